"""The share of a build that the ledger's Sphinx extension takes, on this book built from nothing. Aim: at most 10 %."""

import functools
import sys
import tempfile
import time
from pathlib import Path

from click.testing import CliRunner
from jupyter_book.cli.main import main
from sphinx.application import Sphinx

from benchmarks.timing import header

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.10
spent = 0.0


def timed(callback):
    @functools.wraps(callback)
    def run(*args):
        global spent
        begun = time.perf_counter()
        try:
            return callback(*args)
        finally:
            spent += time.perf_counter() - begun

    return run


connect = Sphinx.connect


def connect_timed(app, event, callback, priority=500):
    ours = callback.__module__.startswith("kexue_utils.ledger")
    return connect(app, event, timed(callback) if ours else callback, priority)


Sphinx.connect = connect_timed
with tempfile.TemporaryDirectory() as out:
    begun = time.perf_counter()
    result = CliRunner().invoke(main, ["build", str(ROOT), "--path-output", out, "--all", "-q"])
    total = time.perf_counter() - begun
if result.exit_code or not spent:
    sys.exit(f"the book was not built\n{result.output}")
header("cpu", ("sphinx", "jupyter-book"), threads=1)
print(f"ledger extension {spent:.3f} s of a build of {total:.2f} s: {spent / total:.1%} (aim: at most {BUDGET:.0%})")
sys.exit(spent / total > BUDGET)
