"""What the pages of the book need from Sphinx: search that knows Chinese, and figures that carry their own words."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from docutils import nodes
from sphinx.search import languages
from sphinx.search.en import SearchEnglish

# Han ideographs with extension A and the compatibility block, as a class for `re` and for JavaScript alike
HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
STAMP = re.compile(r"[✓○] (\S+)")  # and the label of the equation
SVG = "{http://www.w3.org/2000/svg}"


class SearchEnglishChinese(SearchEnglish):
    """English, and Chinese by single characters and by pairs: 贝叶斯 is indexed as 贝, 叶, 斯, 贝叶, 叶斯.

    A query of two characters or more asks for its pairs, so that it finds the words and not just their characters;
    no dictionary is needed, on either side.
    """

    lang = "en-zh"
    language_name = "English and Chinese"
    # Replaces Sphinx's own splitter in the browser. Latin words split as there.
    js_splitter_code = (
        r"""
var splitQuery = (query) => (query.match(/[HAN]+|[^HAN]+/gu) || []).flatMap((run) => {
  if (!/[HAN]/u.test(run)) return run.split(/[^\p{Letter}\p{Number}_\p{Emoji_Presentation}]+/gu).filter((word) => word);
  const characters = [...run];
  return characters.length === 1 ? characters : characters.slice(1).map((c, i) => characters[i] + c);
});
"""
    ).replace("HAN", HAN)

    def split(self, input: str) -> list[str]:
        words = []
        for run in re.findall(f"[{HAN}]+|[^{HAN}]+", input):
            if re.match(f"[{HAN}]", run):
                words += [*run, *(a + b for a, b in zip(run, run[1:], strict=False))]
            else:
                words += super().split(run)
        return words


def inline(text: str) -> list[nodes.Node]:
    """Text with `$…$` for mathematics, as nodes."""
    parts = re.split(r"\$([^$]+)\$", text)
    return [nodes.math(part, part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts) if part]


def words_of(svg: Path) -> tuple[str, str]:
    """The <title> (alternative text) and the <desc> (caption) of an SVG file; empty where it has none."""
    root = ElementTree.parse(svg).getroot()
    return tuple((root.findtext(SVG + tag) or "").strip() for tag in ("title", "desc"))


def bundle(node):
    """The output of a cell that `node` belongs to, as myst-nb nests it; None outside of outputs."""
    while node is not None and node.get("nb_element") != "mime_bundle":
        node = node.parent
    return node


def give_figures_their_words(app, doctree):
    """`kexue_utils.figures.show` writes alternative text and caption into the SVG and prints the caption under it.

    On the page the first becomes the `alt` of the image, and the printed line becomes the caption of a numbered figure.
    """
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir, image["uri"].lstrip("/"))
        if path.suffix != ".svg" or not path.is_file():
            continue
        alt, caption = words_of(path)
        if alt and not image.get("alt"):
            image["alt"] = alt
        output = bundle(image)
        if not caption or output is None:
            continue
        printed = output.next_node(descend=False, siblings=True)
        if printed is not None and printed.astext().strip() == caption:
            printed.parent.remove(printed)
        figure = nodes.figure("", image.deepcopy(), nodes.caption("", "", *inline(caption)), align="center")
        doctree.set_id(figure)
        image.parent[image.parent.index(image)] = figure


def mark_checks(app, doctree):
    """What a check printed becomes a `check-stamp`, the cell around it a `check-cell` whose fold says what it hides.

    A cell that stands directly under its equation is `check-beside`: its fold shares the line of the badge.
    """
    cells = {}
    for block in doctree.findall(nodes.literal_block):
        if bundle(block) is not None and (stamp := STAMP.match(block.astext())):
            block["classes"].append("check-stamp")
            cell = block
            while cell.get("nb_element") != "cell_code":
                cell = cell.parent
            cells.setdefault(cell, []).append(stamp[1])
    for cell, labels in cells.items():
        cell["classes"].append("check-cell")
        place = cell.parent.index(cell)
        above = cell.parent[place - 1] if place else None
        if len(labels) == 1 and isinstance(above, nodes.math_block) and above.get("label") == labels[0]:
            cell["classes"].append("check-beside")
            what = "check"
        else:
            what = f"{'check' if len(labels) == 1 else 'checks'} of {', '.join(labels)}"
        if "prompt_show" in cell:
            cell["prompt_show"], cell["prompt_hide"] = f"Show the {what}", f"Hide the {what}"


def drop_thebe(app, config):
    """Jupyter Book always loads sphinx_thebe, whose scripts name an address outside; nothing here uses it."""
    for listeners in list(app.events.listeners.values()):
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)
    app.registry.css_files[:] = [file for file in app.registry.css_files if file[0] != "sphinx-thebe.css"]


def mend_bibliography(app, pagename, templatename, context, doctree):
    """The entries of the bibliography carry a role that no longer belongs into a list; screen readers lose them."""
    if "doc-biblioentry" in context.get("body", ""):
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    languages[SearchEnglishChinese.lang] = SearchEnglishChinese
    app.connect("config-inited", drop_thebe)
    app.connect("doctree-read", mark_checks)
    app.connect("html-page-context", mend_bibliography)
    app.connect("doctree-read", give_figures_their_words, priority=400)  # before Sphinx numbers the figures
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
