"""From text to notebook: what is stored repeats, agrees with its text, and is all validated."""

import json
import subprocess
import sys

import nbformat
import pytest

from tools import notebooks

CHAPTER = "part/sample"
TEXT = """\
---
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Sample

$$ a = b $$ (sm-first)

```{code-cell} ipython3
:tags: [hide-input]

import os, sys

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "MPLBACKEND"):
    print(name, os.environ[name])
print(hash("the same in every kernel"), sys.executable == THIS)
```

Words between.

```{math}
:label: sm-second

c = d
```

```{code-cell} ipython3
from IPython.display import display

print("before")
display({"text/plain": "shown", "application/vnd.derivation-ledger+json": {"label": "sm-first", "a": 1}}, raw=True)
print("after")
```
""".replace("THIS", repr(sys.executable))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A book of one chapter, executed once."""
    book = tmp_path_factory.mktemp("book")
    write(book, TEXT)
    notebooks.run(book, CHAPTER)
    return book


@pytest.fixture
def sample(tmp_path, executed):
    """A copy of that book which a test may spoil."""
    for path in (notebooks.text_path, notebooks.notebook_path):
        path(tmp_path, CHAPTER).parent.mkdir(parents=True)
        path(tmp_path, CHAPTER).write_bytes(path(executed, CHAPTER).read_bytes())
    return tmp_path


def write(book, text, chapter=CHAPTER):
    path = notebooks.text_path(book, chapter)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def spoil(book, change):
    """Rewrite the stored notebook after `change` has worked on its JSON."""
    path = notebooks.notebook_path(book, CHAPTER)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# the repository's own notebooks


def test_there_are_chapters_and_all_may_be_published(root):
    assert notebooks.chapters(root)
    assert notebooks.verify(root) == []


def test_every_notebook_is_stored_as_the_tool_stores_it(root):
    for chapter in notebooks.chapters(root):
        path = notebooks.notebook_path(root, chapter)
        assert path.read_text(encoding="utf-8") == notebooks.dump(notebooks.load(path)), path


# text to notebook


def test_twice_gives_the_same_bytes(executed):
    path = notebooks.notebook_path(executed, CHAPTER)
    first = path.read_bytes()
    notebooks.run(executed, CHAPTER)
    assert path.read_bytes() == first


def test_the_stored_notebook_holds_only_what_repeats(executed):
    notebook = notebooks.load(notebooks.notebook_path(executed, CHAPTER))
    assert notebook.metadata == notebooks.METADATA
    assert [cell.id for cell in notebook.cells] == [f"cell-{i}" for i in range(4)]
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    settings = notebook.cells[1].outputs[0].text
    assert all(f"{name} {value}\n" in settings for name, value in notebooks.KERNEL_ENV.items())
    assert settings.endswith(" True\n")  # the kernel is the environment's own python
    assert [output.output_type for output in notebook.cells[3].outputs] == ["stream", "display_data", "stream"]
    assert list(executed.glob("**/*.tmp")) == []


def test_strict_validation_passes_and_sees_a_changed_output(sample):
    good, spoiled = notebooks.notebook_path(sample, CHAPTER), notebooks.notebook_path(sample, f"{CHAPTER}_spoiled")
    stored = json.loads(good.read_text(encoding="utf-8"))
    stored["cells"][3]["outputs"][1]["data"]["application/vnd.derivation-ledger+json"]["a"] = 2
    spoiled.write_text(json.dumps(stored), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-rfp", "notebooks"]
    run = subprocess.run(command, cwd=sample, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "1 failed, 3 passed" in run.stdout, run.stdout
    assert f"FAILED {spoiled.relative_to(sample)}::Cell 1" in run.stdout


def test_streams_are_joined_in_one_order_however_they_were_flushed():
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    shown = nbformat.v4.new_output("display_data", data={"text/plain": "x"})
    early = [stream("stdout", "a"), stream("stderr", "w"), stream("stdout", "b"), shown, stream("stdout", "c")]
    late = [stream("stderr", "w"), stream("stdout", "ab"), shown, stream("stdout", "c")]
    assert notebooks.settle(early) == notebooks.settle(late)
    assert [output.get("text") for output in notebooks.settle(late)] == ["ab", "w", None, "c"]


FAILING = """\
# Fails

```{code-cell} ipython3
class Refused(Exception):
    def _render_traceback_(self):
        return ["✗ sm-first · numeric · does not hold (draw 0)", "  left   1", "  right  2"]
```

