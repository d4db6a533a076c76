"""The recorded runs: smoke sizes, and their machinery against what is known exactly."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from kexue_utils.optimization import sgd_convergence as sgd
from kexue_utils.optimization.sgd_convergence.experiments import language, ranking, regret, schedules
from kexue_utils.training.recorder import record
from kexue_utils.training.registry import EXPERIMENTS
from kexue_utils.training.replicas import Replicas
from kexue_utils.training.transformer import decayed
from tests.tolerances import assert_close

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["sgd_regret", "schedules_text", "schedules_text_sgd"])
def test_the_smoke_size_of_every_experiment_runs(name, tmp_path):
    assert "sgd_convergence" in EXPERIMENTS[name]
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


SMALL = schedules._units("AdamW", True)["linear"]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_steps_are_those_of_torch_optim(optimizer):
    """Two replicas at two rates, each clipped by its own norm, against a plain training loop of each."""
    rates, clip = [0.3, 0.02] if optimizer == "SGD" else [0.03, 0.002], 0.7
    p = SMALL | {"optimizer": optimizer, "weight_decay": 0.1 * (optimizer == "AdamW"), "T": 6, "warm": 2, "clip": clip}
    eta = language.shape("cosine", p["T"], p["warm"])
    replicas = Replicas(lambda: language.ByteLosses(p), [3], rates, CPU)
    steps = language.Steps(replicas, p, eta)
    ids = torch.randint(256, (p["T"], 1, 4, 17), generator=torch.Generator().manual_seed(0))
    seen = []
    for t in range(p["T"]):
        steps.now.copy_(steps.table[t])
        loss = replicas.losses(ids[t]).flatten(1).mean(1).sum()
        steps.update(torch.autograd.grad(loss, steps.parameters))
        seen.append(steps.norms.clone())
    for i, rate in enumerate(rates):
        torch.manual_seed(3)
        model = language.ByteLosses(p)
        groups = decayed(model, p["weight_decay"])
        if optimizer == "AdamW":
            peer = torch.optim.AdamW(groups, lr=1.0, betas=language.BETAS, eps=language.EPSILON)
        else:
            peer = torch.optim.SGD(model.parameters(), lr=1.0)
        for t in range(p["T"]):
            for group in peer.param_groups:
                group["lr"] = rate * float(eta[t])
            peer.zero_grad()
            model(ids[t, 0]).mean().backward()
            size = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert seen[t][0, i].item() == pytest.approx(size.item(), rel=1e-3)
            before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
            peer.step()
            moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
            assert seen[t][1, i].item() == pytest.approx(moved.norm().item() / (rate * float(eta[t])), rel=2e-3)
        for name, q in model.named_parameters():
            torch.testing.assert_close(replicas.parameters[name][i], q, rtol=2e-3, atol=2e-4)


def test_every_schedule_rises_to_one_and_the_cooldowns_are_those_of_the_library():
    for name in language.SCHEDULES:
        eta = language.shape(name, 200, 10)
        assert_close(eta[:10], torch.arange(1, 11).double() / 10)
        assert (eta > 0).all() and sgd.is_nonincreasing(eta[9:]) and len(eta) == 200
    assert len(language.SCHEDULES) >= 12
    assert torch.equal(language.shape("cooldown 0.2", 200, 10)[10:], sgd.wsd(200, decay_frac=0.2)[10:])


def test_attention_looks_back_only():
    torch.manual_seed(0)
    layer, x = language.Attention(8, 2, 12), torch.randn(1, 10, 8)
    before = layer(x)
    x[:, 6:] += 1
    after = layer(x)
    assert torch.equal(after[:, :6], before[:, :6]) and not torch.isclose(after[:, 6:], before[:, 6:]).all(-1).any()


def test_the_grid_of_peaks_grows_until_the_best_is_inside(monkeypatch):
    def train(p, rates, seeds, texts, device, description):
        losses = torch.tensor([
            (np.log2(rate) - 5.2) ** 2 + 40 * s * (-1) ** rate if rate < 200 else torch.nan
            for rate in rates
            for s in (-1, 1)  # what one seed alone would mislead by
        ])  # fmt: skip
        return {"validation": losses, "test": losses, "curve": torch.ones(20, 2 * len(rates))}

    monkeypatch.setattr(schedules, "train", train)
    tried = schedules.tune(SMALL | {"rates": [1.0, 2.0, 4.0]}, {}, CPU)
    assert [one["rate"] for one in tried] == [2.0**k for k in range(7)]
    assert min(tried, key=schedules._loss)["rate"] == 32
    down = schedules.tune(SMALL | {"rates": [128.0, 256.0, 512.0]}, {}, CPU)
    assert min(down, key=schedules._loss)["rate"] == 32 and len(down) == 7


def test_the_fit_recovers_planted_constants():
    """Curves that the bound itself makes, at three peaks."""
    D, G, floor, T, points = 3.0, 0.7, 1.5, 120, range(40, 121, 8)
    curves = []
    for rate in (0.1, 0.2, 0.4):
        eta = rate * language.shape("constant", T, 6)
        loss = floor + np.array([float(sgd.last_iterate_bound(eta[:t], D, G)) for t in points])
        curves.append((*ranking.parts(eta, points), loss))
    found = ranking.fit(curves)
    assert [found[k] for k in ("D", "G", "floor")] == pytest.approx([D, G, floor], rel=1e-6) and found["rms"] < 1e-9
    A, B = ranking.parts(0.2 * language.shape("linear", T, 6), points)
    curve = sgd.anytime_curve(0.2 * language.shape("linear", T, 6), D, G)
    assert D**2 * A + G**2 * B == pytest.approx(curve[[t - 1 for t in points]].numpy(), rel=1e-12)


def test_rank_correlations_without_ties_are_those_of_scipy():
    rng = np.random.default_rng(0)
    means, bounds = rng.normal(size=9), rng.normal(size=9)
    losses = means[:, None] + 1e-9 * rng.normal(size=(9, 5))
    found = ranking.compare(losses, bounds)
    assert found["ties"] == 0 and found["pairs"] == 36
    assert found["spearman"]["value"] == pytest.approx(spearmanr(means, bounds).statistic)
    assert found["kendall"]["value"] == pytest.approx(kendalltau(means, bounds).statistic)
    assert found["pairs in order"]["value"] == pytest.approx((1 + found["kendall"]["value"]) / 2)
    assert found["spearman"]["low"] == pytest.approx(found["spearman"]["high"])


def test_schedules_closer_than_two_standard_errors_are_tied():
    """Seeds shift all losses alike: only what is left after pairing can make a tie."""
    common = np.array([0.0, 5.0, -3.0, 1.0])
    noise = np.array([1.0, -1.0, 1.0, -1.0])
    losses = np.stack([common, common + 0.1 * noise + 0.01, common + 1.0 + 0.01 * noise])
    measured = ranking.signs(losses)
    assert measured.tolist() == [[0, 0, -1], [0, 0, -1], [1, 1, 0]]
    right, wrong = (ranking.compare(losses, np.array(order)) for order in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]))
    assert right["ties"] == 1 and right["pairs in order"]["value"] == 1 and wrong["pairs in order"]["value"] == 0
    tied = np.array([0, 0, 1]), np.array([0, 1, 2])
    assert right["kendall"]["value"] == pytest.approx(kendalltau(*tied).statistic)
    assert right["spearman"]["value"] == pytest.approx(spearmanr(*tied).statistic) == -wrong["spearman"]["value"]
    assert ranking.agreement(np.zeros((3, 3)), measured)["spearman"] == 0


def test_the_drop_of_a_line_and_of_a_square():
    points = np.arange(1.0, 101)
    line = ranking.drop(points, np.where(points < 80, 3.0, 3 - (points - 80) / 20), 80.0)
    assert line["size"] == pytest.approx(1) and line["half"] == pytest.approx(0.5)
    assert line["shape"] == pytest.approx(line["done"]) and len(line["done"]) == 21
    late = ranking.drop(points, 3 - 2 * (np.clip(points - 80, 0, None) / 20) ** 2, 80.0)
    assert late["size"] == pytest.approx(2) and late["half"] == pytest.approx(0.5**0.5, abs=1e-3)


def a_world(loss):
    """Units of a run of every schedule whose curves are loss(A, B, rate, schedule), with noise of 0.002 a seed."""
    rng, units = np.random.default_rng(0), {}
    for name in language.SCHEDULES:
        p = SMALL | {"schedule": name, "T": 400, "warm": 10, "points": 100, "rates": [0.1 * 2**k for k in range(-3, 4)]}
        A, B = ranking.parts(language.shape(name, 400, 10), range(4, 401, 4))
        found = {rate: loss(A, B, rate, name) for rate in p["rates"]}
        tuning = [{"rate": r, "validation": c[-1], "curve": c[3::4].tolist()} for r, c in found.items()]
        rate = min(tuning, key=schedules._loss)["rate"]
        norms = schedules._norms(torch.ones(400), 10, 25)
        units[name] = {
            "parameters": p,
            "runs": [
                {"rate": rate, "curve": curve.tolist(), "test": curve[-1], "distance": [1.0], "tuning": tuning,
                 "gradient": norms, "direction": norms}
                for curve in found[rate] + 0.002 * rng.normal(size=(5, 1))
            ],
        }  # fmt: skip
    return units


def test_the_verdict_where_the_bound_is_the_truth_and_where_it_is_not():
    def truth(A, B, rate, name):
        return 1.5 + 4 * A / rate + 0.25 * B * rate

    found = schedules._conclude(a_world(truth))
    assert [found["constants"][k] for k in ("D", "G", "floor")] == pytest.approx([2.0, 0.5, 1.5], rel=1e-6)
    ranked = found["rankings"]["bound at the peak used"]
    assert ranked["spearman"]["low"] > 0.95 and ranked["pairs in order"]["value"] > 0.97 and ranked["pairs"] == 120
    assert all(found["reproduced: the bound ranks the schedules"].values())
    assert all(found["reproduced: the drop has the bound's shape"].values())
    assert found["schedules"]["linear"]["gradient max/median"]["mean"] == 1

    def reverse(A, B, rate, name):
        return truth(A, B, rate, name) if name == "constant" else 4 - truth(A, B, rate, name)[::-1]

    found = schedules._conclude(a_world(reverse))
    assert not any(found["reproduced: the bound ranks the schedules"].values())
