"""Recorded run: the best pair of learning rates of two small regressions, from width 64 to 4096.

What would count for which law was written down before the run: `LAWS` and `outcome`.
"""

import math
from functools import lru_cache

import numpy as np
import torch

from kexue_utils.optimization.lora_plus.sweep import SweepResult, width_sweep
from kexue_utils.optimization.lora_plus.toy import PROBLEMS, draw_toy, train_grid
from kexue_utils.training.recorder import Experiment

FIXED = 256
SHAPES = {"n = m": lambda w: (w, w), f"m = {FIXED}": lambda w: (w, FIXED), f"n = {FIXED}": lambda w: (FIXED, w)}

# Exponents of η_B/η_A in the width that varies, from one end to the other, and whose they are.
LAWS = {
    ("sign", "n = m"): {"n": (1.0, 1.0), "√n": (0.5, 0.5)},
    ("sign", f"m = {FIXED}"): {"n/√m to n": (1.0, 1.0), "the post's n^(3/2)/m": (1.5, 1.5)},
    ("sign", f"n = {FIXED}"): {"n/√m to n": (-0.5, 0.0), "the post's n^(3/2)/m": (-1.0, -1.0)},
    ("sgd", "n = m"): {"n²": (2.0, 2.0), "n": (1.0, 1.0)},
}
TEMPERATURES = (0.1, 0.3, 1.0)
CHOSEN = "0.3"
REACH = 4  # octaves to every side of the best cell that are kept: the same window at every width

# log₂ of the middle of the first grid at width 64, by problem, optimizer and start: only where the search begins.
BEGIN = {
    ("linear", "adam", "A"): (-4, -4), ("linear", "adam", "B"): (-8, 0),
    ("linear", "sign", "A"): (-4, -7), ("linear", "sign", "B"): (-10, 0),
    ("linear", "sgd", "A"): (0, 0), ("linear", "sgd", "B"): (-7, 7),
    ("network", "adam", "A"): (-5, -6), ("network", "adam", "B"): (-8, -3),
    ("network", "sign", "A"): (-5, -5), ("network", "sign", "B"): (-6, -5),
    ("network", "sgd", "A"): (-3, -5), ("network", "sgd", "B"): (-7, -1),
}  # fmt: skip


def outcome(interval: tuple[float, float], laws: dict) -> str:
    """What an interval (low, high) of an exponent says about two laws, each a range of exponents."""
    low, high = interval
    inside = [name for name, (first, last) in laws.items() if low <= last and first <= high]
    if len(inside) == 1:
        return f"supports {inside[0]}"
    return "undecided" if inside else "supports neither"


