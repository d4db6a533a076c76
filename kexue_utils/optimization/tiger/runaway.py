"""Where a sign that never changes takes a weight, and how fast; gradient accumulation without cycles.

Sources: https://kexue.fm/archives/9736, https://kexue.fm/archives/8634
"""

import math

import torch
from torch import Tensor

from .options import require_steps


def _require_positive(**values):
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def constant_sign(theta: float, sign: float, eta: float, weight_decay: float, t: Tensor | float) -> Tensor | float:
    """θ_t after t steps of one rate and one sign: θ* + (θ_0 − θ*)(1−ηλ)^t,  θ* = −s/λ   (tiger-fixed-point)

    theta: θ_0; sign: s = sign(m), ±1; eta: η; weight_decay: λ. The time constant is 1/(ηλ).
    Raises ValueError unless eta and weight_decay are positive and every sign is −1, 0 or 1.
    """
    _require_positive(eta=eta, weight_decay=weight_decay)
    if not bool(torch.as_tensor(abs(sign) * (abs(sign) - 1) == 0).all()):
        raise ValueError(f"sign must be -1, 0 or 1, got {sign}")
    bound = -sign / weight_decay
    return bound + (theta - bound) * (1 - eta * weight_decay) ** t


def runaway(r: float, alpha: float, weight_decay: float, steps: int) -> Tensor:
    """|θ| of a row whose entries run away together: r_{t+1} = r_t + αr_t(1 − λr_t)   (tiger-logistic)

    The rule η = α·RMS of the row makes the growth exponential, weight decay bounds it by 1/λ: a discrete logistic
    curve. r: r_0; returns (steps + 1,), float64. Raises ValueError unless r, alpha and weight_decay are positive and
    steps is not negative.
    """
    _require_positive(r=r, alpha=alpha, weight_decay=weight_decay)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    path = [r]
    for _ in range(steps):
        r = r + alpha * r * (1 - weight_decay * r)
        path.append(r)
    return torch.tensor(path, dtype=torch.float64)


def runaway_time(alpha: float, weight_decay: float, r: float, fraction: float) -> float:
    """Steps until |θ| is the fraction f of its bound 1/λ: t ≈ (1/α)·ln(f(1/λ − r_0)/((1−f)r_0))   (tiger-time)

    r: r_0. Of the logistic equation in continuous time; the iteration agrees to O(α).
    Raises ValueError unless all are positive, r < 1/λ and fraction < 1.
    """
    _require_positive(alpha=alpha, weight_decay=weight_decay, r=r, fraction=fraction)
    bound = 1 / weight_decay
    if not r < bound or not fraction < 1:
        raise ValueError(f"r must be below 1/weight_decay = {bound:g} and fraction below 1, got {r} and {fraction}")
    return math.log(fraction * (bound - r) / ((1 - fraction) * r)) / alpha


def smooth_beta(beta: float, accumulation_steps: int) -> float:
    """β of an average over every micro-batch that forgets as fast as one over cycles: 1 − (1−β)/k   (tiger-smooth)

    Over a cycle it is β + (k−1)/(2k)·(1−β)² + O((1−β)³). Raises ValueError for β outside [0, 1) or a k that is not a
    positive integer.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    require_steps(accumulation_steps)
    return 1 - (1 - beta) / accumulation_steps
