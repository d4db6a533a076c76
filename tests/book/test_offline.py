"""Nothing that a page loads lies outside of the built book, and of MathJax there is what is pinned and no more."""

import re

from tools import vendor_mathjax

# What makes a browser fetch: attributes of these elements, and url() or @import in a style sheet.
LOADS = re.compile(r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*\b(?:src|href|data)=[\"'](?:https?:)?//")
STYLE = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])(?:https?:)?//")


def test_pages_load_only_from_the_site(book_html):
    pages = list(book_html.rglob("*.html"))
    assert len(pages) > 5
    assert [page.name for page in pages if "_static" not in page.parts and LOADS.search(page.read_text("utf-8"))] == []


def test_style_sheets_load_only_from_the_site(book_html):
    sheets = list(book_html.rglob("*.css"))
    assert sheets
    assert [sheet.name for sheet in sheets if STYLE.search(sheet.read_text("utf-8"))] == []


def test_the_patterns_see_what_they_are_for():
    assert LOADS.search('<script async src="https://example.org/a.js">')
    assert LOADS.search("<link href='//example.org/f'>")
    assert not LOADS.search('<a href="https://example.org/">') and not LOADS.search('<script src="../_static/a.js">')
    assert STYLE.search("@import 'https://example.org/a.css'") and STYLE.search("url(//example.org/f.woff2)")


def test_mathjax_is_the_chosen_files_with_their_licence():
    here = {path.as_posix() for path in vendor_mathjax.tree(vendor_mathjax.TARGET)}
    chosen = {name for _, _, files in vendor_mathjax.PACKAGES.values() for name in files.values()}
    assert {path for path in here if path not in chosen and not path.startswith("mathjax-tex/chtml/woff2/")} == set()
    assert "LICENSE" in here and not [name for name in chosen if not (vendor_mathjax.TARGET / name).exists()]


def test_every_component_that_the_configuration_loads_is_there(root):
    config = (root / "_config.yml").read_text(encoding="utf-8")
    loaded = re.search(r"load:\n((?:\s+- .*\n)+)", config)[1]
    names = [line.strip("- \"'") for line in loaded.splitlines()]
    paths = [name.replace("[tex]", "input/tex/extensions") + ".js" for name in map(str.strip, names)]
    assert paths and [path for path in paths if not (vendor_mathjax.TARGET / path).is_file()] == []
