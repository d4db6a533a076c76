"""Recorded runs on fixed grids of rates: which β is best for Tiger, what 16-bit parameters cost it, longer training.

Every β, and every way of storing parameters and momentum, trains at six rates with the same seeds. The longer runs are
at four rates around what was best for a quarter of the steps.
"""

import math

import numpy as np

from kexue_utils.optimization.tiger.experiments.runs import GPT, PARTS, SMOKE, data, nats, train
from kexue_utils.optimization.tiger.experiments.verdicts import at_most, best_of_each
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.recorder import Experiment

RECOMMENDED = 0.965
BETAS = (0.0, 0.5, 0.8, 0.9, 0.945, RECOMMENDED, 0.98, 0.99)
SMALLEST_ADVISED = 1e-3  # of the rates that the post advises
BATCH = 16
LONGER = {  # the smallest of four rates; best in the records of fewer steps are 8e-3, 1.6e-2, 3.2e-4 and 2e-3
    "Tiger": {"rule": "Tiger", "betas": [RECOMMENDED], "lr_scale": "rms", "first": 4e-3},
    "Tiger, β = 0.8": {"rule": "Tiger", "betas": [0.8], "lr_scale": "rms", "first": 8e-3},
    "Lion": {"rule": "Lion", "betas": [0.95, 0.98], "first": 8e-5},
    "AdamW": {"rule": "AdamW", "betas": [0.9, 0.95], "first": 5e-4},
}
STORED = {
    f"{products}{how}": {"products": products, "scale": 1024.0 if products == "float16" else 1.0} | own
    for products in ("bfloat16", "float16")
    for how, own in {
        ", stored in float32": {"storage": "float32"},
        "": {"storage": products},
        ", rounded at random": {"storage": products, "rounding": "stochastic"},
    }.items()
}


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    found = data(p, device)
    trained = train(p, p["rates"], seeds, found, device, p["name"])
    return [
        {name: trained[name][:, s].tolist() for name in (*PARTS, "moved", "finite")}
        | ({"corpus": found.provenance} if s == 0 else {})
        for s in range(len(seeds))
    ]


def _joined(units):
    """{name: {"rates", "validation", "test", "moved": one list of runs for every rate}}."""
    found = {}
    for unit in units.values():
        row = found.setdefault(unit["parameters"]["name"], {"rates": [], "validation": [], "test": [], "moved": []})
        row["rates"] += unit["parameters"]["rates"]
        for i in range(len(unit["parameters"]["rates"])):
            for part in PARTS:
                row[part].append([nats(run[part][i]) for run in unit["runs"]])
            row["moved"].append([run["moved"][i] for run in unit["runs"]])
    return found


def _best(row):
    """Number of the rate with the lowest mean loss."""
    return int(np.argmin(np.mean(row["validation"], 1)))


def _at_its_best(row):
    best = _best(row)
    return {
        "rate": row["rates"][best], "rate inside the grid": 0 < best < len(row["rates"]) - 1,
        "validation": row["validation"][best], "tests": row["test"][best], "test": interval(row["test"][best]),
    }  # fmt: skip


def _beta_units(smoke):
    betas, units = (0.9, RECOMMENDED, 0.99) if smoke else BETAS, {}
    for beta in betas:
        p = GPT | {
            "rule": "Tiger",
            "lr_scale": "rms",
            "batch": BATCH,
            "steps": 800,
            "betas": [beta],
            "name": f"β = {beta:g}",
        }
        p["rates"] = [2e-3 * 2**k for k in range(6)]
        units[p["name"]] = p | (SMOKE if smoke else {})
    return units


def best_beta(rows: dict[float, dict], recommended: float) -> dict:
    """The best β by mean validation loss, and the recommended one against the best of the others on the test part.

    rows: {β: {"validation", "tests": losses run by run}}.
    """
    order = sorted(rows, key=lambda beta: np.mean(rows[beta]["validation"]))
    other = next(beta for beta in order if beta != recommended)
    betas = sorted(rows)
    return {
        "betas": rows, "best": order[0], "best inside the grid": betas[0] < order[0] < betas[-1], "best other": other,
        "recommended at most best other": at_most({"": (rows[recommended]["tests"], rows[other]["tests"])})[""],
    }  # fmt: skip


