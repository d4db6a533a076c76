"""Learning-rate schedules η_1, …, η_T, as float64 tensors (T,).

Each takes T ≥ 1 and its scale α > 0 and raises ValueError otherwise.
Sources: https://kexue.fm/archives/9902, https://kexue.fm/archives/11494
"""

import math
from numbers import Integral

import torch
from torch import Tensor


def _times(T: int, alpha: float) -> Tensor:
    if not isinstance(T, Integral) or T < 1:
        raise ValueError(f"T must be a positive integer, got {T}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    return torch.arange(1, T + 1, dtype=torch.float64)


def constant(T: int, alpha: float = 1.0) -> Tensor:
    """η_t = α   (sgd-constant: α = D/(G√T))"""
    return torch.full_like(_times(T, alpha), alpha)


def inv_sqrt(T: int, alpha: float = 1.0) -> Tensor:
    """η_t = α/√t   (sgd-sqrt: α = D/(√2 G))"""
    return alpha / _times(T, alpha).sqrt()


def inv_t(T: int, alpha: float = 1.0) -> Tensor:
    """η_t = α/t"""
    return alpha / _times(T, alpha)


def polynomial(T: int, alpha: float = 1.0, p: float = 2.0) -> Tensor:
    """η_t = α(1 − t/(T+1))^p, positive up to t = T. Raises ValueError unless p > 0."""
    if not p > 0:
        raise ValueError(f"p must be positive, got {p}")
    return alpha * (1 - _times(T, alpha) / (T + 1)) ** p


def linear_decay(T: int, alpha: float = 1.0) -> Tensor:
    """η_t = α(1 − t/(T+1))   (sgd-linear, sgd-optimal)"""
    return polynomial(T, alpha, 1.0)


def cosine(T: int, alpha: float = 1.0) -> Tensor:
    """η_t = α(1 + cos(πt/(T+1)))/2   (sgd-table)"""
    return alpha * (1 + torch.cos(math.pi * _times(T, alpha) / (T + 1))) / 2


def wsd(T: int, alpha: float = 1.0, decay_frac: float = 0.2) -> Tensor:
    """Warmup-stable-decay without the warmup: η_t = α·min(1, (T+1−t)/(fT+1)), f = ``decay_frac``   (sgd-table)

    Raises ValueError unless 0 ≤ f ≤ 1.
    """
    if not 0 <= decay_frac <= 1:
        raise ValueError(f"decay_frac must lie in [0, 1], got {decay_frac}")
    return alpha * ((T + 1 - _times(T, alpha)) / (decay_frac * T + 1)).clamp(max=1)


def step(T: int, alpha: float = 1.0, *, every: int, factor: float = 0.1) -> Tensor:
    """η_t = α·factor^⌊(t−1)/every⌋. Raises ValueError unless every ≥ 1 and factor > 0."""
    if not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every must be a positive integer, got {every}")
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    return alpha * factor ** ((_times(T, alpha) - 1) // every)


def warmup(base: Tensor, n: int) -> Tensor:
    """The schedule ``base`` (T,) with its first n steps scaled up linearly: η_t·min(1, t/n). Raises unless n ≥ 1."""
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n must be a positive integer, got {n}")
    return base * (_times(len(base), 1.0) / n).clamp(max=1)


def is_nonincreasing(eta: Tensor) -> bool:
    """Whether η_1 ≥ η_2 ≥ …, the hypothesis of the core bound   (sgd-core)"""
    return bool((eta[..., 1:] <= eta[..., :-1]).all())
