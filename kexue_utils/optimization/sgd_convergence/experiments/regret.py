"""Recorded run: how much of the core bound's regret a random problem uses, over a million runs of each kind.

regret/bound with θ* the best point of the model (on fair signs, which have none: the best in hindsight), the same
against the best point in hindsight on shorter runs, and the exponent with which regret falls.
"""

import math
from functools import cache

import torch

from kexue_utils.optimization.sgd_convergence.bounds import core_bound
from kexue_utils.optimization.sgd_convergence.domains import Ball, Box
from kexue_utils.optimization.sgd_convergence.engine import draw, run_sgd
from kexue_utils.optimization.sgd_convergence.exact import mean_abs_walk
from kexue_utils.optimization.sgd_convergence.extremal import Rademacher
from kexue_utils.optimization.sgd_convergence.hindsight import hindsight_optimum
from kexue_utils.optimization.sgd_convergence.problems import Hinge, LeastAbsolute, Logistic
from kexue_utils.optimization.sgd_convergence.rates import fit_rate
from kexue_utils.optimization.sgd_convergence.schedules import constant, inv_sqrt
from kexue_utils.training.intervals import interval
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment

FAMILIES = {"least absolute": LeastAbsolute, "hinge": Hinge, "logistic": Logistic}
SIGNS = "fair signs"
LEVELS = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
WIDTH = 0.005  # of a bin of the histogram of regret/bound
STREAMS = 16  # seeds of the engine kept for each seed of the experiment


@cache
def setting(family: str, d: int, R: float):
    """(problem, domain, θ*): G = 1 on a ball, or an interval, of radius R; θ* (d,) minimises the expected loss.

    The planted θ° has norm 1. The hinge loss is least at another length of it, found on a sample of features.
    """
    if family == SIGNS:
        return Rademacher(), Box(-R, R), torch.tensor([R], dtype=torch.float64)
    problem = FAMILIES[family](torch.full((d,), d**-0.5, dtype=torch.float64))
    best = problem.planted
    if family == "hinge":
        x, _ = problem.sample(2**14, torch.Generator().manual_seed(0))
        size = (x[0] @ problem.planted).abs()
        lengths = torch.linspace(0, R, 201, dtype=torch.float64)
        right, wrong = (1 - lengths[:, None] * size).clamp(min=0), 1 + lengths[:, None] * size
        best = lengths[((1 - problem.flip) * right + problem.flip * wrong).mean(1).argmin()] * problem.planted
    return problem, Ball(R), best


def schedule(name: str, T: int, D: float, G: float) -> torch.Tensor:
    """The schedule that makes its bound least: D/(G√T), or D/(√2 G√t)."""
    return constant(T, D / (G * T**0.5)) if name == "constant" else inv_sqrt(T, D / (2**0.5 * G))


def regrets(parameters: dict, name: str, T: int, runs: int, seed: int, dtype, device, first=0, data=None, best=None):
    """(runs,) average regrets against ``best`` (runs, d), or against the θ* of `setting`; on fair signs against the
    best point in hindsight, ±R, whose loss is −|loss of R|.
    """
    problem, domain, star = setting(*(parameters[key] for key in ("family", "d", "radius")))
    best = star.to(device, dtype).expand(runs, -1) if best is None else best
    run = run_sgd(
        problem, domain, schedule(name, T, domain.diameter, problem.G), torch.zeros(runs, problem.d, device=device),
        seed=seed, first=first, data=data, comparator=best, dtype=dtype, device=device,
        compile=device.type == "cuda" and data is None,
    )  # fmt: skip
    if parameters["family"] == SIGNS:
        return run.online_loss + run.comparator_loss.abs()
    return run.online_loss - run.comparator_loss


def distribution(ratio: torch.Tensor) -> dict:
    """Quantiles at LEVELS, mean, standard deviation, and how many exceed 1."""
    ratio = ratio.double().cpu()
    ordered = ratio.sort().values
    ranks = [round(level * (len(ratio) - 1)) for level in LEVELS]
    return {
        "mean": ratio.mean().item(), "sd": ratio.std().item(), "above 1": int((ratio > 1).sum()),
        "quantiles": ordered[ranks].tolist(),
    }  # fmt: skip


def histogram(ratio: torch.Tensor) -> dict:
    """Counts in bins of width WIDTH, of which the first begins at first · WIDTH."""
    place = (ratio.double().cpu() / WIDTH).floor().long()
    return {"first": int(place.min()), "counts": torch.bincount(place - place.min()).tolist()}


def _moments(values):
    return {"mean": values.double().mean().item(), "se": values.double().std().item() / math.sqrt(len(values))}