def _conclude_betas(units):
    rows = {float(name.removeprefix("β = ")): _at_its_best(row) for name, row in _joined(units).items()}
    betas = sorted(rows)
    horizons = best_of_each(
        [math.log2(1 / (1 - beta)) for beta in betas], [rows[beta]["validation"] for beta in betas]
    )  # fmt: skip
    return best_beta(rows, RECOMMENDED) | {
        "log2 of the best horizon 1/(1 − β)": interval(horizons) if horizons else None,
    }


def _longer_units(smoke):
    units = {}
    for name, own in LONGER.items():
        rates = [own["first"] * 2**k for k in range(4)]
        p = GPT | {"steps": 4 * GPT["steps"], "name": name, "rates": rates}
        p |= {key: value for key, value in own.items() if key != "first"}
        units[name] = p | (SMOKE if smoke else {})
    return units


def _conclude_longer(units):
    rows = {name: _at_its_best(row) for name, row in _joined(units).items()}
    tests = {name: row["tests"] for name, row in rows.items()}
    links = {
        "Lion at most Tiger": (tests["Lion"], tests["Tiger"]),
        "Tiger at most AdamW": (tests["Tiger"], tests["AdamW"]),
        "Tiger with β = 0.8 at most AdamW": (tests["Tiger, β = 0.8"], tests["AdamW"]),
    }
    p = units["Tiger"]["parameters"]
    return {
        "rules": rows, "links": at_most(links), "order": sorted(rows, key=lambda name: rows[name]["test"]["mean"]),
        "tokens a run": p["steps"] * p["batch"] * p["L"],
    }  # fmt: skip


def _half_units(smoke):
    """Half of the rates in a unit, so that devices share the work evenly."""
    units, rates = {}, [SMALLEST_ADVISED * k * (4 if smoke else 1) for k in (1, 4, 8, 16, 32, 64)]
    for name, own in STORED.items():
        p = GPT | {"rule": "Tiger", "lr_scale": "rms", "batch": BATCH, "name": name, "betas": [RECOMMENDED]} | own
        for half, some in {"lower": rates[:3], "upper": rates[3:]}.items():
            units[f"{name}, {half} rates"] = p | (SMOKE if smoke else {}) | {"rates": some}
    return units


def _conclude_half(units):
    rows, summary = _joined(units), {}
    for name, row in rows.items():
        control = rows[f"{name.split(',')[0]}, stored in float32"]
        best, reference = _best(row), _best(control)
        found = {
            "rates": row["rates"], "test": [interval(one) for one in row["test"]],
            "moved": [float(np.mean(one)) for one in row["moved"]], "best rate": row["rates"][best],
            "float32's best rate": row["rates"][reference],
        }  # fmt: skip
        if control is not row:
            found["gap at every rate"] = [
                paired_difference(mine, its) for mine, its in zip(row["test"], control["test"], strict=True)
            ]
            found["gaps"] = at_most(
                {
                    "at the smallest rate advised": (row["test"][0], control["test"][0]),
                    "at the best rate of float32": (row["test"][reference], control["test"][reference]),
                    "each at its own best rate": (row["test"][best], control["test"][reference]),
                }
            )
        summary[name] = found
    return summary


BETA = Experiment(
    title="Which β is best for Tiger on a small language model, each at its best learning rate",
    units=_beta_units,
    run=_run,
    conclude=_conclude_betas,
)
LONG = Experiment(
    title="Tiger, Lion and AdamW on a small language model, four times as long",
    units=_longer_units,
    run=_run,
    conclude=_conclude_longer,
)
HALF = Experiment(
    title="Tiger with parameters and momentum of 16 bits, rounded to nearest or at random",
    units=_half_units,
    run=_run,
    conclude=_conclude_half,
)
