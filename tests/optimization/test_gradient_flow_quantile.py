"""JKO in one dimension: against the exact Gaussian step, a generic optimiser, and the grid solver."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import ndtri
from scipy.stats import norm

from kexue_utils.optimization.gradient_flow import (
    ConvergenceError,
    FokkerPlanck,
    GaussianTarget,
    QuantileJKO1D,
    w2_1d,
)

TARGET = GaussianTarget(cov=[[2.0]])


def quadratic(**options):
    """Towards N(0, 2)."""
    return QuantileJKO1D(lambda x: x**2 / 4, lambda x: x / 2, lambda x: 0 * x + 0.5, **options)


def bimodal(**options):
    """(x² − 1)²: its curvature falls to −4."""
    return QuantileJKO1D(lambda x: (x**2 - 1) ** 2, lambda x: 4 * x * (x**2 - 1), lambda x: 12 * x**2 - 4, **options)


def normal(m, s):
    return lambda u: m + s * ndtri(u)


def energy(jko):
    """F[q], by the definition of the problem."""
    return jko.w @ jko.V(jko.X) - jko.du @ np.log(np.diff(jko.X) / jko.du)


def objective(jko, X, start, tau):
    transport = jko.w @ (X - start) ** 2 / (2 * tau)
    return transport + jko.w @ jko.V(X) - jko.du @ np.log(np.diff(X) / jko.du)


@pytest.mark.parametrize("grid", ["stretched", "midpoint"])
def test_nodes_carry_all_mass(grid):
    jko = quadratic(grid=grid, n=50)
    assert jko.w.sum() == pytest.approx(1, abs=1e-15) and (jko.w > 0).all()
    np.testing.assert_allclose(jko.du, np.diff(jko.u), rtol=1e-9)
    np.testing.assert_allclose(jko.w, jko.w[::-1], rtol=1e-12)
    assert (np.cumsum(jko.w)[:-1] > jko.u[:-1]).all() and (np.cumsum(jko.w)[:-1] < jko.u[1:]).all()


def test_upper_tail_keeps_its_digits():
    """Differences of Φ near 1 would be 0 at z = 8."""
    jko = quadratic(n=1600, zmax=8.0)
    np.testing.assert_allclose(jko.du, jko.du[::-1], rtol=1e-12)
    jko.X = 1.5 + 0.3 * np.linspace(-8, 8, 1600)
    assert jko.step(0.05).newton_iters < 12
    assert quadratic().w.size == 400
    assert ndtri(quadratic().u[0]) == pytest.approx(-2 * math.sqrt(math.log(400)))


@pytest.mark.parametrize("grid, errors", [("stretched", (4.2e-4, 1.2e-4, 3.5e-5, 1.04e-5)),
                                          ("midpoint", (2.72e-3, 1.89e-3, 1.33e-3, 9.5e-4))])  # fmt: skip
def test_against_the_exact_step(grid, errors):
    """W₂ after 20 steps of τ = 0.05, by grid."""
    m, S = torch.tensor([1.5]), torch.tensor([[0.09]])
    for _ in range(20):
        m, S = TARGET.jko_step(m, S, 0.05)
    found, iterations = [], []
    for n in (100, 200, 400, 800):
        jko = quadratic(grid=grid, n=n).from_quantile(normal(1.5, 0.3))
        iterations += [jko.step(0.05).newton_iters for _ in range(20)]
        found.append(math.sqrt(jko.w @ (jko.X - normal(m.item(), math.sqrt(S.item()))(jko.u)) ** 2))
    assert found == pytest.approx(errors, rel=0.02)
    assert np.mean(iterations) < 5
    order = -np.diff(np.log2(found)).mean()
    assert order == pytest.approx(1.8 if grid == "stretched" else 0.5, abs=0.06)


def test_second_order_on_a_bimodal_target():
    """Second moment after 10 steps of τ = 0.05; the flow itself has 0.80199 at t = ½."""
    moments, iterations = [], []
    for n in (200, 400, 800, 1600):
        jko = bimodal(n=n).from_quantile(normal(0.2, 0.5))
        iterations += [jko.step(0.05).newton_iters for _ in range(10)]
        mean, variance = jko.moments()
        moments.append(variance + mean**2)
    limit = moments[-1] + (moments[-1] - moments[-2]) / 3
    assert limit == pytest.approx(0.78846, abs=2e-6)
    assert -np.diff(np.log2(np.array(moments[:-1]) - limit)).mean() == pytest.approx(2, abs=0.2)
    assert np.mean(iterations) < 5


def test_first_order_to_the_grid_solver():
    """The O(τ) error that remains is that of JKO."""
    edges = np.linspace(-3, 3, 401)
    solver = FokkerPlanck([(edges[1:] + edges[:-1]) / 2], lambda x: (x**2 - 1) ** 2)
    x = solver.axes[0]
    q = solver.evolve(norm.pdf(x, 0.2, 0.5) / (norm.pdf(x, 0.2, 0.5).sum() * solver.cell), 0.5, 1, "expm")[-1]
    exact = (q * x**2).sum() * solver.cell
    assert exact == pytest.approx(0.80199, abs=3e-5)
    errors = []
    for steps in (10, 20, 40):
        jko = bimodal(n=800).from_quantile(normal(0.2, 0.5))
        for _ in range(steps):
            jko.step(0.5 / steps)
        mean, variance = jko.moments()
        errors.append(0.80199 - variance - mean**2)
    assert -np.diff(np.log2(errors)) == pytest.approx(1, abs=0.12)
    np.testing.assert_allclose(jko.density(x), q, atol=0.02)


@pytest.mark.parametrize("grid", ["stretched", "midpoint"])
@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.2])
def test_a_step_satisfies_its_equation_and_descends(grid, tau):
    jko = bimodal(grid=grid, n=200).from_quantile(normal(0.2, 0.5))
    for _ in range(5):
        start, before = jko.X, energy(jko)
        info = jko.step(tau)
        density = jko.du / np.diff(jko.X)
        curl = np.diff(density, prepend=0, append=0)  # d/du(1/X') times the mass of a node
        residual = (jko.X - start) / tau + jko.dV(jko.X) + curl / jko.w
        assert np.abs(residual).max() < 1e-9 and info.residual == pytest.approx(np.abs(residual).max())
        moved = jko.w @ (jko.X - start) ** 2
        assert info.objective_drop == pytest.approx(before - energy(jko) - moved / (2 * tau), rel=1e-6, abs=1e-12)
        assert info.objective_drop > 0 and (np.diff(jko.X) > 0).all()
        assert w2_1d(*map(torch.from_numpy, (jko.X, start, jko.w, jko.w))) == pytest.approx(moved)


@pytest.mark.parametrize("tau", [1e-3, 1.0, 100.0])
def test_convex_energies_descend_faster(tau):
    """F' + (1/τ + λ/2)W₂² ≤ F with λ = ½; 2W₂²/τ would be too much for small τ."""
    jko = quadratic(n=400).from_quantile(normal(1.5, 0.3))
    start, before = jko.X, energy(jko)
    jko.step(tau)
    moved, drop = jko.w @ (jko.X - start) ** 2, before - energy(jko)
    assert drop >= (1 / tau + 0.25) * moved - 1e-12
    assert tau > 10 or drop < 2 / tau * moved


