"""The recorded runs: their steps are the library's, their estimators see what is known exactly, smoke sizes run."""

import json
import math

import numpy as np
import pytest
import torch

from kexue_utils.optimization.gradient_flow import FokkerPlanck, gradient_flow, langevin
from kexue_utils.optimization.gradient_flow.experiments import edge_of_stability as edge
from kexue_utils.optimization.gradient_flow.experiments import langevin_bias as bias
from kexue_utils.optimization.gradient_flow.experiments import score_flow as flow
from kexue_utils.training.recorder import record

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["edge_of_stability", "langevin_bias", "score_flow"])
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


@pytest.mark.parametrize("name", flow.TARGETS)
def test_the_scores_of_the_targets_are_those_of_their_draws(name):
    """E(score) = 0 and E x·score = −d for draws of p; the moments are those of the draws."""
    d, n, end = 5, 200_000, 50.0
    target = flow.TARGETS[name](d)
    x = target.draw(n, end, torch.Generator().manual_seed(0))
    m, S = target.moments(end)
    score = target.score(x)
    assert (x.mean(0) - m).abs().max() < 0.02 and (x.T.cov() - S).abs().max() < 0.03
    assert score.mean(0).abs().max() < 0.02 and (x * score).sum(1).mean() == pytest.approx(-d, abs=0.05)
    x0 = target.draw(n, 0.0, torch.Generator().manual_seed(0))
    assert (x0.mean(0) - target.m0).abs().max() < 0.01 and (x0.T.cov() - target.S0).abs().max() < 0.01


def test_the_score_of_the_mixture_is_the_gradient_of_its_logarithm():
    target, x = flow.Mixture(6), torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    distances = torch.cdist(x, target.centres).square() / (2 * flow.WIDTH**2)
    logp = (torch.tensor(flow.WEIGHTS, dtype=torch.float64).log() - distances).logsumexp(1)
    (expected,) = torch.autograd.grad(logp.sum(), x)
    torch.testing.assert_close(target.score(x), expected, rtol=1e-6, atol=1e-6)  # the weights are float32


def test_the_matching_loss_is_that_of_denoising_and_least_at_the_blurred_score():
    torch.manual_seed(0)
    x, noise = torch.randn(1, 100_000, 2, dtype=torch.float64), torch.randn(1, 100_000, 2, dtype=torch.float64)

    def score(x):
        return -x.sin()

    plain = [(score(x + s * 0.3 * noise) + s * noise / 0.3).square().sum(-1) for s in (1, -1)]
    expected = (plain[0] + plain[1]).mean() / 2 - noise.square().sum(-1).mean() / 0.3**2
    torch.testing.assert_close(flow.matching(score, x, noise, 0.3)[0], expected)
    losses = [flow.matching(lambda x, c=c: -c * x / 1.09, x, noise, 0.3).item() for c in (0.9, 1.0, 1.1)]
    below, least, above = losses
    vertex = 1 + 0.05 * (below - above) / (below + above - 2 * least)
    assert vertex == pytest.approx(1, abs=0.02)  # not blurred, it were 1.09


def test_sets_of_particles_learn_side_by_side_as_they_would_alone():
    torch.manual_seed(0)
    model, x = flow.Scores(3, 4, 8), torch.randn(3, 20, 4)
    alone = x[1] @ model.linear[1]
    h = x[1]
    for W, b in zip(model.weights[:-1], model.biases[:-1], strict=True):
        h = torch.nn.functional.silu(h @ W[1] + b[1])
    torch.testing.assert_close(model(x)[1], alone + h @ model.weights[-1][1] + model.biases[-1][1])
    gradient = torch.autograd.grad(flow.matching(model, x, torch.randn(3, 20, 4), 0.1)[1], model.linear)[0]
    assert gradient[1].abs().min() > 0 and not gradient[[0, 2]].any()


