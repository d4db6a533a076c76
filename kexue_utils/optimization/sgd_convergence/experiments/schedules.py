"""Recorded run: does the bound on the last iterate rank learning-rate schedules of a small language model?

The question of arXiv:2501.18965 on the source of Python's standard library: the same warmup and tuning for every
schedule, AdamW or plain SGD, gradients clipped. Beside it what the theory assumes: norms of gradients, and distances.
"""

import math

import numpy as np
import torch

from kexue_utils.optimization.sgd_convergence.experiments.language import SCHEDULES, corpus, shape, train
from kexue_utils.optimization.sgd_convergence.experiments.ranking import compare, drop, fit, parts
from kexue_utils.training.intervals import interval
from kexue_utils.training.recorder import Experiment

TUNING_SEEDS = [1000, 1001]  # tell the best peak, and are none of the recorded seeds
EXTENSIONS, MORE = 3, 4  # how often the grid of peaks may grow, by how many
SPARSE = 4  # every 4th point of a curve where the whole curve isn't needed
SAME_SHAPE = 0.1  # root mean square difference of two drops, as shares of their sizes


def _loss(one):
    """Of a run: what it was chosen by; a run that diverged gave nan, which a record keeps as None."""
    value = one["validation"]
    return value if value is not None and value < math.inf else math.inf


def tune(p: dict, texts: dict, device) -> list[dict]:
    """Every peak of the grid, means over the tuning seeds; it grows by MORE while the best peak stands at an end."""
    rates, tried = list(p["rates"]), []
    for _ in range(EXTENSIONS + 1):
        found = train(p, rates, TUNING_SEEDS, texts, device, f"{p['optimizer']}, {p['schedule']}: {len(rates)} peaks")
        mean = {part: found[part].unflatten(-1, (len(rates), -1)).mean(-1) for part in ("validation", "test", "curve")}
        for i, rate in enumerate(rates):
            ends = {part: mean[part][i].item() for part in ("validation", "test")}
            tried.append({"rate": rate, "curve": mean["curve"][SPARSE - 1 :: SPARSE, i].tolist()} | ends)
        tried.sort(key=lambda one: one["rate"])
        best = tried.index(min(tried, key=_loss))
        ratio = tried[1]["rate"] / tried[0]["rate"]
        if best == 0:
            rates = [tried[0]["rate"] / ratio**k for k in range(MORE, 0, -1)]
        elif best == len(tried) - 1:
            rates = [tried[-1]["rate"] * ratio**k for k in range(1, MORE + 1)]
        else:
            break
    return tried


def _norms(values, warm, points):
    """Of the norms (T,): the median and largest of each of `points` stretches, and over all steps after the warmup."""
    values = values.double()
    stretches = values.view(points, -1)
    after = values[warm:]
    return {
        "medians": stretches.median(1).values.tolist(), "largest": stretches.amax(1).tolist(),
        "median": after.median().item(), "max": after.max().item(),
        "root mean square": after.square().mean().sqrt().item(),
    }  # fmt: skip


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    texts, provenance = corpus(p["corpus"])
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    try:
        state = checkpoint.load() if checkpoint else None
        tried = state["tried"] if state else tune(p, texts, device)
        if checkpoint:
            checkpoint.save({"tried": tried})
        rate = min(tried, key=_loss)["rate"]
        found = train(p, [rate], seeds, texts, device, f"{p['optimizer']}, {p['schedule']}: {len(seeds)} seeds")
    finally:
        torch.set_float32_matmul_precision(precision)
    sparse = p["points"] // SPARSE
    return [
        {
            "rate": rate,
            "curve": found["curve"][:, s].tolist(),
            "distance": found["distance"][SPARSE - 1 :: SPARSE, s].tolist(),
            "gradient": _norms(found["norms"][:, 0, s], p["warm"], sparse),
            "direction": _norms(found["norms"][:, 1, s], p["warm"], sparse),
            "validation": found["validation"][s].item(),
            "test": found["test"][s].item(),
        }
        | ({"tuning": tried, "corpus": provenance} if s == 0 else {})
        for s in range(len(seeds))
    ]


def _units(optimizer, smoke):
    first = {"AdamW": 1e-3, "SGD": 0.2}[optimizer]
    base = {
        "optimizer": optimizer, "corpus": "standard library", "T": 2500, "warm": 100, "d_model": 128, "layers": 3,
        "heads": 4, "L": 128, "batch": 32, "clip": 1.0, "weight_decay": 0.1 if optimizer == "AdamW" else 0.0,
        "rates": [first * 2 ** (k / 2) for k in range(9)], "points": 100, "followed": 64, "windows": 1024,
        "fit from": 0.25, "fit within": 2.0,
    }  # fmt: skip
    names = list(SCHEDULES)
    if smoke:
        base |= {
            "corpus": "help topics", "T": 40, "warm": 4, "d_model": 16, "layers": 1, "heads": 2, "L": 16, "batch": 2,
            "rates": [first * k for k in (2, 4, 8)], "points": 20, "followed": 8, "windows": 8,
        }  # fmt: skip
        names = ["constant", "1/√t", "linear", "cooldown 0.3"]
    return {name: {"schedule": name} | base for name in names}


