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
from contextlib import nullcontext
from importlib.util import find_spec
from operator import is_

import numpy as np
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


class Plan:
    """The tensors of a fused step, in buckets of one kind, and what the kernels read besides them.

    Kept from step to step: with a few hundred tensors the host must not take longer to look at them than the GPU to
    update them. :meth:`prepare` sees whether anything but values has changed.
    """

    def __init__(self, batches: list[tuple], tables: "Tables"):
        self.groups = [group for group, *_ in batches]
        self.signature = [_signature(group) for group in self.groups]
        members = {}
        for group, params, grads, ms, pendings, states in batches:
            for p, g, m, pending, state in zip(params, grads, ms, pendings, states, strict=True):
                theta, m = local(p), local(m)
                g = g if g is None else _as(g, p, theta)
                aligned = all(x is None or x.data_ptr() % 16 == 0 for x in (theta, m, g))
                kind = (theta.device, theta.dtype, m.dtype, theta.dtype if g is None else g.dtype, aligned)
                kind = (*kind, group["stochastic_rounding"])
                members.setdefault(kind, []).append((group, p, theta, m, g, pending, state))
        taken = {id(p) for entries in members.values() for _, p, *_ in entries}
        self.absent = [p for group in self.groups for p in group["params"] if id(p) not in taken]
        self.buckets = [_Bucket(kind, entries, tables) for kind, entries in members.items()]

    def prepare(self, param_groups: list[dict], state: dict, verdicts: dict) -> bool:
        """Take up the present gradients; False if the plan does not fit any more."""
        if len(param_groups) != len(self.groups):
            return False
        for group, known, signature in zip(param_groups, self.groups, self.signature, strict=True):
            if group is not known or group["nan_policy"] == "raise" or _signature(group) != signature:
                return False
        if not all(p.grad is None and p not in verdicts for p in self.absent):
            return False
        return all(bucket.prepare(state) for bucket in self.buckets)

    def launch(self, verdicts: dict, found_inf=None, grad_scale=None) -> None:
        """One micro-batch of all groups."""
        for bucket in self.buckets:
            bucket.launch(verdicts, found_inf, grad_scale)


def _signature(group):
    return (len(group["params"]), group["fused"], group["foreach"], group["lazy_rows"], group["lr_scale"],
            group["stochastic_rounding"], group["capturable"])  # fmt: skip


class Tables:
    """Copies small tables to the device without waiting for it."""

    def __init__(self):
        self.spare, self.captured = None, []

    def upload(self, values: np.ndarray, device: torch.device) -> Tensor:
        """An array of 8-byte numbers on the device."""
        values = torch.from_numpy(values)
        if device.type != "cuda":
            return values.clone()
        # Memory that is still being read may not be written again: the allocator sees to it, except in a capture, whose
        # graph reads it at every replay, and where none can be had.
        capturing, size = torch.cuda.is_current_stream_capturing(), values.numel()
        host = None
        if capturing and self.spare is not None and len(self.spare) >= size:
            host, self.spare = self.spare[:size], self.spare[size:]
        if host is None:
            host = torch.empty(size, dtype=torch.int64, pin_memory=True)
        if not capturing and (self.spare is None or len(self.spare) < 8 * size):
            self.spare = torch.empty(16 * size, dtype=torch.int64, pin_memory=True)
        host.view(values.dtype).copy_(values.view(-1))
        table = host.view(values.dtype).to(device, non_blocking=True)
        if capturing:
            self.captured += (host, table)
        return table


