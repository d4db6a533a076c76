"""Recorded run: does Tiger's best relative rate stay the same when the model gets wider? Absolute rates, and Lion's?

Widths 128 to 1024 at one depth. Matrices start with a standard deviation of 1/√fan-in, so that scale and width go
together, or with 0.02 at every width, where an absolute rate and a relative one start as the same thing.
"""

import numpy as np

from kexue_utils.optimization.tiger.experiments.runs import GPT, PARTS, SMOKE, data, nats, resumed, tune
from kexue_utils.optimization.tiger.experiments.verdicts import best_of_each
from kexue_utils.training.intervals import bootstrap_interval, interval
from kexue_utils.training.recorder import Experiment

WIDTHS = (1024, 512, 256, 128)  # the longest first
HEAD = 64
FLAT = 0.25  # largest |slope| of a rate that stays the same
RULES = {
    "relative": {"rule": "Tiger", "betas": [0.965], "lr_scale": "rms", "init": None, "first": 1e-3},
    "relative, start 0.02": {"rule": "Tiger", "betas": [0.965], "lr_scale": "rms", "init": 0.02, "first": 1e-3},
    "absolute": {"rule": "Tiger", "betas": [0.965], "lr_scale": "none", "init": None, "first": 4e-5},
    "Lion": {"rule": "Lion", "betas": [0.95, 0.98], "init": None, "first": 4e-5},
}


def _run(parameters, seeds, device, checkpoint):
    p, name = parameters, f"{parameters['name']}, d = {parameters['d_model']}"
    found = data(p, device)
    tried = resumed(checkpoint, "tried", lambda: tune(p, seeds, found, device, name))
    return [
        {"rates": [one["rate"] for one in tried]}
        | {part: [one[part][s] for one in tried] for part in PARTS}
        | ({"corpus": found.provenance} if s == 0 else {})
        for s in range(len(seeds))
    ]


def _units(smoke):
    units = {}
    for width in (32, 16) if smoke else WIDTHS:
        for name, own in RULES.items():
            own = dict(own)
            first = own.pop("first") * (1 if own.get("lr_scale") == "rms" else (128 / width) ** 0.5)
            p = GPT | {"layers": 4, "steps": 500, "batch": 16, "windows": 256, "name": name} | own
            p |= {"d_model": width, "heads": width // HEAD, "rates": [first * 2**k for k in range(7)]}
            if smoke:
                p |= SMOKE | {"d_model": width, "rates": [first * 8**k for k in range(3)]}
            units[f"{name}, d = {width}"] = p
    return units


def _conclude(units):
    summary = {}
    for name in RULES:
        best, rows = {}, {}
        for unit in units.values():
            p, runs = unit["parameters"], unit["runs"]
            if p["name"] == name:
                rates = runs[0]["rates"]
                losses = [[nats(run["validation"][i]) for run in runs] for i in range(len(rates))]
                best[p["d_model"]] = found = best_of_each(np.log2(rates).tolist(), losses)
                mean = np.mean(losses, 1)
                rows[p["d_model"]] = {
                    "rates": rates, "validation": mean.tolist(), "log2 of the best rate": found and interval(found),
                    "test at the best rate": interval([nats(run["test"][int(np.argmin(mean))]) for run in runs]),
                }  # fmt: skip
        summary[name] = {"widths": rows} | _slope(best)
    return summary | {"flat": FLAT}


def _slope(best):
    """Slope of log₂ of the best rate on log₂ of the width, run by run; what it says of "the rate stays the same"."""
    if None in best.values():
        return {"slope": None, "verdict": "a best rate is at the end of its grid"}
    widths = np.log2(sorted(best))
    slopes = [
        float(np.polyfit(widths, [best[width][run] for width in sorted(best)], 1)[0])
        for run in range(len(best[min(best)]))
    ]
    mean, low, high = bootstrap_interval(slopes)
    stays = (
        "reproduced" if -FLAT < low and high < FLAT else "contradicted" if high < -FLAT or low > FLAT else "undecided"
    )
    return {
        "slopes": slopes, "slope": {"mean": mean, "low": low, "high": high}, "slope by t": interval(slopes),
        "falls with the width": high < 0, "stays the same": stays,
    }  # fmt: skip


WIDTH = Experiment(
    title="Best learning rate against the width of a small language model: Tiger's relative one, absolute ones, Lion's",
    units=_units,
    run=_run,
    conclude=_conclude,
)
