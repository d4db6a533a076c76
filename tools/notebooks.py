"""Text to notebook, in one direction: `book/chapters/<part>/<slug>.md` becomes `notebooks/<part>/<slug>.ipynb`.

    python -m tools.notebooks run [<part>/<slug> ...] [--discard]
    python -m tools.notebooks verify

`run` executes each text in a fresh kernel and stores it with its outputs, byte for byte the same every time;
`verify` executes nothing: it requires that texts and notebooks agree cell by cell and that all is safe to publish.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby, zip_longest
from pathlib import Path

import nbformat
from jupytext.myst import MystMetadataParsingError, myst_to_notebook
from nbformat import NotebookNode

# The one kernel setting: nbval and the tests get it through conftest.py.
KERNEL_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MAX_BYTES = 4 * 2**20
SLOW_SECONDS = 40
TRACEBACK_LINES = 12
SHOWN_CHARACTERS = 120

IMAGE_TYPES = {"image/png", "image/svg+xml"}
MIME_TYPES = {"text/plain", "application/vnd.derivation-ledger+json"} | IMAGE_TYPES
GLUE = "application/papermill.record/"
ACTIVE = re.compile(
    r"""<\s*/?\s*(?:script|iframe|object|embed|form|meta|base|link|foreignObject)\b  # elements that run or load
      | <[a-z][^>]*[\s"'/]on[a-z]+\s*=                                              # event handlers
      | (?:javascript|vbscript)\s*:
      | data\s*:\s*text/html""",
    re.IGNORECASE | re.VERBOSE,
)
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")
NBVAL_MARK = re.compile(r"#\s*(?:NBVAL_|PYTEST_VALIDATE_)|^nbval-|^raises-exception$")
LABEL = re.compile(r"\$\$[ \t]*\(([^()\s]+)\)[ \t]*$|^[ \t]*:label:[ \t]*(\S+)", re.MULTILINE)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """A text or a notebook that cannot be used; the message names the file and the cell."""


def chapters(root: Path) -> list[str]:
    """Every `<part>/<slug>` that has a text, sorted."""
    texts = root / "book" / "chapters"
    return sorted(path.relative_to(texts).with_suffix("").as_posix() for path in texts.glob("*/*.md"))


def text_path(root: Path, chapter: str) -> Path:
    return root / "book" / "chapters" / f"{chapter}.md"


def notebook_path(root: Path, chapter: str) -> Path:
    return root / "notebooks" / f"{chapter}.ipynb"


def labels(source: str) -> list[str]:
    """Labels of the numbered equations of a cell."""
    return [dollar or directive for dollar, directive in LABEL.findall(source)]


def from_text(path: Path) -> tuple[NotebookNode, list[int]]:
    """The notebook, not executed, that a text describes, and the line where each of its cells starts."""
    try:
        notebook = myst_to_notebook(path.read_text(encoding="utf-8"), add_source_map=True)
    except (OSError, UnicodeDecodeError, MystMetadataParsingError) as error:
        raise NotebookError(f"{path}: cannot be read as a chapter: {error}") from error
    lines = notebook.metadata["source_map"]
    for number, (cell, line) in enumerate(zip(notebook.cells, lines, strict=True)):
        cell.id = f"cell-{number}"  # by place: an id may depend neither on chance nor on what the cell says
        if cell.cell_type == "markdown" and "{code-cell}" in cell.source:
            raise NotebookError(
                f"{path}:{line + 1}: cell {number}: a code cell inside another directive is never executed"
            )
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    return notebook, [line + 1 for line in lines]


def load(path: Path) -> NotebookNode:
    """A stored notebook, its format checked."""
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookError(f"{path}: there is no such notebook; run make notebooks") from error
    except Exception as error:  # nbformat lets KeyError, AttributeError and its own errors out
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise NotebookError(f"{path}: not a notebook: {first}; run make notebooks") from error
    return notebook


def settle(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs in an order that doesn't depend on when buffers were flushed.

    Streams that follow each other are joined, stdout before stderr; displays stay where they are.
    """
    settled = []
    for is_stream, group in groupby(outputs, key=lambda output: output.output_type == "stream"):
        group = list(group)
        if not is_stream:
            settled += group
            continue
        for name in ("stdout", "stderr"):
            text = "".join(output.text for output in group if output.name == name)
            if text:
                settled.append(nbformat.v4.new_output("stream", name=name, text=text))
    return settled


def execute(root: Path, chapter: str) -> NotebookNode:
    """The chapter's notebook, executed in a fresh kernel that runs where the stored notebook lies."""
    from nbclient import NotebookClient  # rendering a stored notebook needs no kernel
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = text_path(root, chapter)
    notebook, lines = from_text(path)
    directory = notebook_path(root, chapter).parent
    directory.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name=METADATA["kernelspec"]["name"],
        record_timing=False,
        resources={"metadata": {"path": str(directory)}},
    )
    python_path = os.pathsep.join(filter(None, [str(root.resolve()), os.environ.get("PYTHONPATH")]))
    try:
        # what the kernel itself logs (not the cells' stderr, which is in the outputs) is noise
        client.execute(env={**os.environ, **KERNEL_ENV, "PYTHONPATH": python_path}, stderr=subprocess.DEVNULL)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(_failure(path, notebook, lines, error)) from None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = settle(cell.outputs)
            cell.metadata.pop("execution", None)
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel has written its version into it
    return notebook


def _failure(path: Path, notebook: NotebookNode, lines: list[int], error: Exception) -> str:
    """What failed, where in the text, and the last lines of what Python said."""
    # A kernel that died or hung leaves no error output; then the last cell that it began is to blame.
    number, said = 0, (str(error).strip() or type(error).__name__).splitlines()[:TRACEBACK_LINES]
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            number, said = place, ANSI.sub("", "\n".join(errors[0].traceback)).rstrip().splitlines()[-TRACEBACK_LINES:]
            break
        number = place
        if cell.execution_count is None:
            break
    return "\n".join([f"{path}:{lines[number]}: cell {number} failed", *(f"  {line}" for line in said)])


