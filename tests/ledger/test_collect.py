"""From executed notebooks to the register: what is found in the text, what is united, what counts as a change."""

import json

import nbformat
import pytest
from miniature import build, code, equation, html, record, shown, text, write_book, write_notebook
from nbclient import NotebookClient

from kexue_utils.ledger import register
from kexue_utils.ledger.__main__ import main
from kexue_utils.ledger.collect import Refused, collect, equations
from kexue_utils.ledger.digest import code_digest, fingerprint

EVERYWHERE = r"""
Inline $x$ and an unnumbered $$y$$

$$ a   =
   b $$ (e-plain)

- in a list

  $$
  \begin{aligned} a &= b \\ c &= d \end{aligned}
  $$ (e-list)

  1. nested

     $$ n $$ (e-nested)

> a quote
>
> $$
> q <
>   r
> $$ (e-quote)

```{math}
:label: e-directive
x = \frac{1}{2}

y = 3
```

```{math} z = 1
:label: e-argument
```

:::{note}
$$ colon $$ (e-colon)

```{tip}
:class: dropdown

$$ inner $$ (e-inner)
```
:::

````{admonition} A title
---
class: tip
---
```{math}
---
label: e-yaml
---
deep
```
:::{warning}
$$ deepest $$ (e-deepest)
:::
````

:::::{note}
::::{tip}
$$ first $$ (e-first)
::::
:::::

<details>

$$ folded $$ (e-folded)

</details>

A footnote[^1].

[^1]: Its text

    $$ foot $$ (e-foot)

```
$$ code $$ (e-no)
```

```{code-block} markdown
$$ example $$ (e-no-either)
```

    $$ indented $$ (e-nor-this)
"""


def test_equations_are_found_everywhere_with_the_fingerprints_of_the_page(tmp_path):
    cells = [text(EVERYWHERE)]
    labels = [label for label, _ in equations(EVERYWHERE)]
    assert labels == [
        "e-plain", "e-list", "e-nested", "e-quote", "e-directive", "e-argument", "e-colon", "e-inner", "e-yaml",
        "e-deepest", "e-first", "e-folded", "e-foot",
    ]  # fmt: skip
    # The build compares each fingerprint with the one on the page, and each label with those on the page.
    write_book(tmp_path, {"one": [*cells, *[code("check", shown(record(label))) for label in labels]]})
    assert build(tmp_path) == (0, "")
    assert html(tmp_path, "notebooks/one").count("ledger-badge") == len(labels)


def test_fingerprint_ignores_the_length_of_spaces_only():
    assert fingerprint(" a \n  = b") == fingerprint("a = b")
    assert len({fingerprint(latex) for latex in ("a = b", "a=b", "a = B", r"a = b \,")}) == 4


SOURCE = 'def f(x):\n    for i in x:\n        y = f"{i}#{x}"  # note\n    return y\n'


@pytest.mark.parametrize(
    "same",
    [
        "# head\n\n" + SOURCE,
        SOURCE.replace("# note", "#"),
        SOURCE.replace("y = f", "y  =   f"),
        SOURCE.replace("\n", "\r\n"),
    ],
)
def test_code_digest_is_blind_to_comments_and_spacing(same):
    assert code_digest(same) == code_digest(SOURCE)


@pytest.mark.parametrize(
    "other", [SOURCE.replace("    return", "        return"), SOURCE.replace("#{", "{"), "def f(:"]
)
def test_code_digest_sees_indentation_strings_and_code(other):
    assert code_digest(other) != code_digest(SOURCE)


