"""Training of a stack of models: data, schedule, clipping, what is measured."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kexue_utils.optimization.sgd_convergence.experiments.language import corpus
from kexue_utils.optimization.sgd_convergence.experiments.language import windows as spread
from kexue_utils.optimization.tiger.experiments import hidden, rules, stack
from kexue_utils.optimization.tiger.reductions import compute_dtype
from kexue_utils.training.progress import progress
from kexue_utils.training.replicas import cosine

PARTS = ("validation", "test")
SMOKE = {
    "corpus": "help topics", "steps": 12, "batch": 2, "L": 16, "d_model": 16, "layers": 1, "heads": 2, "windows": 4,
    "points": 3,
}  # fmt: skip
GPT = {  # 10.6 million parameters besides the embeddings
    "corpus": "standard library", "steps": 1000, "batch": 32, "L": 256, "d_model": 384, "layers": 6, "heads": 6,
    "init": 0.02, "products": "bfloat16", "clip": 1.0, "warm": 0.1, "windows": 512, "points": 20,
}  # fmt: skip


@dataclass
class Data:
    """train: bytes, 1-d; a window may begin at multiples of `stride`; held_out: {split: (n, L + 1)};

    floors: {split: loss of the best predictor}, empty where unknown.
    """

    train: Tensor
    stride: int
    held_out: dict
    floors: dict
    provenance: dict

    def starts(self, p: dict, seed: int) -> Tensor:
        """Where the windows of every step begin: (steps, batch)."""
        places = (len(self.train) - p["L"] - 1) // self.stride + 1
        return self.stride * torch.randint(
            places, (p["steps"], p["batch"]), generator=torch.Generator().manual_seed(seed)
        )


def data(p: dict, device) -> Data:
    """The corpus p["corpus"]: "hidden chain", or one of those that `language.corpus` knows."""
    if p["corpus"] == "hidden chain":
        count = p.get("train_windows", 1 << 15)
        found, floors, provenance = hidden.windows(p["states"], count, p["windows"], p["L"] + 1)
        held_out = {part: torch.from_numpy(found[part].astype(np.int64)).to(device) for part in PARTS}
        return Data(torch.from_numpy(found["train"].ravel()).to(device), p["L"] + 1, held_out, floors, provenance)
    texts, provenance = corpus(p["corpus"])
    held_out = {part: spread(texts[part], p["windows"], p["L"]).to(device) for part in PARTS}
    train = torch.from_numpy(np.frombuffer(texts["train"], np.uint8).copy()).to(device)
    return Data(train, 1, held_out, {}, provenance)


@torch.no_grad()
def mean_losses(parameters: dict, ids: Tensor, p: dict, products, size: int = 32) -> Tensor:
    """Mean loss of every model on the windows ids (n, L + 1): (P,), float64."""
    P, total = len(parameters["embed"]), 0.0
    for part in ids.split(size):
        found = stack.losses(parameters, part.expand(P, *part.shape), p, products)
        total = total + found.flatten(1).double().sum(1)
    return total / ids[:, 1:].numel()


def train(p: dict, rates: list, seeds: list, found: Data, device, description=None) -> dict:
    """Train every seed at every peak rate, model r·len(seeds) + s; what each gave, (rates, seeds, …) on the CPU.

    validation, test: final losses; curve (…, points): loss on every 8th window of validation; moved: share of the
    entries of matrices that are not where they were after 9/10 of the steps; finite: share of the steps with a finite
    loss. The rate rises linearly over the share `warm` of the steps and falls as half a cosine to 0.

    p["storage"]: dtype of parameters, gradients and moments, float32 by default; p["products"]: of matrix products on
    a GPU, float32 elsewhere. p["scale"] multiplies the loss before its gradient is taken, as a 16-bit gradient needs;
    Tiger, Lion and the clipping, which knows of it, don't notice.
    """
    storage = getattr(torch, p.get("storage", "float32"))
    products = getattr(torch, p["products"]) if device.type == "cuda" else torch.float32
    parameters, scale = stack.stacked(p, seeds, len(rates), device, storage), p.get("scale", 1.0)
    rule = rules.RULES[p["rule"]](parameters, p)
    peaks = torch.tensor(rates, device=device, dtype=torch.float32).repeat_interleave(len(seeds))
    starts = torch.stack([found.starts(p, seed) for seed in seeds], 1).to(device)
    span = torch.arange(p["L"] + 1, device=device)
    matrices = [q for name, q in parameters.items() if stack.kind(name) == "matrix"]
    curve, finite, late, thin = [], 0.0, None, p["steps"] // p["points"]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])  # of stochastic rounding
        for t in progress(p["steps"], description):
            ids = found.train[starts[t][..., None] + span].long().repeat(len(rates), 1, 1)
            loss = stack.losses(parameters, ids, p, products).flatten(1).mean(1)
            gradients = torch.autograd.grad(loss.sum() * scale, list(parameters.values()))
            finite = finite + loss.detach().isfinite().double()
            rule.update(clipped(gradients, p["clip"] * scale), peaks * cosine(t, p["steps"], p["warm"]))
            if t + 1 == p["steps"] * 9 // 10:
                late = [q.detach().clone() for q in matrices]
            if (t + 1) % thin == 0:
                curve.append(mean_losses(parameters, found.held_out["validation"][::8], p, products))
    moved = sum((q.detach() != q0).flatten(1).sum(1) for q, q0 in zip(matrices, late, strict=True))
    result = {part: mean_losses(parameters, ids, p, products) for part, ids in found.held_out.items()}
    result |= {"curve": torch.stack(curve, 1), "finite": finite / p["steps"]}
    result["moved"] = moved.double() / sum(q[0].numel() for q in matrices)
    return {name: value.cpu().unflatten(0, (len(rates), len(seeds))) for name, value in result.items()}


@torch.no_grad()
def clipped(gradients, largest: float):
    """Gradients of every model with a joint norm of at most `largest`."""
    sizes = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=compute_dtype(g)) for g in gradients]
    size = torch.stack(sizes).square().sum(0).sqrt()
    factor = largest / size.clamp(min=largest)
    return [g * factor.view(-1, *[1] * (g.ndim - 1)).to(g.dtype) for g in gradients]


def tune(p: dict, seeds: list, found: Data, device, description, extensions: int = 3, more: int = 4) -> list[dict]:
    """[{"rate", "validation": of each seed, …}] by rate: p["rates"], and while the best mean loss is at an end of the

    grid, `more` rates beyond that end, at most `extensions` times.
    """
    rates, tried = list(p["rates"]), []
    for _ in range(extensions + 1):
        here = train(p, rates, seeds, found, device, f"{description}: {len(rates)} rates")
        for i, rate in enumerate(rates):
            tried.append({"rate": rate} | {name: here[name][i].tolist() for name in (*PARTS, "finite")})
        tried.sort(key=lambda one: one["rate"])
        best, ratio = tried.index(min(tried, key=mean_loss)), tried[1]["rate"] / tried[0]["rate"]
        if best == 0:
            rates = [tried[0]["rate"] / ratio**k for k in range(more, 0, -1)]
        elif best == len(tried) - 1:
            rates = [tried[-1]["rate"] * ratio**k for k in range(1, more + 1)]
        else:
            break
    return tried


def mean_loss(one: dict) -> float:
    """What a rate is chosen by; a run that diverged gave nan, which a record keeps as None."""
    losses = one["validation"]
    mean = sum(losses) / len(losses) if None not in losses else math.nan
    return mean if math.isfinite(mean) else math.inf


def nats(loss: float | None) -> float:
    """A final loss; a run that diverged, None in a record, counts as a guess among all bytes: ln 256."""
    return math.log(stack.VOCAB) if loss is None else loss


def resumed(checkpoint, name: str, make):
    """make(), or what it gave before an interruption."""
    state = (checkpoint.load() if checkpoint else None) or {}
    if name not in state:
        state[name] = make()
        if checkpoint:
            checkpoint.save(state)
    return state[name]
