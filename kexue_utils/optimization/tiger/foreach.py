"""The functions of :mod:`.update` on lists of tensors of one device and dtype, with the same arithmetic."""

import torch
from torch import Tensor

from .reductions import compute_dtype, local, sum_squares
from .update import direction, rate, store_


def select(flags: list[Tensor], yes: Tensor | list[Tensor], no: float) -> list[Tensor]:
    """``yes`` where a flag is set, else ``no``: one kernel for all flags if they are single."""
    if all(flag.ndim == 0 for flag in flags) and (isinstance(yes, Tensor) or all(x.ndim == 0 for x in yes)):
        return list(torch.where(torch.stack(flags), yes if isinstance(yes, Tensor) else torch.stack(yes), no).unbind())
    each = [yes] * len(flags) if isinstance(yes, Tensor) else yes
    return [torch.where(flag, x, no) for flag, x in zip(flags, each, strict=True)]


def accumulate_all_(
    ms: list[Tensor], gs: list[Tensor], pendings: list[Tensor], goods: list[Tensor] | None, *, beta: float,
    accumulation_steps: int, maximize: bool,
) -> None:  # fmt: skip
    """:func:`.update.accumulate_` for every tensor."""
    dtype = compute_dtype(ms[0], gs[0])
    decays = beta
    if pendings[0] is not None:
        fresh = pendings if goods is None else [p & good for p, good in zip(pendings, goods, strict=True)]
        decays = select(fresh, torch.full((), beta, dtype=dtype, device=ms[0].device), 1.0)
    weight = (1 - beta) / accumulation_steps
    weight = -weight if maximize else weight
    xs = [m.to(dtype) for m in ms]
    torch._foreach_mul_(xs, decays)
    if goods is None:
        torch._foreach_add_(xs, gs, alpha=weight)
    else:
        for x, g, good in zip(xs, gs, goods, strict=True):
            x.add_(torch.where(good, g, 0), alpha=weight)
    if xs[0] is not ms[0]:
        torch._foreach_copy_(ms, xs)
    for i, pending in enumerate(pendings if pendings[0] is not None else ()):
        pending.fill_(False) if goods is None else pending.logical_and_(~goods[i])


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
