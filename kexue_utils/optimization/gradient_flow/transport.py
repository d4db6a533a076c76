"""Optimal transport on a line: in one dimension the best plan is the monotone one.

Source: https://kexue.fm/archives/9660; F. Santambrogio, arXiv:1609.03890
"""

import numpy as np
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
        return (_sort(x) - _sort(y)).square().mean(-1)
    (x, a), (y, b) = _distribution("a", x, a), _distribution("b", y, b)
    batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    x, a, y, b = (tensor.expand(*batch, -1) for tensor in (x, a, y, b))
    levels = torch.cat((a, b), -1)
    order = _argsort(levels, stable=True)
    levels = levels.gather(-1, order)
    du = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    # How many steps of x, and of y, lie below each level; rounding may leave one distribution's last level above 1.
    from_x = order < x.shape[-1]
    of_x = from_x.cumsum(-1).sub_(from_x.byte())
    of_y = torch.arange(levels.shape[-1], device=levels.device) - of_x
    x, y = (z.gather(-1, index.clamp_(max=z.shape[-1] - 1)) for z, index in ((x, of_x), (y, of_y)))
    return (du * (x - y).square()).sum(-1)


def _distribution(name, x, weights):
    """Sorted samples and the distribution function after each."""
    if weights is None:
        weights = torch.ones_like(x)
    if weights.shape != x.shape:
        raise ValueError(f"{name} must have the shape of its samples, {tuple(x.shape)}, got {tuple(weights.shape)}")
    total = weights.sum(-1, keepdim=True)
    if not ((weights >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError(f"{name} must be finite weights that are not negative and do not sum to 0")
    order = _argsort(x)
    return x.gather(-1, order), (weights / total).gather(-1, order).cumsum(-1)


# On the CPU numpy sorts about ten times faster than torch.


def _in_numpy(x):
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _sort(x):
    return torch.from_numpy(np.sort(x.numpy())) if _in_numpy(x) and not x.requires_grad else x.sort(-1).values


def _argsort(x, stable=False):
    if _in_numpy(x):
        return torch.from_numpy(np.argsort(x.detach().numpy(), kind="stable" if stable else None))
    return x.argsort(dim=-1, stable=stable)
