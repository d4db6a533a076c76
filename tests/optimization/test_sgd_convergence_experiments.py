"""The recorded runs: smoke sizes, and their machinery against what is known exactly."""

import json

import pytest
import torch

from kexue_utils.optimization import sgd_convergence as sgd
from kexue_utils.optimization.sgd_convergence.experiments import regret
from kexue_utils.training.recorder import record
from kexue_utils.training.registry import EXPERIMENTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(n for n in EXPERIMENTS if n.startswith("sgd_")))
def test_the_smoke_size_of_every_experiment_runs(name, tmp_path):
    found = json.loads(record(name, smoke=True, out=tmp_path).read_text("utf-8"))
    assert found["summary"] and all(None not in unit["runs"] for unit in found["units"].values())


@pytest.mark.parametrize("schedule", ["constant", "1/√t"])
def test_regret_on_fair_signs_is_the_exact_one(schedule):
    """DG/2 · E|ε_1 + … + ε_T| / T, whatever the algorithm; in float32 as in float64."""
    p, T, runs = {"family": regret.SIGNS, "d": 1, "radius": 2.0}, 64, 4096
    found = regret.regrets(p, schedule, T, runs, 1, torch.float64, CPU)
    expected = 2.0 * float(sgd.mean_abs_walk(T)) / T
    assert abs(found.mean() - expected) < 5 * found.std() / runs**0.5 < 0.1 * expected
    single = regret.regrets(p, schedule, T, runs, 1, torch.float32, CPU)
    assert (single - found).abs().max() < 1e-5


def test_the_comparator_of_the_hinge_loss_is_the_best_length():
    problem, _, best = regret.setting("hinge", 3, 2.0)
    data = problem.sample(2**16, torch.Generator().manual_seed(7))
    losses = {k: problem.loss(k * best, data).mean() for k in (0.8, 1.0, 1.2)}
    assert losses[1.0] < losses[0.8] and (losses[1.0] < losses[1.2] or best.norm() > 1.99)
    assert torch.nn.functional.cosine_similarity(best, problem.planted, dim=0) > 0.999


def test_the_counts_of_a_distribution():
    ratio = torch.tensor([0.5, -0.0074, 1.001, 0.0])
    found, bins = regret.distribution(ratio), regret.histogram(ratio)
    assert found["above 1"] == 1 and found["quantiles"][-1] == pytest.approx(1.001)
    counts = {bins["first"] + i: n for i, n in enumerate(bins["counts"]) if n}
    assert counts == {-2: 1, 0: 1, 100: 1, 200: 1}


def test_the_fitted_exponent_is_the_planted_one():
    runs = [{"rate": {str(T): {"mean": c * T**-0.4, "se": 1e-3 * T**-0.4} for T in (10, 100, 1000)}} for c in (1, 1.1)]
    found = regret._rate(runs)
    assert found["slope"] == pytest.approx(-0.4, abs=1e-9) and found["seeds"]["mean"] == pytest.approx(-0.4, abs=1e-9)
    assert regret._rate([{"rate": {"10": {"mean": -1.0, "se": 1.0}}}]) is None
