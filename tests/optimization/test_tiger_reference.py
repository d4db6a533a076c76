"""Tiger against independent references: the official rules in numpy, a second buffer for the gradients, two peers."""

import copy
import re

import lion_pytorch
import numpy as np
import pytest
import torch
from pytorch_optimizer import Tiger as PeerTiger
from torch.optim.lr_scheduler import LambdaLR

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.tiger import piecewise_linear, tiger_param_groups
from tests.tolerances import assert_close

NAMES = {"dense.kernel": (5, 7), "dense.bias": (7,), "norm.gamma": (7,), "norm.beta": (7,), "embeddings": (6, 4)}
PATHS = [{"foreach": False}, {"foreach": True}, {"foreach": False, "capturable": True}]


class Named(torch.nn.Module):
    """A model with the official names."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in NAMES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(value))


def draws(n, seed=1, bad=None):
    """Gradients of n micro-batches by name; bad: {(t, name): value}."""
    rng = np.random.default_rng(seed)
    found = [{name: rng.normal(size=shape) for name, shape in NAMES.items()} for _ in range(n)]
    for (t, name), value in (bad or {}).items():
        found[t][name].flat[3] = value
    return found


def run(model, optimizer, gradients, scheduler=None):
    for step in gradients:
        for (_, p), g in zip(model.named_parameters(), step.values(), strict=True):
            p.grad = None if g is None else torch.from_numpy(g).to(p.dtype)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: p.detach().numpy() for name, p in zip(NAMES, model.parameters(), strict=True)}


def official(gradients, k, lr, schedule, one_based, beta=0.965, decay=0.01, shrink=0.99):
    """The official arithmetic, counted from 0 as in its code or from 1 as in the equations; returns θ and m."""
    theta = {name: p.detach().numpy().copy() for name, p in zip(NAMES, Named().parameters(), strict=True)}
    m = {name: np.zeros(shape) for name, shape in NAMES.items()}
    for t, step in enumerate(gradients):
        begins, ends = ((t + 1 - 1) % k == 0, (t + 1) % k == 0) if one_based else (t % k == 0, t % k == k - 1)
        knots = sorted(schedule.items())
        knots = knots if knots[0][0] == 0 else [(0, 0.0), *knots]
        alpha = lr * np.interp(t, [a for a, _ in knots], [b for _, b in knots])
        for name, g in step.items():
            nan = np.isnan(g).any()
            keep = 1.0 if nan or not begins else beta
            g = np.zeros_like(g) if nan else g
            c, eta, wd = 0.0, alpha * ends, decay
            if re.search("bias|beta|gamma", name):
                eta, wd, c = 0.5 * eta, 0.0, float("gamma" in name)
            elif "embeddings" in name:
                eta = eta * np.sqrt(np.mean(theta[name] ** 2, axis=-1, keepdims=True))
            else:
                eta = eta * np.sqrt(np.mean(theta[name] ** 2))
            m[name] = keep * m[name] + (1 - beta) / k * g
            moved = theta[name] - (np.sign(m[name]) + wd * theta[name]) * eta
            theta[name] = (theta[name] - c) * shrink + c if nan else moved
    return theta, m


BAD = {(0, "dense.kernel"): np.nan, (4, "norm.gamma"): np.nan, (5, "embeddings"): np.nan, (8, "dense.bias"): np.nan}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [None, BAD])
@pytest.mark.parametrize("k", [1, 3])
def test_official_rules(k, bad, path):
    gradients, schedule, lr = draws(12, bad=bad), {5: 1.0, 9: 0.2}, 3e-2
    theta, m = official(gradients, k, lr, schedule, one_based=False)
    again, _ = official(gradients, k, lr, schedule, one_based=True)
    assert all(np.array_equal(theta[name], again[name]) for name in NAMES)
    model = Named()
    groups = tiger_param_groups(model, lr, rule="official")
    optimizer = Tiger(groups, accumulation_steps=k, nan_policy="official", **path)
    scheduler = LambdaLR(optimizer, lambda t: piecewise_linear(t, schedule))
    found = run(model, optimizer, gradients, scheduler)
    for (name, value), p in zip(found.items(), model.parameters(), strict=True):
        assert_close(torch.from_numpy(value), torch.from_numpy(theta[name]))
        assert_close(optimizer.state[p]["m"], torch.from_numpy(m[name]))


def repaired(gradients, k, lr, beta=0.965, decay=0.01, shrink=0.99, center=0.0):
    """The repaired rule with a second buffer: sum the cycle's good gradients, then one ordinary step of size rms."""
    theta = {name: p.detach().numpy().copy() for name, p in zip(NAMES, Named().parameters(), strict=True)}
    m = {name: np.zeros(shape) for name, shape in NAMES.items()}
    total = {name: [] for name in NAMES}
    for t, step in enumerate(gradients):
        for name, g in step.items():
            size = np.sqrt(np.mean(theta[name] ** 2))
            if g is not None:
                if np.isfinite(g).all():
                    total[name].append(g)
                else:
                    theta[name] = (theta[name] - center) * shrink + center
            if (t + 1) % k == 0:
                if total[name]:
                    m[name] = beta * m[name] + (1 - beta) * sum(total[name]) / k
                    theta[name] = theta[name] - lr * size * (np.sign(m[name]) + decay * theta[name])
                total[name] = []
    return theta, m


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 4])
def test_bad_gradients_cost_no_decay(k, path):
    bad = BAD | {(7, "dense.kernel"): np.inf, (9, "norm.beta"): -np.inf, (10, "norm.beta"): np.nan}
    gradients = draws(12, bad=bad)
    for t in (4, 5, 6, 7):  # a whole cycle of k = 4
        gradients[t]["embeddings"][0, 0] = np.nan
    theta, m = repaired(gradients, k, 3e-2)
    model = Named()
    optimizer = Tiger(model.parameters(), 3e-2, accumulation_steps=k, **path)
    found = run(model, optimizer, gradients)
    for (name, value), p in zip(found.items(), model.parameters(), strict=True):
        assert_close(torch.from_numpy(value), torch.from_numpy(theta[name]))
        assert_close(optimizer.state[p]["m"], torch.from_numpy(m[name]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("present", [(), (1,), (3,), (1, 4)])
def test_an_expert_with_few_gradients(present, path):
    gradients = draws(12)
    for t in range(4, 8):  # the second cycle of k = 4
        if t - 3 not in present:
            gradients[t]["dense.kernel"] = None
    theta, m = repaired(gradients, 4, 3e-2)
    model = Named()
    optimizer = Tiger(model.parameters(), 3e-2, accumulation_steps=4, **path)
    before = run(model, optimizer, gradients[:4])["dense.kernel"].copy()
    after = run(model, optimizer, gradients[4:8])["dense.kernel"]
    assert np.array_equal(before, after) == (not present)
    found = run(model, optimizer, gradients[8:])
    for (name, value), p in zip(found.items(), model.parameters(), strict=True):
        assert_close(torch.from_numpy(value), torch.from_numpy(theta[name]))
        assert_close(optimizer.state[p]["m"], torch.from_numpy(m[name]))


@pytest.mark.parametrize("policy, factor", [("shrink", 0.99), ("skip", 1.0), ("official", 0.99)])
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_bad_gradients_shrink_towards_the_center(policy, factor, center):
    theta = torch.nn.Parameter(torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64))
    start = theta.detach().clone()
    optimizer = Tiger([theta], center=center, nan_policy=policy)
    for j in range(1, 6):
        theta.grad = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
        optimizer.step()
        assert_close(theta.detach(), (start - center) * factor**j + center)
        assert not optimizer.state[theta]["m"].any()


def test_infinite_gradients():
    theta = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    g = torch.tensor([1.0, float("inf"), 2.0], dtype=torch.float64)
    for policy, stays in (("shrink", True), ("skip", True), ("official", False), ("off", False)):
        optimizer = Tiger([theta], nan_policy=policy)
        theta.grad = g
        optimizer.step()
        assert bool(optimizer.state[theta]["m"].isfinite().all()) == stays


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [2, 5])
def test_accumulation_equals_the_mean_gradient(k, dtype):
    gradients = draws(6 * k)
    means = [{name: sum(g[name] for g in gradients[c * k : c * k + k]) / k for name in NAMES} for c in range(6)]
    models, optimizers = [Named(dtype), Named(dtype)], []
    for model, steps, given in zip(models, (k, 1), (gradients, means), strict=True):
        optimizers.append(Tiger(model.parameters(), 1e-2, accumulation_steps=steps))
        run(model, optimizers[-1], given)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_close(p.detach(), q.detach())
        assert_close(optimizers[0].state[p]["m"], optimizers[1].state[q]["m"])  # the factor 1/k is seen here alone


