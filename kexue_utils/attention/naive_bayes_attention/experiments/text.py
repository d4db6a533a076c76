"""How many bits a character costs: counting models, naive Bayes and attention on the same targets of the same text.

`counted_bits` and `attention_bits` are the live table of the chapter; PYDOC and SYMPY are its recorded forms.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kexue_utils.attention.naive_bayes_attention import NGramNaiveBayes, SkipGramAttentionLM
from kexue_utils.attention.naive_bayes_attention.experiments.lengths import best_rate
from kexue_utils.training.corpora import deal_blocks, encode_common, pydoc_topics, python_sources
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.replicas import Replicas, train

LEFT = 136  # context kept before the first target of a text, so that every model predicts the same targets
BLOCK = 128  # the number of targets is a multiple of this
BETAS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
ATTENTION = {
    "attention": {},
    "attention + bias": {"bias": True},
    "attention + residual": {"residual": True},
    "attention + residual + bias": {"residual": True, "bias": True},
    "attention + residual + bias + lag values": {"residual": True, "bias": True, "lag_values": True},
}


def pydoc_split():
    """((counts, weights, test), V): the first 80 %, the next and the last 10 % of the help topics, ids below V = 48.

    Tables are counted on the first part, weights and learning rates chosen on the second, bits measured on the third.
    """
    ids, _ = encode_common(pydoc_topics())
    ends = [len(ids) * 8 // 10, len(ids) * 9 // 10]
    return tuple(torch.from_numpy(part) for part in np.split(ids, ends)), 48


@cache
def _sympy_ids():
    data = np.frombuffer(b"".join(python_sources().values()), np.uint8)
    values = np.flatnonzero(np.bincount(data))
    index = np.zeros(256, np.uint8)
    index[values] = np.arange(len(values))
    return index[data], len(values)


@cache
def _sympy_split(seed):
    ids, vocab = _sympy_ids()
    return [torch.from_numpy(part) for part in deal_blocks(ids, seed, held_out=65)], vocab


def _splits(corpus, seeds, device):
    """[(counts, weights, test)] by seed, on the device, and V; a seed of "sympy" is a split of its own."""
    if corpus == "pydoc":
        parts, vocab = pydoc_split()
        return [tuple(part.to(device) for part in parts)] * len(seeds), vocab
    splits = [_sympy_split(seed) for seed in seeds]
    return [tuple(part.to(device).long() for part in parts) for parts, _ in splits], splits[0][1]


def _targets(ids, context):
    """The part of a text that a model with that context must see to predict the common targets."""
    n = (len(ids) - LEFT) // BLOCK * BLOCK
    if n < 1 or context > LEFT:
        raise ValueError(f"a text of {len(ids)} tokens has no targets after {LEFT}, or context = {context} is longer")
    return ids[LEFT - context : LEFT + n]


def interpolated_trigram(counts, weights, test, vocab, rounds=30):
    """Bits of λ₀/V + λ₁ p(x_t) + λ₂ p(x_t|x_{t−1}) + λ₃ p(x_t|x_{t−2}, x_{t−1}), λ by EM on `weights`.

    counts, weights, test: 1-d integer tensors with values below vocab.
    """

    def probabilities(ids):
        found = [torch.full((len(ids) - 2,), 1 / vocab, dtype=torch.float64, device=ids.device)]
        for n in range(3):
            gram = sum(counts[k : len(counts) - 2 + k] * vocab ** (2 - k) for k in range(2 - n, 3))
            table = torch.bincount(gram, minlength=vocab ** (n + 1)).view(-1, vocab).double()
            table /= table.sum(-1, keepdim=True).clamp(min=1)
            here = sum(ids[k : len(ids) - 2 + k] * vocab ** (2 - k) for k in range(2 - n, 3))
            found.append(table.flatten()[here])
        return torch.stack(found)

    p = probabilities(_targets(weights, 2))
    mix = torch.full((4, 1), 0.25, dtype=p.dtype, device=p.device)
    for _ in range(rounds):
        share = mix * p
        mix = (share / share.sum(0)).mean(1, keepdim=True)
    return -(mix * probabilities(_targets(test, 2))).sum(0).log2().mean().item()


def naive_bayes(counts, weights, vocab, window=8, *, learned=True):
    """Naive Bayes counted on `counts`; strict, or with weights and β learned on `weights`. Float64."""
    model = NGramNaiveBayes(window, dtype=torch.float64).fit(counts, vocab)
    return model.fit_weights(_targets(weights, window)) if learned else model


def counted_bits(counts, weights, test, vocab, window=8):
    """({row: bits per character}, lag weights, β) of everything that is counted, not trained by gradient steps.

    counts, weights, test: 1-d integer tensors with values below vocab: tables, weights and β, bits.
    """
    bits = {}
    bigram = NGramNaiveBayes(1, dtype=torch.float64).fit(counts, vocab)
    bits["unigram"] = -bigram.log_prior[_targets(test, 0)].mean().item() / math.log(2)
    bits["bigram"] = bigram.cross_entropy(_targets(test, 1)).item() / math.log(2)
    bits["interpolated trigram"] = interpolated_trigram(counts, weights, test, vocab)
    pooled = NGramNaiveBayes(window, lag_specific=False, dtype=torch.float64).fit(counts, vocab)
    model = naive_bayes(counts, weights, vocab, window, learned=False)
    seen = _targets(test, window)
    bits["strict naive Bayes, lags pooled"] = pooled.cross_entropy(seen).item() / math.log(2)
    bits["strict naive Bayes"] = model.cross_entropy(seen).item() / math.log(2)
    for beta in BETAS:
        model.weights = torch.full_like(model.weights, (1 + beta) / window)
        model.beta = torch.full_like(model.beta, beta)
        bits[f"mean pool, β = {beta:g}"] = model.cross_entropy(seen).item() / math.log(2)
    model.fit_weights(_targets(weights, window))
    bits["naive Bayes, learned weights"] = model.cross_entropy(seen).item() / math.log(2)
    return bits, model.weights.tolist(), model.beta.item()


def reliability(log_p: Tensor, targets: Tensor, bins=10):
    """{confidence, accuracy, share, ece} by tenths of the largest probability; ece = Σ share·|confidence − accuracy|.

    log_p: (N, V); targets: (N,). A tenth without predictions has share 0 and nan for the other two.
    """
    top, guess = log_p.exp().max(-1)
    bin_of = (top * bins).long().clamp(max=bins - 1)
    n = torch.bincount(bin_of, minlength=bins).double()
    confidence = torch.bincount(bin_of, top.double(), minlength=bins) / n
    accuracy = torch.bincount(bin_of, (guess == targets).double(), minlength=bins) / n
    ece = ((confidence - accuracy).abs() * n / n.sum()).nansum().item()
    return {"confidence": confidence, "accuracy": accuracy, "share": n / n.sum(), "ece": ece}


def _left(window, n_layers=1):
    """Tokens that all layers together see, layers·(W − 1) + 1, rounded up to 1 modulo 8 for aligned lengths."""
    return n_layers * (window - 1) // -8 * -8 + 1


class WindowLM(nn.Module):
    """Bits of every target that has its full context, W tokens to the left at one layer."""

    def __init__(self, vocab, d, window, n_layers=1, lag_values=False, **options):
        super().__init__()
        self.left = _left(window, n_layers)
        self.lm = SkipGramAttentionLM(
            vocab, d, n_layers, lag_values=min(window, 8) * lag_values, lag_scores=window, window=window, **options
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, left + Q); returns (B, Q)."""
        logits = self.lm(ids[:, :-1])[:, self.left - 1 :]
        return F.cross_entropy(logits.mT, ids[:, self.left :], reduction="none") / math.log(2)


