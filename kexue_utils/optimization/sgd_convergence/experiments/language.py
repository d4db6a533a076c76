"""Training for the recorded run on schedules: many copies of a byte-level language model, one schedule, many peaks."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue_utils.optimization.sgd_convergence.schedules import (
    constant,
    cosine,
    inv_sqrt,
    inv_t,
    linear_decay,
    polynomial,
    step,
    warmup,
    wsd,
)
from kexue_utils.training.corpora import pydoc_topics, split_files, standard_library
from kexue_utils.training.progress import progress
from kexue_utils.training.replicas import Replicas, captured
from kexue_utils.training.transformer import Transformer

COOLDOWNS = (0.05, 0.1, 0.2, 0.3, 0.5)
SCHEDULES = {
    "constant": constant,
    "1/√t": inv_sqrt,
    "1/t": inv_t,
    "linear": linear_decay,
    "cosine": cosine,
    "cosine to a tenth": lambda T: 0.1 + 0.9 * cosine(T),
    "power 1/2": partial(polynomial, p=0.5),
    "power 2": partial(polynomial, p=2.0),
    "power 3": partial(polynomial, p=3.0),
    "halved every quarter": lambda T: step(T, every=T // 4, factor=0.5),
    "a tenth every third": lambda T: step(T, every=-(-T // 3), factor=0.1),
} | {f"cooldown {f:g}": partial(wsd, decay_frac=f) for f in COOLDOWNS}
BETAS, EPSILON = (0.9, 0.95), 1e-8


def shape(name: str, T: int, warm: int) -> Tensor:
    """The schedule `name` as a share of its value at step `warm`, to which every one rises linearly: (T,)."""
    eta = SCHEDULES[name](T)
    return warmup((eta / eta[warm - 1]).clamp(max=1), warm)


class Attention(nn.Module):
    """Causal attention whose logits fall linearly with distance, by 2^(−8h/H) a place in head h."""

    def __init__(self, d: int, heads: int, length: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        back = torch.arange(length)[:, None] - torch.arange(length)
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("bias", torch.where(back >= 0, -slopes[:, None, None] * back, -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d), T up to `length`."""
        T = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + self.bias[:, :T, :T]).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class ByteLosses(nn.Module):
    """Nats per byte of a transformer over bytes: ids (B, T + 1) → (B, T)."""

    def __init__(self, p: dict):
        super().__init__()
        self.model = Transformer(256, p["d_model"], p["layers"], lambda: Attention(p["d_model"], p["heads"], p["L"]))

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")


def corpus(name: str):
    """({split: bytes}, provenance); no file is in two splits."""
    if name == "help topics":  # the same on every Python, for the smoke size
        data, provenance = pydoc_topics().encode(), {"name": name}
        texts = {f"{i}": data[i : i + 8192] for i in range(0, len(data), 8192)}
    else:
        texts, provenance = standard_library()
    parts = zip(("train", "validation", "test"), split_files(texts, 0.1), strict=True)
    return {part: b"\0".join(files.values()) for part, files in parts}, provenance


def windows(data: bytes, count: int, length: int) -> Tensor:
    """`count` windows of length + 1 bytes, spread evenly over the data: (count, length + 1)."""
    starts = np.linspace(0, len(data) - length - 1, count).astype(np.int64)
    return torch.from_numpy(np.frombuffer(data, np.uint8)[starts[:, None] + np.arange(length + 1)].astype(np.int64))


