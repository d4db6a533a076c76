"""Averaging the momentum of data-parallel ranks, once a cycle."""

import torch
from torch import Tensor

from .reductions import compute_dtype

BUCKET_BYTES = 1 << 25


def _buckets(tensors: list[Tensor]):
    """Indices of consecutive tensors of one device and dtype, about 32 MiB together."""
    bucket, size, kind = [], 0, None
    for i, x in enumerate(tensors):
        here = (x.device, x.dtype)
        if bucket and (kind != here or size + x.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size, kind = size + x.nbytes, here
    if bucket:
        yield bucket


def average_momentum(states: list[dict[str, Tensor]], betas: list[float], process_group=None) -> None:
    """m ← mean of the ranks' m, in place   (tiger-allreduce)

    states: m and pending of the same parameters on every rank; betas: β of each. A rank that had no good gradient of
    a parameter in this cycle decays its m first, or the mean would mix βm with m. What no rank has a gradient of stays
    exactly as it is. One exchange for all flags, then one a bucket.
    """
    if not states:
        return
    ranks = torch.distributed.get_world_size(process_group)
    ms, pendings = [state["m"] for state in states], [state["pending"] for state in states]
    flags = torch.cat([x.reshape(-1).to(pendings[0].device, torch.int32) for x in pendings])
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN, group=process_group)
    idle = [
        x.view_as(pending).to(pending.device, torch.bool)
        for x, pending in zip(flags.split([x.numel() for x in pendings]), pendings, strict=True)
    ]
    for m, pending, none, beta in zip(ms, pendings, idle, betas, strict=True):
        dtype = compute_dtype(m)
        late = torch.where(pending & ~none, torch.full((), beta, dtype=dtype, device=m.device), 1.0)
        m.copy_(m.to(dtype) * late)
        pending.copy_(none)
    for bucket in _buckets(ms):
        dtype = compute_dtype(ms[bucket[0]])
        flat = torch.cat([ms[i].to(dtype).reshape(-1) for i in bucket])
        torch.distributed.all_reduce(flat, group=process_group)
        flat /= ranks
        for i, mean in zip(bucket, flat.split([ms[i].numel() for i in bucket]), strict=True):
            ms[i].copy_(torch.where(idle[i], ms[i].to(dtype), mean.view(ms[i].shape)))
