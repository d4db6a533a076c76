"""The front pages say what is there: which posts have a chapter, and what the words of a badge are."""

import re

import yaml

from kexue_utils.ledger.register import KINDS
from tools.notebooks import chapters


def test_the_introduction_links_exactly_the_chapters_that_are_written(root):
    text = (root / "book" / "intro.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*kexue\.fm/archives/(\d+).*\|$", text, re.M)
    assert len(rows) == len(set(rows)) == 16
    linked = re.findall(r"\[written\]\(\.\./notebooks/(.+?)\.ipynb\)", text)
    assert sorted(linked) == chapters(root)
    assert len(linked) + text.count("| not yet written |") == 16


def test_the_table_of_contents_has_exactly_the_chapters_that_are_written(root):
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert sorted(file.removeprefix("notebooks/") for file in files if file.startswith("notebooks/")) == chapters(root)


def test_every_word_of_a_badge_is_explained(root):
    text = (root / "book" / "how_to_read.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([a-z]+) \|", text, re.M)[1:] == list(KINDS)