def _held_out_bits(replicas, texts, left, targets, sequences, part=1):
    """Mean bits of every replica on the common targets of its seed's text, or on every `part`-th block of them."""
    texts = [_targets(text, left) for text in texts]
    totals = []
    for s, text in enumerate(texts):  # texts differ in length: one seed at a time, for all replicas of it
        windows = text.unfold(0, left + targets, targets)[::part]
        rows = torch.arange(len(replicas.rates), device=text.device) * len(texts) + s
        total = torch.zeros(len(rows), dtype=torch.float64, device=text.device)
        for batch in windows.split(sequences * len(texts)):
            total += replicas.losses_of(rows, batch).double().flatten(1).sum(1)
        totals.append(total / (len(windows) * targets))
    return torch.stack(totals, 1).flatten()


def _fit(parameters, texts, vocab, seeds, device, checkpoint=None, description=None):
    """(replicas, curve) of one attention row, trained on the first of every seed's texts, followed on the second."""
    p = parameters
    replicas = Replicas(lambda: WindowLM(vocab, p["d"], p["window"], **p["model"]), seeds, p["rates"], device)
    left = _left(p["window"], p["model"].get("n_layers", 1))
    span = torch.arange(left + p["targets"], device=device)

    def batch(step):
        rows = []
        for seed, (text, _, _) in zip(seeds, texts, strict=True):
            g = torch.Generator(device).manual_seed(1_000_003 * (step + 1) + seed)
            starts = torch.randint(len(text) - len(span) + 1, (p["sequences"], 1), generator=g, device=device)
            rows.append(text[starts + span])
        return (torch.stack(rows),)

    def held_out(which, part=1):
        with torch.no_grad():
            return _held_out_bits(replicas, [t[which] for t in texts], left, p["targets"], p["sequences"], part)

    curve = train(
        replicas, batch, p["steps"], evaluate=lambda: held_out(1, 16), points=p["points"], checkpoint=checkpoint,
        description=description,
    )  # fmt: skip
    return replicas, curve, held_out


