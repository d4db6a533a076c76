"""Recorded run: how far from the target Langevin's steps of size h end, without and with their correction.

For four potentials on the plane, the distance in total variation between a histogram of particles and the Gibbs law.
The particles start from exact draws and run for the same physical time at every h; one potential is quadratic, where
the law that the steps end in is known as well.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kexue_utils.optimization.gradient_flow.gaussian import GaussianTarget
from kexue_utils.training.intervals import interval
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment

RATES = (8.0, 2.0)  # of the quadratic potential


def gaussian(x, y):
    """V = ½(8x² + 2y²) and its gradient."""
    a, b = RATES
    return (a * x**2 + b * y**2) / 2, a * x, b * y


def double_well(x, y):
    """V = (x² − 1)² + 2(y − x/2)² and its gradient."""
    s, t = x**2 - 1, y - x / 2
    return s**2 + 2 * t**2, 4 * x * s - 2 * t, 4 * t


def banana(x, y):
    """V = ½x² + 4(y − ¼x²)² and its gradient."""
    t = y - x**2 / 4
    return x**2 / 2 + 4 * t**2, x - 4 * x * t, 8 * t


def four_modes(x, y):
    """V = −log of .4 N(1, 1) + .3 N(1, −1) + .2 N(−1, 1) + .1 N(−1, −1), variances ¼, up to a constant; gradient."""
    a, b = (4 * x).exp(), (4 * y).exp()
    pp, pm, mp, mm = 0.4 * a * b, 0.3 * a / b, 0.2 * b / a, 0.1 / (a * b)
    total = pp + pm + mp + mm
    value = 2 * (x**2 + y**2) - total.log()
    return value, 4 * x - 4 * (pp + pm - mp - mm) / total, 4 * y - 4 * (pp - pm + mp - mm) / total


# Boxes that leave less than 10⁻⁶ outside.
POTENTIALS = {
    "double well": (double_well, ((-2.5, 2.5), (-3.5, 3.5))),
    "banana": (banana, ((-5.5, 5.5), (-2.5, 9.5))),
    "four modes": (four_modes, ((-4.0, 4.0), (-4.0, 4.0))),
    "quadratic": (gaussian, ((-2.5, 2.5), (-5.0, 5.0))),
}


def ula(potential, state, h, noise, uniform=None):
    """One step of the unadjusted Langevin algorithm   (gf-ula)

    state: (x, y, V, ∂V/∂x, ∂V/∂y), tensors (N,); noise: a pair of standard normals. Returns the next state and 1.
    """
    x, y, _, v, w = state
    scale = (2 * h).sqrt()
    x, y = x - h * v + scale * noise[0], y - h * w + scale * noise[1]
    return (x, y, *potential(x, y)), 1.0


def mala(potential, state, h, noise, uniform):
    """The same step, accepted with min(1, p(y)k(y→x)/p(x)k(x→y))   (gf-mala)

    Of the two proposals' exponents one is |noise|²/2. uniform: (N,) in [0, 1). Returns the next state and, for each
    particle, whether it moved.
    """
    new, _ = ula(potential, state, h, noise)
    back_x, back_y = state[0] - new[0] + h * new[3], state[1] - new[1] + h * new[4]
    ratio = state[2] - new[2] + (noise[0] ** 2 + noise[1] ** 2) / 2 - (back_x**2 + back_y**2) / (4 * h)
    accept = uniform.log() < ratio
    return tuple(torch.where(accept, a, b) for a, b in zip(new, state, strict=True)), accept


METHODS = {"ula": ula, "mala": mala}


def advance(method, potential, steps, device):
    """(x, y, moves, h) → the same `steps` steps of size h later, moves counted; on a GPU one kernel for all of them."""

    def run(x, y, moves, h):
        state = (x, y, *potential(x, y))
        for _ in range(steps):
            noise = torch.randn_like(x), torch.randn_like(x)
            state, moved = METHODS[method](potential, state, h, noise, torch.rand_like(x) if method == "mala" else None)
            moves = moves + moved
        return state[0], state[1], moves

    return torch.compile(run, fullgraph=True, dynamic=False) if device.type == "cuda" else run


def law(potential, box, cells: int) -> Tensor:
    """Mass of e^{−V}/Z in each of cells² rectangles of the box, (cells, cells) float64, by 2 × 2 Gauss points each."""
    axes = []
    for low, high in box:
        centres = low + (high - low) / cells * (torch.arange(cells, dtype=torch.float64) + 0.5)
        half = (high - low) / cells / 2 / math.sqrt(3)
        axes.append(torch.stack((centres - half, centres + half), 1).flatten())
    V, *_ = potential(axes[0][:, None], axes[1])
    p = (V.min() - V).exp().unflatten(0, (cells, 2)).unflatten(2, (cells, 2)).sum((1, 3))
    return p / p.sum()


class Sampler:
    """Independent draws of the law of a potential on a grid of cells², uniform inside a cell."""

    def __init__(self, masses: Tensor, box, device):
        self.box, self.cells = box, len(masses)
        self.levels = masses.flatten().cumsum(0).to(device)

    def __call__(self, n: int) -> tuple[Tensor, Tensor]:
        """x, y: (n,) float32."""
        u = torch.rand(n, dtype=torch.float64, device=self.levels.device)
        cell = torch.searchsorted(self.levels, u * self.levels[-1]).clamp_(max=self.cells**2 - 1)
        found = []
        for (low, high), index in zip(self.box, (cell // self.cells, cell % self.cells), strict=True):
            inside = torch.rand(n, dtype=torch.float64, device=u.device)
            found.append((low + (high - low) / self.cells * (index + inside)).float())
        return tuple(found)


def counted(x: Tensor, y: Tensor, box, bins: int) -> Tensor:
    """How many particles each of bins² rectangles holds, and at the end how many none of them does: (bins² + 1,)."""
    i, j = ((z - low) * (bins / (high - low)) for z, (low, high) in zip((x, y), box, strict=True))
    inside = (i >= 0) & (i < bins) & (j >= 0) & (j < bins)  # not a number is outside
    index = torch.where(inside, i.floor() * bins + j.floor(), bins**2).long()
    return torch.bincount(index, minlength=bins**2 + 1)


def total_variation(counts: Tensor, masses: Tensor) -> float:
    """½ Σ|counts/Σcounts − masses|, where nothing has mass outside the box."""
    share = counts.double() / counts.sum()
    return (((share[:-1] - masses.flatten()).abs().sum() + share[-1]) / 2).item()


def particles(p, method, h, step, draw, box, masses, own=None):
    """Histograms of N particles at one step size; `step` is of `advance`.

    Returns {tv: after the burn-in, curve: of each block of snapshots, acceptance} and, with the law `own` that the
    steps end in, the distance from that.
    """
    x, y = draw(p["particles"])
    moves, h_ = torch.zeros_like(x), torch.tensor(h, dtype=x.dtype, device=x.device)
    launches = round(p["spacing"] / h) // p["substeps"]
    mean, block, curve = 0, 0, []
    for snapshot in range(1, p["burn"] + p["snapshots"] + 1):
        for _ in range(launches):
            x, y, moves = step(x, y, moves, h_)
        block = block + counted(x, y, box, p["bins"])
        if snapshot % p["block"] == 0:
            curve.append(total_variation(block, masses))
            mean, block = mean + (block if snapshot > p["burn"] else 0), 0
    found = {"tv": total_variation(mean, masses), "curve": curve}
    if own is not None:
        found["own"] = total_variation(mean, own)
    if method == "mala":
        steps = launches * p["substeps"] * (p["burn"] + p["snapshots"])
        found["acceptance"] = moves.double().mean().item() / steps
    return found


def aggregate(masses: Tensor, bins: int) -> Tensor:
    """(cells, cells) masses in bins² rectangles of as many cells each."""
    size = len(masses) // bins
    return masses.unflatten(0, (bins, size)).unflatten(2, (bins, size)).sum((1, 3))


def _quadratic(variances):
    return lambda x, y: ((x**2 / variances[0] + y**2 / variances[1]) / 2,)


def stationary(name, p, h):
    """Masses of the law that ULA of step size h ends in, where that is known: the quadratic potential   (gf-ula)"""
    if name != "quadratic":
        return None
    variances = GaussianTarget(torch.diag(1 / torch.tensor(RATES, dtype=torch.float64))).ula_stationary(h).diagonal()
    return aggregate(law(_quadratic(variances), POTENTIALS[name][1], p["cells"]), p["bins"])


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    potential, box = POTENTIALS[p["potential"]]
    cells = law(potential, box, p["cells"])
    draw, masses = Sampler(cells, box, device), aggregate(cells, p["bins"])
    own = {h: stationary(p["potential"], p, h) for h in p["h"]}
    bias = [(own[h] - masses).abs().sum().item() / 2 for h in p["h"] if own[h] is not None]
    masses = masses.to(device)
    if device.type == "cuda":
        torch.compiler.reset()
    steps = {method: advance(method, potential, p["substeps"], device) for method in METHODS}
    done = (checkpoint.load() or {}) if checkpoint else {}
    each = [("exact", 0.0), *((method, h) for method in METHODS for h in p["h"])]
    jobs = [(seed, number, *job) for seed in seeds for number, job in enumerate(each)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for job in progress(len(jobs), p["potential"]):
            seed, number, method, h = jobs[job]
            key = f"{seed} {method} {h}"
            if key in done:
                continue
            torch.manual_seed(1_000_003 * seed + number)
            if method == "exact":
                done[key] = _floor(p, draw, box, masses)
            else:
                law_h = own[h].to(device) if method == "ula" and own[h] is not None else None
                done[key] = particles(p, method, h, steps[method], draw, box, masses, law_h)
            if checkpoint:
                checkpoint.save(done)
    runs = []
    for seed in seeds:
        run = {"floor": done[f"{seed} exact 0.0"]}
        for method in METHODS:
            found = [done[f"{seed} {method} {h}"] for h in p["h"]]
            run[method] = {key: [one[key] for one in found] for key in found[0]}
        runs.append(run | ({"bias": bias} if bias else {}))
    return runs


def _floor(p, draw, box, masses):
    """Two independent samples of the law, as many points as the snapshots have: distances from it and between them."""
    one, two = (sum(counted(*draw(p["particles"]), box, p["bins"]) for _ in range(p["snapshots"])) for _ in range(2))
    apart = total_variation(one, two[:-1] / two.sum())
    return {"to the law": [total_variation(one, masses), total_variation(two, masses)], "between": apart}


def _units(smoke):
    base = {"particles": 2**22, "h": [0.02, 0.01, 0.005, 0.0025, 0.00125], "substeps": 4, "spacing": 0.16, "burn": 64,
            "snapshots": 256, "block": 16, "bins": 64, "cells": 1024}  # fmt: skip
    if smoke:
        base |= {"particles": 2048, "h": [0.02, 0.01], "spacing": 0.08, "burn": 1, "snapshots": 2, "block": 1}
        base |= {"bins": 16, "cells": 128}
    return {name: base | {"potential": name} for name in POTENTIALS}


def slope(h, tv, weights):
    """Weighted least-squares slope of log TV over log h."""
    x, y = np.log(h), np.log(tv)
    w = np.asarray(weights) / np.sum(weights)
    x = x - w @ x
    return float((w * x) @ y / ((w * x) @ x))


def _conclude(units):
    rows = {}
    for name, unit in units.items():
        runs, h = unit["runs"], unit["parameters"]["h"]
        floor = float(np.mean([run["floor"]["to the law"] for run in runs]))
        row = {"floor": floor, "between exact samples": interval([run["floor"]["between"] for run in runs])}
        for method in METHODS:
            row[method] = [interval([run[method]["tv"][k] for run in runs]) for k in range(len(h))]
        row["acceptance"] = [float(np.mean([run["mala"]["acceptance"][k] for run in runs])) for k in range(len(h))]
        means = np.array([found["mean"] for found in row["ula"]])
        used = np.flatnonzero(means > 5 * floor)
        row["h in the fit"] = [h[k] for k in used]
        row["mala over floor"] = max(found["mean"] for found in row["mala"]) / floor
        row["reproduced: mala within 2 floors"] = row["mala over floor"] < 2
        if len(used) > 1:
            weights = (means[used] / floor) ** 2  # the noise of log TV is floor / TV
            slopes = [slope(np.array(h)[used], np.array(run["ula"]["tv"])[used], weights) for run in runs]
            row["slope"] = interval(slopes)
            row["reproduced: ula linear in h"] = 0.9 < row["slope"]["low"] and row["slope"]["high"] < 1.1
        if "bias" in runs[0]:
            row["exact bias"] = runs[0]["bias"]
            row["ula to its own law"] = [interval([run["ula"]["own"][k] for run in runs]) for k in range(len(h))]
        rows[name] = row
    return rows


BIAS = Experiment(
    title="Langevin steps of size h on four potentials: their bias in total variation, with and without correction",
    units=_units,
    run=_run,
    conclude=_conclude,
)