class _Bucket:
    def __init__(self, kind, entries, tables):
        self.kind, self.tables = kind, tables
        self.device, t_theta, _, self.t_g, _, _ = kind
        self.acc = torch.float64 if torch.float64 in kind else torch.float32
        self.groups = list({id(group): group for group, *_ in entries}.values())
        number = {id(group): i for i, group in enumerate(self.groups)}
        self.params = [p for _, p, *_ in entries]
        self.states = [state for *_, state in entries]
        self.strides = [theta.stride() for _, _, theta, *_ in entries]
        self.known = [[s[name] for s in self.states] for name in ("m", "pending")]
        self.found = None
        self._take([g for _, _, _, _, g, _, _ in entries])
        self.sharded = any(map(is_sharded, self.params))
        self.base = np.zeros((len(entries), 10), dtype=np.int64)
        counts, row_counts = [], []
        for i, (group, p, theta, m, _, pending, _) in enumerate(entries):
            by_rows, size = group["lr_scale"] == "row_rms", theta.numel()
            row = max(theta.shape[-1], 1) if by_rows else 1
            self.base[i] = (theta.data_ptr(), m.data_ptr(), 0, pending.data_ptr(), 0, size, p.numel(), row,
                            sum(row_counts), number[id(group)])  # fmt: skip
            counts.append(-(-size // BLOCK))
            row_counts.append(size // row if by_rows else 0)
        self.addresses = self.base[:, 0].tolist()
        n, device = len(entries), self.device
        self.chunks, self.row_chunks = _pairs(counts, device), _pairs([-(-rows // ROWS) for rows in row_counts], device)
        firsts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        self.firsts = torch.from_numpy(firsts).to(device)
        self.square_parts = torch.zeros(len(self.chunks), dtype=self.acc, device=device)
        self.bad_parts = torch.zeros(len(self.chunks), dtype=torch.int32, device=device)
        self.sums = torch.zeros(n, dtype=self.acc, device=device)
        self.bads = torch.zeros(n, dtype=torch.int32, device=device)
        self.decisions = torch.zeros(n, 9, dtype=torch.float64, device=device)
        self.row_scales = torch.zeros(max(sum(row_counts), 1), dtype=self.acc, device=device)
        self.content, self.table, self.setting = [None, None], None, None

    def prepare(self, state):
        """Whether only values and the addresses of gradients have changed."""
        if state.get(self.params[0]) is not self.states[0] or state.get(self.params[-1]) is not self.states[-1]:
            return False
        for name, known in zip(("m", "pending"), self.known, strict=True):
            if not all(map(is_, [s[name] for s in self.states], known)):
                return False
        params = [local(p) for p in self.params] if self.sharded else self.params
        if [p.data_ptr() for p in params] != self.addresses:
            return False
        grads = [p.grad for p in self.params]
        if any(g is not None and (g.is_sparse or g.dtype != self.t_g) for g in grads):
            return False
        if self.sharded or [g if g is None else g.stride() for g in grads] != self.strides:
            grads = [g if g is None else _as(g, p, x) for g, p, x in zip(grads, self.params, params, strict=True)]
        return self._take(grads)

    def _take(self, grads):
        """Keep these gradients for the launch; False if they are not aligned as the others were."""
        found = [0 if g is None else g.data_ptr() for g in grads]
        fits = found == self.found or not (self.kind[4] and any(address % 16 for address in found))
        self.gradients, self.found = grads, found
        return fits

    def _upload(self, verdicts):
        """Tables of addresses and of settings, copied where they have changed."""
        found = self.found
        if verdicts:
            known = [verdicts.get(p) for p in self.params]
            found = found + [x.data_ptr() if isinstance(x, Tensor) else 0 for x in known]
        settings = [x for group in self.groups for x in _settings(group)]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if found != self.content[0] or capturing:
            self.base[:, 2] = found[: len(self.params)]
            self.base[:, 4] = found[len(self.params) :] if verdicts else 0
            self.table = self.tables.upload(self.base, self.device)
        if settings != self.content[1] or capturing:
            values = np.array(settings, dtype=np.float64)
            self.setting = self.tables.upload(values, self.device).view(len(self.groups), -1)
        if capturing:
            self.tables.captured.append(self)  # the graph reads what this bucket owns
        # What was copied in a capture is not there before the graph runs.
        self.content = [None, None] if capturing else [found, settings]
        for row, group in zip(self.setting, self.groups, strict=True):
            _fill_from_device(row, group)

    def launch(self, verdicts, found_inf, grad_scale, reverse=True):
        """The kernels, for the gradients that :meth:`prepare` or the constructor saw."""
        from . import kernels

        self._upload(verdicts)
        _, t_theta, t_m, t_g, aligned, rounding = self.kind
        t_theta, t_m, t_g = (_triton_dtype(kernels, x) for x in (t_theta, t_m, t_g))
        rounding = rounding and self.kind[1] in (torch.bfloat16, torch.float16)
        amp, scaled, groups = found_inf is not None, grad_scale is not None, self.groups
        acc, align = _triton_dtype(kernels, self.acc), 16 if aligned else 1
        last = any(
            isinstance(x["micro_step"], Tensor) or x["micro_step"] == x["accumulation_steps"] - 1 for x in groups
        )
        guarded = not amp and any(_POLICIES[group["nan_policy"]] for group in groups)
        squared = last and any(group["lr_scale"] == "rms" for group in groups)
        found_inf = self.sums if found_inf is None else found_inf.to(self.device)
        grad_scale = self.sums if grad_scale is None else grad_scale.to(self.device)
        seed = torch.randint(0, 1 << 31, (1,), device=self.device) if rounding else self.firsts
        n, rows = len(self.chunks), len(self.row_chunks)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if n and (guarded or squared):
                kernels.reduce_kernel[(n,)](
                    self.table, self.setting, self.chunks, self.square_parts, self.bad_parts, T_THETA=t_theta, T_G=t_g,
                    ACC=acc, AMP=amp, ALIGN=align, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
            if last and rows:
                kernels.row_kernel[(rows,)](
                    self.table, self.setting, self.row_chunks, self.row_scales, T_THETA=t_theta, ACC=acc, ROWS=ROWS,
                    BLOCK=ROW_BLOCK, num_warps=WARPS,
                )  # fmt: skip
            for add, decide in ((True, False), (False, True)) if self.sharded else ((True, True),):
                kernels.decide_kernel[(len(self.params),)](
                    self.table, self.setting, self.firsts, self.square_parts, self.bad_parts, self.sums, self.bads,
                    self.decisions, found_inf, ACC=acc, AMP=amp, SUM=add, DECIDE=decide, BLOCK=PARTS, num_warps=4,
                )  # fmt: skip
                if not decide:
                    for parts, op in ((self.sums, "SUM"), (self.bads, "MAX")):
                        parts.copy_(torch.stack(all_reduce(list(parts.unbind()), self.params, op)))
            if n:
                kernels.update_kernel[(n,)](
                    self.table, self.chunks, self.decisions, self.row_scales, grad_scale, seed, n, T_THETA=t_theta,
                    T_M=t_m, T_G=t_g, ACC=acc, AMP=scaled, POWERS=any(group["sign_power"] for group in groups),
                    ROUND=rounding, REVERSED=reverse, ALIGN=align, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
        self.gradients = None  # they may be freed now


def _triton_dtype(kernels, dtype):
    return getattr(kernels.tl, {torch.bfloat16: "bfloat16"}.get(dtype, str(dtype)[6:]))


def _pairs(counts, device):
    """(tensor, number of the chunk in it) of every chunk."""
    counts = np.array(counts, dtype=np.int64)
    t = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(t)) - (np.cumsum(counts) - counts)[t]
    return torch.from_numpy(np.stack((t, number), 1).astype(np.int32)).to(device)


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


def _fill_from_device(row, group):
    """Settings that live on the device: a learning rate, a position in the cycle. Columns as in :mod:`.kernels`."""
    if isinstance(group["lr"], Tensor):
        row[0].copy_(group["lr"].reshape(()), non_blocking=True)
    if isinstance(group["micro_step"], Tensor):
        position = group["micro_step"]
        row[10].copy_(position == 0)
        row[11].copy_(position == group["accumulation_steps"] - 1)
