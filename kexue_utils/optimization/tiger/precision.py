"""What few bits do to a sign step: moments that never reach zero, steps that change nothing.

Sources: https://kexue.fm/archives/9512, https://kexue.fm/archives/9736
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def _bits(dtype: torch.dtype) -> tuple[int, int]:
    """Bits p of the significand and exponent e of the smallest normal number 2^e."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
    info = torch.finfo(dtype)
    return 1 - round(math.log2(info.eps)), round(math.log2(info.smallest_normal))


def momentum_stall(beta: float, dtype: torch.dtype) -> int:
    """Where a momentum without gradients stops: the largest q with fl(βq) = q, about 1/(2(1−β))   (tiger-stall)

    In units of the smallest subnormal number of ``dtype``. From there m ← βm changes nothing, so that sign(m) lasts
    for ever: (1−β)q ≤ ½ rounds back to q (at ½ if q is even). β and the product are in float32 (float64 for float64),
    as :class:`Tiger` has them; gradual underflow, to nearest even.
    Raises ValueError for β outside [0, 1), and for β so close to 1 that m does not decay at any size.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    p, _ = _bits(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = Fraction(torch.tensor(beta, dtype=wide).item())
    if 2 * (1 - exact) * (2**p - 1) <= 1:
        raise ValueError(f"beta must be below 1 - 2**-{p + 1} for {dtype}: m stalls at any size, got {beta}")
    q = math.ceil(1 / (2 * (1 - exact))) + 1
    while q and _product(exact, q, wide, dtype) != q:
        q -= 1
    return q


def _product(beta, q, wide, dtype):
    """fl(βq) for an integer q of the smallest numbers of ``dtype``."""
    if dtype != wide:  # the product is rounded to 24 bits before
        return round(Fraction(torch.tensor(float(beta * q), dtype=torch.float32).item()))
    return round(beta * q)


def absorbed(theta: Tensor, step: Tensor | float) -> Tensor:
    """Whether fl(θ − s) = θ, by the rule: |s| < ulp(θ)/2, or = ulp(θ)/2 with an even last bit   (tiger-absorption)

    ulp is the distance to the next number on the side that the step goes to: half as large from a power of two
    towards zero. theta: any floating dtype and shape; step: exact in float64. Returns bool.
    """
    p, lowest = _bits(theta.dtype)
    x, step = theta.double(), torch.as_tensor(step, dtype=torch.float64, device=theta.device)
    fraction, exponent = torch.frexp(x.abs())
    exponent = torch.where(x == 0, lowest, exponent - 1).clamp_min(lowest)  # |θ| in [2^e, 2^(e+1)), or subnormal
    inward = (step * x > 0) & (fraction == 0.5) & (exponent > lowest)
    ulp = torch.ldexp(torch.ones_like(x), exponent - p + 1)
    even = torch.remainder(x.abs() / ulp, 2) == 0
    half = torch.where(inward, ulp / 4, ulp / 2)
    return (step.abs() < half) | ((step.abs() == half) & even)


def frozen_fraction(alpha: float, sd: float, dtype: torch.dtype) -> float:
    """Fraction of N(0, sd²) weights, stored in ``dtype``, that a step η = α·sd does not change   (tiger-frozen)

    Exact integral over the binades [2^e, 2^{e+1}): all is absorbed where η < 2^{e−p}, half of it at equality, nothing
    below; of the weights that round to 2^e itself, those that move inwards follow the binade below.
    Raises ValueError unless alpha and sd are positive and finite.
    """
    if not (0 < alpha < math.inf and 0 < sd < math.inf):
        raise ValueError(f"alpha and sd must be positive and finite, got {alpha} and {sd}")
    p, lowest = _bits(dtype)
    eta, total = alpha * sd, 0.0

    def below(x):
        return math.erf(x / (sd * math.sqrt(2)))  # P(|θ| < x)

    def absorbs(e, tie):
        half = 2.0 ** (max(e, lowest) - p)
        return tie if eta == half else float(eta < half)

    for e in range(lowest, math.ceil(math.log2(40 * sd)) + 1):
        spacing = 2.0 ** (e - p + 1)
        edge = 2.0**e - (spacing / 4 if e > lowest else spacing / 2)  # what rounds to 2^e
        at = below(2.0**e + spacing / 2) - below(edge)
        inside = below(2.0 ** (e + 1) - spacing / 2) - below(2.0**e + spacing / 2)
        total += inside * absorbs(e, 0.5) + at / 2 * (absorbs(e, 1.0) + absorbs(e - 1, 1.0))
    return total + below(2.0**lowest - 2.0 ** (lowest - p)) * absorbs(lowest, 0.5)


def adam_displacement(beta1: float = 0.9, beta2: float = 0.999) -> float:
    """Path of Adam after one isolated gradient, late in training, in steps η   (tiger-adam)

        (1−β₁)/√(1−β₂) · Σ_t (β₁/√β₂)^t = (1−β₁)/√(1−β₂) / (1 − β₁/√β₂)

    31.8 at the usual values. Tiger's is one step for every step, without bound.
    Raises ValueError unless 0 ≤ β₁ < √β₂ < 1.
    """
    if not 0 <= beta1 < math.sqrt(max(beta2, 0.0)) < 1:
        raise ValueError(f"beta1 and beta2 must satisfy 0 <= beta1 < sqrt(beta2) < 1, got {beta1} and {beta2}")
    return (1 - beta1) / math.sqrt(1 - beta2) / (1 - beta1 / math.sqrt(beta2))