def dump(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT, indent=1, ensure_ascii=False) + "\n"


def run(root: Path, chapter: str, discard: bool = False) -> None:
    """Execute a chapter and store it, whole or not at all."""
    notebook = execute(root, chapter)
    path = notebook_path(root, chapter)
    problems = list(lint(notebook, path))
    if problems:
        raise NotebookError("\n".join(problems))
    if not discard:
        scratch = path.with_suffix(".tmp")
        scratch.write_text(dump(notebook), encoding="utf-8")
        scratch.replace(path)


def compare(root: Path, chapter: str) -> Iterator[str]:
    """Where text and stored notebook disagree: a message a cell, with its equations and the first line that differs."""
    text, path = text_path(root, chapter), notebook_path(root, chapter)
    expected, lines = from_text(text)
    stored = load(path)
    for number in range(max(len(expected.cells), len(stored.cells))):
        pair = [book.cells[number] if number < len(book.cells) else None for book in (expected, stored)]
        if all(pair) and all(pair[0].get(key) == pair[1].get(key) for key in ("cell_type", "source", "metadata")):
            continue
        named = dict.fromkeys(label for cell in pair if cell for label in labels(cell.source))
        equations = f" (equation {', '.join(named)})" if named else ""
        where = f"{text}:{lines[number]}" if pair[0] else str(text)
        message = f"{where}: cell {number}{equations} differs from {path}, which was executed; run make notebooks"
        sources = [cell.source.splitlines() if cell else [] for cell in pair]
        here, there = next((two for two in zip_longest(*sources) if two[0] != two[1]), (None, None))
        if here != there:
            message += f"\n    executed  {_shown(there)}\n    now       {_shown(here)}"
        yield message
        if len(expected.cells) != len(stored.cells):
            return  # a cell was added or removed here: all that follow are only shifted


def _shown(line: str | None) -> str:
    return "(nothing)" if line is None else line.strip()[:SHOWN_CHARACTERS]


def lint(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """What keeps a notebook off the page: cells that nbval would pass over, outputs that could act or can't repeat."""
    for number, cell in enumerate(notebook.cells):
        where = f"{path}: cell {number}"
        texts = [cell.source]
        if cell.cell_type == "code":
            if cell.execution_count is None:
                yield f"{where} was never executed; run make notebooks"
            for mark in (*cell.source.splitlines(), *cell.metadata.get("tags", ())):
                if NBVAL_MARK.search(mark):
                    yield f"{where} asks not to be checked: {mark.strip()}"
            texts = []  # code is escaped on the page, so only what it says in public counts
            for output in cell.outputs:
                yield from _lint_output(output, where)
                texts += _texts(output)
        for text in texts:
            if found := ACTIVE.search(text):
                yield f"{where} holds active content: {found.group().strip()[:60]}"


def _lint_output(output: NotebookNode, where: str) -> Iterator[str]:
    if output.output_type == "error":
        yield f"{where} failed: {output.ename}: {output.evalue}"
    elif output.output_type == "stream" and output.name == "stderr":
        yield f"{where} writes to stderr: {output.text.strip().splitlines()[-1]}"
    else:
        for mime in output.get("data", {}):
            if mime.removeprefix(GLUE) not in MIME_TYPES:
                yield f"{where} shows {mime}; allowed are {', '.join(sorted(MIME_TYPES))} and glue"
        if found := next(filter(None, map(ADDRESS.search, _texts(output))), None):
            yield f"{where} shows a memory address, which no second run repeats: {found.group()}"


def _texts(output: NotebookNode) -> list[str]:
    data = output.get("data", {})
    return [output.get("text", "")] + [str(value) for mime, value in data.items() if mime != "image/png"]


def verify(root: Path) -> list[str]:
    """Every reason not to publish the stored notebooks; empty if there is none."""
    known = chapters(root)
    problems = []
    for path in sorted((root / "notebooks").glob("**/*.ipynb")):
        chapter = path.relative_to(root / "notebooks").with_suffix("").as_posix()
        if chapter not in known and ".ipynb_checkpoints" not in path.parts:
            problems.append(f"{path}: has no text {text_path(root, chapter)}")
    for chapter in known:
        path = notebook_path(root, chapter)
        try:
            problems += compare(root, chapter)
            problems += lint(load(path), path)
        except NotebookError as error:
            problems.append(str(error))
            continue
        if path.stat().st_size > MAX_BYTES:
            problems.append(f"{path}: {path.stat().st_size} bytes, more than {MAX_BYTES}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="execute texts and store them as notebooks")
    runner.add_argument("chapters", nargs="*", metavar="PART/SLUG", help="all, if none is named")
    runner.add_argument("--discard", action="store_true", help="require that they run, store nothing")
    commands.add_parser("verify", help="texts and notebooks agree and are safe to publish")
    options = parser.parse_args(arguments)

    root = Path()
    if options.command == "verify":
        problems = verify(root)
    else:
        known, problems = chapters(root), []
        for chapter in options.chapters or known:
            if chapter not in known:
                problems.append(f"{chapter}: no such chapter; there are {', '.join(known) or 'none'}")
                continue
            start = time.perf_counter()
            try:
                run(root, chapter, options.discard)
            except NotebookError as error:
                problems.append(str(error))
            else:
                seconds = time.perf_counter() - start
                print(f"{chapter}: {seconds:.0f} s{' (slow)' if seconds > SLOW_SECONDS else ''}", flush=True)
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
