"""Settings of every test: the kernels' environment, repeatable properties, and the book, built once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from tools.notebooks import KERNEL_ENV

ROOT = Path(__file__).parent

# nbval's kernels inherit it; set before anything imports torch or numpy.
os.environ.update(KERNEL_ENV)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

# --nbval is meant for notebooks/, not for those that a test keeps as examples.
collect_ignore_glob = ["tests/*.ipynb"]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def files(root) -> list[str]:
    """Names of the checkout's own files: all but what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


@pytest.fixture
def copy(root, files, tmp_path) -> Path:
    """Those files somewhere else, for a test to spoil."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="session")
def book_html(root, tmp_path_factory, worker_id) -> Path:
    """`_build/html`, built from nothing with every warning an error; once, although tests run in several processes."""
    shared = tmp_path_factory.getbasetemp()
    built = (shared if worker_id == "master" else shared.parent) / "book"
    with FileLock(f"{built}.lock"):
        if not built.exists():
            command = [sys.executable, "-m", "tools.book", "--fresh"]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
            built.write_text(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}" if done.returncode else "")
    if built.read_text():
        pytest.fail(f"the book does not build:\n{built.read_text()}", pytrace=False)
    return root / "_build" / "html"
