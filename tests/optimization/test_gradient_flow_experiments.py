"""The recorded runs: their steps are the library's, their estimators see what is known exactly, smoke sizes run."""

import json
import math

import numpy as np
import pytest
import torch

from kexue_utils.optimization.gradient_flow import FokkerPlanck, langevin
from kexue_utils.optimization.gradient_flow.experiments import langevin_bias as bias
from kexue_utils.training.recorder import record

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["langevin_bias"])
def test_the_smoke_size_runs(name, tmp_path):
    found = json.loads(record(name, smoke=True, out=tmp_path).read_text("utf-8"))
    assert found["summary"] and all(None not in unit["runs"] for unit in found["units"].values())


@pytest.mark.parametrize("name", bias.POTENTIALS)
def test_potentials_come_with_their_gradients(name):
    potential, box = bias.POTENTIALS[name]
    torch.manual_seed(0)
    x, y = (low + (high - low) * torch.rand(50, dtype=torch.float64) for low, high in box)
    V, *gradient = potential(x.requires_grad_(), y.requires_grad_())
    for found, expected in zip(gradient, torch.autograd.grad(V.sum(), (x, y)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["ula", "mala"])
@pytest.mark.parametrize("name", bias.POTENTIALS)
def test_the_step_is_that_of_the_library(name, method):
    potential, box = bias.POTENTIALS[name]
    torch.manual_seed(1)
    x = torch.stack(bias.Sampler(bias.law(potential, box, 64), box, CPU)(500), 1).double()
    run = langevin(lambda z: -torch.stack(potential(*z.T)[1:], 1), x, 0.05, 3, method,
                   lambda z: -potential(*z.T)[0], torch.Generator().manual_seed(2))  # fmt: skip
    generator, h = torch.Generator().manual_seed(2), torch.tensor(0.05, dtype=torch.float64)
    state, moves = (*x.T, *potential(*x.T)), 0
    for expected in run.samples:
        noise = torch.empty_like(x).normal_(generator=generator).T
        uniform = torch.empty(len(x), dtype=x.dtype)
        uniform = uniform.uniform_(generator=generator) if method == "mala" else None
        state, moved = bias.METHODS[method](potential, state, h, noise, uniform)
        moves += moved if isinstance(moved, float) else moved.double().mean()
        torch.testing.assert_close(torch.stack(state[:2], 1), expected, rtol=1e-12, atol=1e-12)
    assert moves / 3 == pytest.approx(run.acceptance.item()) and (method == "ula") == (moves == 3)


@pytest.mark.parametrize("name", bias.POTENTIALS)
def test_masses_of_the_law_are_those_of_the_grid(name):
    potential, box = bias.POTENTIALS[name]
    edges = [np.linspace(low, high, 193) for low, high in box]
    solver = FokkerPlanck([(e[1:] + e[:-1]) / 2 for e in edges],
                          lambda x, y: potential(torch.from_numpy(x), torch.from_numpy(y))[0].numpy())  # fmt: skip
    grid = bias.aggregate(torch.from_numpy(solver.stationary()) * solver.cell, 16)
    fine = bias.aggregate(bias.law(potential, box, 192), 16)
    assert 1e-8 < (fine - grid).abs().sum() < 2e-3  # the grid takes a cell's centre for its mean
    torch.testing.assert_close(bias.aggregate(bias.law(potential, box, 384), 16), fine, rtol=1e-4, atol=1e-8)


def test_draws_follow_the_law_as_well_as_independent_samples_can():
    potential, box = bias.POTENTIALS["four modes"]
    masses = bias.law(potential, box, 128)
    torch.manual_seed(0)
    counts = bias.counted(*bias.Sampler(masses, box, CPU)(200_000), box, 16)
    bins = bias.aggregate(masses, 16)
    expected = (bins / 200_000).sqrt().sum().item() * math.sqrt(2 / math.pi) / 2
    assert 0.7 * expected < bias.total_variation(counts, bins) < 1.3 * expected


def test_what_is_outside_or_not_a_number_is_counted_apart():
    x, y = torch.tensor([0.1, 3.0, math.nan, -0.1]), torch.tensor([0.9, 0.1, 0.1, 0.1])
    counts = bias.counted(x, y, ((0.0, 1.0), (0.0, 1.0)), 2)
    assert counts.tolist() == [0, 1, 0, 0, 3]
    assert bias.total_variation(counts, torch.tensor([[0.0, 1.0], [0.0, 0.0]])) == 0.75


def test_the_known_bias_of_a_quadratic_potential_is_seen():
    """With variances 1/8 and 1/2 the steps end in 1/8/(1 − 4h) and 1/2/(1 − h): for h = 0.08, .184 and .543."""
    p = bias._units(True)["quadratic"] | {"particles": 20_000, "h": [0.08, 0.04], "spacing": 0.32, "burn": 10,
                                          "snapshots": 30, "block": 10}  # fmt: skip
    (run,) = bias._run(p, [0], CPU, None)
    floor = max(run["floor"]["to the law"])
    assert run["bias"][0] > 10 * floor and run["bias"][1] > 4 * floor
    for h in range(2):
        assert abs(run["ula"]["tv"][h] - run["bias"][h]) < floor
        assert run["ula"]["own"][h] < 2 * floor and run["mala"]["tv"][h] < 2 * floor


def test_an_interrupted_unit_goes_on_where_it_was():
    class Stored:
        state, saves = None, 0

        def load(self):
            return self.state

        def save(self, state):
            self.state, self.saves = dict(state), self.saves + 1

    p, stored = bias._units(True)["banana"], Stored()
    whole = bias._run(p, [0], CPU, stored)
    assert stored.saves == 1 + 2 * len(p["h"])
    stored.state.pop("0 mala 0.01")
    assert bias._run(p, [0], CPU, stored) == whole and stored.saves == 2 + 2 * len(p["h"])


def test_the_slope_is_that_of_a_power():
    h = np.array([0.1, 0.05, 0.025])
    assert bias.slope(h, 3 * h**1.5, [4, 2, 1]) == pytest.approx(1.5)
