"""The strict build: it passes here, and each thing that a reader might break stops it with the place and the label."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tools.book
from tools import notebooks


def build(book):
    command = [sys.executable, "-m", "tools.book"]
    return subprocess.run(command, cwd=book, capture_output=True, text=True, timeout=600)


def numbered(book):
    """A chapter, and the LaTeX and label of its first numbered equation on one line that has a `=`."""
    for chapter in notebooks.chapters(book):
        text = notebooks.text_path(book, chapter).read_text(encoding="utf-8")
        if found := re.search(r"^\$\$(.*=.*)\$\$ \(([\w-]+)\)$|^\$\$\n(.*=.*)\n\$\$ \(([\w-]+)\)$", text, re.MULTILINE):
            latex, label, block, block_label = found.groups()
            return chapter, latex or block, label or block_label
    raise LookupError("no chapter has a numbered equation on one line")


def test_the_book_builds_without_a_warning(root, book_html):
    assert (book_html / "index.html").is_file()
    for chapter in notebooks.chapters(root):
        page = (book_html / "notebooks" / f"{chapter}.html").read_text(encoding="utf-8")
        text = notebooks.text_path(root, chapter).read_text(encoding="utf-8")
        found = notebooks.labels(text)
        assert found and all(f'id="equation-{label}"' in page for label in found), chapter


def test_an_equation_edited_in_the_text_alone_is_refused_by_label(copy):
    chapter, latex, label = numbered(copy)
    path = notebooks.text_path(copy, chapter)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(latex, latex.replace("=", "= -", 1), 1), encoding="utf-8")
    built = build(copy)
    assert built.returncode == 1 and not (copy / "_build").exists()
    assert f"book/chapters/{chapter}.md" in built.stderr and label in built.stderr
    assert "run make notebooks" in built.stderr
    assert f"executed  {latex}" in built.stderr.replace("$$ ", "").replace("$$", "") and "now " in built.stderr


def test_an_equation_edited_in_text_and_notebook_is_refused_by_label(copy):
    chapter, latex, label = numbered(copy)
    path = notebooks.text_path(copy, chapter)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(latex, latex.replace("=", "= -", 1), 1), encoding="utf-8")
    edited, _ = notebooks.from_text(path)
    stored = notebooks.load(notebooks.notebook_path(copy, chapter))
    for cell, new in zip(stored.cells, edited.cells, strict=True):
        cell.source = new.source
    notebooks.notebook_path(copy, chapter).write_text(notebooks.dump(stored), encoding="utf-8")
    assert notebooks.verify(copy) == []
    built = build(copy)
    assert built.returncode == 1 and not (copy / "_build").exists()
    assert label in built.stderr


def test_a_dead_reference_fails_the_build_and_fails_it_again(copy):
    with (copy / "book" / "notation.md").open("a", encoding="utf-8") as page:
        page.write("\nSee {eq}`no-such-equation`.\n")
    for built in (build(copy), build(copy)):
        assert built.returncode == 1
        assert "notation.md" in built.stderr and "no-such-equation" in built.stderr


def test_a_warning_about_a_chapter_leads_to_its_text(root):
    (chapter, *_), text = notebooks.chapters(root), notebooks.text_path
    path = text(root, chapter)
    notebook, lines = notebooks.from_text(path)
    number = next(i for i, cell in enumerate(notebook.cells) if notebooks.labels(cell.source))
    place = f"{notebooks.notebook_path(root.resolve(), chapter)}:{number + 1}0003: WARNING: \x1b[31mstale\x1b[39m"
    said = tools.book.readable(place, root)
    assert said == f"{text(Path(), chapter)}:{lines[number] + 2}: WARNING: stale"


def test_a_cache_of_pages_is_dropped_when_what_makes_pages_has_changed(copy):
    assert not tools.book.outdated(copy)  # there is none yet
    cache = copy / tools.book.CACHE / "environment.pickle"
    cache.parent.mkdir(parents=True)
    cache.touch()
    assert not tools.book.outdated(copy)
    later = cache.stat().st_mtime + 10
    for name in ("_config.yml", "book/_static/book.css", "book/_ext/book_page.py", "kexue_utils/ledger/page.py"):
        path = copy / name
        before = path.stat().st_mtime
        os.utime(path, (later, later))
        assert tools.book.outdated(copy), name
        os.utime(path, (before, before))
    os.utime(copy / "book" / "intro.md", (later, later))  # Sphinx sees by itself
    assert not tools.book.outdated(copy)


def test_rendering_needs_nothing_that_computes(root):
    code = (
        "import sys, tools.book, kexue_utils.ledger.__main__, kexue_utils.ledger.sphinx\n"
        "print(sorted({'numpy', 'sympy', 'torch', 'matplotlib', 'scipy'} & sys.modules.keys()))"
    )
    seen = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert seen.stdout == "[]\n", seen.stderr