def test_lion_with_equal_betas_is_tiger():
    torch.manual_seed(0)
    for b in (0.9, 0.965):
        first = [torch.nn.Parameter(torch.randn(8, 5)), torch.nn.Parameter(torch.randn(7))]
        second, third = copy.deepcopy(first), copy.deepcopy(first)
        ours = Tiger(first, 1e-3, b, 0.1, lr_scale="none")
        theirs = lion_pytorch.Lion(second, lr=1e-3, betas=(b, b), weight_decay=0.1)
        other = lion_pytorch.Lion(third, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        for _ in range(40):
            for p, q, r in zip(first, second, third, strict=True):
                p.grad = torch.randn_like(p)
                q.grad, r.grad = p.grad.clone(), p.grad.clone()
            ours.step(), theirs.step(), other.step()
        for p, q, r in zip(first, second, third, strict=True):
            m, n = ours.state[p]["m"], theirs.state[q]["exp_avg"]
            assert torch.equal(m.sign(), n.sign())
            torch.testing.assert_close(m, n, rtol=0, atol=1e-7)
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # theirs rounds 1 − ηλ, which adds up
            assert (p - r).abs().max() > 1e-3


def test_the_peers_tiger_is_the_plain_rule():
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(8, 5)), torch.nn.Parameter(torch.randn(7))]
    second = copy.deepcopy(first)
    ours, theirs = Tiger(first, lr_scale="none"), PeerTiger(second, foreach=False)
    for _ in range(20):
        for p, q in zip(first, second, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-6)  # as above


