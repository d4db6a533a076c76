"""One tensor's update, step by step: the functions that the loop calls and that every faster path must agree with.

Source: 《Tiger：一个“抠”到极致的优化器》, Jianlin Su, https://kexue.fm/archives/9512
"""

import math

import torch
from torch import Tensor

from .reductions import compute_dtype, local, row_mean_squares, sum_squares

LR_SCALES = ("rms", "row_rms", "half", "none")


def rms(theta: Tensor, rows: bool = False) -> Tensor:
    """Root mean square: RMS(θ) = √((1/N) Σ θ_i²)   (tiger-rms)

    rows: of each row (last dimension, kept), as for an embedding. Returns float32, float64 for float64; 0-d, or
    (…, 1) for rows. For a DTensor the mean is over all shards.
    """
    if rows:
        return row_mean_squares(theta).sqrt()
    return (sum_squares([theta])[0] * (1 / max(theta.numel(), 1))).sqrt()


def rate(theta: Tensor, lr: float | Tensor, lr_scale: str = "rms", rms_floor: float = 0.0) -> float | Tensor:
    """Learning rate of one parameter: η = α·RMS(θ), α·RMS of each row, α/2 or α   (tiger-rate)

    lr: α. lr_scale: ``"rms"`` (matrices), ``"row_rms"`` (embeddings), ``"half"`` (biases, gains of norms), ``"none"``.
    rms_floor: what RMS(θ) is replaced by where it is smaller; with 0 a zero parameter never moves.
    Raises ValueError for another lr_scale.
    """
    if lr_scale not in LR_SCALES:
        raise ValueError(f"lr_scale must be one of {', '.join(LR_SCALES)}, got {lr_scale!r}")
    if lr_scale == "none":
        return lr
    if lr_scale == "half":
        return 0.5 * lr
    size = rms(theta, lr_scale == "row_rms").clamp_min(rms_floor)
    return size * (lr.to(size.dtype) if isinstance(lr, Tensor) else lr)


def direction(m: Tensor, sign_power: float = 0.0) -> Tensor:
    """u = sign(m)·|m|^e   (tiger-family)

    sign_power: e = 1 − γ; 0 is Tiger, 1 momentum SGD. sign(0) = 0 for every e. Raises ValueError for e outside [0, 1].
    """
    if not 0 <= sign_power <= 1:
        raise ValueError(f"sign_power must be in [0, 1], got {sign_power}")
    if sign_power == 0:
        return m.sign()
    return m.sign() * m.abs() ** sign_power


def accumulate_(
    m: Tensor, g: Tensor, pending: Tensor | None = None, good: Tensor | None = None, *, beta: float,
    accumulation_steps: int = 1, maximize: bool = False, consume: bool = False,
) -> None:  # fmt: skip
    """One micro-batch into the momentum: m ← [(β−1)χ + 1]·m + (1−β)/k·g   (tiger-accumulation)

    χ is ``pending``, set at the start of a cycle of k = ``accumulation_steps`` gradients and cleared here: m decays
    once a cycle, at its first good gradient, and receives 1/k of each. A gradient that is not ``good`` changes
    nothing. In place. m, g: any shape; pending, good: bool, 0-d or one for each row, (rows, 1, …); pending None: always
    set, for k = 1. consume: g may be written to, which saves a copy of it.
    """
    dtype, decay = compute_dtype(m, g), beta
    if pending is not None:
        fresh = pending if good is None else pending & good
        decay = torch.where(fresh, torch.full((), beta, dtype=dtype, device=m.device), 1.0)
    weight = (1 - beta) / accumulation_steps
    if good is not None:
        g = g.masked_fill_(~good, 0) if consume else torch.where(good, g, 0)
    x = m.to(dtype)
    x.mul_(decay).add_(g, alpha=-weight if maximize else weight)
    if x is not m:
        m.copy_(x)
    if pending is not None:
        pending.fill_(False) if good is None else pending.logical_and_(~good)


def shrink_(theta: Tensor, good: Tensor, ratio: float, center: float = 0.0) -> None:
    """After a bad gradient: θ ← (θ − c)·s + c   (tiger-nan)

    good: 0-d bool; nothing changes where it is True. ratio: s; center: c, 1 for the gain of a norm, else 0. In place.
    """
    theta = local(theta)
    dtype = compute_dtype(theta)
    weight = torch.where(good, torch.zeros((), dtype=dtype, device=theta.device), 1 - ratio)
    x = theta.to(dtype)
    x.lerp_(torch.full((), center, dtype=dtype, device=theta.device), weight)
    store_(theta, x, False)


def step_(
    theta: Tensor, m: Tensor, eta: Tensor | float, *, weight_decay: float, sign_power: float = 0.0,
    stochastic_rounding: bool = False,
) -> None:  # fmt: skip
    """θ ← θ − η·(sign(m) + λθ)   (tiger-update)

    eta: η, a number or a tensor that broadcasts. In place, computed in float32 (float64 if θ or m is) and rounded once,
    to nearest or by :func:`stochastic_round`.
    """
    theta, m = local(theta), local(m)
    dtype = compute_dtype(theta, m)
    eta = torch.as_tensor(eta, dtype=dtype, device=theta.device)
    x = theta.to(dtype)
    u = direction(m.to(dtype), sign_power)
    if weight_decay:
        u.add_(x, alpha=weight_decay)
    store_(theta, x.addcmul_(u, eta, value=-1), stochastic_rounding)


def store_(theta: Tensor, x: Tensor, stochastic_rounding: bool) -> None:
    """Round x into θ, unless it is θ."""
    if x is not theta:
        theta.copy_(stochastic_round(x, theta.dtype) if stochastic_rounding else x)


def stochastic_round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in float16 or bfloat16, rounded so that the mean is x: P(up) = (x − ⌊x⌋)/(⌈x⌉ − ⌊x⌋)   (tiger-rounding)

    ⌊x⌋ and ⌈x⌉ are x's neighbours in ``dtype``. x: float32; draws from torch's generator of x's device.
    Other dtypes are cast as usual.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    info = torch.finfo(dtype)
    p = 1 - round(math.log2(info.eps))  # bits of the significand
    exponent = torch.frexp(x.float())[1].clamp_min(round(math.log2(info.smallest_normal)) + 1)
    draw = torch.randint(0, 1 << (24 - p), x.shape, device=x.device).float() / (1 << (24 - p))
    rounded = torch.ldexp((torch.ldexp(x.float(), p - exponent) + draw).floor(), exponent - p)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
