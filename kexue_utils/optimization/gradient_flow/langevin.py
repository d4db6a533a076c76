"""Langevin sampling: the particles of the Fokker–Planck equation, with and without the correction of their bias.

Sources: https://kexue.fm/archives/9660; G. Roberts, R. Tweedie (1996); A. Wibisono, arXiv:1802.08089
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import require_count, require_positive

METHODS = ("ula", "mala")


class LangevinRun(NamedTuple):
    """samples: (steps // thin, N, d), after thin, 2·thin, … steps; acceptance: share of accepted moves, 0-dim."""

    samples: Tensor
    acceptance: Tensor


def log_proposal(x: Tensor, y: Tensor, g: Tensor, h: float) -> Tensor:
    """log k(x→y) up to a constant, k(x→·) = N(x + hg, 2h), g = ∇log p(x): −|y − x − hg|²/4h   (gf-mala)

    x, y, g: (..., d), which broadcast; returns (...).
    """
    return (y - x - h * g).square().sum(-1) / (-4 * h)


def langevin(
    grad_logp: Callable[[Tensor], Tensor],
    x: Tensor,
    h: float,
    steps: int,
    method: str = "ula",
    logp: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    thin: int = 1,
) -> LangevinRun:
    """N particles of dx = ∇log p dt + √2 dW, in steps of time h   (gf-langevin)

    - ``ula``   x' = x + h∇log p(x) + √(2h) ξ; its stationary law is off by O(h)   (gf-ula)
    - ``mala``  the same proposal y, accepted with min(1, p(y)k(y→x)/p(x)k(x→y)), k as in :func:`log_proposal`:
      p is its stationary law, for every h   (gf-mala)

    x: (N, d), any floating dtype and device, left as it is; grad_logp: (N, d) → (N, d), logp: (N, d) → (N,), up to a
    constant, for ``mala`` only. generator: on the device of x. Nothing is read back before the last step.
    Raises ValueError for another shape or method, a missing logp, h, steps or thin not positive, thin > steps;
    FloatingPointError with the first step (from 1) after which a particle is not finite.
    """
    require_positive(h=h)
    require_count(steps=steps, thin=thin)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point particles of shape (N, d), got {x.dtype}, {tuple(x.shape)}")
    if method == "mala" and logp is None:
        raise ValueError("logp is required for method 'mala'")
    if thin > steps:
        raise ValueError(f"thin must be at most steps = {steps}, got {thin}")
    moves = (_ula if method == "ula" else _mala)(x, h, grad_logp, logp, generator)
    samples = x.new_empty(steps // thin, *x.shape)
    good = torch.zeros((), dtype=torch.int64, device=x.device)
    accepted = torch.zeros((), dtype=torch.float64, device=x.device)
    for step in range(1, steps + 1):
        x, share = next(moves)
        accepted += share
        good += (good == step - 1) & torch.isfinite(x.abs().max())
        if step % thin == 0:
            samples[step // thin - 1] = x
    if good < steps:
        raise FloatingPointError(f"{method} diverges: x is not finite after step {good + 1} of {steps}, h = {h}")
    return LangevinRun(samples, accepted / steps)


def _ula(x, h, grad_logp, logp, generator):
    x, noise = x.clone(), torch.empty_like(x)
    while True:
        noise.normal_(generator=generator)
        x.add_(grad_logp(x), alpha=h).add_(noise, alpha=math.sqrt(2 * h))
        yield x, 1.0


def _mala(x, h, grad_logp, logp, generator):
    g, l = grad_logp(x), logp(x)
    while True:
        noise = torch.empty_like(x).normal_(generator=generator)
        y = x + h * g + math.sqrt(2 * h) * noise
        g_y, l_y = grad_logp(y), logp(y)
        ratio = l_y - l + log_proposal(y, x, g_y, h) - log_proposal(x, y, g, h)
        accept = torch.empty_like(l).uniform_(generator=generator).log() < ratio  # never, if it is nan
        x, g = (torch.where(accept[:, None], new, old) for new, old in ((y, x), (g_y, g)))
        l = torch.where(accept, l_y, l)
        yield x, accept.double().mean()
