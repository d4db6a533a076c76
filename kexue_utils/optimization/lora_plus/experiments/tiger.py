"""Recorded run: the two learning rates of LoRA under Tiger, whose step is in proportion to RMS(θ), widths 64 to 4096.

At LeCun scales RMS(B)/RMS(A) = √(n/r): the rule has a ratio of √n built in. So the best *extra* ratio α_B/α_A does not
depend on the width if √n is right, and grows like √n if n is. As a control, the same without the rule.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kexue_utils.optimization.lora_plus.experiments.widths import (
    CHOSEN,
    REACH,
    TEMPERATURES,
    as_runs,
    outcome,
    recorded_sweep,
)
from kexue_utils.optimization.lora_plus.sweep import width_sweep
from kexue_utils.optimization.lora_plus.toy import PROBLEMS, Toy, draw_toy, loss_gradients
from kexue_utils.training.recorder import Experiment

# Exponents in the width of the best α_B/α_A, and whose they are; written down before the run.
LAWS = {"rms": {"√n": (0.0, 0.0), "n": (0.5, 0.5)}, "none": {"√n": (0.5, 0.5), "n": (1.0, 1.0)}}

# log₂ of the middle of the first grid at width 64, by rule and start: only where the search begins.
BEGIN = {("rms", "A"): (-3, -5), ("rms", "B"): (-5, -3), ("none", "A"): (-6, -6), ("none", "B"): (-8, -4)}


class CellTiger:
    """Tiger for many small problems side by side: m ← βm + (1−β)g, θ ← θ − α·max(RMS(θ), floor)·sign(m)

    parameters: tensors that are changed in place; rates: α, one tensor for each, which broadcasts against it; dims:
    those over which each one's RMS is taken, the entries of one cell; floors: of the RMS. lr_scale "none": θ ← θ − α
    sign(m). No weight decay.
    """

    def __init__(self, parameters: list[Tensor], rates: list[Tensor], dims: list[tuple[int, ...]], *,
                 floors: list[float], beta: float, lr_scale: str = "rms"):  # fmt: skip
        self.parameters, self.rates, self.dims = parameters, rates, dims
        self.floors, self.beta, self.lr_scale = floors, beta, lr_scale
        self.momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], factor: float = 1.0) -> None:
        """One step at `factor` times the rates."""
        every = zip(self.parameters, self.momenta, gradients, self.rates, self.dims, self.floors, strict=True)
        for theta, m, gradient, rate, dims, floor in every:
            m.lerp_(gradient, 1 - self.beta)
            eta = rate * factor
            if self.lr_scale == "rms":
                count = math.prod(theta.shape[d] for d in dims)
                norm = torch.linalg.vector_norm(theta, dim=dims, keepdim=True)
                eta = eta * (norm / math.sqrt(count)).clamp(min=floor)
            theta.sub_(m.sign().mul_(eta))


def floors(parameters: dict, n: int) -> list[float]:
    """Least RMS of A and of B: the scales of LeCun's start, 1/√n and 1/√r, or one number for both."""
    if parameters["floor"] == "LeCun":
        return [n**-0.5, parameters["r"] ** -0.5]
    return [parameters["floor"]] * 2


def train_grid(toy: Toy, etas_A, etas_B, parameters: dict) -> Tensor:
    """Final losses (S, len(etas_A), len(etas_B)) under Tiger at every pair of rates, which fall linearly to 0."""
    p = parameters
    pairs = torch.cartesian_prod(*(torch.as_tensor(e, dtype=torch.float64) for e in (etas_A, etas_B))).to(toy.A)
    C = len(pairs)
    A, B = toy.A[:, :, None].repeat(1, 1, C, 1), toy.B[:, None].repeat(1, C, 1, 1)
    rates = [pairs[:, 0, None], pairs[:, 1, None, None]]
    options = {"floors": floors(p, toy.A.shape[1]), "beta": p["beta"], "lr_scale": p["rule"]}
    cells = CellTiger([A, B], rates, [(1, 3), (2, 3)], **options)
    for t in range(p["steps"]):
        _, G_A, G_B, _ = loss_gradients(toy, A, B)
        cells.step([G_A, G_B], 1 - t / p["steps"])
    loss, *_ = loss_gradients(toy, A, B)
    return loss.nan_to_num(nan=torch.inf, posinf=torch.inf).view(-1, len(etas_A), len(etas_B))


def first_grids(parameters: dict):
    """Functions of the width: the rates of A and of B that a sweep begins with, 2 apart."""
    p = parameters
    middle_A, middle_B = BEGIN[p["rule"], p["init"]]
    reach = np.arange(-(p["cells"] // 2), p["cells"] - p["cells"] // 2)
    power = 0.5 if p["rule"] == "rms" else 1.0
    return lambda n: 2.0 ** (reach + middle_A - round(power * math.log2(n / 64))), lambda n: 2.0 ** (reach + middle_B)


def _run(parameters, seeds, device, checkpoint):
    p = parameters

    def losses(n, etas_A, etas_B, seeds):
        options = {"r": p["r"], "b": p["b"], "init": p["init"], "dtype": torch.float32, "device": device}
        return train_grid(draw_toy(p["problem"], n, n, seeds, **options), etas_A, etas_B, p)

    result = width_sweep(losses, p["widths"], *first_grids(p), seeds, extend=12, margin=REACH + 1)
    return as_runs(result, seeds)


def _conclude(units):
    summary = {}
    for unit, result in units.items():
        found, laws = {"slopes": {}}, LAWS[result["parameters"]["rule"]]
        for temperature in TEMPERATURES:
            swept = recorded_sweep(result["runs"], temperature)
            edges = [width for width in swept.widths if swept.at_edge(width)]
            if edges:
                found["best cell at an edge"] = edges
                break
            slopes = swept.slope_ci(draws=500)
            found["slopes"][f"{temperature:g}"] = {q: slope._asdict() for q, slope in slopes.items()}
            if f"{temperature:g}" == CHOSEN:
                best = swept.optimum()
                found["optimum"] = {n: {q: math.log2(x) for q, x in rates.items()} for n, rates in best.items()}
                found["outcome"] = outcome((slopes["ratio"].low, slopes["ratio"].high), laws)
        summary[unit] = found
    return summary


def _units(smoke):
    base = {"rule": "rms", "floor": "LeCun", "steps": 60, "beta": 0.9, "r": 4, "b": 16, "cells": 13,
            "widths": [64, 128, 256, 512, 1024, 2048, 4096]}  # fmt: skip
    if smoke:
        base |= {"widths": [16, 32], "steps": 10, "cells": 9}
    variants = {"RMS rule": {}, "RMS rule, floor 1e-3": {"floor": 1e-3}, "no rule": {"rule": "none"},
                "RMS rule, 240 steps, β .965": {"steps": 240, "beta": 0.965}}  # fmt: skip
    chosen = [(name, problem, init) for name in variants for problem in PROBLEMS for init in "AB"]
    if smoke:
        chosen = [("RMS rule", "linear", "A"), ("no rule", "network", "B")]
    return {
        f"{problem}, {init} random, {name}": base | {"problem": problem, "init": init} | variants[name]
        for name, problem, init in chosen
    }


TIGER = Experiment(
    title="The best learning rates of LoRA's two factors under Tiger, with and without its RMS rule, widths 64 to 4096",
    units=_units,
    run=_run,
    conclude=_conclude,
)
