"""The fused step: at most four Triton launches for all tensors together, whatever their number.

    reduce   Σθ² and "a bad entry?" of every chunk      reads θ where the rule is "rms", g where it is guarded
    rows     RMS of every row of the embeddings         reads θ
    decide   of every tensor: is g good, β or 1, η      reads the parts
    update   m, and θ at the end of a cycle             reads g, m, (θ), writes m, (θ)

Separate passes, not one kernel whose programs wait for each other: with sharded parameters the sums must leave the
kernel between them anyway, and no order of execution is assumed. The update goes through the chunks backwards,
beginning with what the reduction has left in the cache.
"""

import os
import struct
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from .reductions import all_reduce, is_sharded, local, sharded_dims

BLOCK, ROWS, ROW_BLOCK, PARTS = 2048, 8, 256, 1024
WARPS = 8
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_RULES = {"none": 0, "half": 1, "rms": 2, "row_rms": 3}
_POLICIES = {"off": 0, "raise": 0, "skip": 1, "shrink": 2, "official": 3}
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs on any device


def supports(p: Tensor, group: dict) -> bool:
    """Whether the kernels can update this parameter."""
    if not _HAS_TRITON or not (p.is_cuda or _INTERPRETED) or p.dtype not in _DTYPES or group["lazy_rows"]:
        return False
    if group["momentum_dtype"] not in (None, *_DTYPES):
        return False
    by_rows = group["lr_scale"] == "row_rms"
    if is_sharded(p) and by_rows and any(p.placements[i].dim in (-1, p.ndim - 1) for i in sharded_dims(p)):
        return False
    x = local(p)
    return x.is_contiguous() or (not by_rows and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


class Tables:
    """What the kernels read besides the tensors, kept from step to step: addresses, sizes, the list of chunks."""

    def __init__(self):
        self.layouts, self.spare, self.captured = {}, None, []

    def layout(self, sizes, device, acc):
        """Chunks and scratch for tensors of these (size, row, by rows)."""
        key = (sizes, device, acc)
        if key not in self.layouts:
            self.layouts[key] = _Layout(sizes, device, acc)
        return self.layouts[key]

    def upload(self, layout, rows, settings, device):
        """Addresses and settings on the device; copied only when they have changed."""
        content = (tuple(rows), tuple(settings))
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if layout.content != content:
            floats = struct.unpack(f"{len(settings)}q", struct.pack(f"{len(settings)}d", *settings))
            values = torch.tensor((*rows, *floats), dtype=torch.int64)
            # Memory that is still being read may not be written again: the allocator sees to it, except in a capture,
            # whose graph reads it at every replay.
            host = self.spare if capturing else None
            if host is None or len(host) < len(values):
                host = torch.empty(len(values), dtype=torch.int64, pin_memory=device.type == "cuda")
            elif capturing:
                self.spare = None
            host[: len(values)].copy_(values)
            if capturing:
                self.captured.append(host)
            elif device.type == "cuda" and self.spare is None:
                self.spare = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
            table = host[: len(values)].to(device, non_blocking=True, copy=True)
            layout.content = None if capturing else content  # a captured copy has not happened yet
            layout.tables = table[: len(rows)], table[len(rows) :].view(torch.float64)
        if capturing:
            self.captured.append(layout.tables)
        return layout.tables


class _Layout:
    def __init__(self, sizes, device, acc):
        counts = [-(-size // BLOCK) for size, _, _ in sizes]
        row_counts = [size // row if by_rows else 0 for size, row, by_rows in sizes]
        self.chunks = _pairs(counts, device)
        self.row_chunks = _pairs([-(-rows // ROWS) for rows in row_counts], device)
        self.firsts = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32, device=device)
        self.row_bases = [sum(row_counts[:i]) for i in range(len(row_counts))]
        self.square_parts = torch.zeros(len(self.chunks), dtype=acc, device=device)
        self.bad_parts = torch.zeros(len(self.chunks), dtype=torch.int32, device=device)
        self.sums = torch.zeros(len(sizes), dtype=acc, device=device)
        self.bads = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        self.decisions = torch.zeros(len(sizes), 9, dtype=torch.float64, device=device)
        self.row_scales = torch.zeros(max(sum(row_counts), 1), dtype=acc, device=device)
        self.content = self.tables = None


def _pairs(counts, device):
    """(tensor, number of the chunk in it) of every chunk."""
    counts = torch.tensor(counts, dtype=torch.int64)
    t = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number = torch.arange(len(t)) - (counts.cumsum(0) - counts)[t]
    return torch.stack((t, number), 1).to(device=device, dtype=torch.int32)


def fused_step(tables: Tables, batches: list[tuple], verdicts: dict, found_inf=None, grad_scale=None) -> None:
    """One micro-batch of all groups. batches: (group, parameters, gradients or None, ms, pendings)."""
    buckets = {}
    for group, params, grads, ms, pendings in batches:
        for p, g, m, pending in zip(params, grads, ms, pendings, strict=True):
            theta, m = local(p), local(m)
            g = g if g is None else _as(g, p, theta)
            verdict = verdicts.get(p)
            verdict = verdict if isinstance(verdict, Tensor) else None
            entry = (group, p, theta, m, g, pending, verdict)
            aligned = all(x is None or x.data_ptr() % 16 == 0 for x in (theta, m, g))
            kind = (theta.device, theta.dtype, m.dtype, theta.dtype if g is None else g.dtype, aligned)
            buckets.setdefault((*kind, group["stochastic_rounding"]), []).append(entry)
    for kind, entries in buckets.items():
        _launch(tables, kind, entries, found_inf, grad_scale)


def _as(g, p, theta):
    """This rank's part of a gradient, in the memory order of its parameter."""
    if is_sharded(g) and g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    g = local(g)
    return g if g.stride() == theta.stride() else torch.empty_like(theta, dtype=g.dtype).copy_(g)


def _settings(group):
    k, position = group["accumulation_steps"], group["micro_step"]
    weight = (1 - group["beta"]) / k
    lr = 0.0 if isinstance(group["lr"], Tensor) else group["lr"]
    first, last = (0, 0) if isinstance(position, Tensor) else (position == 0, position == k - 1)
    return (lr, group["beta"], -weight if group["maximize"] else weight, group["weight_decay"], group["rms_floor"],
            1 - group["shrink_ratio"], group["center"], group["sign_power"], _RULES[group["lr_scale"]],
            _POLICIES[group["nan_policy"]], first, last)  # fmt: skip


def _launch(tables, kind, entries, found_inf, grad_scale, reverse=True):
    from . import kernels
    from .kernels import tl

    device, t_theta, t_m, t_g, aligned, rounding = kind
    types = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
    types = {dtype: types.get(dtype, tl.float16) for dtype in (t_theta, t_m, t_g)}
    acc = torch.float64 if torch.float64 in types else torch.float32
    groups = list({id(group): group for group, *_ in entries}.values())
    number = {id(group): i for i, group in enumerate(groups)}
    by_rows = [group["lr_scale"] == "row_rms" for group, *_ in entries]
    sizes = tuple(
        (theta.numel(), max(theta.shape[-1], 1) if rows else 1, rows)
        for (_, _, theta, *_), rows in zip(entries, by_rows, strict=True)
    )
    layout = tables.layout(sizes, device, acc)
    rows = []
    for (group, p, theta, m, g, pending, verdict), base, (size, row, _) in zip(
        entries, layout.row_bases, sizes, strict=True
    ):
        addresses = [0 if x is None else x.data_ptr() for x in (theta, m, g, pending, verdict)]
        rows += (*addresses, size, p.numel(), row, base, number[id(group)])
    settings = [x for group in groups for x in _settings(group)]
    address, setting = tables.upload(layout, rows, settings, device)
    for i, group in enumerate(groups):
        _fill_from_device(setting.view(len(groups), -1)[i], group, kernels)

    amp = found_inf is not None
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    common = {"ACC": tl.float64 if acc == torch.float64 else tl.float32, "AMP": amp}
    align = 16 if aligned else 1
    last = any(isinstance(group["micro_step"], Tensor) or group["micro_step"] == group["accumulation_steps"] - 1
               for group in groups)  # fmt: skip
    guarded = not amp and any(_POLICIES[group["nan_policy"]] for group in groups)
    squared = last and any(group["lr_scale"] == "rms" for group in groups)
    found_inf = layout.sums if found_inf is None else found_inf.to(device)
    scaled = grad_scale is not None
    grad_scale = layout.sums if grad_scale is None else grad_scale.to(device)
    seed = torch.randint(0, 1 << 31, (1,), device=device) if rounding else layout.firsts
    n = len(layout.chunks)
    with here:
        if n and (guarded or squared):
            kernels.reduce_kernel[(n,)](
                address, setting, layout.chunks, layout.square_parts, layout.bad_parts, T_THETA=types[t_theta],
                T_G=types[t_g], ALIGN=align, BLOCK=BLOCK, num_warps=WARPS, **common,
            )  # fmt: skip
        if last and len(layout.row_chunks):
            kernels.row_kernel[(len(layout.row_chunks),)](
                address, setting, layout.row_chunks, layout.row_scales, T_THETA=types[t_theta], ACC=common["ACC"],
                ROWS=ROWS, BLOCK=ROW_BLOCK, num_warps=WARPS,
            )  # fmt: skip
        sharded = any(is_sharded(p) for _, p, *_ in entries)
        for stage in (("SUM",), ("DECIDE",)) if sharded else (("SUM", "DECIDE"),):
            kernels.decide_kernel[(len(entries),)](
                address, setting, layout.firsts, layout.square_parts, layout.bad_parts, layout.sums, layout.bads,
                layout.decisions, found_inf, SUM="SUM" in stage, DECIDE="DECIDE" in stage, BLOCK=PARTS,
                num_warps=4, **common,
            )  # fmt: skip
            if stage == ("SUM",):
                params = [p for _, p, *_ in entries]
                layout.sums.copy_(torch.stack(all_reduce(list(layout.sums.unbind()), params, "SUM")))
                layout.bads.copy_(torch.stack(all_reduce(list(layout.bads.unbind()), params, "MAX")))
        if n:
            common["AMP"] = scaled
            kernels.update_kernel[(n,)](
                address, layout.chunks, layout.decisions, layout.row_scales, grad_scale, seed, n,
                T_THETA=types[t_theta], T_M=types[t_m], T_G=types[t_g], ROUND=rounding and t_theta in (
                    torch.bfloat16, torch.float16), POWERS=any(group["sign_power"] for group in groups),
                REVERSED=reverse, ALIGN=align, BLOCK=BLOCK, num_warps=WARPS, **common,
            )  # fmt: skip


def _fill_from_device(row, group, kernels):
    """Settings that live on the device: a learning rate, a position in the cycle."""
    if isinstance(group["lr"], Tensor):
        row[kernels.LR.value].copy_(group["lr"].reshape(()), non_blocking=True)
    if isinstance(group["micro_step"], Tensor):
        position = group["micro_step"]
        row[kernels.FIRST.value].copy_(position == 0)
        row[kernels.LAST.value].copy_(position == group["accumulation_steps"] - 1)