def first_grids(parameters: dict):
    """Functions of the width: the rates of A and of B that a sweep begins with, 2 apart."""
    p = parameters
    middle = BEGIN[p["problem"], p["optimizer"], p["init"]]
    reach = np.arange(-(p["cells"] // 2), p["cells"] - p["cells"] // 2)

    def etas_A(width):
        n, _ = SHAPES[p["shape"]](width)
        return 2.0 ** (reach + middle[0] - round(math.log2(n / 64)))

    def etas_B(width):
        _, m = SHAPES[p["shape"]](width)
        shift = round(math.log2(m / 64)) if (p["problem"], p["optimizer"]) == ("linear", "sgd") else 0
        return 2.0 ** (reach + middle[1] + shift)

    return etas_A, etas_B


def sweep(parameters: dict, seeds: list[int], device: torch.device) -> SweepResult:
    """Losses at every width, on grids that are continued until the best cell is `REACH` cells inside."""
    p = parameters

    @lru_cache(1)
    def toy(width):
        n, m = SHAPES[p["shape"]](width)
        options = {"r": p["r"], "b": p["b"], "init": p["init"], "dtype": torch.float32, "device": device}
        return draw_toy(p["problem"], n, m, seeds, **options)

    def losses(width, etas_A, etas_B, seeds):
        return train_grid(toy(width), etas_A, etas_B, optimizer=p["optimizer"], steps=p["steps"])

    return width_sweep(losses, p["widths"], *first_grids(p), seeds, extend=12, margin=REACH + 1)


def window(grid, reach: int = REACH):
    """(first log₂ η_A, first log₂ η_B, losses (S, 2·reach + 1, 2·reach + 1) around the best cell, fewer at an edge)."""
    means = np.log(grid.losses).mean(0)
    i, j = (max(0, place - reach) for place in np.unravel_index(means.argmin(), means.shape))
    return (
        round(math.log2(grid.etas_A[i])),
        round(math.log2(grid.etas_B[j])),
        grid.losses[:, i : i + 2 * reach + 1, j : j + 2 * reach + 1],
    )


def as_runs(result, seeds):
    """What a record keeps of a sweep, seed by seed: the window of every width in hundredths of log₁₀."""
    runs = [{} for _ in seeds]
    for width, grid in result.grids.items():
        first_A, first_B, losses = window(grid)
        for run, cells in zip(runs, losses, strict=True):
            logs = [[round(100 * math.log10(x)) if math.isfinite(x) else None for x in row] for row in cells]
            run[str(width)] = {"log2 first eta_A": first_A, "log2 first eta_B": first_B, "100 log10 loss": logs}
    return runs


def _run(parameters, seeds, device, checkpoint):
    return as_runs(sweep(parameters, seeds, device), seeds)


def recorded_sweep(runs: list[dict], temperature: float) -> SweepResult:
    """The sweep of a unit's runs; seeds whose windows differ are cut to the cells that all of them have."""
    grids = {}
    for width in runs[0]:
        cells = [run[width] for run in runs]
        grid = [
            np.array(c["100 log10 loss"], dtype=np.float64) for c in cells
        ]  # None becomes nan, and that counts as ∞
        begin = [np.array([c[f"log2 first eta_{x}"] for c in cells]) for x in "AB"]
        sizes = [np.array([g.shape[axis] for g in grid]) for axis in (0, 1)]
        first = [b.max() for b in begin]
        last = [(b + s).min() for b, s in zip(begin, sizes, strict=True)]
        losses = np.stack(
            [
                10 ** (g[first[0] - a : last[0] - a, first[1] - b : last[1] - b] / 100)
                for g, a, b in zip(grid, *begin, strict=True)
            ]
        )
        grids[int(width)] = (*(2.0 ** np.arange(f, e) for f, e in zip(first, last, strict=True)), losses)
    return SweepResult(grids, temperature)


def envelope(grid) -> dict:
    """{log₂ ratio: log₁₀ of the least loss (geometric mean over seeds) among the pairs of that ratio}"""
    means, found = np.log10(grid.losses).mean(0), {}
    ratios = np.round(np.log2(grid.etas_B) - np.log2(grid.etas_A)[:, None]).astype(int)
    for ratio in np.unique(ratios):
        least = means[ratios == ratio].min()
        found[str(ratio)] = float(least)
    return found


def _conclude(units):
    summary = {}
    for unit, result in units.items():
        p, found = result["parameters"], {"slopes": {}}
        for temperature in TEMPERATURES:
            swept = recorded_sweep(result["runs"], temperature)
            edges = [width for width in swept.widths if swept.at_edge(width)]
            if edges:
                found["best cell at an edge"] = edges
                break
            if temperature == float(CHOSEN):
                found["optimum"] = {
                    width: {name: math.log2(value) for name, value in best.items()}
                    for width, best in swept.optimum().items()
                }
            found["slopes"][f"{temperature:g}"] = {q: ci._asdict() for q, ci in swept.slope_ci(draws=500).items()}
        found["envelope"] = {width: envelope(grid) for width, grid in swept.grids.items()}
        laws = LAWS["sgd" if p["optimizer"] == "sgd" else "sign", p["shape"]]
        if CHOSEN in found["slopes"]:
            ratio = found["slopes"][CHOSEN]["ratio"]
            found["outcome"] = outcome((ratio["low"], ratio["high"]), laws)
        summary[unit] = found
    return summary


def _units(smoke):
    base = {"problem": "linear", "optimizer": "adam", "init": "A", "shape": "n = m", "steps": 60, "r": 4, "b": 16,
            "widths": [64, 128, 256, 512, 1024, 2048, 4096], "cells": 13}  # fmt: skip
    if smoke:
        base |= {"widths": [16, 32], "steps": 10}
    units = [{"problem": p, "optimizer": o, "init": i} for p in PROBLEMS for o in ("adam", "sign", "sgd") for i in "AB"]
    units += [{"problem": p, "init": i, "shape": s} for p in PROBLEMS for i in "AB" for s in list(SHAPES)[1:]]
    units += [{"init": i, "steps": 240} for i in "AB"]
    if smoke:
        units = [{}, {"problem": "network", "optimizer": "sgd", "init": "B"}]
    named = {}
    for changes in units:
        p = base | changes
        more = "" if p["steps"] == base["steps"] else f", {p['steps']} steps"
        named[f"{p['problem']}, {p['optimizer']}, {p['init']} random, {p['shape']}{more}"] = p
    return named


WIDTHS = Experiment(
    title="The best learning rates of LoRA's two factors at widths 64 to 4096: three optimizers, two starts, n and m",
    units=_units,
    run=_run,
    conclude=_conclude,
)
