"""Documents of text, images and videos, and the positions that a scheme gives to their tokens."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import inf, prod
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from .schemes import SCHEMES

TEXT, PATCH, SEPARATOR = 0, 1, 2


@dataclass(frozen=True)
class Text:
    """A run of n text tokens, n ≥ 0. Raises ValueError otherwise."""

    n: int

    def __post_init__(self):
        if not isinstance(self.n, Integral) or self.n < 0:
            raise ValueError(f"text needs an integer n>=0, got n={self.n}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)


@dataclass(frozen=True)
class Image:
    """An image of h rows and w columns of patches, in row-major order. Raises ValueError unless h, w ≥ 1."""

    h: int
    w: int
    step: ClassVar[float] = 1.0  # between the frames of a video

    def __post_init__(self):
        if not all(isinstance(n, Integral) and n >= 1 for n in self.shape):
            raise ValueError(f"image needs h>=1 and w>=1, got h={self.h}, w={self.w}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.h, self.w


@dataclass(frozen=True)
class Video:
    """A video of t frames of h × w patches, frame by frame. Raises ValueError unless t, h, w ≥ 1 and 0 ≤ step < ∞.

    step: ids from one frame to the next on the time axis, γ_t of RoPE-TV; M-RoPE rounds i·step down (Qwen2.5-VL:
    ``tokens_per_second`` times the seconds per frame of the grid).
    """

    t: int
    h: int
    w: int
    step: float = 1.0

    def __post_init__(self):
        if not all(isinstance(n, Integral) and n >= 1 for n in self.shape):
            raise ValueError(f"video needs t>=1, h>=1 and w>=1, got t={self.t}, h={self.h}, w={self.w}")
        if not 0 <= self.step < inf:
            raise ValueError(f"video needs 0<=step<inf, got step={self.step}")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.t, self.h, self.w


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of the T tokens of a document on A axes.

    positions: (A, T); the last two axes are vertical and horizontal, the first of three is time, the only one of
    ``flatten`` is rank. kind: (T,) int8, 0 text, 1 patch, 2 separator. next: the id that the next text token would
    get. spans: of every segment, its first token and the one after its last; separators are in no span.
    """

    positions: Tensor
    kind: Tensor
    next: float
    spans: tuple[tuple[int, int], ...]
    segments: tuple[Text | Image | Video, ...]
    scheme: str