def attention_bits(counts, test, vocab, row, *, window=8, d=32, steps=600, rate=0.03, seed=0):
    """Bits per character on `test` of a row of ATTENTION after a few Adam steps of 512 targets each.

    counts, test: 1-d integer tensors with values below vocab.
    """
    p = {"window": window, "d": d, "model": ATTENTION[row], "rates": [rate], "steps": steps, "points": 1}
    p |= {"targets": 64, "sequences": 8}
    _, _, held_out = _fit(p, [(counts, test[: 2 * LEFT + BLOCK], test)], vocab, [seed], torch.device("cpu"))
    return held_out(2).item()


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    texts, vocab = _splits(p["corpus"], seeds, device)
    if p["texts"]:
        texts = [tuple(text[:n] for text, n in zip(parts, p["texts"], strict=True)) for parts in texts]
    if "model" not in p:
        names = ("bits", "weights", "beta")
        return [dict(zip(names, counted_bits(*parts, vocab, p["window"]), strict=True)) for parts in texts]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(p["matmul"])
    try:
        name = f"W = {p['window']}, d = {p['d']}, {p['model']}"
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels refuse masks that are stacked by vmap
            replicas, curve, held_out = _fit(p, texts, vocab, seeds, device, checkpoint, name)
            validation, test = replicas.by_rate(held_out(1)), replicas.by_rate(held_out(2))
    finally:
        torch.set_float32_matmul_precision(precision)
    return [
        {
            "curve": [[step, [by_seed[s] for by_seed in values]] for step, values in curve],
            "validation": [by_seed[s] for by_seed in validation],
            "test": [by_seed[s] for by_seed in test],
        }
        for s in range(len(seeds))
    ]


