"""Recorded run: the most memory that training takes with k micro-batches a step, measured against a count by hand.

In units of N parameters, 4 bytes each: AdamW θ, ∂θ, m, v; Lion and Tiger θ, ∂θ, m; Tiger that takes gradients into m
during the backward pass θ, m. On top of it the tensors that the forward pass keeps, and one layer's gradient.
"""

import gc
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kexue_utils.optimization.tiger.groups import tiger_param_groups
from kexue_utils.optimization.tiger.optimizer import Tiger
from kexue_utils.position.rope_base_beta import RopeAttention, RotaryEmbedding
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.transformer import Transformer

# What lives at once, in words a parameter, and whether there are activations and a second gradient of a layer then.
METHODS = {
    "AdamW, .grad accumulates": (4, True),
    "Lion, .grad accumulates": (3, True),
    "Tiger, .grad accumulates": (3, True),
    "Tiger, .grad freed every micro-batch": (3, False),  # at its most when the backward pass ends
    "Tiger, backward hooks": (2, True),
}
TOLERANCE = 0.03


class Lion(torch.optim.Optimizer):
    """u = sign(β₁m + (1−β₁)g), θ ← θ − ηu, m ← β₂m + (1−β₂)g, in place but for u of one tensor."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m, (first, second) = self.state[p].setdefault("m", torch.zeros_like(p)), group["betas"]
                p.sub_(torch.lerp(m, p.grad, 1 - first).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - second)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside took at once, for devices whose allocator doesn't tell."""

    def __init__(self, *held: Tensor):
        super().__init__()
        self.live, self.peak = {}, 0
        self._see(held)

    def _see(self, tensors):
        for x in tensors:
            storage = x.untyped_storage()
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._see(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def new_model(parameters: dict, device: torch.device | str) -> Transformer:
    """A causal transformer over bytes with rotary positions, made on the device."""
    d, heads = parameters["d_model"], parameters["heads"]
    rope = RotaryEmbedding(d // heads)
    with torch.device(device):
        return Transformer(256, d, parameters["layers"], lambda: RopeAttention(d, heads, rope=rope))


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats a byte, ids (B, T + 1)."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def saved_bytes(parameters: dict) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, without parameters, from shapes."""
    model, kept = new_model(parameters, "meta"), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    ids = torch.zeros(parameters["batch"], parameters["T"] + 1, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = mean_loss(model, ids)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def predicted_bytes(method: str, parameters: dict) -> dict:
    """{resident, activations, gradient}: the terms of the count, in bytes."""
    words, transient = METHODS[method]
    shapes = [p.numel() for p in new_model(parameters, "meta").parameters()]
    more = (saved_bytes(parameters), 4 * max(shapes)) if transient else (0, 0)
    return dict(zip(("resident", "activations", "gradient"), (4 * words * sum(shapes), *more), strict=True))


def new_optimizer(method: str, model: nn.Module, k: int):
    """The optimizer of a method, on the implementation without temporaries of the model's size."""
    on_gpu = next(model.parameters()).is_cuda
    if method.startswith("AdamW"):
        return torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if method.startswith("Lion"):
        return Lion(model.parameters(), 1e-5)
    k = 1 if method.endswith("accumulates") else k
    optimizer = Tiger(tiger_param_groups(model), accumulation_steps=k, foreach=None if on_gpu else False)
    if method.endswith("hooks"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is clipped here
            optimizer.install_backward_hooks(model)
    return optimizer


def train(method: str, model: nn.Module, parameters: dict, seed: int) -> float:
    """Loss of the last of `cycles`·k micro-batches of random bytes."""
    p, device = parameters, next(model.parameters()).device
    generator, k = torch.Generator().manual_seed(seed), p["k"]
    optimizer, loss = new_optimizer(method, model, k), None
    into_grad = method.endswith("accumulates")
    for t in range(p["cycles"] * k):
        if not into_grad or t % k == 0:
            optimizer.zero_grad()
        loss = None  # or it would keep the last graph alive through this one's forward pass
        ids = torch.randint(256, (p["batch"], p["T"] + 1), generator=generator).to(device)
        loss = mean_loss(model, ids)
        (loss / k if into_grad else loss).backward()
        if not into_grad or t % k == k - 1:
            optimizer.step()
    return loss.item()


def measure(method: str, parameters: dict, seed: int, device: torch.device) -> dict:
    """{before, peak, loss}: bytes allocated before the model is made, and at most until training ends; last loss."""
    torch.manual_seed(seed)
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        model = new_model(parameters, device)
        torch.cuda.reset_peak_memory_stats(device)
        loss = train(method, model, parameters, seed)
        return {"before": before, "peak": torch.cuda.max_memory_allocated(device), "loss": loss}
    model = new_model(parameters, device)
    with LiveBytes(*model.parameters()) as counter:
        loss = train(method, model, parameters, seed)
    return {"before": 0, "peak": counter.peak, "loss": loss}


def _run(parameters, seeds, device, checkpoint):
    method, runs = parameters["method"], []
    predicted = predicted_bytes(method, parameters)
    count = sum(p.numel() for p in new_model(parameters, "meta").parameters())
    for i in progress(len(seeds), method):
        found = measure(method, parameters, seeds[i], device)
        runs.append(found | {"predicted": predicted, "parameters": count, "counted": device.type})
    return runs


def _conclude(units):
    methods = {}
    for name, unit in units.items():
        peaks, first = [run["peak"] for run in unit["runs"]], unit["runs"][0]
        predicted, N = sum(first["predicted"].values()), first["parameters"]
        methods[name] = {
            "bytes a parameter": {
                "measured": max(peaks) / N, "predicted": predicted / N,
                **{term: size / N for term, size in first["predicted"].items()},
            },
            "measured over predicted": {"least": min(peaks) / predicted, "most": max(peaks) / predicted},
            "gigabytes": max(peaks) / 1e9,
            "within 3 %": all(abs(peak / predicted - 1) <= TOLERANCE for peak in peaks),
        }  # fmt: skip
    hooks = methods["Tiger, backward hooks"]
    saved = {name: 1 - hooks["gigabytes"] / found["gigabytes"] for name, found in methods.items()}
    return {"methods": methods, "saved by hooks over": saved,
            "verdict": "reproduced" if hooks["within 3 %"] else "not reproduced"}  # fmt: skip


def _units(smoke):
    base = {"d_model": 2048, "heads": 16, "layers": 26, "T": 256, "batch": 1, "k": 8, "cycles": 2}
    if smoke:
        base |= {"d_model": 128, "heads": 2, "layers": 3, "T": 16, "k": 2}
    return {method: base | {"method": method} for method in METHODS}


MEMORY = Experiment(
    title="Peak memory of training 1.3 billion parameters in 8 micro-batches a step: AdamW, Lion, Tiger, Tiger's hooks",
    units=_units,
    run=_run,
    conclude=_conclude,
)
