"""What a layout does: symmetry, equivalence, compatibility, spacing, collisions, order; read off its positions."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .layouts import PATCH, Image, Layout, Text, layout

ROWS_AND_COLUMNS = slice(-2, None)  # the axes without time
DOCUMENT = (Text(2), Image(2, 3), Text(3))


class Symmetry(NamedTuple):
    """corner, central: whether they hold for every image; left, right: their gaps, (images, A)."""

    corner: bool
    central: bool
    left: Tensor
    right: Tensor


class Equivalence(NamedTuple):
    """holds: None if an image is worth no number of tokens; worth: of every image, or None; patches: likewise."""

    holds: bool | None
    worth: tuple[float | None, ...]
    patches: tuple[int, ...]


class Compatibility(NamedTuple):
    """holds: both of the others, see :func:`check_compatibility`."""

    holds: bool
    diagonal: bool
    consecutive: bool


class Spacing(NamedTuple):
    """Steps (A,) from a patch to the next in time, the one below, the one to the right; None where there is none."""

    time: Tensor | None
    vertical: Tensor | None
    horizontal: Tensor | None


class Desiderata(NamedTuple):
    """True if it holds for all sizes, False if not, None if it makes no sense."""

    compatible: bool
    symmetric: bool
    equivalent: bool | None
    integer: bool
    isotropic: bool
    shape_independent: bool
    collision_free: bool
    ordered: bool


def _visuals(layout):
    """(shape, lo, hi) of the images and videos."""
    pairs = zip(layout.segments, layout.spans, strict=True)
    return [(segment.shape, lo, hi) for segment, (lo, hi) in pairs if not isinstance(segment, Text)]


def _enclosed(layout):
    """(p of the text before, (A, N) p of the patches, p of the text after) where there is text on both sides."""
    p, kind = layout.positions, layout.kind
    visuals = [(lo, hi) for _, lo, hi in _visuals(layout) if 0 < lo and hi < len(kind)]
    found = [(p[:, lo - 1], p[:, lo:hi], p[:, hi]) for lo, hi in visuals if PATCH not in (kind[lo - 1], kind[hi])]
    if not found:
        raise ValueError("layout must have an image or a video between two text tokens or separators")
    return found


def _rounding(layout):
    """How far gaps that are equal can be apart, by the rounding of positions."""
    p = layout.positions
    return 4 * torch.finfo(p.dtype).eps * p.abs().max().item() if p.is_floating_point() else 0


def check_symmetry(layout: Layout, *, axes: slice = slice(None)) -> Symmetry:
    """Whether text before and after an image sees it alike   (mm-symmetry, mm-central)

    corner, the post's condition: first patch − last text before = first text after − last patch. central, stronger:
    p_m − L = K − p_{N+1−m} for every patch m. Images without text (or a separator) on both sides are left out.
    axes: which to compare, ``ROWS_AND_COLUMNS`` for those only. Raises ValueError if there is no such image.
    """
    enclosed = [(before[axes], patches[axes], after[axes]) for before, patches, after in _enclosed(layout)]
    gaps = [(patches - before[:, None], (after[:, None] - patches).flip(1)) for before, patches, after in enclosed]
    left, right = (torch.stack([gap[:, 0] for gap in side]) for side in zip(*gaps, strict=True))
    same = partial(torch.allclose, rtol=0, atol=_rounding(layout))
    return Symmetry(same(left, right), all(same(*sides) for sides in gaps), left, right)


def check_equivalence(layout: Layout) -> Equivalence:
    """Whether an image is worth its number of patches: K − L = N + 1   (mm-equivalent)

    K − L is that of the text on both sides, as in :func:`check_symmetry`; it has to be the same on all axes for an
    image to be worth a number of tokens, K − L − 1.
    """
    enclosed = _enclosed(layout)
    spans = [(after - before).unique().tolist() for before, _, after in enclosed]
    worth = tuple(span.pop() - 1 if len(span) == 1 else None for span in spans)
    patches = tuple(grid.shape[1] for _, grid, _ in enclosed)
    return Equivalence(None if None in worth else worth == patches, worth, patches)


def check_compatibility(scheme: str, segments: Sequence[Text | Image] = DOCUMENT) -> Compatibility:
    """Whether text has the ids of RoPE-1D   (mm-compatible)

    diagonal: (n, …, n) for every text token among these segments; consecutive: n, n + 1, … once the images are left
    out. Raises ValueError for an unknown scheme.
    """
    mixed = layout(segments, scheme)
    pure = layout([segment for segment in segments if isinstance(segment, Text)], scheme).positions
    text = mixed.positions[:, mixed.kind != PATCH]
    diagonal = torch.equal(text, text[:1].expand_as(text))
    consecutive = bool((pure.diff() == 1).all())
    return Compatibility(diagonal and consecutive, diagonal, consecutive)


def neighbour_spacing(layout: Layout) -> tuple[Spacing, ...]:
    """For every image or video, the steps between neighbouring patches, taken at its first patch   (mm-spacing)"""
    spacings = []
    for shape, lo, hi in _visuals(layout):
        grid = layout.positions[:, lo:hi].unflatten(1, (1,) * (3 - len(shape)) + shape)
        first = grid[:, 0, 0, 0]
        neighbours = grid[:, 1:, 0, 0], grid[:, 0, 1:, 0], grid[:, 0, 0, 1:]
        spacings.append(Spacing(*((n[:, 0] - first if n.numel() else None) for n in neighbours)))
    return tuple(spacings)


def collision_free(layout: Layout) -> bool:
    """Whether no two tokens have the same position   (mm-collisions)"""
    return layout.positions.unique(dim=1).shape == layout.positions.shape


def order_preserved(layout: Layout) -> bool:
    """Whether what comes before an image is below its patches on every axis, and what comes after above (mm-order)"""
    p, ordered = layout.positions, True
    for _, lo, hi in _visuals(layout):
        for cut in (lo, hi):
            before, after = p[:, :cut], p[:, cut:]
            if before.numel() and after.numel():
                ordered &= bool((before.amax(1) < after.amin(1)).all())
    return ordered


def desiderata(scheme: str, sizes: Sequence[tuple[int, int]], *, text: Text = DOCUMENT[0]) -> Desiderata:
    """The row of a scheme in the table of wishes, computed over images h × w between texts   (mm-desiderata)

    sizes: (h, w), some with h ≠ w and some with h, w ≥ 2. Symmetric: the corner condition on rows and columns.
    Isotropic: a row is as far from the next (in the max-norm) as a column, h, w ≥ 2. Shape-independent: both steps are
    the same for all of these. Raises ValueError for an unknown scheme, or sizes that have no h, w ≥ 2.
    """
    layouts = [layout([text, Image(h, w), text], scheme) for h, w in sizes]
    spacings = [spacing for found in layouts for spacing in neighbour_spacing(found)]
    steps = [torch.stack(s[1:]) for s in spacings if s.vertical is not None and s.horizontal is not None]
    if not steps:
        raise ValueError(f"sizes must have one with h, w >= 2, got {list(sizes)}")
    steps = torch.stack(steps)
    vertical, horizontal = steps.abs().amax(-1).unbind(1)
    equivalences = [check_equivalence(found).holds for found in layouts]
    return Desiderata(
        compatible=check_compatibility(scheme).holds,
        symmetric=all(check_symmetry(found, axes=ROWS_AND_COLUMNS).corner for found in layouts),
        equivalent=None if None in equivalences else all(equivalences),
        integer=all(torch.equal(found.positions, found.positions.floor()) for found in layouts),
        isotropic=torch.allclose(vertical, horizontal),
        shape_independent=torch.allclose(steps, steps[:1].expand_as(steps)),
        collision_free=all(map(collision_free, layouts)),
        ordered=all(map(order_preserved, layouts)),
    )