def test_against_a_generic_optimiser():
    """L-BFGS on the logarithms of the gaps, the same discrete problem."""
    jko = bimodal(n=30).from_quantile(normal(0.2, 0.5))
    start = jko.X
    info = jko.step(0.05)

    def unpack(y):
        return y[0] + np.concatenate(([0], np.cumsum(np.exp(y[1:]))))

    y = np.concatenate((start[:1], np.log(np.diff(start))))
    options = {"maxiter": 20_000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(lambda y: objective(jko, unpack(y), start, 0.05), y, method="L-BFGS-B", options=options)
    least = objective(jko, jko.X, start, 0.05)
    assert least <= found.fun + 1e-12 and found.fun == pytest.approx(least, abs=1e-6)
    assert objective(jko, start, start, 0.05) - least == pytest.approx(info.objective_drop, abs=1e-14)
    np.testing.assert_allclose(unpack(found.x), jko.X, atol=5e-3)


def test_equilibrium_stays():
    """Nearly the target itself, so that the step is as small as the error of the grid."""
    jko = quadratic(n=400).from_quantile(normal(0.0, math.sqrt(2)))
    start = jko.X
    jko.step(0.1)
    assert jko.w @ (jko.X - start) ** 2 < 1e-8


def test_start_from_a_density():
    x = np.linspace(-1.0, 3.0, 4001)
    jko = quadratic(n=300)
    assert jko.from_density(x, 7 * norm.pdf(x, 1, 0.2)) is jko
    inner = slice(20, -20)
    np.testing.assert_allclose(jko.X[inner], normal(1, 0.2)(jko.u)[inner], atol=1e-5)
    assert jko.moments() == pytest.approx((1, 0.04), abs=2e-4)
    ramp = quadratic(n=50).from_density(np.array([0.0, 1.0]), np.array([1.0, 3.0]))
    np.testing.assert_allclose((ramp.X + ramp.X**2) / 2, ramp.u, atol=1e-14)  # ∫ (1 + 2x)/2
    flat = quadratic(n=50).from_density(np.array([0.0, 0.5, 2.0]), np.ones(3))
    np.testing.assert_allclose(flat.X, 2 * flat.u, atol=1e-14)


def test_density():
    jko = quadratic(n=800).from_quantile(normal(1.0, 0.5))
    x = np.linspace(-0.5, 2.5, 50)
    np.testing.assert_allclose(jko.density(x), norm.pdf(x, 1, 0.5), rtol=1e-3)
    assert (jko.density(np.array([-9.0, 9.0])) == 0).all()


def test_steps_from_far_away_stay_monotone():
    """Newton's first step would cross particles over."""
    for m, s in ((30.0, 1e-3), (0.0, 50.0)):
        jko = bimodal(n=100).from_quantile(normal(m, s))
        info = jko.step(0.1)
        assert (np.diff(jko.X) > 0).all() and info.objective_drop > 0


# errors


def test_bad_arguments():
    with pytest.raises(ValueError, match="grid must be one of stretched, midpoint, got 'uniform'"):
        quadratic(grid="uniform")
    with pytest.raises(ValueError, match="n must be at least 3, got 2"):
        quadratic(n=2)
    with pytest.raises(ValueError, match="zmax must be positive"):
        quadratic(zmax=0.0)
    jko = quadratic()
    for call in (lambda: jko.step(0.1), jko.moments, lambda: jko.density(np.zeros(1))):
        with pytest.raises(ValueError, match="X must be set first"):
            call()
    for Q in (lambda u: -u, lambda u: 0 * u, lambda u: u[1:], lambda u: u * math.nan):
        with pytest.raises(ValueError, match="Q must be an increasing function"):
            jko.from_quantile(Q)
    x = np.linspace(0, 1, 5)
    for args in ((x, x[1:]), (x[::-1], x + 1), (x[:1], x[:1] + 1), (x[None], x[None] + 1)):
        with pytest.raises(ValueError, match="x and q must be increasing points and densities"):
            jko.from_density(*args)
    for q in (x, x - 0.5, x + math.nan, x + math.inf):
        with pytest.raises(ValueError, match="q must be positive"):
            jko.from_density(x, q)
    jko.from_quantile(normal(0, 1))
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau must be positive"):
            jko.step(tau)


def test_a_step_that_fails_leaves_the_state():
    """From the top of the barrier with τ > ¼, the problem is not convex."""
    jko = bimodal(n=100).from_quantile(normal(0.0, 3.0))
    before = jko.X.copy()
    with pytest.raises(ConvergenceError, match="not convex for tau = 50"):
        jko.step(50.0)
    np.testing.assert_array_equal(jko.X, before)
    with pytest.raises(ValueError):
        jko.from_quantile(lambda u: -u)
    np.testing.assert_array_equal(jko.X, before)
    wrong = QuantileJKO1D(lambda x: x**2, lambda x: -2 * x, lambda x: 2 + 0 * x).from_quantile(normal(1.0, 1.0))
    before = wrong.X.copy()
    with pytest.raises(ConvergenceError, match="no part of a Newton step lowers the objective|no JKO step in"):
        wrong.step(1.0)
    np.testing.assert_array_equal(wrong.X, before)
