"""RoPE on positions with several axes: every plane ℓ turns by the angle ω_ℓ·p of a frequency vector ω_ℓ.

Axial codes have one non-zero entry in each ω_ℓ; with the frequencies of RoPE-1D, whatever the axes, a position
(n, …, n) is then rotated exactly as RoPE-1D rotates n.
Sources: https://kexue.fm/archives/8397, https://kexue.fm/archives/10040
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kexue_utils.position.rope_base_beta import rope_tables, rotate


def frequency_partition(dim: int, axes: int, *, how: str = "interleaved", sections: Sequence[int] | None = None
                        ) -> Tensor:  # fmt: skip
    """The axis a(j) of every pair j of features, (dim/2,) int64   (mm-compatible, mm-partition)

    sections: pairs for each axis, by default as equal as can be, the first axes one more.
    how ``"interleaved"``: 0, 1, …, 0, 1, …, where an axis that has all its pairs is left out (Qwen3-VL, whose sections
    [24, 20, 20] end in 0, 0, 0, 0); ``"chunked"``: 0, …, 0, 1, …, 1, … (Qwen2-VL, [16, 24, 24]).
    Raises ValueError for an odd dim, axes < 1, an unknown how, or sections that are not `axes` numbers ≥ 0 with the
    sum dim/2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be a positive multiple of 2, got {dim}")
    if axes < 1:
        raise ValueError(f"axes must be at least 1, got {axes}")
    if how not in ("interleaved", "chunked"):
        raise ValueError(f"how must be 'interleaved' or 'chunked', got {how!r}")
    if sections is None:
        sections = torch.arange(dim // 2).remainder(axes).bincount(minlength=axes).tolist()
    if len(sections) != axes or min(sections) < 0 or sum(sections) != dim // 2:
        raise ValueError(
            f"sections must be {axes} numbers >= 0 with the sum dim/2 = {dim // 2}, got {list(sections)} "
            f"with the sum {sum(sections)}"
        )
    axis = torch.arange(axes).repeat_interleave(torch.tensor(sections))
    if how == "chunked":
        return axis
    rank = torch.cat([torch.arange(n) for n in sections])
    return axis[rank.argsort(stable=True)]


def axial_frequencies(inv_freq: Tensor, axis_of_pair: Tensor, axes: int) -> Tensor:
    """The frequency matrix (axes, D): θ_j in row a(j) of column j and 0 elsewhere   (mm-axial)

    inv_freq: θ, (D,), its dtype and device are kept; axis_of_pair: (D,) from :func:`frequency_partition`. Raises
    ValueError for other shapes, or an axis that is not in 0, …, axes − 1.
    """
    if inv_freq.ndim != 1 or axis_of_pair.shape != inv_freq.shape:
        shapes = f"{tuple(inv_freq.shape)} and {tuple(axis_of_pair.shape)}"
        raise ValueError(f"inv_freq and axis_of_pair must both have shape (D,), got {shapes}")
    if not set(axis_of_pair.tolist()) <= set(range(axes)):
        raise ValueError(f"axis_of_pair must be in 0..{axes - 1}, got {sorted(set(axis_of_pair.tolist()))}")
    row = torch.arange(axes, device=inv_freq.device)[:, None]
    return torch.where(row == axis_of_pair.to(inv_freq.device), inv_freq, 0)


def rope_nd_tables(positions: Tensor, frequencies: Tensor, *, layout: str = "half",
                   dtype: torch.dtype = torch.float64, factor: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(cos, sin) of the angles ω_ℓ·p, for :func:`~kexue_utils.position.rope_base_beta.rotate`   (mm-general)

    positions: (A, T) or (B, A, T); frequencies: ω, (A, D), on the same device; dtype and factor as in
    :func:`~kexue_utils.position.rope_base_beta.rope_tables`: angles are formed in float64. One call serves the
    queries and keys of every layer. Raises ValueError unless both have the same A.
    """
    if positions.ndim not in (2, 3) or frequencies.ndim != 2 or positions.shape[-2] != len(frequencies):
        shapes = f"{tuple(positions.shape)} and {tuple(frequencies.shape)}"
        raise ValueError(f"positions (A, T) or (B, A, T) and frequencies (A, D) must have the same A, got {shapes}")
    angle = positions.to(torch.float64).mT @ frequencies.to(torch.float64)
    # Position 1 at the frequency "angle": the product with 1 is exact.
    return rope_tables(angle.new_ones(1), angle, layout=layout, dtype=dtype, factor=factor)


def rope_nd(x: Tensor, positions: Tensor, frequencies: Tensor, *, layout: str = "half") -> Tensor:
    """Rotate every plane ℓ of x by its angle ω_ℓ·p: y = 𝓡_p x, and 𝓡_p^⊤ 𝓡_p' = 𝓡_{p'−p}   (mm-general)

    x: (..., T, dim), any floating dtype, kept; positions: (A, T), or (B, A, T) for x (B, ..., T, dim), the same for
    all heads; frequencies: ω, (A, D), 2D ≤ dim: :func:`axial_frequencies`, or any others, learned ones too. Features
    from 2D on are returned as they are. With axial frequencies and all axes equal, this is bit by bit ``apply_rope``
    with the column sums of ω. Raises as :func:`rope_nd_tables` and ``rotate``.
    """
    return rotate(x, *rope_nd_tables(positions, frequencies, layout=layout, dtype=x.dtype), layout=layout)
