"""The figures of the book: same bytes twice, words that reach the page, colours that everybody can tell apart."""

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from kexue_utils import figures

DRAW = """
import numpy as np
from kexue_utils import figures
fig, ax = figures.subplots()
x = np.linspace(0.1, 1, 50)
for k in range(3):
    ax.plot(x, np.sin(x * k) + {noise}, label=f"$k = {{k}}$")
ax.scatter(x, x)
ax.set_xlabel(r"$\\sigma$")
ax.legend()
text = figures.svg(fig, alt="three sines & a <line>", caption="Waves of $k$.")
"""


def draw(noise=0.0):
    scope = {}
    exec(DRAW.format(noise=noise), scope)
    return scope["text"]


def test_same_bytes_in_another_process_and_under_another_hash_seed():
    other = subprocess.run(
        [sys.executable, "-c", DRAW.format(noise=0.0) + "print(text, end='')"],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "77", "PATH": ""},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert other.stdout == draw()


def test_rounding_noise_does_not_move_a_byte_but_the_data_does():
    assert draw(noise=1e-12) == draw()
    assert draw(noise=1e-2) != draw()


def test_an_svg_holds_its_words_and_nothing_active_or_dated():
    text = draw()
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(space + "title") == "three sines & a <line>"
    assert root.findtext(space + "desc") == "Waves of $k$."
    tags = {element.tag.removeprefix(space) for element in root.iter()}
    assert not tags & {"script", "foreignObject", "image", "metadata", "text"}
    assert not re.search(r"\son\w+=|https?://(?!www\.w3\.org)|\b20\d\d-\d\d", text)


def test_show_and_glue_emit_what_the_page_reads(monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "display", lambda data, raw, metadata=None: seen.append((data, metadata)))
    fig, _ = figures.subplots()
    assert figures.show(fig, alt="empty axes", caption="Nothing yet.") is None
    assert figures.glue("width", np.float64(2.5)) is None
    figures.glue("count", np.int64(3))
    figures.glue("word", "sum")
    (image, _), (caption, _), (width, metadata), (count, _), (word, _) = seen
    assert image["image/svg+xml"].startswith("<svg") and image["text/plain"] == "empty axes"
    assert caption == {"text/plain": "Nothing yet."}
    key = "application/papermill.record/text/plain"
    assert (width[key], count[key], word[key]) == ("2.5", "3", "'sum'")
    assert metadata == {"scrapbook": {"name": "width", "mime_prefix": "application/papermill.record/"}}
    json.dumps([data for data, _ in seen])


def test_glue_stores_what_myst_nb_stores(monkeypatch):
    myst_glue = pytest.importorskip("myst_nb.ext.glue")
    ours, theirs = [], []
    monkeypatch.setattr(figures, "display", lambda data, raw, metadata: ours.append((data, metadata)))
    monkeypatch.setattr(myst_glue, "ipy_display", lambda data, raw, metadata: theirs.append((data, metadata)))
    for value in (0.5, 3, "sum"):
        figures.glue("name", value)
        myst_glue.glue("name", value, display=False)
    assert ours == theirs


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"alt": " ", "caption": "c"}, ValueError, "alt must be one line of text, got ' '"),
        ({"alt": "a", "caption": "two\nlines"}, ValueError, "caption must be one line"),
        ({"alt": None, "caption": "c"}, TypeError, "alt must be a str, got NoneType"),
    ],
)
def test_a_figure_without_words_is_refused(words, error, message):
    fig, _ = figures.subplots()
    with pytest.raises(error, match=message):
        figures.show(fig, **words)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("", 1.0, ValueError), ("x", float("nan"), ValueError), ("x", [1], TypeError), (3, 1.0, TypeError)],
)
def test_glue_refuses_what_no_sentence_can_say(name, value, error):
    with pytest.raises(error):
        figures.glue(name, value)


def linear(colour):
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def luminance(rgb):
    return rgb @ [0.2126, 0.7152, 0.0722]


# Linear RGB as seen without L, M or S cones (Machado, Oliveira and Fernandes 2009, severity 1)
SIGHT = {
    "normal": np.eye(3),
    "protan": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deutan": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "tritan": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_neighbouring_colours_can_be_told_apart(sight):
    seen = [lab(SIGHT[sight] @ linear(colour)) for colour in figures.PALETTE[:4]]
    distance = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(range(4), 2)}
    assert min(distance.values()) > 12, distance


def test_lines_and_ink_stand_out_on_the_page_in_both_themes():
    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    white, page = linear("#ffffff"), linear("#121212")
    for colour, needed in [*((colour, 3) for colour in figures.PALETTE), (figures.INK, 7)]:
        assert contrast(linear(colour), white) >= needed
        # In the dark theme: invert, then turn the hue by 180° (the matrix of CSS hue-rotate), then screen on the page.
        inverted = 1 - np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        weight = np.array([0.213, 0.715, 0.072])
        turned = np.clip(2 * (inverted @ weight) - inverted, 0, 1)
        dark = np.where(turned <= 0.04045, turned / 12.92, ((turned + 0.055) / 1.055) ** 2.4)
        assert contrast(dark, page) >= needed, colour


def test_points_says_an_interval_in_words():
    row = {"mean": -0.0214, "low": -0.03, "high": 0.0004}
    assert figures.points(row) == "−2.1 points (−3.0 to 0.0)"
    assert figures.points(row, "%") == "−2.1 % (−3.0 to 0.0)"
