"""A whole check: its record, its lines, its reasons, and the same in a real notebook kernel."""

import importlib
import json
import re
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from checking import failure, record, survivors

from kexue_utils.attention.naive_bayes_attention import combine_log_probs, pooling
from kexue_utils.ledger import cited, register, show, watch
from kexue_utils.ledger.digest import code_digest


def rotation(m, theta=0.3):
    c, s = np.cos(m * theta), np.sin(m * theta)
    return np.array([[c, -s], [s, c]])


def relative(rng):
    m, n = rng.integers(1, 50, 2)
    q, k = rng.normal(size=(2, 2))
    lhs, rhs = (rotation(m) @ q) @ (rotation(n) @ k), q @ rotation(n - m) @ k
    return lhs, rhs, q @ rotation(m - n) @ k


def idle(rng):
    x = rng.normal(size=3)
    return x.sum(), x @ np.ones(3) + 0 * x[0], x.mean()


def pooled(rng):
    p, a = rng.dirichlet(np.ones(5), size=4), rng.dirichlet(np.ones(4))
    p, a = torch.from_numpy(p), torch.from_numpy(a)
    geometric = (p ** a[:, None]).prod(0)
    return combine_log_probs(p.log(), weights=a).exp(), geometric / geometric.sum(), a @ p