```{code-cell} ipython3
raise CASE
```
"""


def test_a_check_that_does_not_hold_gives_its_own_three_lines(tmp_path):
    write(tmp_path, FAILING.replace("CASE", "Refused()"))
    with pytest.raises(notebooks.NotebookError) as error:
        notebooks.run(tmp_path, CHAPTER)
    where, *said = str(error.value).splitlines()
    assert where == f"{notebooks.text_path(tmp_path, CHAPTER)}:10: cell 2 failed"
    assert said == ["  ✗ sm-first · numeric · does not hold (draw 0)", "    left   1", "    right  2"]
    assert not notebooks.notebook_path(tmp_path, CHAPTER).exists()


def test_an_error_shows_the_end_of_its_traceback_and_keeps_the_old_notebook(sample):
    before = notebooks.notebook_path(sample, CHAPTER).read_bytes()
    write(sample, FAILING.replace("CASE", "KeyError('no such thing')"))
    with pytest.raises(notebooks.NotebookError, match=r"cell 2 failed\n(.*\n)+.*KeyError: 'no such thing'$"):
        notebooks.run(sample, CHAPTER)
    assert notebooks.notebook_path(sample, CHAPTER).read_bytes() == before


def test_a_kernel_that_dies_is_reported_at_its_cell(tmp_path):
    write(tmp_path, FAILING.replace("raise CASE", "import os; os._exit(1)"))
    with pytest.raises(notebooks.NotebookError, match=r"sample\.md:10: cell 2 failed\n  Kernel died"):
        notebooks.run(tmp_path, CHAPTER)


def test_a_warning_on_the_page_is_refused(tmp_path):
    write(tmp_path, "```{code-cell} ipython3\nimport warnings; warnings.warn('careful')\n```\n")
    with pytest.raises(notebooks.NotebookError, match="cell 0 writes to stderr"):
        notebooks.run(tmp_path, CHAPTER)


def test_the_command_names_an_unknown_chapter(root):
    command = [sys.executable, "-m", "tools.notebooks", "run", "part/absent"]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1 and "part/absent: no such chapter" in ran.stderr


# text and notebook agree


def test_an_executed_sample_has_no_problem(sample):
    assert notebooks.verify(sample) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a = b", "a = -b", "cell 0 (equation sm-first) differs"),
        ("a = b", "a = -b", "executed  $$ a = b $$ (sm-first)\n    now       $$ a = -b $$ (sm-first)"),
        ("c = d", "c = 2 d", "cell 2 (equation sm-second) differs"),
        ("(sm-first)", "(sm-other)", "cell 0 (equation sm-other, sm-first) differs"),
        ('print("before")', 'print("later")', "cell 3 differs"),
        ("hide-input", "remove-cell", "cell 1 differs"),
        ("Words between.", "Words.\n\n+++\n\nMore.", "cell 2 (equation sm-second) differs"),
    ],
)
def test_an_edit_of_the_text_alone_is_seen(sample, old, new, said):
    assert old in TEXT
    write(sample, TEXT.replace(old, new))
    (problem,) = notebooks.verify(sample)
    assert problem.startswith(str(notebooks.text_path(sample, CHAPTER))) and said in problem
    assert problem.splitlines()[0].endswith("run make notebooks")


def test_an_edit_of_the_notebook_alone_is_seen(sample):
    spoil(sample, lambda nb: nb["cells"][0].update(source="# Sample\n\n$$ a = c $$ (sm-first)"))
    (problem,) = notebooks.verify(sample)
    assert "cell 0 (equation sm-first) differs" in problem


def test_a_removed_cell_is_seen_once(sample):
    spoil(sample, lambda nb: nb["cells"].pop(1))
    (problem,) = notebooks.verify(sample)
    assert "cell 1 (equation sm-second) differs" in problem


def test_every_label_of_a_cell_is_found_and_nothing_else():
    source = "$$ (x)^2 $$ (a-b)\n$$\ny\n$$ (c-d)\n```{math}\n:label: e-f\nz\n```"
    assert notebooks.labels(source) == ["a-b", "c-d", "e-f"]


# bad input


def test_a_cell_that_never_ran_is_refused(sample):
    spoil(sample, lambda nb: nb["cells"][3].update(execution_count=None, outputs=[]))
    (problem,) = notebooks.verify(sample)
    assert "cell 3 was never executed" in problem


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_a_malformed_notebook_is_named(sample, content):
    path = notebooks.notebook_path(sample, CHAPTER)
    path.write_text(content, encoding="utf-8")
    (problem,) = notebooks.verify(sample)
    assert problem.startswith(f"{path}: not a notebook: ") and "\n" not in problem


def test_a_missing_notebook_and_one_without_text_are_named(sample):
    path = notebooks.notebook_path(sample, CHAPTER)
    orphan = path.rename(path.with_stem("orphan"))
    assert notebooks.verify(sample) == [
        f"{orphan}: has no text {notebooks.text_path(sample, 'part/orphan')}",
        f"{path}: there is no such notebook; run make notebooks",
    ]


def test_a_notebook_over_the_limit_is_named(sample, monkeypatch):
    monkeypatch.setattr(notebooks, "MAX_BYTES", 100)
    (problem,) = notebooks.verify(sample)
    assert "bytes, more than 100" in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\nkernelspec: [\n---\n\n# Title\n", "cannot be read as a chapter"),
        ("```{code-cell} ipython3\n:tags: [\n\n1\n```\n", "cannot be read as a chapter"),
        ("::::{note}\n\n```{code-cell} ipython3\n1\n```\n\n::::\n", None),
        ("- item\n\n  ```{code-cell} ipython3\n  1\n  ```\n", "inside another directive is never executed"),
    ],
)
def test_a_malformed_text_is_named(tmp_path, text, said):
    write(tmp_path, text)
    path = notebooks.text_path(tmp_path, CHAPTER)
    if said is None:  # a fence of colons does not hide the cell: it is a cell of the notebook like any other
        notebook, _ = notebooks.from_text(path)
        assert "code" in [cell.cell_type for cell in notebook.cells]
        return
    with pytest.raises(notebooks.NotebookError, match=said) as error:
        notebooks.from_text(path)
    assert str(path) in str(error.value)