class Steps:
    """One step for every replica: clip the gradient of each, then AdamW or SGD; all that changes is in tensors.

    u_t, the direction of θ_{t+1} = θ_t − η_t u_t, is the clipped gradient g_t (SGD) or
    m̂_t/(√v̂_t + ε) + λθ_t, with λ = 0 for gains (AdamW). Norms of g_t before clipping and of u_t are kept.
    """

    def __init__(self, replicas: Replicas, p: dict, eta: Tensor):
        self.parameters, self.p, device = list(replicas.parameters.values()), p, replicas.device
        adam = p["optimizer"] == "AdamW"
        self.moments = [[torch.zeros_like(q) for q in self.parameters] for _ in range(2 * adam)]
        self.peaks = torch.tensor(replicas.rates, device=device).repeat_interleave(len(replicas.seeds))
        t = torch.arange(1, p["T"] + 1, dtype=torch.float64)
        table = [eta] + [1 / (1 - beta**t) for beta in BETAS]
        self.table = torch.stack(table, 1).to(device, torch.float32)
        self.now = torch.zeros(3, device=device)
        self.norms = torch.zeros(2, len(self.peaks), device=device)

    @torch.no_grad()
    def update(self, gradients):
        size = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
        factor, rate, moved = self.p["clip"] / size.clamp(min=self.p["clip"]), self.peaks * self.now[0], 0.0
        for i, (q, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            one = [-1] + [1] * (q.ndim - 1)
            u = g * factor.view(one)
            if self.moments:
                m, v = (moments[i] for moments in self.moments)
                m.lerp_(u, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(u, u, value=1 - BETAS[1])
                u = m * self.now[1] / ((v * self.now[2]).sqrt_().add_(EPSILON))
                if q.ndim > 2:  # a matrix of each replica
                    u = u.add_(q, alpha=self.p["weight_decay"])
            moved = moved + u.flatten(1).square().sum(1)
            q.sub_(rate.view(one) * u)
        self.norms.copy_(torch.stack([size, moved.sqrt()]))


@torch.no_grad()
def mean_losses(replicas: Replicas, ids: Tensor, size: int = 64) -> Tensor:
    """Mean loss of every replica on the windows ids (n, L + 1): (P,)."""
    parts = [part.expand(len(replicas.seeds), *part.shape) for part in ids.split(size)]
    return sum(replicas.losses(part).flatten(1).double().sum(1) for part in parts) / ids[:, 1:].numel()


def train(p: dict, rates: list, seeds: list, texts: dict, device, description=None) -> dict:
    """Train every seed at every peak rate; what each gave, replica by replica (P = rates · seeds).

    curve (points, P): loss on the followed windows; distance (points, P): ‖θ_t − θ_1‖; norms (T, 2, P): ‖g_t‖ and
    ‖u_t‖; validation, test (P,): final losses.
    """
    data = torch.from_numpy(np.frombuffer(texts["train"], np.uint8).copy()).to(device)
    held_out = {part: windows(texts[part], p["windows"], p["L"]).to(device) for part in ("validation", "test")}
    followed = held_out["validation"][:: p["windows"] // p["followed"]]
    starts = torch.stack([
        torch.randint(len(data) - p["L"], (p["T"], p["batch"]), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ], 1).to(device)  # fmt: skip
    span = torch.arange(p["L"] + 1, device=device)
    replicas = Replicas(lambda: ByteLosses(p), seeds, rates, device)
    steps = Steps(replicas, p, shape(p["schedule"], p["T"], p["warm"]))
    begin = [q.detach().clone() for q in steps.parameters]
    ids = torch.zeros(len(seeds), p["batch"], p["L"] + 1, dtype=torch.int64, device=device)
    norms = torch.zeros(p["T"], 2, len(steps.peaks), device=device)

    def step_once():
        loss = replicas.losses(ids)
        steps.update(torch.autograd.grad(loss.flatten(1).mean(1).sum(), steps.parameters))

    replay = captured(step_once, sum(steps.moments, [])) if device.type == "cuda" else step_once
    curve, distance, thin = [], [], p["T"] // p["points"]
    for t in progress(p["T"], description):
        ids.copy_(data[starts[t][..., None] + span])
        steps.now.copy_(steps.table[t])
        replay()
        norms[t] = steps.norms
        if (t + 1) % thin == 0:
            curve.append(mean_losses(replicas, followed))
            away = sum(
                (q.detach() - q0).flatten(1).square().sum(1) for q, q0 in zip(steps.parameters, begin, strict=True)
            )
            distance.append(away.sqrt())
    return {
        "curve": torch.stack(curve).cpu(), "distance": torch.stack(distance).cpu(), "norms": norms.cpu(),
        **{part: mean_losses(replicas, found).cpu() for part, found in held_out.items()},
    }  # fmt: skip
