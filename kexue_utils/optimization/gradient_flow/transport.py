"""Optimal transport on a line: in one dimension the best plan is the monotone one.

Source: https://kexue.fm/archives/9660; F. Santambrogio, arXiv:1609.03890
"""

import torch
from torch import Tensor


def w2_1d(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Squared distance W₂² of samples on a line: ∫₀¹(Q_x(u) − Q_y(u))²du, exactly   (gf-w2)

    x: (..., n), y: (..., m), any floating dtype; a, b: their weights, same shapes, not negative, normalised here, None
    for equal ones. Returns (...). O(n log n): two sorts if n = m without weights, else the steps of both distribution
    functions merged. Differentiable. Raises ValueError for no samples, weights of another shape, and for weights
    that are negative, not finite, or sum to 0.
    """
    if x.shape[-1] == 0 or y.shape[-1] == 0:
        raise ValueError(f"x and y must have samples, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if a is None and b is None and x.shape[-1] == y.shape[-1]:
        return (x.sort(-1).values - y.sort(-1).values).square().mean(-1)
    (x, a), (y, b) = _distribution("a", x, a), _distribution("b", y, b)
    batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    x, a, y, b = (tensor.expand(*batch, -1).contiguous() for tensor in (x, a, y, b))
    levels = torch.cat((a, b), -1).sort(-1).values
    du = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    return (du * (_quantile(x, a, levels) - _quantile(y, b, levels)).square()).sum(-1)


def _distribution(name, x, weights):
    """Sorted samples and the distribution function after each."""
    if weights is None:
        weights = torch.ones_like(x)
    if weights.shape != x.shape:
        raise ValueError(f"{name} must have the shape of its samples, {tuple(x.shape)}, got {tuple(weights.shape)}")
    total = weights.sum(-1, keepdim=True)
    if not ((weights >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError(f"{name} must be finite weights that are not negative and do not sum to 0")
    x, order = x.sort(-1)
    return x, (weights / total).gather(-1, order).cumsum(-1)


def _quantile(x, cdf, levels):
    index = torch.searchsorted(cdf, levels).clamp(max=x.shape[-1] - 1)  # rounding may leave the last level above 1
    return x.gather(-1, index)
