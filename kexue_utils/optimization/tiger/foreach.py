"""The functions of :mod:`.update` on lists of tensors of one device and dtype, with the same arithmetic."""

from collections.abc import Callable

import torch
from torch import Tensor

from .reductions import compute_dtype, local, sum_squares
from .update import direction, rate, store_


def lift(function: Callable[..., Tensor], *lists: list[Tensor]) -> list[Tensor]:
    """function of the i-th flag or number of each list, for every i: in one go if all are single."""
    if len(lists[0]) > 1 and all(x.ndim == 0 for each in lists for x in each):
        return list(function(*map(torch.stack, lists)).unbind())
    return [function(*each) for each in zip(*lists, strict=True)]


def accumulate_all_(
    ms: list[Tensor], gs: list[Tensor], pendings: list[Tensor | None], goods: list[Tensor] | None, *, beta: float,
    accumulation_steps: int, maximize: bool,
) -> None:  # fmt: skip
    """:func:`.update.accumulate_` for every tensor."""
    dtype, decays = compute_dtype(ms[0], gs[0]), beta
    flagged = pendings[0] is not None
    if flagged:
        fresh = pendings if goods is None else lift(torch.logical_and, pendings, goods)
        once = torch.full((), beta, dtype=dtype, device=ms[0].device)
        decays = lift(lambda flag: torch.where(flag, once, 1.0), fresh)
    weight = (1 - beta) / accumulation_steps
    weight = -weight if maximize else weight
    xs = [m.to(dtype) for m in ms]
    torch._foreach_mul_(xs, decays)
    if goods is None:
        torch._foreach_add_(xs, gs, alpha=weight)
    else:
        zero = gs[0].new_zeros(())
        for x, g, good in zip(xs, gs, goods, strict=True):
            x.add_(torch.where(good, g, zero), alpha=weight)
    if xs[0] is not ms[0]:
        torch._foreach_copy_(ms, xs)
    if flagged and goods is None:
        torch._foreach_zero_(pendings)
    elif flagged:
        torch._foreach_copy_(pendings, lift(lambda flag, good: flag & ~good, pendings, goods))


def shrink_all_(thetas: list[Tensor], goods: list[Tensor], ratio: float, center: float) -> None:
    """:func:`.update.shrink_` for every tensor."""
    thetas = [local(theta) for theta in thetas]
    dtype = compute_dtype(thetas[0])
    xs, zero = [theta.to(dtype) for theta in thetas], torch.zeros((), dtype=dtype, device=thetas[0].device)
    weights = lift(lambda good: torch.where(good, zero, 1 - ratio), goods)
    torch._foreach_lerp_(xs, [zero + center] * len(xs), weights)
    for theta, x in zip(thetas, xs, strict=True):
        store_(theta, x, False)


def rates(thetas: list[Tensor], lr: float | Tensor, lr_scale: str, rms_floor: float) -> list[float | Tensor]:
    """:func:`.update.rate` of every tensor."""
    if lr_scale != "rms":
        return [rate(theta, lr, lr_scale, rms_floor) for theta in thetas]
    sizes = torch._foreach_mul(sum_squares(thetas), [1 / max(theta.numel(), 1) for theta in thetas])
    sizes = torch._foreach_clamp_min(torch._foreach_sqrt(sizes), rms_floor)
    return list(torch._foreach_mul(sizes, lr.to(sizes[0].dtype) if isinstance(lr, Tensor) else lr))


def step_all_(
    thetas: list[Tensor], ms: list[Tensor], etas: list[Tensor], *, weight_decay: float, sign_power: float,
    stochastic_rounding: bool,
) -> None:  # fmt: skip
    """:func:`.update.step_` for every tensor."""
    thetas, ms = [local(theta) for theta in thetas], [local(m) for m in ms]
    dtype = compute_dtype(thetas[0], ms[0])
    xs, moments = [theta.to(dtype) for theta in thetas], [m.to(dtype) for m in ms]
    us = torch._foreach_sign(moments) if sign_power == 0 else [direction(m, sign_power) for m in moments]
    if weight_decay:
        torch._foreach_add_(us, xs, alpha=weight_decay)
    torch._foreach_addcmul_(xs, us, etas, value=-1)
    for theta, x in zip(thetas, xs, strict=True):
        store_(theta, x, stochastic_rounding)
