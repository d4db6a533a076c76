"""What the pages of the book need from Sphinx: search that knows Chinese, and figures that carry their own words."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from docutils import nodes
from sphinx.search import languages
from sphinx.search.en import SearchEnglish

# Han ideographs with extension A and the compatibility block, as a class for `re` and for JavaScript alike
HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
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
        if not caption or isinstance(image.parent, nodes.figure):
            continue
        parent, at = image.parent, image.parent.index(image)
        printed = parent[at + 1] if at + 1 < len(parent) else None
        if isinstance(printed, nodes.literal_block) and printed.astext().strip() == caption:
            parent.remove(printed)
        figure = nodes.figure("", image.deepcopy(), nodes.caption("", "", *inline(caption)), align="center")
        doctree.set_id(figure)
        parent[at] = figure


def setup(app):
    languages[SearchEnglishChinese.lang] = SearchEnglishChinese
    app.connect("doctree-read", give_figures_their_words, priority=400)  # before Sphinx numbers the figures
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