def _units(corpus, windows, d, smoke):
    rates = [0.003, 0.01, 0.03, 0.1, 0.3] if corpus == "pydoc" else [0.001, 0.003, 0.01, 0.03, 0.1]
    size = {
        "corpus": corpus,
        "d": d,
        "rates": rates,
        "steps": 3000 if corpus == "pydoc" else 2500,
        "points": 20,
        "texts": None,
        "matmul": "high",
    }
    size |= {"sequences": 64, "targets": 64}
    if smoke:
        size |= {"rates": rates[1:4], "steps": 3, "points": 1, "texts": [20000, 2000, 2000], "sequences": 4, "d": 8}
        windows = windows[:1]
    units = {}
    for W in windows:
        at = size | {"window": W} | ({"targets": 128, "sequences": 32} if W > 64 else {})
        units[f"W = {W}: counts"] = {k: at[k] for k in ("corpus", "window", "texts")}
        for row, model in ATTENTION.items():
            units[f"W = {W}: {row}"] = at | {"model": model}
    return units


def _sympy_units(smoke):
    units = _units("sympy", [8, 32, 128], 64, smoke)
    base = units[_base(units)]
    lower = base["rates"] if smoke else [0.0003, *base["rates"][:-1]]
    for d in (16,) if smoke else (128, 256, 512):
        units[f"d = {d}"] = base | {"d": d, "rates": lower}
    for layers in (2,) if smoke else (2, 3):
        units[f"{layers} layers"] = base | {"model": base["model"] | {"n_layers": layers}, "rates": lower}
    return units


_DIFFERENCES = {
    "strict naive Bayes − bigram": ("strict naive Bayes", "bigram"),
    "bigram − learned naive Bayes": ("bigram", "naive Bayes, learned weights"),
    "bigram − attention": ("bigram", "attention"),
    "attention − learned naive Bayes": ("attention", "naive Bayes, learned weights"),
    "gain of the residual": ("attention", "attention + residual"),
    "gain of the bias": ("attention", "attention + bias"),
    "gain of the bias beside the residual": ("attention + residual", "attention + residual + bias"),
    "gain of lag-dependent values": ("attention + residual + bias", "attention + residual + bias + lag values"),
}


def _row(runs):
    return {"runs": runs} | interval(runs)


def _trained(unit):
    best, inside = best_rate(unit)
    row = _row([run["test"][best] for run in unit["runs"]])
    return row | {"rate": unit["parameters"]["rates"][best], "rate inside the grid": inside}


def _base(units):
    """The unit that the larger sizes are compared with."""
    return "W = 32: attention + residual + bias" if "W = 32: counts" in units else "W = 8: attention + residual + bias"


def _conclude(units):
    summary = {"windows": {}, "sizes": {}}
    for name, unit in units.items():
        if name.endswith(": counts"):
            W, runs = unit["parameters"]["window"], unit["runs"]
            rows = {row: _row([run["bits"][row] for run in runs]) for row in runs[0]["bits"]}
            rows |= {row: _trained(units[f"W = {W}: {row}"]) for row in ATTENTION}
            differences = {
                label: paired_difference(rows[a]["runs"], rows[b]["runs"]) for label, (a, b) in _DIFFERENCES.items()
            }
            summary["windows"][str(W)] = {
                "rows": rows,
                "differences": differences,
                "Σw": [sum(run["weights"]) for run in runs],
                "1 + β": [1 + run["beta"] for run in runs],
                "reproduced: strict naive Bayes > bigram > learned": all(
                    differences[k]["mean"] > 3 * differences[k]["se"]
                    for k in ("strict naive Bayes − bigram", "bigram − learned naive Bayes")
                ),
                "reproduced: residual gains more than 3 SE": differences["gain of the residual"]["z"] > 3,
            }
        elif not name.startswith("W = "):
            row, small = _trained(unit), _trained(units[_base(units)])["runs"]
            summary["sizes"][name] = row | {"gain over one layer, d = 64": paired_difference(small, row["runs"])}
    return summary


PYDOC = Experiment(
    title="The chapter's text table with tuned learning rates: help topics of Python, window 8, d = 32",
    units=lambda smoke: _units("pydoc", [8], 32, smoke),
    run=_run,
    conclude=_conclude,
)
SYMPY = Experiment(
    title="The text table on the bytes of sympy 1.14.0: windows 8, 32, 128, widths 64 to 512, 1 to 3 layers",
    units=_sympy_units,
    run=_run,
    conclude=_conclude,
)