def _constants(unit):
    """D, G and the floor, once for all schedules: one least squares fit to the followed losses of the constant
    schedule's tuning runs, at peaks within the factor `fit within` of the best, from the share `fit from` of the steps
    on. (arXiv:2501.18965 fits a curve after its warmup in the same way.)
    """
    p, tried = unit["parameters"], unit["runs"][0]["tuning"]
    thin, best = p["T"] // p["points"] * SPARSE, min(tried, key=_loss)["rate"]
    points = [thin * (k + 1) for k in range(p["points"] // SPARSE)]
    late = [k for k, t in enumerate(points) if t >= p["fit from"] * p["T"]]
    curves = []
    for one in tried:
        near = best / p["fit within"] * 0.999 < one["rate"] < best * p["fit within"] * 1.001
        if near and None not in one["curve"]:
            A, B = parts(one["rate"] * shape(p["schedule"], p["T"], p["warm"]), [points[k] for k in late])
            curves.append((A, B, np.array(one["curve"])[late]))
    return fit(curves) | {"curves": len(curves)}


def _cooldown(unit, curve_of_bound):
    """A cooldown's drop, measured and as the bound has it."""
    p = unit["parameters"]
    fraction = float(p["schedule"].split()[1])
    points = np.arange(1, p["points"] + 1) * (p["T"] // p["points"])
    start = (1 - fraction) * p["T"]
    measured = [drop(points, np.array(run["curve"]), start) for run in unit["runs"]]
    bound = drop(points, curve_of_bound, start)
    shape = np.mean([one["shape"] for one in measured], 0)
    return {
        "size": interval([one["size"] for one in measured]), "bound size": bound["size"],
        "half": interval([one["half"] for one in measured]), "bound half": bound["half"],
        "done": bound["done"], "shape": shape.tolist(), "bound shape": bound["shape"],
        "shapes differ by": float(np.sqrt(np.mean((shape - np.array(bound["shape"])) ** 2))),
    }  # fmt: skip


def _conclude(units):
    constants = _constants(units["constant"])
    rows, drops = {}, {}
    for name, unit in units.items():
        p, runs = unit["parameters"], unit["runs"]
        tried, rate = runs[0]["tuning"], runs[0]["rate"]
        points = [p["T"] // p["points"] * (k + 1) for k in range(p["points"])]
        A, B = parts(shape(name, p["T"], p["warm"]), points)
        D2, G2 = constants["D"] ** 2, constants["G"] ** 2
        curve = constants["floor"] + D2 * A / rate + G2 * B * rate
        rates = [one["rate"] for one in tried]
        rows[name] = {
            "test": interval([run["test"] for run in runs]), "tests": [run["test"] for run in runs], "rate": rate,
            "rate inside the grid": min(rates) < rate < max(rates), "rates tried": len(rates),
            "bound": curve[-1], "bound curve": curve[SPARSE - 1 :: SPARSE].tolist(),
            "tuned bound over DG": 2 * (A[-1] * B[-1]) ** 0.5,
            "tuned rate by the bound": (D2 * A[-1] / (G2 * B[-1])) ** 0.5 if G2 else None,
            "distance": interval([run["distance"][-1] for run in runs]),
            "gradient max/median": interval([run["gradient"]["max"] / run["gradient"]["median"] for run in runs]),
            "direction max/median": interval([run["direction"]["max"] / run["direction"]["median"] for run in runs]),
            "gradient": interval([run["gradient"]["root mean square"] for run in runs]),
            "direction": interval([run["direction"]["root mean square"] for run in runs]),
        }  # fmt: skip
        if name.startswith("cooldown"):
            drops[name] = _cooldown(unit, curve)
    tests = np.array([row["tests"] for row in rows.values()])
    rankings = {
        "bound at the peak used": compare(tests, np.array([row["bound"] for row in rows.values()])),
        "bound at its own best peak": compare(tests, np.array([row["tuned bound over DG"] for row in rows.values()])),
    }
    return {
        "constants": constants,
        "schedules": rows,
        "rankings": rankings,
        "reproduced: the bound ranks the schedules": {
            name: found["spearman"]["value"] >= 0.8 for name, found in rankings.items()
        },
        "cooldowns": drops,
        "reproduced: the drop has the bound's shape": {
            name: found["shapes differ by"] <= SAME_SHAPE for name, found in drops.items()
        },
        "every peak inside its grid": all(row["rate inside the grid"] for row in rows.values()),
    }


ADAMW, SGD = (
    Experiment(
        title=f"{len(SCHEDULES)} learning-rate schedules of a small language model against the bound: {optimizer}",
        units=lambda smoke, optimizer=optimizer: _units(optimizer, smoke),
        run=_run,
        conclude=_conclude,
    )
    for optimizer in ("AdamW", "SGD")
)
