"""Rotations of pairs of features by an angle proportional to the position, in both layouts.

``half`` pairs feature j with j + D (GPT-NeoX, Llama in transformers), ``interleaved`` pairs 2j with 2j + 1
(RoFormer, GPT-J). They are the same operator up to a permutation of the features.
Source: https://kexue.fm/archives/8265, arXiv:2104.09864
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = ("half", "interleaved")


def _require_layout(layout):
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def rope_tables(positions: Tensor, inv_freq: Tensor, *, layout: str = "half", dtype: torch.dtype = torch.float64,
                factor: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tables for :func:`rotate`: factor·cos(nθ_j) of shape (..., T, 2D), sin likewise of shape (..., T, D).

    positions: (..., T), integers or floats, any sign; inv_freq: θ, (D,), on the same device. Angles are formed in
    float64 and only the results are cast to ``dtype``: bfloat16 positions are wrong from n = 257 on, and float32
    angles are off by about 6·10⁻⁸·n radians. Raises ValueError for a single number as positions, or an unknown layout.
    """
    _require_layout(layout)
    if positions.ndim == 0:
        raise ValueError("positions must have shape (T,) or (..., T), got ()")
    angle = positions.to(torch.float64)[..., None] * inv_freq.to(torch.float64)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    cos = torch.cat((cos, cos), -1) if layout == "half" else cos.repeat_interleave(2, -1)
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "half") -> Tensor:
    """(x_a, x_b) → (x_a cos − x_b sin, x_b cos + x_a sin) for every pair (a, b) of features   (rope-rotation)

    x: (..., T, dim), any floating dtype, left as it is; cos, sin: from :func:`rope_tables`, with leading dimensions
    that are the first ones of x (those that are missing before T are broadcast). Features from 2D on are returned
    unrotated. Returns the shape and dtype of x, whatever that of the tables; differentiable.
    Raises as :func:`apply_rope`.
    """
    _require_layout(layout)
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if 2 * sin.shape[-1] > x.shape[-1]:
        raise ValueError(f"x must have at least 2 * len(inv_freq) = {2 * sin.shape[-1]} features, got {x.shape[-1]}")
    *batch, T, D = sin.shape
    if sin.ndim > x.ndim or T != x.shape[-2] or any(a not in (1, b) for a, b in zip(batch, x.shape, strict=False)):
        raise ValueError(f"positions must have shape (T,) or (..., T) for x {tuple(x.shape)}, got {(*batch, T)}")
    dim, ones = x.shape[-1], (1,) * (x.ndim - sin.ndim)
    cos, sin = (table.reshape(*batch, *ones, T, -1) for table in (cos, sin))
    pairs, axis = ((2, D), -2) if layout == "half" else ((D, 2), -1)
    x_a, x_b = x[..., : 2 * D].unflatten(-1, pairs).unbind(axis)
    if torch.compiler.is_compiling():  # one fused kernel, where updates in place would be two
        cos = cos.unflatten(-1, pairs).select(axis, 0)
        y = torch.stack((x_a * cos - x_b * sin, x_b * cos + x_a * sin), axis).flatten(-2)
        return torch.cat((y, x[..., 2 * D :]), -1).to(x.dtype)
    y = x * F.pad(cos, (0, dim - 2 * D), value=1.0)
    y_a, y_b = (y[..., : 2 * D].unflatten(-1, pairs).select(axis, i) for i in range(2))
    # In place on the new tensor: fewer passes over memory than joining two halves.
    y_a.addcmul_(x_b, sin, value=-1)
    y_b.addcmul_(x_a, sin)
    return y.to(x.dtype)


def apply_rope(
    x: Tensor, positions: Tensor, inv_freq: Tensor, *, layout: str = "half", inverse: bool = False
) -> Tensor:
    """Rotate every pair of features by its angle nθ_j: y_n = 𝓡_n x_n   (rope-rotation, rope-block)

    x: (..., T, dim), any floating dtype, kept; positions: (T,), or the first dimensions of x followed by T, such as
    (B, T) for x (B, H, T, dim); integers or floats, any sign; inv_freq: θ, (D,), with 2D ≤ dim: the first 2D features
    are rotated, the others returned as they are. ``inverse`` rotates back (𝓡_n^⊤).
    Raises TypeError for an x that is not floating-point; ValueError for 2D > dim, positions that don't fit x, or an
    unknown layout. Source: https://kexue.fm/archives/8265
    """
    cos, sin = rope_tables(positions, inv_freq, layout=layout, dtype=x.dtype)
    return rotate(x, cos, -sin if inverse else sin, layout=layout)


def rope_matrix(n: float, inv_freq: Tensor, layout: str = "half") -> Tensor:
    """𝓡_n as a matrix, (2D, 2D) in float64: blocks [[cos nθ_j, −sin nθ_j], [sin nθ_j, cos nθ_j]]   (rope-block)

    n: any real position. Raises ValueError for an unknown layout.
    """
    _require_layout(layout)
    angle = n * inv_freq.to(torch.float64)
    index = torch.arange(2 * len(angle), device=angle.device)
    if layout == "half":
        a, b = index.view(2, -1)
    else:
        a, b = index.view(-1, 2).T
    matrix = angle.new_zeros(len(index), len(index))
    matrix[a, a] = matrix[b, b] = angle.cos()
    matrix[a, b], matrix[b, a] = -angle.sin(), angle.sin()
    return matrix