def test_record(capsys):
    bundle = record(relative, "rope-relative", of=[rotation], uses=["rope-rotation"], found=["a post: m - n"])
    assert bundle == {
        "schema": 1, "label": "rope-relative", "state": "holds", "kind": "numeric", "evidence": "20 draws",
        "mistakes": 1, "source": bundle["source"], "uses": ["rope-rotation"], "found": ["a post: m - n"],
        "mutants": {"rhs → 2·rhs": "rejected", "rhs → -rhs": "rejected", "swap q @ rotation(n - m) @ k": "did not run",
                    "swap q @ rotation(n - m)": "rejected", "- → + in n - m": "rejected", "swap n - m": "rejected"},
        "functions": bundle["functions"], "same": {}, "ran": {}, "subset": None,
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{16}", bundle["source"])
    assert list(bundle["functions"]) == [f"{__name__}.rotation"]
    assert capsys.readouterr().out == "✓ rope-relative · numeric, 20 draws · 5/5 mutants\n  rotation 5/5\n"
    assert json.loads(json.dumps(bundle)) == bundle
    again = record(relative, "rope-relative", of=[rotation])
    assert again | {"uses": 0, "found": 0} == bundle | {"uses": 0, "found": 0}


def test_what_ran_is_digested_as_the_book_does():
    bundle = record(pooled, of=[combine_log_probs])
    path = "kexue_utils/attention/naive_bayes_attention/pooling.py"
    with open(pooling.__file__, encoding="utf-8") as file:
        assert bundle["ran"] == {path: code_digest(file.read())}


def test_a_package_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_space").mkdir()  # without __init__.py
    (tmp_path / "own_space" / "core.py").write_text("def momentum(m, v):\n    return m * v\n")
    (tmp_path / "own_module.py").write_text("def kinetic(m, v):\n    return 0.5 * m * v**2\n")
    monkeypatch.syspath_prepend(tmp_path)
    core, module = importlib.import_module("own_space.core"), importlib.import_module("own_module")
    for name in ("own_space", "own_module"):
        monkeypatch.setattr(watch, "packages", watch.packages | {name})

    def energy(rng):
        m, v = rng.uniform(1, 2, size=2)
        return module.kinetic(m, v), core.momentum(m, v) ** 2 / (2 * m), m * v**2

    assert "calls own_module.kinetic\n  name it in of=[…]" in failure(energy, of=[core.momentum])
    assert "calls own_space.core.momentum" in failure(energy, of=[module.kinetic])
    bundle = record(energy, of=[module.kinetic, core.momentum])
    assert list(bundle["ran"]) == ["own_module.py", "own_space/core.py"]
    assert list(bundle["functions"]) == ["own_module.kinetic", "own_space.core.momentum"]


class TestReasons:
    def test_a_survivor_is_shown_and_a_reason_settles_it(self, capsys):
        left = survivors(record(idle)["mutants"])
        assert left and "▲ test" in (text := capsys.readouterr().out)
        assert all(f"survives without a reason: {name}" in text for name in left)
        assert record(idle, same=dict.fromkeys(left, "0·x is 0"))["same"].keys() == set(left)
        assert "✓ test" in capsys.readouterr().out

    def test_unknown_and_outdated(self):
        text = failure(relative, of=[rotation], same={"- → + in n-m": "?"})
        assert text.splitlines()[1:3] == ["  same names no mutant: '- → + in n-m'", "  did you mean '- → + in n - m'"]
        assert "same explains a mutant that is rejected" in failure(relative, of=[rotation], same={"swap n - m": "?"})
        did_not_run = {"swap q @ rotation(n - m) @ k": "?"}
        assert "same explains a mutant that did not run" in failure(relative, of=[rotation], same=did_not_run)

    def test_of_a_function(self):
        (verdicts,) = record(pooled, of=[combine_log_probs])["functions"].values()
        same = {f"combine_log_probs: {name}": "β is 0 here" for name in survivors(verdicts)}
        assert same and record(pooled, of=[combine_log_probs], same=same)["same"] == same


def test_subset(monkeypatch, capsys):
    whole = record(pooled, of=[combine_log_probs])
    (everything,) = whole["functions"].values()
    left = survivors(everything)
    bundle = record(pooled, of=[combine_log_probs], mutants=8, same={f"combine_log_probs: {left[0]}": "β is 0"})
    (verdicts,) = bundle["functions"].values()
    assert 8 <= len(verdicts) < len(everything) and verdicts.items() <= everything.items()
    assert "rejected" in verdicts.values()  # it goes on until one is, so that no subset is blind by chance
    tried, number = len(bundle["mutants"]) + len(verdicts), len(bundle["mutants"]) + len(everything)
    assert bundle["subset"] == {"tried": tried, "of": number} and whole["subset"] is None
    assert f"{tried} of {number} tried" in capsys.readouterr().out
    monkeypatch.setenv("LEDGER_ALL_MUTANTS", "1")
    assert record(pooled, of=[combine_log_probs], mutants=5)["subset"] is None


def test_lines_fit_the_column(capsys):
    record(relative, "a-chapter-with-a-long-name-and-a-long-equation", of=[rotation])
    assert all(len(line) < 60 for line in capsys.readouterr().out.splitlines())


def test_an_error_says_where():
    def broken(rng):
        x = rng.normal(size=3)
        y = np.linalg.inv(x)
        return y, x, x

    assert failure(broken).splitlines() == [
        "✗ test · raised",
        "  LinAlgError: 1-dimensional array given. Array must be at least two-dimensional",
        "  in  y = np.linalg.inv(x)",
    ]


def test_cited(capsys):
    cited("clt", "Billingsley, theorem 27.1", uses=["iid"])
    bundle = show.records.pop()
    assert (bundle["kind"], bundle["state"], bundle["uses"]) == ("cited", "cited", ["iid"])
    assert capsys.readouterr().out == "○ clt · cited: Billingsley, theorem 27.1\n"


NOTEBOOK = [
    "import numpy as np\nfrom functools import lru_cache\nfrom kexue_utils.ledger import check",
    """class Base:
    def angle(self, m):
        return m * 0.3

class Rotation(Base):
    def matrix(self, m):
        a = super().angle(m)
        return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])

r = Rotation()""",
    """@check("relative", of=[Rotation])
def relative(rng):
    m, n = rng.integers(1, 50, 2)
    return r.matrix(m).T @ r.matrix(n), r.matrix(n - m), r.matrix(n + m)""",
    """@check("tautology")
def tautology(rng):
    m = rng.normal()
    return r.matrix(m), 1 * r.matrix(m), r.matrix(-m)""",
    """@check("wrong")
def wrong(rng):
    m = 1 + rng.random()
    return r.matrix(2 * m)[0, 0], np.cos(0.5 * m), r.matrix(m)[0, 0]""",
]


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return [cell.outputs for cell in notebook.cells]


class TestNotebook:
    def test_a_cell_shows_two_lines_and_carries_the_record(self, executed):
        ((output,)) = executed[2]
        assert output.output_type == "display_data"
        assert output.data["text/plain"].splitlines()[0] == "✓ relative · numeric, 20 draws · 4/4 mutants"
        bundle = output.data[register.BUNDLE]
        assert list(bundle["functions"]) == ["__main__.Rotation.matrix"] and bundle["ran"] == {}

    def test_a_refusal_and_a_failure_are_a_few_lines(self, executed):
        ((refused,), (failed,)) = executed[3:]
        assert refused.ename == failed.ename == "LedgerError"
        assert refused.traceback[1].startswith("  blind: no change of ")
        assert failed.traceback[0] == "✗ wrong · numeric · does not hold (draw 0)" and len(failed.traceback) == 3


SCRIPT = """
import sys
sys.path.insert(0, "tests/ledger")
from test_check import idle, pooled, relative, rotation, combine_log_probs
from kexue_utils.ledger import check, show
check("a", of=[rotation])(relative), check("b")(idle), check("c", of=[combine_log_probs])(pooled)
print(show.records)
"""


def test_output_does_not_depend_on_the_hash_seed(root):
    runs = {
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=root,
                       env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "PYTHONIOENCODING": "utf-8"}).stdout
        for seed in ("0", "7")
    }  # fmt: skip
    assert len(runs) == 1
