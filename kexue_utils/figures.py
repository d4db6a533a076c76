"""The one style of the book's figures, and the two ways in which a cell hands something to the page.

    fig, ax = figures.subplots()
    ax.plot(sigma, distance, label="measured")
    figures.show(fig, alt="…what is drawn…", caption="…what to see, with $mathematics$…")

A figure is an SVG on white: the page blends white into its background and inverts lightness (not hue) in the dark
theme, and a hosted notebook shows the file as it is. The bytes depend on what is drawn and on nothing else.
"""

import io
import math
import numbers
import re
from xml.sax.saxutils import escape

import matplotlib
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Blue, vermilion, green, purple, brown, grey: after Okabe and Ito, darkened until a line on white has contrast 3.
# Line styles differ as well, so that no figure depends on colour alone.
PALETTE = ("#0060c0", "#c8500a", "#008a50", "#a8438a", "#7a5c00", "#5c6670")
INK = "#24292f"

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=PALETTE)
    + cycler(linestyle=["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1))]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#d9dee3",
    "grid.linewidth": 0.6,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "mathtext.fontset": "dejavusans",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "derivations-that-run",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def subplots(
    nrows: int = 1, ncols: int = 1, *, width: float = 5.6, height: float = 3.3, **options
) -> tuple[Figure, Axes]:
    """A figure of `width` × `height` inches in the book's style, and its axes as pyplot's `subplots` gives them.

    Sets matplotlib's style for the session, because artists read it when they are drawn, not when the figure is made.
    The figure belongs to no window and to no pyplot state: nothing shows it but `show`. `options` go to
    `Figure.subplots` (`sharex`, `squeeze`, `subplot_kw`, …).
    """
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(fig)
    return fig, fig.subplots(nrows, ncols, **options)


def _words(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    if not text.strip() or "\n" in text:
        raise ValueError(f"{name} must be one line of text, got {text!r}")
    return text.strip()


def _rounded(match: re.Match) -> str:
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), match[0])


def svg(fig: Figure, *, alt: str, caption: str) -> str:
    """The figure as SVG text: `alt` in its <title>, `caption` in its <desc>, coordinates to 1/100 point, no date.

    Raises TypeError if a text is not a str, ValueError if it is empty or has more than one line.
    """
    alt, caption = _words("alt", alt), _words("caption", caption)
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, body = re.search(r"(<svg [^>]*)>(.*)", file.getvalue(), re.S).groups()
    # The last digits of a coordinate are rounding noise of whatever computed the data; the eye sees none of them.
    body = re.sub(r'\b(?:d|x|y|width|height)="[^"]*"|translate\([^)]*\)', _rounded, body)
    return f'{head} role="img">\n <title>{escape(alt)}</title>\n <desc>{escape(caption)}</desc>{body}'


def show(fig: Figure, *, alt: str, caption: str) -> None:
    """Put a figure into the cell's output, with its words.

    `alt` says what is drawn to whoever can't see it; `caption` says what to see in it, and may hold `$…$`. The caption
    is printed under the figure; on the page it becomes the figure's numbered caption. Errors as in `svg`.
    """
    display({"image/svg+xml": svg(fig, alt=alt, caption=caption), "text/plain": alt.strip()}, raw=True)
    display({"text/plain": caption.strip()}, raw=True)


def points(row: dict, unit: str = "points") -> str:
    """{mean, low, high}, shares between −1 and 1, in words: 2.1 points (1.4 to 2.9)."""
    mean, low, high = (f"{100 * row[key]:.1f}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} {unit} ({low} to {high})"


def glue(name: str, value: str | numbers.Real) -> None:
    """Store a value under `name` so that the text of the page can say it: {glue:text}`name` or {glue:text}`name:.3f`.

    What `myst_nb.glue(name, value, display=False)` stores, without needing myst_nb where the notebook runs. Prints
    nothing. Raises TypeError for anything but a str or a real number, ValueError for an empty name or a number that
    is not finite: neither belongs in a sentence.
    """
    _words("name", name)
    if isinstance(value, numbers.Integral):
        value = int(value)
    elif isinstance(value, numbers.Real):
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"value of {name!r} must be finite, got {value}")
    elif not isinstance(value, str):
        raise TypeError(f"value of {name!r} must be a str or a real number, got {type(value).__name__}")
    prefix = "application/papermill.record/"
    display(
        {prefix + "text/plain": repr(value)},
        raw=True,
        metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
    )
