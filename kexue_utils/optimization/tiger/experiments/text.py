"""Recorded run: Tiger, Lion, AdamW and momentum SGD on a small language model, each at its own best learning rate.

The post's order is Lion ≥ Tiger ≥ AdamW. Two texts: Python's standard library, and a hidden Markov chain whose best
possible loss is known. Every rule gets the same tokens, clipping, warm-up and cosine, the same number of rates, and no
weight decay; the seeds that choose a rate are not those that judge it.
"""

import numpy as np

from kexue_utils.optimization.tiger.experiments.runs import (
    GPT,
    PARTS,
    SMOKE,
    data,
    mean_loss,
    nats,
    resumed,
    train,
    tune,
)
from kexue_utils.optimization.tiger.experiments.verdicts import MARGIN, at_most
from kexue_utils.training.intervals import interval
from kexue_utils.training.recorder import Experiment

TUNING_SEEDS = [1000, 1001]
NEIGHBOURS = (0.5, 1.0, 2.0)
RULES = {
    "Tiger": {"betas": [0.965], "lr_scale": "rms", "first": 1e-3},
    "Lion": {"betas": [0.95, 0.98], "first": 4e-5},
    "AdamW": {"betas": [0.9, 0.95], "first": 2.5e-4},
    "SGDM": {"betas": [0.9], "first": 0.0125},
}
CORPORA = {"source code": "standard library", "hidden chain": "hidden chain"}


def _run(parameters, seeds, device, checkpoint):
    p, name = parameters, f"{parameters['rule']}, {parameters['corpus']}"
    found = data(p, device)
    tried = resumed(checkpoint, "tried", lambda: tune(p, TUNING_SEEDS, found, device, name))
    best = min(tried, key=mean_loss)["rate"]
    rates = [best * factor for factor in NEIGHBOURS]
    judged = train(p, rates, seeds, found, device, f"{name}: {len(seeds)} seeds at three rates")
    rest = {"tuning": tried, "corpus": found.provenance, "floors": found.floors}
    return [
        {"rates": rates, "curve": judged["curve"][1, s].tolist(), "finite": judged["finite"][:, s].tolist()}
        | {part: judged[part][:, s].tolist() for part in PARTS}
        | (rest if s == 0 else {})
        for s in range(len(seeds))
    ]


def _units(smoke):
    units = {}
    for text, name in CORPORA.items():
        for rule, own in RULES.items():
            p = GPT | {"corpus": name, "rule": rule} | {k: v for k, v in own.items() if k != "first"}
            p |= {"states": 16} if name == "hidden chain" else {}
            p["rates"] = [own["first"] * 2**k for k in range(7)]
            if smoke:
                p |= SMOKE | {"rates": [8 * own["first"] * 4**k for k in range(3)], "train_windows": 64}
                p["corpus"] = name if name == "hidden chain" else SMOKE["corpus"]
            units[f"{rule}, {text}"] = p
    return units


def _one(unit):
    runs, p = unit["runs"], unit["parameters"]
    tried, rates = runs[0]["tuning"], [one["rate"] for one in runs[0]["tuning"]]
    tests = [nats(run["test"][1]) for run in runs]
    neighbours = [np.mean([nats(run["validation"][i]) for run in runs]) for i in range(3)]
    found = {
        "rate": runs[0]["rates"][1], "rates tried": len(tried), "tests": tests, "test": interval(tests),
        "rate inside the grid": min(rates) < runs[0]["rates"][1] < max(rates),
        "better than both neighbours": bool(neighbours[1] < min(neighbours[0], neighbours[2])),
        "neighbours": [float(x) for x in neighbours],
        "curve": np.mean([[nats(x) for x in run["curve"]] for run in runs], 0).tolist(),
        "tokens a run": p["steps"] * p["batch"] * p["L"],
    }  # fmt: skip
    if runs[0]["floors"]:
        found["test above the filter"] = interval([test - runs[0]["floors"]["test"] for test in tests])
    return found


def compared(rows):
    """{"rules", "links": verdicts of the post's order, "order": by mean loss} of `_one` of every rule on one text."""
    tests = {rule: row["tests"] for rule, row in rows.items()}
    links = {
        "Lion at most Tiger": (tests["Lion"], tests["Tiger"]),
        "Tiger at most AdamW": (tests["Tiger"], tests["AdamW"]),
    }
    return {
        "rules": rows, "links": at_most(links), "order": sorted(rows, key=lambda rule: rows[rule]["test"]["mean"]),
    }  # fmt: skip


def _conclude(units):
    summary = {text: compared({rule: _one(units[f"{rule}, {text}"]) for rule in RULES}) for text in CORPORA}
    return summary | {"margin": MARGIN}


TEXT = Experiment(
    title="Tiger, Lion, AdamW and momentum SGD on a small language model, each at its best learning rate",
    units=_units,
    run=_run,
    conclude=_conclude,
)
