"""Render the stored, validated notebooks: `python -m tools.book [--fresh]`. Executes none of them.

Refuses, in this order: a text that its notebook doesn't have, a ledger that the notebooks don't give, any warning.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tools.notebooks import verify

# Read-time warnings are not repeated for pages that Sphinx has cached: a failed build must leave no cache.
CACHE = Path("_build", ".doctrees")


def build(root: Path, fresh: bool = False) -> int:
    """Build the book under `root` into `_build/html`; 0 if nothing at all was wrong. `fresh` forgets earlier builds."""
    problems = verify(root)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    ledger = [sys.executable, "-m", "kexue_utils.ledger", "collect", "--check"]
    if code := subprocess.run(ledger, cwd=root).returncode:
        return code
    if fresh:
        shutil.rmtree(root / "_build", ignore_errors=True)
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))  # it cannot be called with -m
    book = [jupyter_book, "build", ".", "-n", "-W", "--keep-going", "-q"]
    code = subprocess.run(book, cwd=root, stdout=subprocess.DEVNULL).returncode  # warnings come on stderr
    if code:
        shutil.rmtree(root / CACHE, ignore_errors=True)
        print("The book was not built: see the first warning above.", file=sys.stderr)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.book", description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="forget earlier builds")
    return build(Path(), parser.parse_args().fresh)


if __name__ == "__main__":
    sys.exit(main())
