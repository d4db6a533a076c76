"""Entropic JKO steps on a grid: against the exact Gaussian step and Sinkhorn's definition."""

import math

import numpy as np
import ot
import pytest
import torch

from kexue_utils.optimization.gradient_flow import ConvergenceError, GaussianTarget, entropic_jko_step
from tests.tolerances import assert_close

TARGET = GaussianTarget(cov=[[2.0]])


def quadratic(x):
    return x**2 / 4


def line(low, high, n):
    return torch.linspace(low, high, n, dtype=torch.float64)


def gaussian(x, m, v):
    return torch.exp(-((x - m) ** 2) / (2 * v))


def moments(x, q):
    w = q / q.sum()
    mean = w @ x
    return mean, w @ (x - mean) ** 2


@pytest.mark.parametrize("eps, tau, variance", [(0.2, 0.1, 0.8907784709), (0.05, 0.1, 0.7150335458)])
def test_against_the_exact_step(eps, tau, variance):
    """Three steps from N(1.5, ¼); spacing √ε/4."""
    x = line(-6, 8, round(14 / (math.sqrt(eps) / 4)) + 1)
    q, m, v = gaussian(x, 1.5, 0.25), 1.5, 0.25
    log_b = None
    for _ in range(3):
        step = entropic_jko_step(q, [x], quadratic, tau, eps, log_b=log_b)
        q, log_b = step.density, step.log_b
        m, v = TARGET.entropic_jko_step_1d(m, v, tau, eps)
    found = moments(x, q)
    assert found[0].item() == pytest.approx(m.item(), abs=1e-8)
    assert found[1].item() == pytest.approx(v.item(), abs=1e-8)
    assert v.item() == pytest.approx(variance, abs=6e-11)
    exact = gaussian(x, m, v) / math.sqrt(2 * math.pi * v)
    torch.testing.assert_close(q, exact, rtol=0, atol=1e-7)  # Gaussian throughout


def test_optimality_of_the_plan():
    """First marginal q_k, second q', and ε log π + c + 2τ(V + log q') + f(x) = 0 with f of x alone."""
    x = line(-3, 3, 61)
    V = (x**2 - 1) ** 2
    q, tau, eps = gaussian(x, 0.3, 0.2), 0.2, 0.3
    q = q / (q.sum() * 0.1)
    step = entropic_jko_step(q, [x], lambda x: (x**2 - 1) ** 2, tau, eps, tol=1e-13)
    log_K = -((x[:, None] - x) ** 2) / eps
    log_a = q.log() - torch.logsumexp(log_K + step.log_b, 1) - math.log(0.1)
    log_plan = log_a[:, None] + log_K + step.log_b
    assert_close(log_plan.exp().sum(1) * 0.1, q)
    assert_close(log_plan.exp().sum(0) * 0.1, step.density, scale=10)
    assert_close(step.density.sum() * 0.1, torch.ones((), dtype=torch.float64))
    stationary = eps * (log_plan - log_K) + 2 * tau * (V + step.density.log())
    spread = stationary - stationary[:, :1]
    assert spread.abs().max() < 1e-8  # log q' of cells that hold 10⁻²⁰ of the mass


