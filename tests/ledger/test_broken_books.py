"""Each way in which a page can claim more than its checks uphold fails the build, or the collection before it."""

import pytest
from miniature import build, code, edit_ledger, equation, record, shown, text, write_book

from kexue_utils.ledger.collect import Refused, collect
from kexue_utils.ledger.digest import code_digest

LIBRARY = "def half(x):\n    return x / 2\n"


def no_change(ledger):
    pass


def change_latex(folder):
    path = folder / "notebooks" / "one.ipynb"
    path.write_text(path.read_text().replace("c = d", "c = 2 d"))


def change_library(folder):
    (folder / "lib" / "halves" / "__init__.py").write_text(LIBRARY.replace("2", "3"))


def lose_library(folder):
    (folder / "lib" / "halves" / "__init__.py").unlink()


def untouched(folder):
    pass


def add_ghost(ledger):
    ledger["equations"]["x-ghost"] = dict(ledger["equations"]["x-one"])


BLIND = {"halves.half": {"x / 2 → x * 2": "survived", "2 → 3": "survived"}}
SEEN = {"halves.half": {"x / 2 → x * 2": "rejected", "2 → 3": "rejected"}}
ran = {"halves/__init__.py": code_digest(LIBRARY)}

# The chapter's second equation, what happens to the ledger, what happens to the book, and what the build must say.
BROKEN = {
    "unchecked": ([text("$$\nc = d\n$$ (x-two)")], no_change, untouched, ["x-two", "no check upholds it"]),
    "dangling": (equation("x-two", "c = d"), add_ghost, untouched, ["x-ghost", "on no page"]),
    "stale by LaTeX": (equation("x-two", "c = d"), no_change, change_latex, ["x-two", "LaTeX is not the one"]),
    "stale by library": (
        equation("x-two", "c = d", ran=ran), no_change, change_library,
        ["x-two", "halves/__init__.py has changed", "execute its notebook again"],
    ),
    "library lost": (equation("x-two", "c = d", ran=ran), no_change, lose_library, ["x-two", "__init__.py is not"]),
    "survivor": (
        equation("x-two", "c = d", mutants={"2 → 3": "survived", "x → -x": "rejected"}), no_change, untouched,
        ["x-two", "'2 → 3' survives without a reason"],
    ),
    "function's survivor": (
        equation("x-two", "c = d", functions={"halves.half": SEEN["halves.half"] | {"x → -x": "survived"}}),
        no_change, untouched, ["x-two", "'x → -x' of halves.half survives without a reason"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_book_fails_and_says_which_equation_and_why(tmp_path, name):
    second, corrupt, damage, words = BROKEN[name]
    (tmp_path / "lib" / "halves").mkdir(parents=True)
    (tmp_path / "lib" / "halves" / "__init__.py").write_text(LIBRARY)
    write_book(tmp_path, {"one": [*equation("x-one"), *second]})
    edit_ledger(tmp_path, corrupt)
    damage(tmp_path)
    status, said = build(tmp_path)
    assert status == 1
    lines = [line for line in said.splitlines() if "WARNING: equation" in line]
    assert any(all(word in line for word in words) for line in lines), said
    # One mistake is one message, and says where it is if it is on a page at all.
    assert len(lines) == 1 and ("one.ipynb" in lines[0] or name == "dangling"), said


TRACE = ["\x1b[31m✗ x-two · numeric · does not hold (draw 0)\x1b[0m\n  left   1\n  right  2"]
ERROR = {"output_type": "error", "ename": "LedgerError", "evalue": "", "traceback": TRACE}
REFUSED = {
    "duplicate label": (equation("x-one", "c = d")[:1], ["duplicate label x-one"]),
    "dangling check": (equation("x-two")[1:], ["dangling check", "label x-two"]),
    "failed check": ([code('@check("x-two")', ERROR)], ["check of x-two", "does not hold", "left   1", "right  2"]),
    "not executed": ([code("1 + 1", count=None)], ["cell 4", "has not been executed"]),
    "other schema": ([code("check", shown(record("x-two") | {"schema": 2}))], ["schema is not 1"]),
    "two checks": (equation("x-one")[1:], ["x-one has two checks"]),
    "unknown use": (equation("x-two", uses=["x-zero"]), ["x-two uses x-zero"]),
    "cycle": (equation("x-two", uses=["x-two"]), ["in a circle", "x-two uses x-two"]),
    "reason against another check": (
        [*equation("x-two", functions=SEEN), *equation("x-three", functions=BLIND, same={"half: 2 → 3": "why"})],
        ["x-three", "'half: 2 → 3'", "the check of x-two rejects"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_collection_refuses_with_file_and_label(tmp_path, name):
    cells, words = REFUSED[name]
    write_book(tmp_path, {"one": [*equation("x-one"), *cells]}, collected=False)
    with pytest.raises(Refused) as refusal:
        collect(tmp_path / "notebooks")
    (message,) = refusal.value.problems
    assert message.startswith("notebooks/one.ipynb") and all(word in message for word in words), message


@pytest.mark.parametrize("content", ["{", '{"cells": 3}', '{"cells": [{}]}', "[]"])
def test_malformed_notebooks_are_refused(tmp_path, content):
    (tmp_path / "one.ipynb").write_text(content)
    with pytest.raises(Refused, match=r"one\.ipynb: not a notebook"):
        collect(tmp_path)
