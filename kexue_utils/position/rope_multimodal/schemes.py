"""Schemes of multimodal positions: where the patches of an image or a video stand after the text id L.

A scheme is a function (sizes, step, L) → (one coordinate grid per axis, K − 1), with K the first text id after the
patches. All arithmetic is rational; a coordinate is rounded once, to float64.
Sources: https://kexue.fm/archives/10040, https://kexue.fm/archives/10352, arXiv:2409.12191
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from math import lcm, prod
from typing import NamedTuple

import torch
from torch import Tensor


class Scheme(NamedTuple):
    """axes: A; place, text: rules for patches and for a run of text; video: whether `place` takes (t, h, w)."""

    axes: int
    place: Callable
    text: Callable
    video: bool = False


def _ramp(n: int, first: Fraction | int, step: Fraction | int) -> Tensor:
    """first, first + step, …: n rationals as integers over one denominator, so that only the division rounds."""
    q = lcm(first.denominator, step.denominator)
    return (torch.arange(n) * int(step * q) + int(first * q)).to(torch.float64) / q


def _grid(*axes: Tensor) -> tuple[Tensor, ...]:
    return torch.meshgrid(*axes, indexing="ij")


def tie_scales(h: int, w: int, *, form: str = "integer") -> tuple[Fraction, Fraction, Fraction]:
    """Scales of RoPE-Tie: s = (K−L)/(h+1), t = (K−L)/(w+1), so that (h+1)s = (w+1)t = K−L   (mm-scaled)

    Returns (s, t, K−L), by form: ``"integer"`` K−L = (w+1)(h+1), thus s = w+1, t = h+1 (mm-integer);
    ``"minimal"`` K−L = lcm(w+1, h+1), the least with integers s, t (mm-minimal); ``"fractional"`` K−L = wh+1, an image
    worth wh tokens (mm-fractional). Raises ValueError unless h, w ≥ 1, or for an unknown form.
    Source: https://kexue.fm/archives/10040
    """
    if h < 1 or w < 1:
        raise ValueError(f"image needs h>=1 and w>=1, got h={h}, w={w}")
    forms = {"integer": (w + 1) * (h + 1), "minimal": lcm(w + 1, h + 1), "fractional": w * h + 1}
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
    span = Fraction(forms[form])
    return span / (h + 1), span / (w + 1), span


def unified_offsets(sizes: Sequence[int], gammas: Sequence[Fraction | float], N: int) -> tuple[Fraction, ...]:
    """Offsets that make a grid worth N tokens symmetric: β_a = (N + 1 − (n_a + 1)γ_a)/2   (mm-unified)

    Patch (i_1, …) with 1 ≤ i_a ≤ n_a stands at L + β_a + i_a γ_a on axis a, and K = L + N + 1.
    Raises ValueError where a grid does not fit between L and K: it needs n_a ≥ 1, γ_a > 0 and
    (n_a − 1)γ_a < N + 1.
    Source: https://kexue.fm/archives/10352
    """
    offsets = []
    for n, gamma in zip(sizes, map(Fraction, gammas), strict=True):
        if n < 1:
            raise ValueError(f"sizes must be at least 1, got {n}")
        if not 0 < gamma or not (n - 1) * gamma < N + 1:
            raise ValueError(f"gammas must satisfy 0 < (n - 1) * gamma < N + 1 = {N + 1} for n = {n}, got {gamma}")
        offsets.append((N + 1 - (n + 1) * gamma) / 2)
    return tuple(offsets)


def tv_offsets(*sizes: int) -> tuple[Fraction, ...]:
    """Offsets of RoPE-TV, unit steps and worth N = ∏ n_a: β_a = (N − n_a)/2   (mm-tv; three sizes: mm-video)

    For h, w: ((wh − h)/2, (wh − w)/2). Source: https://kexue.fm/archives/10352
    """
    return unified_offsets(sizes, [1] * len(sizes), prod(sizes))


def _diagonal(n, L, axes):
    return [_ramp(n, L + 1, 1)] * axes, L + n


def _row(n, L, axes):
    """A run of text fills one row of the page; an empty one takes none."""
    rows = min(n, 1)
    return _grid(torch.full((rows,), float(L + 1), dtype=torch.float64), _ramp(n, 1, 1)), L + rows


def _flatten(sizes, step, L):
    N = prod(sizes)
    return [_ramp(N, L + 1, 1)], L + N


def _page(sizes, step, L):
    h, w = sizes
    return _grid(_ramp(h, L + 1, 1), _ramp(w, 1, 1)), L + h


def _naive2d(sizes, step, L):
    return _grid(*(_ramp(n, L + 1, 1) for n in sizes)), L + max(sizes)


def _tie(sizes, step, L, form):
    *scales, span = tie_scales(*sizes, form=form)
    return _grid(*(_ramp(n, L + s, s) for n, s in zip(sizes, scales, strict=True))), L + span - 1


def _tv(sizes, step, L, axes):
    N = prod(sizes)
    gammas = (Fraction(step), 1, 1)[-axes:]
    offsets = unified_offsets(sizes, gammas, N)
    ramps = (_ramp(n, L + beta + gamma, gamma) for n, beta, gamma in zip(sizes, offsets, gammas, strict=True))
    return _grid(*ramps), L + N


def _mrope(sizes, step, L, counted):
    t, h, w = sizes
    # float32, as in the models: there some products i·step are rounded up to an integer.
    frames = (torch.arange(t, dtype=torch.float32) * step).floor().to(torch.float64) + float(L + 1)
    ramps = (frames, _ramp(h, L + 1, 1), _ramp(w, L + 1, 1))
    return _grid(*ramps), max(Fraction(ramp[-1].item()) for ramp in ramps[counted:])


SCHEMES = {
    "flatten": Scheme(1, _flatten, _diagonal, video=True),
    "page": Scheme(2, _page, _row),
    "naive2d": Scheme(2, _naive2d, _diagonal),
    "tie": Scheme(2, partial(_tie, form="integer"), _diagonal),
    "tie_frac": Scheme(2, partial(_tie, form="fractional"), _diagonal),
    "tie_min": Scheme(2, partial(_tie, form="minimal"), _diagonal),
    "tv": Scheme(2, partial(_tv, axes=2), _diagonal),
    "tv3": Scheme(3, partial(_tv, axes=3), _diagonal, video=True),
    "mrope": Scheme(3, partial(_mrope, counted=0), _diagonal, video=True),
    "mrope_hw": Scheme(3, partial(_mrope, counted=1), _diagonal, video=True),
}
