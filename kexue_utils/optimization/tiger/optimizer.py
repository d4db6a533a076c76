"""Tiger as a torch optimizer: one buffer, gradient accumulation inside it, a guard against bad gradients.

Sources: https://kexue.fm/archives/9512, https://kexue.fm/archives/8634, https://kexue.fm/archives/9736;
official code https://github.com/bojone/tiger
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import fused as fused_kernels
from .distributed import average_momentum
from .engine import advance, consume, dense, finish
from .options import require, require_steps, warn_about_zeros
from .reductions import finite, is_sharded

# Which storage and code path is used is the new optimizer's choice, not the checkpoint's.
_OWN = ("momentum_dtype", "foreach", "fused", "capturable")


class Tiger(Optimizer):
    """Sign of the momentum, decoupled weight decay, one buffer   (tiger-update, tiger-accumulation)

        m_t = [(β−1)χ_{(t−1)/k} + 1]·m_{t−1} + (1−β)/k·g_t
        θ_t = θ_{t−1} − χ_{t/k}·η_t·[sign(m_t) + λθ_{t−1}]        χ_x = 1 if x is an integer, else 0

    ``step()`` is called after *every* micro-batch, then ``zero_grad()`` as usual; θ moves at every k-th call, where
    lr is read, exactly as if the k gradients had been averaged (their mean, so the loss needs no division by k).

    params: parameters, named parameters or groups, best from :func:`tiger_param_groups`; every option is per group.
    lr: α, a number or a tensor; peak values of 1e-3 to 2e-3 are usual with ``"rms"``.
    beta: β in [0, 1); 0.965 for language, 0.945 for vision. weight_decay: λ ≥ 0; with ``"rms"`` a step shrinks θ by
    αλ·RMS(θ), so that λ is in units of 1/θ: |θ| ≤ 1/λ.
    accumulation_steps: k ≥ 1; may change between two cycles.
    lr_scale: η = α·max(RMS(θ), floor) (``"rms"``), the same for each row (``"row_rms"``), α/2 (``"half"``), α
    (``"none"``)   (tiger-rate). rms_floor: the floor; with 0 a zero matrix never moves (there is a warning); 1e-3
    suits zero-initialised output heads and LoRA factors.
    nan_policy: what a gradient tensor with an entry that is not finite does   (tiger-nan)
    - ``"shrink"``    it is rejected and θ ← (θ − c)·s + c with s = ``shrink_ratio``, c = ``center``
    - ``"skip"``      it is rejected
    - ``"raise"``     FloatingPointError with the parameter's name, nothing changed; waits for the device, for debugging
    - ``"off"``       no test, which saves a read of the gradients
    - ``"official"``  as the official code: only NaN counts; in the first micro-batch it costs the cycle its decay,
      in the last one its update
    A rejected gradient counts as zero. β is applied at a parameter's first good gradient of a cycle; a parameter
    without any is left alone, no decay, no step. A missing gradient (None) is one that was rejected.
    lazy_rows: every row of a parameter is treated so by itself, and its gradient is missing where it is zero: rows of
    an embedding that were not in the batch stay. Sparse gradients need it (they are made dense); 1 byte a row.
    sign_power: e of u = sign(m)|m|^e, 0 for Tiger, 1 for momentum SGD   (tiger-family)
    momentum_dtype: of m; None for the parameter's own. Arithmetic is in float32 at least and rounds once.
    stochastic_rounding: of float16 and bfloat16 parameters   (tiger-rounding)
    maximize: ascend. capturable: the position in the cycle lives on the device, so that one CUDA graph, or one
    compiled graph, serves every micro-batch of a cycle (a compiled step with k = 1 does not need it).
    foreach, fused: which implementation. fused is one Triton launch a pass for all tensors, the default on CUDA where
    Triton is; foreach takes lists of tensors, the default elsewhere; foreach=False is the plain loop, with the fewest
    temporaries on the CPU. They differ in the last bits of RMS(θ) and m at most.

    State: m and one bool a parameter. ``state_dict`` holds the position in the cycle; loading keeps this optimizer's
    momentum_dtype and implementation. A ``GradScaler`` may skip no call: its infinities reject the micro-batch for
    every parameter, without shrinking. Clipping by norm acts on each micro-batch.

    Raises ValueError for options out of range; RuntimeError for complex parameters, sparse gradients without
    lazy_rows, fused=True where it can't be, and a change of accumulation_steps within a cycle.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, beta: float = 0.965, weight_decay: float = 0.01, *,
        accumulation_steps: int = 1, lr_scale: str = "rms", rms_floor: float = 0.0, nan_policy: str = "shrink",
        shrink_ratio: float = 0.99, center: float = 0.0, lazy_rows: bool = False, sign_power: float = 0.0,
        momentum_dtype: torch.dtype | None = None, stochastic_rounding: bool = False, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False,
    ):  # fmt: skip
        defaults = dict(
            lr=lr, beta=beta, weight_decay=weight_decay, accumulation_steps=accumulation_steps, lr_scale=lr_scale,
            rms_floor=rms_floor, nan_policy=nan_policy, shrink_ratio=shrink_ratio, center=center, lazy_rows=lazy_rows,
            sign_power=sign_power, momentum_dtype=momentum_dtype, stochastic_rounding=stochastic_rounding,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable,
        )  # fmt: skip
        self._transient()
        super().__init__(params, defaults)

    def _transient(self):
        # Verdicts on gradients that were consumed before step(); hooks; the fused step's tables. Not part of the state.
        self._verdicts, self._handles, self._groups_of = {}, [], {}
        self._plan, self._tables = None, fused_kernels.Tables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_verdicts" not in self.__dict__:
            self._transient()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            require(group)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        group["micro_step"] = _place_micro_step(0, group)
        group["cycle_steps"] = group["accumulation_steps"]

    # Before a step: nothing has changed when one of these raises.

    def _check(self, found_inf):
        for index, group in enumerate(self.param_groups):
            self._check_cycle(group)
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse and not group["lazy_rows"]:
                    raise RuntimeError(f"sparse gradients need lazy_rows=True, got one of shape {tuple(p.shape)}")
            if group["nan_policy"] == "raise" and found_inf is None:
                self._check_finite(index, group)

    def _check_cycle(self, group):
        k, started = group["accumulation_steps"], group["cycle_steps"]
        if k == started:
            return
        require_steps(k)
        position = int(group["micro_step"])
        if position:
            raise RuntimeError(
                f"accumulation_steps can change only at a cycle boundary (micro_step={position} of {started})"
            )
        group["cycle_steps"] = k

    def _check_finite(self, index, group):
        members = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        good = finite([dense(p.grad) for _, p in members])
        for (i, p), fine in zip(members, good, strict=True):
            if not fine:
                name = group["param_names"][i] if "param_names" in group else f"{i} of group {index}"
                raise FloatingPointError(
                    f"the gradient of parameter {name}, shape {tuple(p.shape)}, has entries that are not finite"
                )

    def _init_group(self, group, params, grads, ms, pendings, everything=False):
        """Collect what takes part in this step; the first time, make its state."""
        new = []
        for p in group["params"]:
            has_gradient = p.grad is not None or p in self._verdicts
            # Within a cycle a parameter takes part without a gradient; with k = 1 it can't have begun one.
            if not (has_gradient or everything or (group["accumulation_steps"] > 1 and p in self.state)):
                continue
            if p not in self.state:
                if not has_gradient:
                    continue
                self._init_state(group, p)
                new.append(p)
            params.append(p)
            grads.append(p.grad)
            ms.append(self.state[p]["m"])
            pendings.append(self.state[p]["pending"])
        warn_about_zeros(group, new)

    def _init_state(self, group, p):
        flags = (p.shape[0],) + (1,) * (p.ndim - 1) if group["lazy_rows"] else ()
        self.state[p] = {
            "m": torch.zeros_like(p, dtype=group["momentum_dtype"], memory_format=torch.preserve_format),
            "pending": torch.ones(flags, dtype=torch.bool, device=p.device),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the gradients of one micro-batch in; at the end of a cycle, move θ. Returns the closure's loss.

        Raises RuntimeError for a closure, or a GradScaler, while backward hooks are installed.
        """
        loss = None
        if closure is not None:
            if self._handles:
                raise RuntimeError("a closure evaluates gradients again, but backward hooks consume them; remove one")
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self._handles and found_inf is not None:
            raise RuntimeError("a GradScaler needs the gradients that the backward hooks consumed; remove the hooks")
        # A compiled step takes the lists of tensors: the compiler fuses them itself.
        plan, compiling = self._plan, torch.compiler.is_compiling()
        if compiling or plan is None or not plan.prepare(self.param_groups, self.state, self._verdicts):
            self._check(found_inf)
            batches = self._step_groups(found_inf, grad_scale)
            if not compiling:
                self._plan = plan = fused_kernels.Plan(batches, self._tables) if batches else None
        else:
            for group in self.param_groups:
                self._check_cycle(group)
        if not compiling and plan is not None:
            plan.launch(self._verdicts, found_inf, grad_scale)
            for group in plan.groups:
                advance(group)
        self._verdicts.clear()
        return loss

    def _step_groups(self, found_inf, grad_scale):
        """Step the groups that are not for the kernels; what the kernels need for the others."""
        batches = []
        for group in self.param_groups:
            params, grads, ms, pendings = [], [], [], []
            fused = self._is_fused(group)
            # A plan is made for one set of parameters, so it takes all that have a state.
            self._init_group(group, params, grads, ms, pendings, everything=fused)
            if params and fused:
                batches.append((group, params, grads, ms, pendings, [self.state[p] for p in params]))
                continue
            if params:
                verdicts, plain = consume(group, params, grads, ms, pendings, self._verdicts, found_inf, grad_scale)
                finish(group, params, ms, pendings, verdicts, found_inf is None, plain)
            advance(group)
        return batches

    @torch.no_grad()
    def flush(self) -> None:
        """End the cycle now, after j < k micro-batches: the step is taken and the next cycle starts.

        The j gradients keep their weight (1−β)/k each: together they count j/k of a full cycle. Where the length of
        the last cycle is known beforehand, set ``accumulation_steps`` = j at its start instead, which is exact.
        """
        for group in self.param_groups:
            if not isinstance(group["micro_step"], Tensor) and group["micro_step"] == 0:
                continue
            params, grads, ms, pendings = [], [], [], []
            self._init_group(group, params, grads, ms, pendings, everything=True)
            if params:
                finish(group, params, ms, pendings, [None] * len(params), False, flush=True)
            group["micro_step"] = _place_micro_step(0, group)

    def _is_fused(self, group):
        chosen = group["fused"] if group["fused"] is not None else group["foreach"] is None
        if not chosen or torch.compiler.is_compiling():
            return False
        return all(fused_kernels.supports(p, group) for p in group["params"])

    # Gradients that are consumed before step().

    def install_backward_hooks(self, model: nn.Module) -> None:
        """Take every gradient into m during the backward pass and free it: no two layers' gradients live at once.

        model: owns the parameters; not wrapped for data parallelism, whose gradients are averaged later: use
        :meth:`allreduce_momentum`. A parameter that is used twice counts once. θ does not move before ``step()``,
        which is called as without hooks. Clipping by global norm sees no gradients any more: a warning says so.
        Raises RuntimeError if hooks are there already, for a wrapped or sharded model and for nan_policy "raise";
        ValueError if the optimizer has a parameter that is not the model's.
        """
        if self._handles:
            raise RuntimeError("backward hooks are installed already")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise RuntimeError("model must be the bare module: a wrapper averages gradients after the hooks have run")
        owned = set(model.parameters())
        for group in self.param_groups:
            if group["nan_policy"] == "raise":
                raise RuntimeError(
                    "nan_policy 'raise' must see all gradients before any is consumed: no backward hooks"
                )
            for p in group["params"]:
                if p not in owned:
                    raise ValueError(f"model must own every parameter, not so for one of shape {tuple(p.shape)}")
                if is_sharded(p):
                    raise RuntimeError("backward hooks do not see the gradients of sharded parameters")
        warnings.warn(
            "backward hooks free the gradients: clipping them by their global norm has no effect", stacklevel=2
        )
        # The garbage collector does not see what a parameter's hooks hold: a strong reference would keep both for ever.
        this = weakref.ref(self)

        def hook(p):
            if (optimizer := this()) is not None:
                optimizer._consume_hook(p)

        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._groups_of[p] = index
                if p.requires_grad:
                    self._handles.append(p.register_post_accumulate_grad_hook(hook))

    def remove_backward_hooks(self) -> None:
        """Undo :meth:`install_backward_hooks`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._groups_of = [], {}

    @torch.no_grad()
    def _consume_hook(self, p):
        group = self.param_groups[self._groups_of[p]]
        self._check_cycle(group)
        if p.grad.is_sparse and not group["lazy_rows"]:
            raise RuntimeError(f"sparse gradients need lazy_rows=True, got one of shape {tuple(p.shape)}")
        if p not in self.state:
            self._init_state(group, p)
            warn_about_zeros(group, [p])
        self._consume_now(group, [p])

    def _consume_now(self, group, params):
        """Gradients of these parameters into m; freed."""
        states = [self.state[p] for p in params]
        ms, pendings = [s["m"] for s in states], [s["pending"] for s in states]
        verdicts, _ = consume(group, params, [p.grad for p in params], ms, pendings, self._verdicts, free=True)
        for p, verdict in zip(params, verdicts, strict=True):
            if verdict is not None:
                self._verdicts[p] = verdict
            p.grad = None

    @torch.no_grad()
    def allreduce_momentum(self, process_group=None) -> None:
        """Average m over the ranks instead of their gradients: one exchange a cycle   (tiger-allreduce)

            (1/R) Σ_r [βm + (1−β)/k Σ_i g_{r,i}] = βm + (1−β)/k Σ_i (1/R) Σ_r g_{r,i}

        Call it on every rank just before the ``step()`` that ends a cycle; it takes in (and frees) the gradients that
        are there, so that ``step()`` only moves θ. The ranks' gradients must not be averaged otherwise (no
        ``DistributedDataParallel``, or all of the cycle under its ``no_sync``).
        Raises RuntimeError elsewhere in a cycle, without a process group, for sharded parameters, and for
        nan_policy "shrink" and "official", by which the ranks' weights would part.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError("allreduce_momentum needs torch.distributed.init_process_group")
        for group in self.param_groups:
            if group["nan_policy"] not in ("off", "skip"):
                raise RuntimeError(f"allreduce_momentum needs nan_policy 'skip' or 'off', got {group['nan_policy']!r}")
            if any(map(is_sharded, group["params"])):
                raise RuntimeError("allreduce_momentum is for replicated parameters, got sharded ones")
            self._check_cycle(group)
            position, k = int(group["micro_step"]), group["accumulation_steps"]
            if position != k - 1:
                raise RuntimeError(f"allreduce_momentum is valid only at a cycle's end (micro_step={position} of {k})")
        states, betas = [], []
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self.state:  # another rank may have one
                    self._init_state(group, p)
            members = [p for p in group["params"] if p in self.state]
            self._consume_now(group, members)
            for p in members:
                self._verdicts.setdefault(p, True)
            states += [self.state[p] for p in members]
            betas += [group["beta"]] * len(members)
        average_momentum(states, betas, process_group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual; m takes this optimizer's momentum_dtype.

        Raises ValueError, with nothing changed, for the state of another optimizer or of parameters of other shapes.
        """
        for entry in state_dict["state"].values():
            if not {"m", "pending"} <= entry.keys():
                raise ValueError(f"state_dict must hold m and pending of each parameter, got {sorted(entry)}")
        for group in state_dict["param_groups"]:
            if "micro_step" not in group:
                raise ValueError(f"state_dict must hold micro_step of each group, got {sorted(group)}")
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=False):
            if i in state_dict["state"] and (shape := state_dict["state"][i]["m"].shape) != p.shape:
                raise ValueError(f"state_dict must fit: got m of shape {tuple(shape)} for a parameter {tuple(p.shape)}")
        own = [{name: group[name] for name in _OWN} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, choice in zip(self.param_groups, own, strict=True):
            group.update(choice)
            group["micro_step"] = _place_micro_step(int(group["micro_step"]), group)
        # torch casts state to the parameter's dtype, bools as well: copy it again.
        new = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, p) in zip(saved, new, strict=True):
            if i in state_dict["state"]:
                entry, dtype = state_dict["state"][i], group["momentum_dtype"] or p.dtype
                self.state[p] = {
                    "m": torch.empty_like(p, dtype=dtype).copy_(entry["m"]),
                    "pending": entry["pending"].to(device=p.device, copy=True),
                }
        self._verdicts.clear()
        self._plan = None


def _place_micro_step(position, group):
    if not group["capturable"]:
        return position
    return torch.full((), position, dtype=torch.int64, device=group["params"][0].device)
