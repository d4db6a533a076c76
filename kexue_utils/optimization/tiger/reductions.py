"""The two reductions that a step needs of a whole tensor, also where it is sharded: Σθ² and "are all entries finite".

A local shard knows neither: its RMS would differ from rank to rank, and so would the weights of one parameter.
"""

import sys

import torch
from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor (one can exist only once its module is loaded); none is expected under torch.compile."""
    if type(x) in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The part of x that this rank holds; writing to it writes to x."""
    return x.to_local() if is_sharded(x) else x


def sharded_dims(x: Tensor) -> tuple[int, ...]:
    """Mesh dimensions over which a DTensor is split."""
    return tuple(i for i, placement in enumerate(x.placements) if placement.is_shard())


def all_reduce(values: list[Tensor], like: list[Tensor], op: str) -> list[Tensor]:
    """Combine local values (of one shape) over the shards of their tensors: one collective a mesh, not one a tensor."""
    meshes = {}
    for i, x in enumerate(like):
        if is_sharded(x) and sharded_dims(x):
            meshes.setdefault((x.device_mesh, sharded_dims(x)), []).append(i)
    values = list(values)
    for (mesh, dims), members in meshes.items():
        stacked = torch.stack([values[i] for i in members])
        for dim in dims:
            torch.distributed.all_reduce(stacked, getattr(torch.distributed.ReduceOp, op), group=mesh.get_group(dim))
        for i, value in zip(members, stacked.unbind(), strict=True):
            values[i] = value
    return values


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What arithmetic on them is done in: float32 at least, rounded once when it is stored."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _sum_squares(x: Tensor) -> Tensor:
    # In two stages: the CPU's norm of 10⁸ float32 numbers in one go is 0.6 % too small.
    dtype = compute_dtype(x)
    if x.ndim < 2 or torch.compiler.is_compiling():  # the compiler has stages of its own
        return x.to(dtype).square().sum()
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype).square().sum()


def sum_squares(tensors: list[Tensor]) -> list[Tensor]:
    """Σx² of each tensor, 0-d, in float32 or float64, over all shards."""
    parts = [local(x) for x in tensors]
    if parts and parts[0].is_cuda and not torch.compiler.is_compiling():
        norms = torch._foreach_norm(parts, 2, compute_dtype(*parts))  # a tree on the GPU
        sums = torch._foreach_mul(norms, norms)
    else:
        sums = [_sum_squares(x) for x in parts]
    return all_reduce(sums, tensors, "SUM")


def row_mean_squares(x: Tensor) -> Tensor:
    """Mean of squares over the last dimension, kept: (…, 1)."""
    part = local(x)
    means = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=compute_dtype(part)).square() / x.shape[-1]
    if is_sharded(x):
        for dim in sharded_dims(x):
            if x.placements[dim].dim in (-1, x.ndim - 1):
                torch.distributed.all_reduce(means, group=x.device_mesh.get_group(dim))
    return means


def finite(tensors: list[Tensor], nan_only: bool = False) -> list[Tensor]:
    """Whether each tensor, over all shards, has only finite entries (``nan_only``: no NaN); 0-d bools, no sync."""
    parts = [local(x) for x in tensors]
    if len({x.device for x in parts}) != 1:
        return [finite([x], nan_only)[0] for x in tensors]
    if torch.compiler.is_compiling():
        return [~x.isnan().any() if nan_only else x.isfinite().all() for x in parts]
    if parts[0].is_cuda and all(x.numel() for x in parts):
        ends = [torch._foreach_norm(parts, float("inf"))]  # NaN propagates
    else:
        ends = zip(*(x.aminmax() if x.numel() else (x.new_zeros(()),) * 2 for x in parts), strict=True)
    dtype = compute_dtype(*parts)
    ends = [torch.stack([x.to(dtype) for x in end]) for end in ends]
    good = ~ends[0].isnan() if nan_only else torch.stack([end.isfinite() for end in ends]).all(0)
    good = list(good.unbind())
    if any(map(is_sharded, tensors)):
        good = [x.bool() for x in all_reduce([x.int() for x in good], tensors, "MIN")]
    return good
