"""Miniature books: notebooks from compact definitions, collected and built as a reader's own book would be."""

import contextlib
import copy
import io
import json

from sphinx.cmd.build import build_main

from kexue_utils.ledger import register
from kexue_utils.ledger.collect import collect

CONF = """
project = "miniature"
extensions = ["myst_nb", "kexue_utils.ledger.sphinx"]
html_theme = {theme!r}
myst_enable_extensions = ["dollarmath", "colon_fence"]
nb_execution_mode = "off"
exclude_patterns = ["_build"]
numfig = True
ledger_file = "ledger.json"
ledger_packages = ["lib"]
{more}
"""
PARTS = ("summary", "table", "functions", "survivors", "graph", "found")
LEDGER_PAGE = "# Ledger\n\n" + "".join(f"## The {part}\n\n```{{ledger-{part}}}\n```\n\n" for part in PARTS)


def record(label, **changes):
    """A check's record as a cell emits it: it holds, and rejects all mutants."""
    return {"schema": 1, "label": label, "state": "holds", "kind": "numeric", "evidence": "20 draws", "mistakes": 1,
            "source": "0123456789abcdef", "uses": [], "found": [], "mutants": {"a + b → a - b": "rejected"},
            "functions": {}, "same": {}, "ran": {}, "subset": None} | changes  # fmt: skip


def text(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source, *outputs, count=1):
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs), "execution_count": count}


def shown(bundle):
    data = {"text/plain": f"✓ {bundle['label']} · {bundle['kind']}", register.BUNDLE: bundle}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def equation(label, latex="a = b", **changes):
    """Two cells: the equation, and its check's."""
    return [
        text(f"$$\n{latex}\n$$ ({label})"),
        code(f'@check("{label}")\ndef f(rng): ...', shown(record(label, **changes))),
    ]


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(copy.deepcopy(cell), id=f"cell-{i}") for i, cell in enumerate(cells)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}
    path.write_text(json.dumps(book, ensure_ascii=False), encoding="utf-8")


def write_book(folder, chapters, theme="basic", more="", collected=True):
    """A book in `folder` with chapters {name: cells}; `collected` also writes its ledger.json."""
    for name, cells in chapters.items():
        write_notebook(folder / "notebooks" / f"{name}.ipynb", text(f"# Chapter {name}"), *cells)
    toc = "\n".join([f"notebooks/{name}" for name in chapters] + ["ledger"])
    (folder / "index.md").write_text(f"# Miniature\n\n```{{toctree}}\n{toc}\n```\n")
    (folder / "ledger.md").write_text(LEDGER_PAGE)
    (folder / "conf.py").write_text(CONF.format(theme=theme, more=more))
    if collected:
        (folder / "ledger.json").write_text(register.dump(collect(folder / "notebooks")))
    return folder


def edit_ledger(folder, change):
    """Lets `change` alter the ledger of a book, as if the checks had said so."""
    path = folder / "ledger.json"
    ledger = json.loads(path.read_text())
    change(ledger)
    path.write_text(register.dump(ledger))


def build(folder, *options, builder="html"):
    """(exit status, warnings) of a build in which warnings are errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = build_main(
            [
                "-b",
                builder,
                "-nW",
                "--keep-going",
                "-q",
                "--no-color",
                *options,
                str(folder),
                str(folder / "_build" / "html"),
            ]
        )
    return status, err.getvalue()


def html(folder, page):
    return (folder / "_build" / "html" / f"{page}.html").read_text(encoding="utf-8")
