"""One micro-batch of one parameter group without Triton: gradients into m, then at the end of a cycle θ.

``pending`` is a flag a parameter: it has not yet had a good gradient in this cycle. Verdicts say of a gradient whether
it was good; no branch depends on a value on the device.
"""

import torch
from torch import Tensor

from .foreach import accumulate_all_, lift, rates, shrink_all_, step_all_
from .reductions import compute_dtype, finite, is_sharded, local
from .update import accumulate_, rate, shrink_, step_

BUCKETS = {"cpu": 1 << 22}  # elements that foreach takes at once, by type of device
BUCKET = 1 << 26


def consume(group, params, grads, ms, pendings, known, found_inf=None, grad_scale=None, free=False):
    """Gradients into m. Returns verdicts (None: no gradient; True: good, or not tested), and whether all is plain.

    known: verdicts on gradients that were consumed before; free: the gradients will not be needed again. Plain is a
    cycle of one micro-batch in which nothing can be missing: flags need not be looked at, and are left as they are.
    """
    verdicts = [known.get(p) for p in params] if known else [None] * len(params)
    members = [i for i, g in enumerate(grads) if g is not None]
    if not members:
        return verdicts, False
    gs = [dense(grads[i]) for i in members]
    goods = None
    if found_inf is not None:
        goods = [(found_inf == 0).reshape(()).to(g.device) for g in gs]
    elif group["nan_policy"] in ("shrink", "skip", "official"):
        goods = finite(gs, nan_only=group["nan_policy"] == "official")
    if goods is not None and group["nan_policy"] != "official" and _on_host(gs) and all(goods):
        goods = None
    ms, pendings = [local(ms[i]) for i in members], [pendings[i] for i in members]
    gs = [_like(g, params[i]) for g, i in zip(gs, members, strict=True)]
    if grad_scale is not None:
        gs = [g.to(compute_dtype(g)) * grad_scale.to(g.device).reciprocal() for g in gs]
    if group["nan_policy"] == "official":
        first = group["micro_step"] == 0
        for pending in pendings:
            pending.copy_(first) if isinstance(first, Tensor) else pending.fill_(first)
    for j, i in enumerate(members):
        before = verdicts[i]
        good = True if goods is None else goods[j]
        verdicts[i] = good if before is None or before is True else before & good
    plain = goods is None and len(members) == len(params) and not (known or free or group["lazy_rows"])
    plain = plain and group["accumulation_steps"] == 1 and group["nan_policy"] != "official"
    if plain:
        pendings = [None] * len(params)
    if group["lazy_rows"]:
        rows = [(g != 0).flatten(1).any(1).reshape(p.shape) for g, p in zip(gs, pendings, strict=True)]
        goods = rows if goods is None else [row & good for row, good in zip(rows, goods, strict=True)]
    options = {name: group[name] for name in ("beta", "accumulation_steps", "maximize")}
    if group["foreach"] is not False and not free:
        for bucket in _buckets(ms, gs):
            picked = [[x[j] for j in bucket] if x is not None else None for x in (ms, gs, pendings, goods)]
            accumulate_all_(*picked, **options)
    else:
        for j, m in enumerate(ms):
            accumulate_(m, gs[j], pendings[j], None if goods is None else goods[j], consume=free, **options)
    return verdicts, plain


def finish(group, params, ms, pendings, verdicts, shrinks, plain=False, flush=False):
    """Shrink what had a bad gradient; at the end of a cycle, step what had a good one."""
    policy, last = group["nan_policy"], True if flush else group["micro_step"] == group["accumulation_steps"] - 1
    official, shrinks = policy == "official" and not flush, shrinks and policy in ("shrink", "official")
    foreach = group["foreach"] is not False
    for bucket in _buckets(params, ms) if foreach else ([i] for i in range(len(params))):
        if official:  # only what has a gradient now
            bucket = [i for i in bucket if isinstance(verdicts[i], Tensor)]
        thetas, flags = [params[i] for i in bucket], [pendings[i] for i in bucket]
        if not bucket:
            continue
        # The rate is that of θ before anything happens to it.
        etas = None if last is False else _rates(group, thetas, ms[bucket[0]])
        tested = [i for i in bucket if isinstance(verdicts[i], Tensor)] if shrinks else []
        if foreach and tested:
            bad = [params[i] for i in tested], [verdicts[i] for i in tested]
            shrink_all_(*bad, group["shrink_ratio"], group["center"])
        else:
            for i in tested:
                shrink_(params[i], verdicts[i], group["shrink_ratio"], group["center"])
        if last is False:
            continue
        if not plain:
            active = [verdicts[i] for i in bucket] if official else lift(torch.logical_not, flags)
            if isinstance(last, Tensor):
                active = lift(lambda x: x & last.to(x.device), active)
            etas = lift(lambda x, eta: torch.where(x, eta, 0.0), active, etas)
        options = {name: group[name] for name in ("weight_decay", "sign_power", "stochastic_rounding")}
        if foreach:
            step_all_(thetas, [ms[i] for i in bucket], etas, **options)
        else:
            step_(thetas[0], ms[bucket[0]], etas[0], **options)
        if not plain:
            now = torch.as_tensor(last, device=flags[0].device) if isinstance(last, Tensor) else last
            torch._foreach_copy_(flags, lift(lambda x: x | now, flags))  # noqa: B023


def _rates(group, thetas, m):
    """Rates as tensors, without waiting for the device."""
    rule = group["lr"], group["lr_scale"], group["rms_floor"]
    etas = rates(thetas, *rule) if len(thetas) > 1 else [rate(thetas[0], *rule)]
    dtype = compute_dtype(thetas[0], m)
    if isinstance(etas[0], Tensor):
        return [eta.to(device=theta.device, dtype=dtype) for eta, theta in zip(etas, thetas, strict=True)]
    return [torch.full((), etas[0], dtype=dtype, device=thetas[0].device)] * len(etas)


def advance(group):
    """The next position in the cycle."""
    if isinstance(group["micro_step"], Tensor):
        group["micro_step"].add_(1).remainder_(group["accumulation_steps"])
    elif group["accumulation_steps"] > 1:
        group["micro_step"] = (group["micro_step"] + 1) % group["accumulation_steps"]


def _buckets(*lists):
    """Indices of tensors that share device and dtypes, few enough that copies of them are no burden."""
    done, found = [], {}
    for i, row in enumerate(zip(*lists, strict=True)):
        key = (row[0].device, *(x.dtype for x in row))
        bucket, size = found.get(key, ([], 0))
        if bucket and size + row[0].numel() > BUCKETS.get(row[0].device.type, BUCKET):
            done.append(bucket)
            bucket, size = [], 0
        bucket.append(i)
        found[key] = bucket, size + row[0].numel()
    return done + [bucket for bucket, _ in found.values()]


def _on_host(gs):
    """Whether a look at these tensors costs nothing."""
    return not torch.compiler.is_compiling() and all(g.device.type == "cpu" for g in gs)


def dense(g):
    """A sparse gradient as a dense one."""
    return g.coalesce().to_dense() if g.is_sparse else g


def _like(g, p):
    """This rank's part of a gradient, split as its parameter is."""
    if is_sharded(g) and g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    return local(g)