def _one(p, name, seed, device, advance):
    """Everything about one schedule and one seed."""
    problem, domain, _ = setting(p["family"], p["d"], p["radius"])

    def bound(T):
        return float(core_bound(schedule(name, T, domain.diameter, problem.G), domain.diameter, problem.G))

    stream, T, single = STREAMS * seed, p["T"], torch.float32
    found = []
    for piece in range(p["runs"] // p["piece"]):
        found.append(regrets(p, name, T, p["piece"], stream, single, device, first=piece * p["piece"]))
        advance()
    found = torch.cat(found)
    exact = regrets(p, name, T, p["checked"], stream, torch.float64, device)
    advance()
    rate = {str(T): _moments(found)}
    for k, length in enumerate(p["lengths"]):
        rate[str(length)] = _moments(regrets(p, name, length, p["piece"], stream + k + 1, single, device))
    advance()
    result = {
        "distribution": distribution(found / bound(T)),
        "histogram": histogram(found / bound(T)),
        "float64": distribution(exact / bound(T)),
        "float32 off by": ((found[: p["checked"]] - exact).abs().max() / bound(T)).item(),
        "rate": rate,
    }
    if p["family"] != SIGNS:
        T, runs = p["hindsight T"], p["hindsight runs"]
        data = draw(problem, runs, T, seed=stream + STREAMS - 1, device=device)
        best = hindsight_optimum(problem, data, domain, tol=p["tol"])
        planted, hindsight = (
            regrets(p, name, T, runs, 0, torch.float64, device, data=data, best=point) / bound(T)
            for point in (None, best.theta)
        )
        result["hindsight"] = {
            "planted": distribution(planted), "hindsight": distribution(hindsight),
            "histogram": histogram(hindsight), "gap": (best.gap.max() / bound(T)).item(),
        }  # fmt: skip
    advance()
    return result


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    state = checkpoint.load() if checkpoint else None
    runs = state["runs"] if state else []
    if device.type == "cuda":
        torch.compiler.reset()  # a unit needs two variants of the compiled step, and there is room for eight
    names = ("constant", "1/√t")
    steps = iter(progress(len(names) * len(seeds[len(runs) :]) * (p["runs"] // p["piece"] + 3) + 1,
                          f"{p['family']}, d = {p['d']}"))  # fmt: skip
    next(steps)
    for seed in seeds[len(runs) :]:
        runs.append({name: _one(p, name, seed, device, lambda: next(steps)) for name in names})
        if checkpoint:
            checkpoint.save({"runs": runs})
    next(steps, None)
    return runs


def _units(smoke):
    base = {"T": 10_000, "runs": 2**18, "piece": 2**16, "checked": 2**14, "lengths": [104, 304, 1000, 3000],
            "hindsight T": 1000, "hindsight runs": 2**10, "tol": 1e-6, "radius": 2.0}  # fmt: skip
    if smoke:
        base |= {"T": 120, "runs": 512, "piece": 256, "checked": 32, "lengths": [30, 60],
                 "hindsight T": 40, "hindsight runs": 8}  # fmt: skip
    # Largest first: the units are dealt out in this order.
    units = {f"{family}, d = {d}": {"family": family, "d": d} for d in (128, 16, 2) for family in FAMILIES}
    units[SIGNS] = {"family": SIGNS, "d": 1}
    if smoke:
        units = {name: units[name] for name in ("least absolute, d = 2", "hinge, d = 16", "logistic, d = 2", SIGNS)}
    return {name: base | unit for name, unit in units.items()}


def _rate(runs):
    """Slope of log regret against log T: of the means over all seeds, with its standard error, and seed by seed."""
    lengths = sorted(runs[0]["rate"], key=int)
    T = [float(length) for length in lengths]
    means, errors = ([[run["rate"][length][key] for length in lengths] for run in runs] for key in ("mean", "se"))
    if min(map(min, means)) <= 0:
        return None
    pooled = [sum(column) / len(runs) for column in zip(*means, strict=True)]
    spread = [math.hypot(*column) / len(runs) for column in zip(*errors, strict=True)]
    slope, se = fit_rate(T, pooled, spread)
    slopes = [fit_rate(T, *pair)[0] for pair in zip(means, errors, strict=True)]
    return {"T": T, "regret": pooled, "regret se": spread, "slope": slope, "se": se, "seeds": interval(slopes)}


def _spread(distributions, runs):
    median = LEVELS.index(0.5)
    return {
        "median": interval([found["quantiles"][median] for found in distributions]),
        "mean": interval([found["mean"] for found in distributions]),
        "largest": max(found["quantiles"][-1] for found in distributions),
        "smallest": min(found["quantiles"][0] for found in distributions),
        "above 1": sum(found["above 1"] for found in distributions),
        "runs": runs * len(distributions),
    }


def _conclude(units):
    rows = {}
    for unit, result in units.items():
        p = result["parameters"]
        rows[unit] = {}
        for name in ("constant", "1/√t"):
            runs = [run[name] for run in result["runs"]]
            row = {
                "distribution": _spread([run["distribution"] for run in runs], p["runs"]),
                "float64": _spread([run["float64"] for run in runs], p["checked"]),
                "float32 off by": max(run["float32 off by"] for run in runs),
                "rate": _rate(runs),
            }
            if p["family"] == SIGNS:
                # Any algorithm has this expected regret: how many standard errors away is the measured one?
                exact = [p["radius"] * float(mean_abs_walk(int(T))) / T for T in row["rate"]["T"]]
                row["exact regret"] = exact
                row["standard errors off"] = [
                    (found - expected) / se
                    for found, expected, se in zip(row["rate"]["regret"], exact, row["rate"]["regret se"], strict=True)
                ]
            else:
                for point in ("planted", "hindsight"):
                    row[point] = _spread([run["hindsight"][point] for run in runs], p["hindsight runs"])
                row["gap"] = max(run["hindsight"]["gap"] for run in runs)
            rows[unit][name] = row
    checked = [row["float64"] for unit in rows.values() for row in unit.values()]
    slopes = [row["rate"]["se"] for unit in rows.values() for row in unit.values() if row["rate"]]
    return {
        "units": rows,
        "violations in float64": sum(found["above 1"] for found in checked),
        "runs in float64": sum(found["runs"] for found in checked),
        "largest standard error of an exponent": max(slopes),
    }


REGRET = Experiment(
    title="A million runs of SGD of each kind: regret as a share of its bound, and the exponent with which it falls",
    units=_units,
    run=_run,
    conclude=_conclude,
)