def test_the_score_of_a_gaussian_fit():
    torch.manual_seed(0)
    x = torch.randn(2, 500, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 1
    for one, found in zip(x, flow.closure(x), strict=True):
        expected = -(one - one.mean(0)) @ torch.linalg.inv(one.T.cov(correction=0))
        torch.testing.assert_close(found, expected)
    assert flow.gaussian_kl(x, x[0].mean(0), x[0].T.cov(correction=0))[0] == pytest.approx(0, abs=1e-12)


def test_the_distance_along_directions_is_that_of_a_shift():
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    found = flow.sliced_w2((x + shift)[None], x.repeat(2, 1), torch.eye(3, dtype=torch.float64))
    assert found.item() == pytest.approx(5 / math.sqrt(3))


def test_a_learned_score_keeps_the_particles_on_the_flow():
    p = flow._units(True)["gaussian, 2 refits a step"] | {"d": 2, "particles": 512, "steps": 60, "first": 200}
    p |= {"refits": 10, "width": 16, "rate": 3e-3, "points": 4}
    (run,) = flow._run(p, [0], CPU, None)
    for name in ("learned score", "Gaussian score"):
        assert max(value for _, value in run[name]["curve"]["kl"]) < 0.04
        assert run[name]["curve"]["second"][0][1] > 1.05 * run["exact second moment"]
        assert np.mean(run[name]["excess"]) == pytest.approx(0, abs=0.05)


def tiny(net, seeds=(0, 1), images=20):
    loss = edge.Loss(net, *(part[:images] for part in edge.digits()))
    return loss, torch.stack([edge.start(net, seed) for seed in seeds])


def test_the_networks_are_those_of_torch():
    loss, theta = tiny("cnn")
    x = loss.images[:, None]
    for W, b in list(edge.layers(theta[1:], edge.LAYERS["cnn"]))[:-1]:
        kernel = W[0].T.unflatten(1, (3, 3, -1)).movedim(-1, 1)
        x = torch.nn.functional.avg_pool2d(torch.conv2d(x, kernel, b[0, 0], padding=1).tanh(), 2)
    (W, b) = list(edge.layers(theta[1:], edge.LAYERS["cnn"]))[-1]
    torch.testing.assert_close(edge.outputs("cnn", theta, loss.images)[1], x.movedim(1, -1).flatten(1) @ W[0] + b[0])
    loss, theta = tiny("mlp")
    (W, b), (V, c) = edge.layers(theta[:1], edge.LAYERS["mlp"])
    expected = (loss.images.flatten(1) @ W[0] + b[0]).tanh() @ V[0] + c[0]
    torch.testing.assert_close(edge.outputs("mlp", theta, loss.images)[0], expected)
    torch.testing.assert_close(loss(theta)[0], (expected - loss.classes).square().sum() / 40)


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_the_sharpness_is_the_largest_eigenvalue_of_the_whole_hessian(net, monkeypatch):
    monkeypatch.setitem(edge.LAYERS, "mlp", ((64, 3), (3, 10)))
    monkeypatch.setitem(edge.LAYERS, "cnn", ((9, 2), (18, 3), (12, 10)))
    loss, theta = tiny(net)
    found = edge.sharpness(loss, theta, 40)
    for s in range(2):
        hessian = torch.autograd.functional.hessian(lambda row: loss(row[None])[0], theta[s])
        assert found[s] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-6)
    nowhere = edge.sharpness(loss, torch.stack((theta[0], theta[1] * torch.inf)), 40)
    assert nowhere[0] == pytest.approx(found[0]) and math.isnan(nowhere[1])


def test_the_reference_has_order_4_and_is_the_flow():
    loss, theta = tiny("mlp")
    exact = gradient_flow(loss.grad, theta, [0.0, 2.0], rtol=1e-12, atol=1e-14)[-1]
    errors = [(edge.rk4(loss.grad, theta, 2 / n, n) - exact).norm() for n in (10, 20, 40)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert errors[-1] < 1e-6 and all(3.7 < order < 4.4 for order in orders)


def test_descent_leaves_the_flow_where_the_step_passes_the_edge():
    """f has curvature up to about 3 here: a step of 1 has its edge at 2, one of ¼ at 8."""
    p = edge._units(True)["MLP 64-32-10"] | {"lr": [1.0, 1 / 4, 1 / 8], "points": 4, "spacing": 3.0, "rk4": 1 / 8}
    (run,) = edge._run(p, [0], CPU, None)
    distance = {lr: run["gd"][str(lr)]["distance"][-1] for lr in p["lr"]}
    assert max(run["flow"]["sharpness"]) > 2.2 and run["reference error"] < 0.01 * distance[1 / 8]
    assert distance[1 / 4] < 2.5 * distance[1 / 8] and distance[1.0] > 12 * distance[1 / 8]