@pytest.mark.parametrize("c", [4.0, 0.125])
def test_scale_equivariance(c):
    """θ' = cθ has the gradients g/c: the same path if λ' = λ/c, bit for bit for a power of two."""

    def path(scale, decay, lr_scale):
        model = Named()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        optimizer = Tiger(model.parameters(), 1e-2, weight_decay=decay, lr_scale=lr_scale)
        return run(model, optimizer, [{name: g / scale for name, g in step.items()} for step in draws(10)])

    def same(one, other):
        return all(np.array_equal(c * one[name], other[name]) for name in NAMES)

    for rule in ("rms", "row_rms"):
        assert same(path(1, 0, rule), path(c, 0, rule))
        assert same(path(1, 0.5, rule), path(c, 0.5 / c, rule))
        assert not same(path(1, 0.5, rule), path(c, 0.5, rule))
    assert not same(path(1, 0, "none"), path(c, 0, "none"))


def test_relative_step():
    model = Named()
    gradients = draws(1)
    for rule in ("rms", "row_rms", "half", "none"):
        model = Named()
        before = [p.detach().clone() for p in model.parameters()]
        run(model, Tiger(model.parameters(), 1e-2, weight_decay=0.0, lr_scale=rule), gradients)
        for p, old in zip(model.parameters(), before, strict=True):
            step = (p.detach() - old).abs()
            if rule == "rms":  # a gain with non-zero mean: not the standard deviation, not the norm
                expected = (1e-2 * old.square().mean().sqrt()).expand_as(old)
            elif rule == "row_rms":
                expected = (1e-2 * old.square().mean(-1, keepdim=True).sqrt()).expand_as(old)
            else:
                expected = torch.full_like(old, 5e-3 if rule == "half" else 1e-2)
            torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-14)


def test_constant_factors_of_the_gradient_do_not_matter_but_moving_ones_do():
    paths = []
    for factor in (lambda t: 1.0, lambda t: 1e-3, lambda t: 1e3, lambda t: 1.0 + (t % 3)):
        model = Named()
        scaled = [{name: factor(t) * g for name, g in step.items()} for t, step in enumerate(draws(30))]
        paths.append(run(model, Tiger(model.parameters(), 1e-2), scaled))
    assert all(np.array_equal(paths[0][name], paths[i][name]) for i in (1, 2) for name in NAMES)
    assert not all(np.array_equal(paths[0][name], paths[3][name]) for name in NAMES)
