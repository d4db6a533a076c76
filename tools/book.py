"""Render the stored, validated notebooks: `python -m tools.book [--fresh]`. Executes none of them.

Refuses, in this order: a text that its notebook doesn't have, a ledger that the notebooks don't give, any warning.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.notebooks import ANSI, from_text, text_path, verify

# Read-time warnings are not repeated for pages that Sphinx has cached: a failed build must leave no cache.
CACHE = Path("_build", ".doctrees")
# What makes the pages, beside their texts. Sphinx looks at the settings among it, and at nothing else.
MACHINERY = ("_config.yml", "book/_ext", "book/_static", "kexue_utils/ledger", "tools", "constraints.txt")
# myst-nb's way to say: line 7 of the third cell is :30007:
PLACE = re.compile(r"notebooks/(\S+/\S+)\.ipynb:(\d+)(\d{4}):")


def outdated(root: Path) -> bool:
    """Whether what makes pages has changed since the cache of pages was written."""
    cache = root / CACHE / "environment.pickle"
    parts = [path for name in MACHINERY for path in (root / name, *(root / name).rglob("*")) if path.is_file()]
    newest = max(path.stat().st_mtime for path in parts if path.suffix != ".pyc")
    return cache.exists() and newest > cache.stat().st_mtime


def readable(warnings: str, root: Path) -> str:
    """Sphinx's warnings with places that one can open: the chapter's text and a line in it."""

    def place(found):
        chapter, cell, line = found[1], int(found[2]) - 1, int(found[3])
        text = text_path(Path(), chapter)
        return f"{text}:{from_text(root / text)[1][cell] + max(line - 1, 0)}:"

    return PLACE.sub(place, ANSI.sub("", warnings).replace(f"{root.resolve()}/", ""))


def build(root: Path, fresh: bool = False) -> int:
    """Build the book under `root` into `_build/html`; 0 if nothing at all was wrong. `fresh` forgets earlier builds."""
    problems = verify(root)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    ledger = [sys.executable, "-m", "kexue_utils.ledger", "collect", "--check"]
    if code := subprocess.run(ledger, cwd=root).returncode:
        return code
    if fresh or outdated(root):
        shutil.rmtree(root / "_build", ignore_errors=True)
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))  # it cannot be called with -m
    book = [jupyter_book, "build", ".", "-n", "-W", "--keep-going", "-q"]
    built = subprocess.run(book, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    print(readable(built.stderr, root), end="", file=sys.stderr)
    if built.returncode:
        shutil.rmtree(root / CACHE, ignore_errors=True)
        print("The book was not built: see the first warning above.", file=sys.stderr)
    return built.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.book", description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="forget earlier builds")
    return build(Path(), parser.parse_args().fresh)


if __name__ == "__main__":
    sys.exit(main())
