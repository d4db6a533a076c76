"""Recorded run: does attention, trained on t tokens of an exact naive Bayes world, know what to do with 4t?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue_utils.training.intervals import interval, t_interval
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.replicas import Replicas, train

POOLS = ("mean", "sum", "mean × log t", "mean × t", "scores × log t")
KL_RATIO = 0.1  # success: KL(sum) below this share of KL(mean) at four times the training length


class ClassHead(nn.Module):
    """One attention layer that reads x_1..x_t and gives log p(class|x): softmax(γ Σ_j a_j v(x_j) · w [+ b]).

    s_j = q(x_t)·k(x_j) and a = softmax(s), or e^s unnormalised for the pool "sum"; "mean × t" and "mean × log t"
    multiply the read-out by that factor of the length, "scores × log t" the scores. γ is learned. After training
    at one length, nothing separates b from a constant in v: the bias is right at that length only.
    """

    def __init__(self, symbols, classes, d, pool, bias):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool = {pool!r}: it must be one of {POOLS}")
        self.pool = pool
        self.q, self.k, self.v = (nn.Embedding(symbols, d) for _ in range(3))
        self.w = nn.Linear(d, classes, bias=bias)
        self.log_gamma = nn.Parameter(torch.zeros(()))
        for p in (self.q.weight, self.k.weight, self.v.weight, self.w.weight):
            nn.init.normal_(p, std=d**-0.5)
        if bias:
            nn.init.zeros_(self.w.bias)

    def forward(self, ids: Tensor, length: Tensor, target: Tensor) -> Tensor:
        """KL(target‖model), (B,). ids: (B, T), of which the first `length` (B,) count; target: (B, K)."""
        B, T = ids.shape
        last = ids.gather(1, length[:, None] - 1)
        s = (self.q(last) @ self.k(ids).mT).squeeze(1)
        t = length[:, None].to(s.dtype)
        if self.pool == "scores × log t":
            s = s * t.log()
        s = s.masked_fill(torch.arange(T, device=ids.device) >= length[:, None], -math.inf)
        a = s.exp() if self.pool == "sum" else s.softmax(-1)
        factor = {"mean × t": t, "mean × log t": t.log()}.get(self.pool, torch.ones_like(t))
        h = (a.unsqueeze(1) @ self.v(ids)).squeeze(1) * factor * self.log_gamma.exp()
        return (torch.xlogy(target, target) - target * self.w(h).log_softmax(-1)).sum(-1)


def draw(emission, n, low, high, T, generator):
    """n sequences from the world with `emission` (K, M), classes equally likely, lengths uniform on low..high.

    Returns ids (n, T), of which the first `length` (n,) count, the class (n,) and the exact posterior (n, K).
    """
    K, device = len(emission), emission.device
    y = torch.randint(K, (n,), generator=generator, device=device)
    length = torch.randint(low, high + 1, (n,), generator=generator, device=device)
    ids = torch.multinomial(emission[y], T, replacement=True, generator=generator)
    counted = (torch.arange(T, device=device) < length[:, None]).to(emission.dtype)
    posterior = (emission.log().T[ids] * counted.unsqueeze(-1)).sum(1).softmax(-1)
    return ids, length, y, posterior


def _units(smoke):
    size = {"classes": 4, "symbols": 6, "d": 16, "rates": [0.001, 0.003, 0.01, 0.03, 0.1]}
    size |= {
        "bias": False,
        "steps": 2500,
        "batch": 1024,
        "held_out": 16384,
        "tested": [4, 8, 16, 32, 64, 128, 256],
        "eval": [16, 16],
    }
    if smoke:
        size |= {"steps": 5, "batch": 32, "held_out": 128, "tested": [4, 64], "rates": [0.01, 0.03, 0.1]}
    units = {f"{pool}, t = 16": size | {"pool": pool, "trained": [16, 16]} for pool in POOLS}
    mixed = {"trained": [4, 64], "eval": [4, 64]}
    for pool in ("mean", "sum"):
        units[f"{pool} + bias, t = 16"] = units[f"{pool}, t = 16"] | {"bias": True}
        units[f"{pool} + bias, t = 4..64"] = units[f"{pool}, t = 16"] | {"bias": True} | mixed
    return units


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    worlds = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        e = -torch.rand(p["classes"], p["symbols"], generator=g, dtype=torch.float64).log()  # rows ~ Dirichlet(1)
        worlds.append((e / e.sum(-1, keepdim=True)).to(device))

    def batch(n, low, high, key, labels):
        rows = []
        for seed, world in zip(seeds, worlds, strict=True):
            g = torch.Generator(device).manual_seed(1_000_003 * (key + 1) + seed)
            ids, length, y, posterior = draw(world, n, low, high, high, g)
            rows.append((ids, length, (F.one_hot(y, p["classes"]) if labels else posterior).float()))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    replicas = Replicas(
        lambda: ClassHead(p["symbols"], p["classes"], p["d"], p["pool"], p["bias"]), seeds, p["rates"], device
    )
    held_out = batch(p["held_out"] // 4, *p["eval"], p["steps"], False)
    curve = train(
        replicas,
        lambda step: batch(p["batch"], *p["trained"], step, True),
        p["steps"],
        evaluate=lambda: replicas.losses(*held_out).mean(-1),
        checkpoint=checkpoint,
        description=f"{p['pool']}, t = {p['trained']}",
    )
    with torch.no_grad():
        kl = {
            t: replicas.by_rate(replicas.losses(*batch(p["held_out"], t, t, p["steps"] + t, False)).mean(-1))
            for t in p["tested"]
        }
    return [
        {
            "validation": [by_seed[s] for by_seed in curve[-1][1]],
            "curve": [[step, [by_seed[s] for by_seed in values]] for step, values in curve],
            "kl": {str(t): [by_seed[s] for by_seed in values] for t, values in kl.items()},
        }
        for s in range(len(seeds))
    ]


def best_rate(unit):
    """(position, inside): the learning rate with the lowest mean validation loss, and whether it is inside the grid."""
    runs = unit["runs"]
    rates = range(len(unit["parameters"]["rates"]))
    means = [
        math.inf if any(r["validation"][i] is None for r in runs) else sum(r["validation"][i] for r in runs) / len(runs)
        for i in rates
    ]
    best = means.index(min(means))
    return best, 0 < best < len(means) - 1


def _conclude(units):
    summary = {"rows": {}}
    for name, unit in units.items():
        best, inside = best_rate(unit)
        kl = {t: [run["kl"][t][best] for run in unit["runs"]] for t in unit["runs"][0]["kl"]}
        summary["rows"][name] = {
            "rate": unit["parameters"]["rates"][best],
            "rate inside the grid": inside,
            "kl": {t: interval(v) for t, v in kl.items()},
            "runs": kl,
        }
    mean, ratio = summary["rows"]["mean, t = 16"]["runs"]["64"], {}
    for name, row in summary["rows"].items():
        ratios = [x / y for x, y in zip(row["runs"]["64"], mean, strict=True)]
        geometric = map(math.exp, t_interval([math.log(r) for r in ratios]))
        ratio[name] = dict(zip(("mean", "low", "high"), geometric, strict=True)) | {"runs": ratios}
    reproduced = ratio["sum, t = 16"]["high"] < KL_RATIO
    return summary | {"KL / KL(mean) at t = 64": ratio, "reproduced: sum extrapolates": reproduced}


LENGTHS = Experiment(
    title="KL to the exact posterior at lengths never trained on: mean, sum and rescaled attention",
    units=_units,
    run=_run,
    conclude=_conclude,
)