def test_functions_unite_their_checks_and_own_functions_are_named_by_chapter(tmp_path):
    write_notebook(
        tmp_path / "part" / "one.ipynb",
        *equation("x-a", functions={"lib.f": {"m": "rejected", "n": "survived"}, "__main__.g": {"k": "rejected"}}),
        *equation("x-b", functions={"lib.f": {"m": "survived", "n": "did not run", "o": "survived"}},
                  same={"f: o": "even"}),
    )  # fmt: skip
    ledger = collect(tmp_path)
    assert ledger["functions"] == {
        "lib.f": {
            "m": {"rejected_by": ["x-a"], "survives": ["x-b"]},
            "n": {"rejected_by": [], "survives": ["x-a"]},
            "o": {"rejected_by": [], "survives": ["x-b"], "reason": "even"},
        },
        "part/one.g": {"k": {"rejected_by": ["x-a"], "survives": []}},
    }
    assert ledger["equations"]["x-a"]["chapter"] == "part/one"
    assert ledger["equations"]["x-a"]["check"]["of"] == ["lib.f", "part/one.g"]


def test_a_label_belongs_to_one_notebook(tmp_path):
    write_notebook(tmp_path / "one.ipynb", *equation("x-a"))
    write_notebook(tmp_path / "two.ipynb", *equation("x-a")[:1])
    with pytest.raises(Refused, match=r"two\.ipynb: duplicate label x-a, which .*one\.ipynb has already"):
        collect(tmp_path)
    write_notebook(tmp_path / "two.ipynb", *equation("x-b"), *equation("x-a")[1:])
    with pytest.raises(
        Refused, match=r"two\.ipynb: dangling check: no equation in this notebook carries the label x-a"
    ):
        collect(tmp_path)


def test_drift_is_refused_until_the_check_changes_or_the_change_is_accepted(tmp_path):
    write_notebook(tmp_path / "one.ipynb", *equation("x-a", "a = b"), *equation("x-b", "c"))
    old = collect(tmp_path)
    write_notebook(tmp_path / "one.ipynb", *equation("x-a", "a  =\nb"), *equation("x-b", "c"))
    assert collect(tmp_path, old)["equations"]["x-a"]["check"]
    write_notebook(tmp_path / "one.ipynb", *equation("x-a", "a = 2 b"), *equation("x-b", "c"))
    with pytest.raises(
        Refused, match=r"x-a has changed but its check has not(.|\n)*--accept x-a(.|\n)*was  a = b\n"
    ) as refusal:
        collect(tmp_path, old)
    assert len(refusal.value.problems) == 1
    assert collect(tmp_path, old, ["x-a"])["equations"]["x-a"]["latex"] == "a = 2 b"
    with pytest.raises(Refused, match="--accept names x-c"):
        collect(tmp_path, old, ["x-a", "x-c"])
    write_notebook(tmp_path / "one.ipynb", *equation("x-a", "a = 2 b", source="f" * 16), *equation("x-b", "c"))
    assert collect(tmp_path, old)["equations"]["x-a"]["latex"] == "a = 2 b"


def test_an_error_that_the_text_wants_to_show_is_no_failure(tmp_path):
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["no"]}
    wanted = code("raise ValueError('no')", error)
    wanted["metadata"] = {"tags": ["raises-exception"]}
    write_notebook(tmp_path / "one.ipynb", *equation("x-a"), wanted)
    assert list(collect(tmp_path)["equations"]) == ["x-a"]


def test_no_notebook_is_no_ledger(tmp_path):
    with pytest.raises(Refused, match="no notebook with a numbered equation"):
        collect(tmp_path)


@pytest.fixture
def command(tmp_path):
    write_notebook(tmp_path / "notebooks" / "one.ipynb", *equation("x-a", "a = b"), text("$$ c $$ (x-b)"))
    out = tmp_path / "ledger.json"

    def run(*arguments):
        return main(
            [*arguments, "--out", str(out)] + ["--notebooks", str(tmp_path / "notebooks")] * (arguments[0] == "collect")
        )

    return run, out


def test_collect_writes_a_sorted_file_without_times_and_paths_twice_the_same(command, tmp_path):
    run, out = command
    assert run("collect") == 0
    first = out.read_text()
    assert run("collect") == 0 and out.read_text() == first and run("collect", "--check") == 0
    assert str(tmp_path) not in first and first == register.dump(json.loads(first))
    assert json.loads(first)["equations"]["x-b"]["check"] is None


