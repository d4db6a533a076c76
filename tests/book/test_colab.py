"""A notebook alone, on a machine that has only what Colab has: its first cell brings the rest."""

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from packaging.requirements import Requirement

from tools import notebooks, repository

HOSTED = ("numpy", "scipy", "sympy", "matplotlib", "torch", "ipykernel", "pip")
ABSENT = ("kexue_utils", "sklearn", "sphinx", "myst_nb", "jupytext", "pytest", "nbclient", "tools")
ROOT = Path(__file__).parents[2]


def closure(names):
    """Installed distributions that the named ones need, themselves included, by name."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = distribution(name)
        needed = map(Requirement, found[name].requires or ())
        waiting += [need.name for need in needed if not need.marker or need.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def wheel(files, tmp_path_factory):
    """The package as its repository would give it: built from the checkout's own files only."""
    source = tmp_path_factory.mktemp("source")
    for name in files:
        if name.startswith("kexue_utils/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    built = subprocess.run([*pip, "."], cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (path,) = source.glob("kexue_utils-*.whl")
    return path


@pytest.fixture
def hosted(tmp_path):
    """A fresh environment's python that sees what HOSTED needs, by links, and nothing else."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for dist in closure(HOSTED):
        for top in {file.parts[0] for file in dist.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(dist.locate_file(top))
    return python


def environment():
    """No index, no settings, no checkout: pip may use what is there and the wheel."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "JUPYTER"))}
    return {**kept, **notebooks.KERNEL_ENV, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


def execute(notebook, python, folder):
    """Run `notebook` in a kernel of `python` that starts in `folder`."""
    spec = folder.parent / "kernels" / "hosted"
    spec.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "hosted", "language": "python"}))
    specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
    for last in (False, True):  # kernels choose ports before they bind them: where many start, one may lose its own
        manager = AsyncKernelManager(kernel_name="hosted", kernel_spec_manager=specs)
        client = NotebookClient(notebook, km=manager, timeout=300, resources={"metadata": {"path": str(folder)}})
        try:
            return client.execute(env=environment(), stderr=subprocess.DEVNULL)
        except DeadKernelError:
            if last:
                raise


def test_the_environment_has_only_what_a_hosted_notebook_has(hosted, tmp_path):
    code = f"import importlib.util as u; print([n for n in {HOSTED + ABSENT} if u.find_spec(n)])"
    seen = subprocess.run([hosted, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert seen.stdout.strip() == str(list(HOSTED)), seen.stderr


@pytest.mark.parametrize("chapter", notebooks.chapters(ROOT))
def test_a_notebook_alone_runs_through_its_first_cell(chapter, wheel, hosted, tmp_path):
    folder = tmp_path / "content"
    folder.mkdir()
    shutil.copy(notebooks.notebook_path(ROOT, chapter), folder)
    (stored,) = folder.iterdir()

    notebook = notebooks.load(stored)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    address = f"git+{repository.address(ROOT)}"
    assert first.source.count(address) == 1
    first.source = first.source.replace(address, wheel.as_uri())
    asked = "import sys; print(sys.executable, *{m.__file__ for n, m in sys.modules.items() if n == 'kexue_utils'})"
    notebook.cells.append(nbformat.v4.new_code_cell(asked))
    execute(notebook, hosted, folder)

    python, package = notebook.cells[-1].outputs[0].text.split()
    assert python == str(hosted)
    assert Path(package).is_relative_to(tmp_path / "env")
    assert list(folder.iterdir()) == [stored]