def layout(segments: Sequence[Text | Image | Video], scheme: str, *, start: int = 1, separators: bool = True,
           dtype: torch.dtype = torch.float64) -> Layout:  # fmt: skip
    """Positions of a document: text token n at (n, …, n), patches after the last text id L as the scheme says.

    Row i = 1…h and column j = 1…w of an image stand, and the next text token at K, in the scheme

    - ``flatten``  (1 axis): L + (i−1)w + j, K = L + wh + 1   (mm-flatten)
    - ``page``     (2): row, column: text fills row r from column 1, an image the next h rows   (mm-page)
    - ``naive2d``  (2): (L + i, L + j), K = L + max(h, w) + 1   (mm-naive)
    - ``tie``, ``tie_min``, ``tie_frac`` (2): (L + is, L + jt), see :func:`tie_scales`   (mm-scaled)
    - ``tv``       (2): (L + β_1 + i, L + β_2 + j), K = L + wh + 1, see :func:`tv_offsets`   (mm-tv)
    - ``tv3``      (3): the same with time (mm-video); ``tv`` means ``tv3`` in a document with a video
    - ``mrope``    (3): (L + 1, L + i, L + j), K one more than the largest id (mm-mrope); frame f of a video has
      time L + 1 + ⌊(f − 1)·step⌋. Qwen2-VL, Qwen2.5-VL; Qwen3-VL and GLM-4V see a video as images between texts
    - ``mrope_hw`` (3): as ``mrope`` but for K = L + max(h, w) + 1, whatever the time, as in transformers 5.23: after
      a long video, text then takes ids that its frames have already

    start: the first id. separators: put [IMG] and [/IMG] around every image and video: text tokens with an id each.
    Without them L is one less than the next free id, and symmetry needs text between any two images (UserWarning).
    dtype: of the positions, which are rounded once to float64 and once to it; an integer type must hold them exactly.
    Raises ValueError for an unknown scheme, a video where the scheme has no form for it, ids that an integer dtype
    does not hold; TypeError for something else than a segment.
    Sources: https://kexue.fm/archives/10040, arXiv:2409.12191
    """
    segments = tuple(segments)
    for segment in segments:
        if not isinstance(segment, Text | Image | Video):
            raise TypeError(f"segments must be Text, Image or Video, got {type(segment).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scheme == "tv" and any(isinstance(segment, Video) for segment in segments):
        scheme = "tv3"
    axes, place, text, video = SCHEMES[scheme]
    for segment in segments:
        if isinstance(segment, Video) and not video:
            raise ValueError(f"scheme {scheme!r} has no form for videos, got {segment}")
    if scheme.startswith(("tie", "tv")) and not separators:
        _warn_of_neighbours(segments, scheme)
    runs, spans, kind = _tokens(segments, separators)
    positions, L = torch.empty(axes, len(kind), dtype=torch.float64), Fraction(start) - 1
    for run, block in zip(runs, positions.split([prod(run.shape) for run in runs], 1), strict=True):
        if isinstance(run, Text):
            coordinates, L = text(run.n, L, axes)
        else:
            sizes = (1,) * (axes - len(run.shape)) + run.shape
            coordinates, L = place(sizes, run.step, L)
        for row, coordinate in zip(block, coordinates, strict=True):
            row.view(coordinate.shape).copy_(coordinate)
    rounded = positions.to(dtype)
    if not dtype.is_floating_point and not torch.equal(rounded.to(torch.float64), positions):
        raise ValueError(f"dtype must be a floating-point type or hold all ids of {scheme!r}, got {dtype}")
    return Layout(rounded, kind, float(L + 1), spans, segments, scheme)


def _tokens(segments, separators):
    """Runs (one text, with its separators, before and after each image or video), spans of the segments, kinds."""
    runs, spans, kinds, T = [Text(0)], [], [], 0
    for segment in segments:
        n, kind, border = prod(segment.shape), TEXT, 0
        if isinstance(segment, Text):
            runs[-1] = Text(runs[-1].n + n)
        else:
            kind, border = PATCH, int(separators)
            runs[-1:] = [Text(runs[-1].n + border), segment, Text(border)]
        spans.append((T + border, T + border + n))
        kinds += [(SEPARATOR, border), (kind, n), (SEPARATOR, border)]
        T += border + n + border
    kind, length = torch.tensor(kinds, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return runs, tuple(spans), kind.to(torch.int8).repeat_interleave(length)


def _warn_of_neighbours(segments, scheme):
    seen = [isinstance(segment, Text) for segment in segments if prod(segment.shape)]
    if any(not a and not b for a, b in pairwise(seen)):
        message = f"images without a separator or text between them are not symmetric in scheme {scheme!r}"
        warnings.warn(message, UserWarning, stacklevel=3)


def pad_layouts(layouts: Sequence[Layout]) -> tuple[Tensor, Tensor]:
    """A batch of layouts: positions (B, A, T) with 0 after the end of each, and a mask (B, T), True at its tokens.

    Raises ValueError for no layouts, or different numbers of axes.
    """
    axes = {len(layout.positions) for layout in layouts}
    if len(axes) != 1:
        raise ValueError(f"layouts must be at least one, with the same number of axes, got axes {sorted(axes)}")
    positions = torch.nn.utils.rnn.pad_sequence([layout.positions.T for layout in layouts], batch_first=True).mT
    lengths = torch.tensor([len(layout.kind) for layout in layouts])
    return positions, torch.arange(positions.shape[-1]) < lengths[:, None]