def test_given_second_marginal_it_is_sinkhorn():
    """POT's plan between q_k and q' is the plan of the step."""
    x = line(-3, 3, 50)
    step = entropic_jko_step(gaussian(x, 0.3, 0.2), [x], lambda x: (x**2 - 1) ** 2, 0.2, 0.3, tol=1e-13)
    a, b = (gaussian(x, 0.3, 0.2) / gaussian(x, 0.3, 0.2).sum()).numpy(), (step.density / step.density.sum()).numpy()
    cost = (x[:, None] - x).numpy() ** 2
    theirs = ot.sinkhorn(a, b, cost, 0.3, method="sinkhorn_log", stopThr=1e-13, numItermax=20_000)
    kernel = np.exp(-cost / 0.3) * np.exp(step.log_b.numpy())
    ours = a[:, None] * kernel / kernel.sum(1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_small_regularisation_is_jko():
    x = line(-2, 4.5, 261)
    m, S = TARGET.jko_step(torch.tensor([1.5]), torch.tensor([[0.25]]), 0.5)
    found = moments(x, entropic_jko_step(gaussian(x, 1.5, 0.25), [x], quadratic, 0.5, 0.01, tol=1e-8).density)
    assert found[0].item() == pytest.approx(m.item(), abs=1e-3)
    assert found[1].item() == pytest.approx(S.item(), rel=0.01)


def test_nothing_underflows():
    """e^{−|x−y|²/ε} is 0 in float64 for most of a grid of width 16 with ε = 0.02."""
    x = line(-8, 8, 201)
    kernel = torch.exp(-((x[:, None] - x) ** 2) / 0.02)
    assert (kernel == 0).double().mean() > 0.4
    q = gaussian(x, -5.0, 0.05)
    step = entropic_jko_step(q, [x], lambda x: 4 * x**2, 0.1, 0.02, tol=1e-8)
    assert step.density.isfinite().all() and step.log_b.isfinite().all()
    assert step.density.sum().item() * 0.08 == pytest.approx(1)
    empty = torch.where(x < 0, q, 0)
    assert entropic_jko_step(empty, [x], quadratic, 0.5, 0.2).density.isfinite().all()


def test_two_dimensions_factorise():
    """V(x) + U(y) and a product q give the product of two steps."""
    x, y = line(-3, 3, 41), line(-2, 4, 33)
    q_x, q_y = gaussian(x, 0.5, 0.3), gaussian(y, 1.0, 0.4)
    both = entropic_jko_step(q_x[:, None] * q_y, [x, y], lambda x, y: x**2 + (y - 1) ** 4, 0.3, 0.3)
    of_x = entropic_jko_step(q_x, [x], lambda x: x**2, 0.3, 0.3).density
    of_y = entropic_jko_step(q_y, [y], lambda y: (y - 1) ** 4, 0.3, 0.3).density
    torch.testing.assert_close(both.density, of_x[:, None] * of_y, rtol=0, atol=1e-9)  # tol of the iteration


def test_scale_and_mass_of_the_start_do_not_matter():
    x = line(-4, 4, 81)
    first = entropic_jko_step(gaussian(x, 1.0, 0.3), [x], quadratic, 0.2, 0.2)
    second = entropic_jko_step(1e-9 * gaussian(x, 1.0, 0.3), [x], lambda x: quadratic(x) + 700, 0.2, 0.2)
    assert_close(second.density, first.density, scale=100)  # log q' of tails
    assert first.density.sum().item() * 0.1 == pytest.approx(1, abs=1e-12)


def test_warm_start():
    x = line(-4, 5, 120)
    q = gaussian(x, 1.5, 0.25)
    cold = entropic_jko_step(q, [x], quadratic, 0.1, 0.1)
    warm = entropic_jko_step(q, [x], quadratic, 0.1, 0.1, log_b=cold.log_b)
    assert warm.iterations <= 3 < cold.iterations and cold.residual <= 1e-11
    torch.testing.assert_close(warm.density, cold.density, rtol=0, atol=1e-10)


def test_float32():
    x = line(-4, 5, 60).float()
    step = entropic_jko_step(gaussian(x, 1.5, 0.25), [x], quadratic, 0.2, 0.3, tol=1e-5)
    assert step.density.dtype == torch.float32 and step.density.isfinite().all()


def test_bad_arguments():
    x = line(-1, 1, 9)
    q = gaussian(x, 0.0, 0.1)
    for name in ("tau", "eps", "tol"):
        for value in (0.0, -1.0, math.nan):
            options = {"tau": 0.1, "eps": 0.1, name: value}
            with pytest.raises(ValueError, match=f"{name} must be positive"):
                entropic_jko_step(q, [x], quadratic, **options)
    with pytest.raises(ValueError, match="max_iter must be a positive integer, got 0"):
        entropic_jko_step(q, [x], quadratic, 0.1, 0.1, max_iter=0)
    with pytest.raises(ValueError, match=r"q must have shape \(9, 9\), got \(9,\)"):
        entropic_jko_step(q, [x, x], quadratic, 0.1, 0.1)
    for bad in (-q, q * math.nan, 0 * q, q * math.inf):
        with pytest.raises(ValueError, match="q must be finite, not negative, and have mass"):
            entropic_jko_step(bad, [x], quadratic, 0.1, 0.1)
    with pytest.raises(ConvergenceError, match="no entropic JKO step in 3 iterations: the residual is"):
        entropic_jko_step(q, [x], quadratic, 0.1, 0.1, max_iter=3)
