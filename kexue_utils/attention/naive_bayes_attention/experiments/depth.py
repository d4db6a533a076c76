"""Recorded run: a language whose next bit is the XOR of two earlier ones, and what depth or noise does for it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kexue_utils.attention.naive_bayes_attention import NGramNaiveBayes, SkipGramAttentionLM
from kexue_utils.attention.naive_bayes_attention.experiments.lengths import best_rate
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.replicas import Replicas, train


class LatentLM(nn.Module):
    """Two read-outs with z_k ~ N(f_k, σ²I) between them, p(x_t|x_{<t}) = E_z p(x_t|z) over the samples; σ is learned.

    σ = 0 is the two-layer model (nb-dirac).
    """

    def __init__(self, sigma, **size):
        super().__init__()
        self.lm = SkipGramAttentionLM(n_layers=2, **size)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))

    def forward(self, ids: Tensor, noise: Tensor) -> Tensor:
        """ids: (B, T); noise: (samples, B, T, d), standard normal; returns log p(x_t|x_{<t}), (B, T, V)."""
        z = self.lm.layers[0](ids) + self.log_sigma.exp() * noise
        logits = self.lm.w(self.lm.layers[1](z.flatten(0, 1)))
        samples = logits.log_softmax(-1).unflatten(0, noise.shape[:2])
        return samples.logsumexp(0) - math.log(len(noise))


class _Bits(nn.Module):
    def __init__(self, p):
        super().__init__()
        size = {"vocab": 2, "d": p["d"], "residual": True, "bias": True}
        size |= {"lag_scores": p["window"], "window": p["window"]}
        self.first = p["first"]
        self.model = LatentLM(p["sigma"], **size) if p["samples"] else SkipGramAttentionLM(n_layers=p["layers"], **size)

    def forward(self, ids: Tensor, *noise: Tensor) -> Tensor:
        """Bits per token of the targets from position `first` on, (B, T − first)."""
        logits = self.model(ids[:, :-1], *noise)[:, self.first - 1 :]
        return F.cross_entropy(logits.mT, ids[:, self.first :], reduction="none") / math.log(2)


def xor_text(first, flips, lags):
    """Bits with x_t = x_{t−ℓ₁} ⊕ … ⊕ x_{t−ℓₖ} ⊕ flip_t, ℓ in `lags`, int64 (n, T).

    first: (n, max lags) fair coins, the first bits; flips: (n, T) with P(flip = 1) = ε, those of the first bits unused.
    The best predictor needs H(ε) = −ε log₂ ε − (1−ε) log₂(1−ε) bits per token. As long as 1 + Σ xˡ divides no 1 + xᵐ
    with m inside the window, x_t is independent of every single earlier token, and log-odds that are a sum of functions
    of single tokens (naive Bayes with any weights) need 1 bit.
    """
    x = list(first.unbind(1))
    for t in range(len(x), flips.shape[1]):
        x.append((sum(x[t - lag] for lag in lags) + flips[:, t]) % 2)
    return torch.stack(x, 1)


def _entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _units(smoke):
    size = {"d": 32, "window": 8, "first": 16, "T": 48, "lags": [2, 5], "flip": 0.1, "samples": 0, "layers": 1}
    size |= {"rates": [0.001, 0.003, 0.01, 0.03, 0.1], "steps": 2500, "batch": 64, "held_out": 2048, "sigma": 0.3}
    if smoke:
        size |= {"rates": [0.003, 0.01, 0.03], "steps": 4, "batch": 4, "held_out": 32}
    counted = {"lags": size["lags"], "flip": size["flip"], "window": 8, "rates": [], "tokens": 1000 if smoke else 30000}
    return {
        "naive Bayes, learned weights": counted,
        "1 layer": size,
        "1 layer, twice as wide": size | {"d": 2 * size["d"]},
        "2 layers": size | {"layers": 2},
        "2 layers, noisy latent, 8 samples": size | {"layers": 2, "samples": 8},
    }


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    if "tokens" in p:
        return [{"test": [_counted(p, seed)]} for seed in seeds]

    def batch(n, key):
        first, flips, noise = [], [], []
        for seed in seeds:
            g = torch.Generator(device).manual_seed(1_000_003 * (key + 1) + seed)
            first.append(torch.randint(2, (n, max(p["lags"])), generator=g, device=device))
            flips.append((torch.rand(n, p["T"], generator=g, device=device) < p["flip"]).long())
            if p["samples"]:
                noise.append(torch.randn(p["samples"], n, p["T"] - 1, p["d"], generator=g, device=device))
        ids = xor_text(torch.cat(first), torch.cat(flips), p["lags"]).unflatten(0, (len(seeds), n))
        return (ids, torch.stack(noise)) if noise else (ids,)

    replicas = Replicas(lambda: _Bits(p), seeds, p["rates"], device)

    def held_out(key, parts):
        n, keys = p["held_out"] // 16, range(p["steps"] + key, p["steps"] + key + parts)
        with torch.no_grad():
            return sum(replicas.losses(*batch(n, k)).flatten(1).mean(1) for k in keys) / parts

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels refuse masks that are stacked by vmap
        curve = train(
            replicas,
            lambda step: batch(p["batch"], step),
            p["steps"],
            evaluate=lambda: held_out(0, 2),
            checkpoint=checkpoint,
            description=f"{p['layers']} layers, {p['samples']} samples",
        )
        validation, test = (replicas.by_rate(held_out(key, 16)) for key in (100, 200))
    sigma = None
    if p["samples"]:
        sigma = replicas.by_rate(replicas.parameters["model.log_sigma"].detach().exp())
    return [
        {
            "curve": [[step, [by_seed[s] for by_seed in values]] for step, values in curve],
            "validation": [by_seed[s] for by_seed in validation],
            "test": [by_seed[s] for by_seed in test],
        }
        | ({"sigma": [by_seed[s] for by_seed in sigma]} if sigma else {})
        for s in range(len(seeds))
    ]


def _counted(p, seed):
    """Bits per token of naive Bayes with learned weights: counts on 60 %, weights on 20 %, test on 20 % of one text."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(2, (1, max(p["lags"])), generator=g)
    ids = xor_text(first, (torch.rand(1, p["tokens"], generator=g) < p["flip"]).long(), p["lags"])[0]
    counts, weights, test = ids.split([p["tokens"] * 3 // 5, p["tokens"] // 5, p["tokens"] // 5])
    model = NGramNaiveBayes(p["window"], dtype=torch.float64).fit(counts, 2).fit_weights(weights)
    return model.cross_entropy(test).item() / math.log(2)


def _conclude(units):
    rows = {}
    for name, unit in units.items():
        best, inside = best_rate(unit) if unit["parameters"]["rates"] else (0, None)
        bits = [run["test"][best] for run in unit["runs"]]
        rows[name] = {"runs": bits} | interval(bits)
        if inside is not None:
            rows[name] |= {"rate": unit["parameters"]["rates"][best], "rate inside the grid": inside}
        if unit["parameters"].get("samples"):
            rows[name]["sigma"] = [run["sigma"][best] for run in unit["runs"]]
    flip = units["1 layer"]["parameters"]["flip"]
    one, two, noisy = (rows[k]["runs"] for k in ("1 layer", "2 layers", "2 layers, noisy latent, 8 samples"))
    depth, noise = paired_difference(one, two), paired_difference(two, noisy)
    return {
        "rows": rows,
        "best possible": _entropy(flip),
        "best that tells 00 from the rest only": _entropy(flip) / 4 + 3 / 4 * _entropy((2 - flip) / 3),
        "gain of the second layer": depth,
        "gain of the noise": noise,
        "reproduced: naive Bayes does not represent XOR": rows["naive Bayes, learned weights"]["low"] > 0.99,
        "reproduced: one layer does not represent XOR": depth["low"] > 0.1,
        "noise helps": noise["low"] > 0,
    }


DEPTH = Experiment(
    title="A language with an XOR dependency: one layer, two layers, two layers with a noisy latent between them",
    units=_units,
    run=_run,
    conclude=_conclude,
)