def test_check_writes_nothing_and_fails_where_the_file_would_change(command, tmp_path, capsys):
    run, out = command
    assert run("collect", "--check") == 1 and not out.exists()
    run("collect")
    first = out.read_text()
    write_notebook(tmp_path / "notebooks" / "one.ipynb", *equation("x-a", "a = b", kind="exact"))
    assert run("collect", "--check") == 1 and out.read_text() == first
    assert "ledger collect" in capsys.readouterr().err


def test_a_refusal_leaves_the_file_and_accept_takes_labels(command, tmp_path, capsys):
    run, out = command
    run("collect")
    first = out.read_text()
    write_notebook(tmp_path / "notebooks" / "one.ipynb", *equation("x-a", "a = 2 b"), *equation("x-b", "c"))
    assert run("collect") == 1 and out.read_text() == first and "one.ipynb: x-a has changed" in capsys.readouterr().err
    assert run("collect", "--accept", "x-a, x-b") == 0 and "a = 2 b" in out.read_text()


def test_status_sums_up(command, tmp_path, capsys):
    run, _ = command
    cells = equation("x-a", mutants={"2 → 3": "survived", "m": "rejected"}, functions={"f.g": {"n": "rejected"}})
    write_notebook(tmp_path / "notebooks" / "one.ipynb", *cells, text("$$ c $$ (x-b)"))
    assert run("collect") == 0 and run("status") == 0
    said = " ".join(capsys.readouterr().out.split())
    for line in ("equations checked 1/2", "equations rejected 1/2", "functions rejected 1/1", "unchecked x-b",
                 "survivor x-a: 2 → 3 (NO REASON)"):  # fmt: skip
        assert line in said


def run_notebook(path, *cells):
    write_notebook(path, *cells)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, allow_errors=True, record_timing=False).execute()
    nbformat.write(notebook, path)


REAL = """from kexue_utils.ledger import check

def half(x):
    return x / 2

@check("r-half", uses=["r-sum"], of=[half], found=["a draft: h = x/3"])
def halved(rng):
    x = rng.normal()
    return half(x) + half(x), x, 3 * x"""
SUM = """@check("r-sum")
def sums(rng):
    a, b = rng.integers(1, 50, 2)
    return int(a + b) ** 2, int(a) ** 2 + 2 * int(a) * int(b) + int(b) ** 2, int(a) ** 2 + int(b) ** 2"""
SUMS = text("$$ (a+b)^2 = a^2 + 2ab + b^2 $$ (r-sum)")


def test_real_checks_reach_the_page_and_a_wrong_one_stops_at_the_collection(tmp_path):
    cells = [text("# One"), text(r"$$ \tfrac x2 + \tfrac x2 = x $$ (r-half)"), code(REAL), SUMS, code(SUM)]
    write_book(tmp_path, {"one": []}, collected=False)
    path = tmp_path / "notebooks" / "one.ipynb"
    run_notebook(path, *cells)
    ledger = collect(tmp_path / "notebooks")
    (tmp_path / "ledger.json").write_text(register.dump(ledger))
    assert build(tmp_path) == (0, "")
    assert register.covered(ledger) == register.solid(ledger) == {"r-half", "r-sum"}
    assert {label: check["kind"] for label, check in register.checks(ledger).items()} == {
        "r-half": "numeric",
        "r-sum": "exact",
    }
    rejected, counted = register.score(register.verdicts(ledger["functions"]["one.half"]).values())
    assert rejected == counted > 0
    assert "✓ r-half" in html(tmp_path, "notebooks/one")

    wrong = code(SUM.replace("2 * int(a)", "3 * int(a)"))
    run_notebook(path, *cells[:-1], wrong)
    with pytest.raises(Refused, match=r"one\.ipynb, cell 5, check of r-sum: raised an error\n(.|\n)*does not hold"):
        collect(tmp_path / "notebooks")
