"""The grid solver: its algebra, exact Gaussians, orders, rates; against fplanck and scipy."""

import math
import warnings

import fplanck
import numpy as np
import pytest
import torch
from scipy.constants import k as boltzmann
from scipy.linalg import expm, solve_banded
from scipy.stats import multivariate_normal, norm

from kexue_utils.optimization.gradient_flow import FokkerPlanck, GaussianTarget, bernoulli

TARGET = GaussianTarget(cov=[[2.0]])
START = torch.tensor([1.5], dtype=torch.float64), torch.tensor([[0.09]], dtype=torch.float64)
EXACT = norm(
    *(value.item() for value in (TARGET.ou_marginal(*START, 1.0)[0], TARGET.ou_marginal(*START, 1.0)[1].sqrt()))
)


def centres(low, high, n):
    edges = np.linspace(low, high, n + 1)
    return (edges[1:] + edges[:-1]) / 2


def gaussian_case(n):
    """Solver for N(0, 2) on [-10, 10], and N(1.5, 0.3²) on its grid."""
    x = centres(-10, 10, n)
    solver = FokkerPlanck([x], lambda x: x**2 / 4)
    q = norm.pdf(x, 1.5, 0.3)
    return solver, x, q / (q.sum() * solver.cell)


def double_well(beta, n=1600, wide=4.0):
    return FokkerPlanck([centres(-wide, wide, n)], lambda x: beta * (x**2 - 1) ** 2 / 4)


def two_dimensions(n=24, **options):
    x = centres(-4, 4, n)
    return FokkerPlanck([x, centres(-3, 3, n + 5)], lambda x, y: x**2 / 2 + y**4 / 4 + 0.5 * x * y, **options)


SOLVERS = {
    "reflecting": lambda: gaussian_case(60)[0],
    "periodic": lambda: FokkerPlanck([centres(0, 2 * np.pi, 50)], lambda x: 2 * np.cos(x), D=0.7, bc="periodic"),
    "2-D": lambda: two_dimensions(12, D=0.3),
    "2-D, periodic": lambda: FokkerPlanck(
        [centres(0, 1, 7), centres(0, 2, 9)],
        lambda x, y: np.sin(2 * np.pi * x) + np.cos(np.pi * y),
        bc="periodic",
    ),
}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]()


def random_density(solver, seed=0):
    q = np.random.default_rng(seed).random(solver.shape) ** 4
    return q / (q.sum() * solver.cell)


# algebra


def test_bernoulli_function():
    z = np.array([-1000.0, -30, -1, -1e-3, -1e-9, 0, 1e-300, 1e-9, 0.1, 1, 30, 700, 800, 1000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bernoulli(z)
    assert np.isfinite(found).all() and found[5] == 1 and found[0] == 1000 and found[-1] == 0
    small, large = np.abs(z) < 1e-4, np.abs(z) > 1e-4
    np.testing.assert_allclose(found[small], (1 - z / 2 + z**2 / 12)[small], rtol=1e-15)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_allclose(found[large], (z / np.expm1(z))[large], rtol=1e-14)
    np.testing.assert_allclose(bernoulli(-z), found + z, rtol=1e-14, atol=1e-12)  # B(−z) = B(z) + z
    assert bernoulli(0.5) == pytest.approx(0.5 / math.expm1(0.5), rel=1e-15)


def test_generator_is_that_of_a_markov_chain(solver):
    L = solver.generator().toarray()
    scale = np.abs(L).max()
    off = L - np.diag(np.diag(L))
    assert (off >= 0).all() and ((off > 0) == (off > 0).T).all()
    np.testing.assert_allclose(L.sum(0), 0, atol=1e-14 * scale)
    p = solver.stationary()
    assert p.shape == solver.shape and p.sum() * solver.cell == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(L @ p.ravel(), 0, atol=1e-13 * scale * p.max())
    flux = L * p.ravel()
    np.testing.assert_allclose(flux, flux.T, atol=1e-13 * scale * p.max())  # detailed balance


def test_stationary_law_is_that_of_gibbs():
    solver = SOLVERS["2-D"]()
    x, y = np.meshgrid(*solver.axes, indexing="ij")
    gibbs = np.exp(-(x**2 / 2 + y**4 / 4 + 0.5 * x * y) / 0.3)
    np.testing.assert_allclose(solver.stationary(), gibbs / (gibbs.sum() * solver.cell), rtol=1e-12)


def test_flux_is_that_of_chang_and_cooper():
    """−(D/h)[w q̄ + q_{i+1} − q_i], q̄ = δ q_i + (1−δ) q_{i+1}, δ = 1/w − 1/(e^w − 1)."""
    solver = FokkerPlanck([centres(-3, 3, 20)], lambda x: np.sin(3 * x) + x**2, D=0.6)
    h, q, V = solver.cell, random_density(solver), np.sin(3 * solver.axes[0]) + solver.axes[0] ** 2
    w = np.diff(V) / 0.6
    delta = 1 / w - 1 / np.expm1(w)
    flux = -0.6 / h * (w * (delta * q[:-1] + (1 - delta) * q[1:]) + np.diff(q))
    np.testing.assert_allclose(solver.generator() @ q, -np.diff(flux, prepend=0, append=0) / h, rtol=1e-11, atol=1e-11)


def test_scaling_of_potential_and_time():
    """(V, D) is (V/D, 1) with time multiplied by D."""
    x = centres(-3, 3, 30)
    L = FokkerPlanck([x], lambda x: x**4, D=0.3).generator()
    np.testing.assert_allclose(L.toarray(), 0.3 * FokkerPlanck([x], lambda x: x**4 / 0.3).generator().toarray())


def test_separable_potential():
    """L of V(x) + U(y) is L_V ⊗ 1 + 1 ⊗ L_U, on axes of different spacing."""
    x, y = centres(-2, 2, 7), centres(0, 1, 5)
    both = FokkerPlanck([x, y], lambda x, y: x**2 + np.sin(y)).generator().toarray()
    of_x = FokkerPlanck([x], lambda x: x**2).generator().toarray()
    of_y = FokkerPlanck([y], np.sin).generator().toarray()
    np.testing.assert_allclose(both, np.kron(of_x, np.eye(5)) + np.kron(np.eye(7), of_y), atol=1e-12)


# steps


def test_schemes_are_their_formulas(solver):
    q, dt = random_density(solver), 1e-3
    L, eye = solver.generator().toarray(), np.eye(q.size)
    expected = {
        "be": np.linalg.solve(eye - dt * L, q.ravel()),
        "cn": np.linalg.solve(eye - dt / 2 * L, (eye + dt / 2 * L) @ q.ravel()),
        "expm": expm(dt * L) @ q.ravel(),
    }
    for scheme, solved in expected.items():
        np.testing.assert_allclose(solver.step(q, dt, scheme).ravel(), solved, rtol=1e-10, atol=1e-12)


def test_tridiagonal_solve_is_that_of_scipy():
    solver, _, q = gaussian_case(200)
    M = np.eye(200) - 0.1 * solver.generator().toarray()
    bands = np.stack([np.append(0, np.diag(M, 1)), np.diag(M), np.append(np.diag(M, -1), 0)])
    np.testing.assert_allclose(solver.step(q, 0.1), solve_banded((1, 1), bands, q), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dt", [1e-3, 1.0, 1e4])
def test_mass_positivity_and_descent(solver, dt):
    q = np.zeros(solver.shape)
    q.ravel()[3] = 1 / solver.cell
    for scheme in ("be", "expm") if dt <= 1 else ("be",):
        new = solver.step(q, dt, scheme)
        assert (new >= 0).all() and new.sum() * solver.cell == pytest.approx(1, abs=1e-12 * (1 + dt))
        assert solver.kl(new) <= solver.kl(q)
    np.testing.assert_allclose(solver.step(solver.stationary(), dt), solver.stationary(), rtol=1e-8)


def test_evolve_repeats_steps(solver):
    q = random_density(solver)
    path = solver.evolve(q, 0.01, 3)
    assert path.shape == (4, *solver.shape) and np.array_equal(path[0], q)
    np.testing.assert_array_equal(path[3], solver.step(solver.step(solver.step(q, 0.01), 0.01), 0.01))
    np.testing.assert_allclose(solver.step(q, 0.02), solver.evolve(q, 0.02, 1)[1], rtol=0)  # not the old factor


def test_large_steps_of_an_exponential_are_cut():
    solver, _, q = gaussian_case(400)
    L = solver.generator().toarray()
    assert -L.diagonal().min() > 500
    np.testing.assert_allclose(solver.step(q, 3.0, "expm"), expm(3 * L) @ q, rtol=1e-9, atol=1e-13)


def test_crank_nicolson_warns_past_its_limit():
    solver, _, q = gaussian_case(60)
    limit = 2 / -solver.generator().diagonal().min()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (solver.step(q, 0.999 * limit, "cn") >= 0).all()
        solver.step(q, 100 * limit, "be")
    spike = np.zeros(60)
    spike[30] = 1
    with pytest.warns(UserWarning, match=r"cn may turn negative for dt > 2/max\|L_ii\|"):
        assert solver.step(spike, 10 * limit, "cn").min() < 0


def test_potential_as_steep_as_a_wall():
    """Jumps of V up to 1000 between cells, and a start on the wrong side: nothing over- or underflows."""
    solver = FokkerPlanck([np.linspace(-3, 3, 13)], lambda x: 400 * x**2)
    assert np.abs(np.diff(400 * solver.axes[0] ** 2)).max() == 1100
    q = np.zeros(13)
    q[0] = 2
    q = solver.evolve(q, 0.05, 200)[-1]
    assert (q >= 0).all() and np.abs(q - solver.stationary()).sum() * 0.5 < 1e-12
    coarse = FokkerPlanck([np.linspace(-3, 3, 13)], lambda x: 4 * x**2)
    q[:] = 0
    q[0] = 2
    q = coarse.evolve(q, 0.05, 200)[-1]
    assert np.abs(q - coarse.stationary()).sum() * 0.5 < 1e-13


# against the exact Gaussians


def test_second_order_in_space():
    """The errors that the chapter quotes."""
    errors = []
    for n in (100, 200, 400):
        solver, x, q = gaussian_case(n)
        errors.append(np.abs(solver.step(q, 1.0, "expm") - EXACT.pdf(x)).sum() * solver.cell)
    assert errors == pytest.approx([2.246e-3, 5.62e-4, 1.403e-4], rel=5e-4)
    assert -np.diff(np.log2(errors)) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("scheme, order", [("be", 1), ("cn", 2)])
def test_orders_in_time(scheme, order):
    solver, _, q = gaussian_case(100)
    exact = solver.step(q, 1.0, "expm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cn past its limit
        errors = [np.abs(solver.evolve(q, 1 / n, n, scheme)[-1] - exact).sum() for n in (50, 100, 200, 400)]
    assert -np.diff(np.log2(errors))[1:] == pytest.approx(order, abs=0.05)


def test_two_dimensions_against_the_exact_gaussian():
    cov = np.array([[1.0, 0.6], [0.6, 0.8]])
    A = np.linalg.inv(cov)
    m, S = GaussianTarget(cov).ou_marginal([1.2, -1.0], np.diag([0.15, 0.4]), 0.5)
    errors = []
    for n in (48, 96):
        x = centres(-6, 6, n)
        solver = FokkerPlanck([x, x], lambda x, y: (A[0, 0] * x**2 + 2 * A[0, 1] * x * y + A[1, 1] * y**2) / 2)
        points = np.stack(np.meshgrid(x, x, indexing="ij"), -1)
        q = multivariate_normal.pdf(points, [1.2, -1], np.diag([0.15, 0.4]))
        q = solver.step(q, 0.5, "expm")
        errors.append(np.abs(q - multivariate_normal.pdf(points, m.numpy(), S.numpy())).sum() * solver.cell)
    assert errors == pytest.approx([1.626e-2, 4.069e-3], rel=5e-4)


def test_explicit_steps_turn_negative_and_differ_from_jko_by_the_square_of_the_step():
    for n, least in ((400, -0.0890), (800, -0.0975), (1600, -0.0994)):
        solver, x, q = gaussian_case(n)
        explicit = q + 0.1 * (solver.generator() @ q)
        assert explicit.min() == pytest.approx(least, abs=1e-4)
        assert (solver.step(q, 0.1) >= 0).all()
    gaps = []
    for alpha in (0.02, 0.01, 0.005, 0.0025):
        m, S = TARGET.jko_step(*START, alpha)
        implicit = norm.pdf(x, m.item(), S.sqrt().item())
        gaps.append(np.abs(q + alpha * (solver.generator() @ q) - implicit).sum() * solver.cell)
    assert gaps == pytest.approx([0.0572, 0.01685, 0.00464, 0.001223], rel=0.02)  # of the grid: 0.0012 at α → 0


# divergence and rates


def test_kl_and_dissipation_of_gaussians():
    solver, x, _ = gaussian_case(1600)
    q = norm.pdf(x, *(value.item() for value in (START[0], START[1].sqrt())))
    assert solver.kl(q) == pytest.approx(TARGET.kl(*START).item(), rel=1e-9)
    wide = EXACT.pdf(x)
    moments = torch.tensor([EXACT.mean()]), torch.tensor([[EXACT.var()]])
    assert solver.dissipation(wide) == pytest.approx(TARGET.fisher_information(*moments).item(), rel=1e-4)


def test_dissipation_is_the_rate_of_kl(solver):
    q = random_density(solver) + 0.01
    rate = solver.generator() @ q.ravel()
    expected = -(rate * np.log(q / solver.stationary()).ravel()).sum() * solver.cell
    assert solver.dissipation(q) == pytest.approx(expected, rel=1e-8)
    dt = 1e-7
    assert (solver.kl(q) - solver.kl(solver.step(q, dt, "expm"))) / dt == pytest.approx(expected, rel=1e-3)
    assert solver.dissipation(solver.stationary()) == pytest.approx(0, abs=1e-15)
    assert solver.kl(solver.stationary()) == pytest.approx(0, abs=1e-14)
    empty = random_density(solver)
    empty.ravel()[0] = 0
    assert solver.dissipation(empty) == math.inf and math.isfinite(solver.kl(empty))


def test_kl_is_convex_along_a_convex_potential():
    """V'' ≥ 1: KL(t) ≤ e^{−2t} KL(0), and KL ≤ I/2."""
    solver = FokkerPlanck([centres(-4, 4, 200)], lambda x: x**2 / 2 + x**4 / 4)
    q = norm.pdf(solver.axes[0], -1, 0.4)
    q /= q.sum() * solver.cell
    path = solver.evolve(q, 0.02, 50, "expm")
    kl = np.array([solver.kl(q) for q in path])
    ratio = kl / (np.exp(-0.04 * np.arange(51)) * kl[0])
    assert (ratio[1:] < 1).all()
    assert all(solver.kl(q) <= solver.dissipation(q) / 2 for q in path[1:])


@pytest.mark.parametrize("beta, gap, over_eyring_kramers",
                         [(1, 0.79209, 2.26), (2, 0.84589, 1.55), (4, 0.74868, 1.13), (8, 0.45455, 0.933)])  # fmt: skip
def test_gap_of_a_double_well(beta, gap, over_eyring_kramers):
    found = double_well(beta).spectral_gap()
    assert found == pytest.approx(gap, abs=6e-6)
    eyring_kramers = 2 * math.sqrt(2 * beta * beta) / (2 * math.pi) * math.exp(-beta / 4)
    assert found / eyring_kramers == pytest.approx(over_eyring_kramers, abs=6e-3)


@pytest.mark.parametrize("beta, ratio", [(16, 0.903), (32, 0.947), (64, 0.975)])
def test_high_barriers_follow_eyring_and_kramers(beta, ratio):
    eyring_kramers = math.sqrt(2) * beta / math.pi * math.exp(-beta / 4)
    assert double_well(beta, 4000, 2.5).spectral_gap() / eyring_kramers == pytest.approx(ratio, abs=1e-3)


def test_kl_falls_at_twice_the_gap():
    solver = double_well(2, n=150)
    q = norm.pdf(solver.axes[0], 0.5, 0.3)
    kl = [solver.kl(q) for q in solver.evolve(q / (q.sum() * solver.cell), 1.0, 7, "expm")]
    assert math.log(kl[6] / kl[7]) == pytest.approx(2 * solver.spectral_gap(), rel=1e-3)


def test_gaps_known_in_closed_form():
    flat = FokkerPlanck([centres(0, 1, 30)], lambda x: 0 * x, D=2.0, bc="periodic")
    assert flat.spectral_gap() == pytest.approx(2.0 * 900 * 2 * (1 - math.cos(2 * math.pi / 30)), rel=1e-9)
    walls = FokkerPlanck([centres(0, 1, 30), centres(0, 2, 20)], lambda x, y: 0 * x, D=2.0)
    assert walls.spectral_gap() == pytest.approx(2.0 * 100 * 2 * (1 - math.cos(math.pi / 20)), rel=1e-9)
    assert gaussian_case(800)[0].spectral_gap() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("a, gap, left", [(1.5, 5.727e-2, 0.173), (2.5, 3.581e-5, 0.6915), (3.5, 3.171e-10, 0.693147)])
def test_mixtures_that_do_not_mix(a, gap, left):
    """Half N(a, ¼), half N(−a, ¼), started at a: KL after t = 10."""
    solver = FokkerPlanck(
        [centres(-a - 4, a + 4, 1600)],
        lambda x: -np.logaddexp(norm.logpdf(x, a, 0.5), norm.logpdf(x, -a, 0.5)),
    )
    assert solver.spectral_gap() == pytest.approx(gap, rel=3e-4 if a < 3 else 0.02)
    q = norm.pdf(solver.axes[0], a, 0.05)
    q = solver.evolve(q / (q.sum() * solver.cell), 0.01, 1000)[-1]
    assert solver.kl(q) == pytest.approx(left, abs=6e-4)


# fplanck


def their_solver(monkeypatch, axes, V):
    """fplanck's, with k_B T = drag = 1 in its units; it calls a name that numpy 2 removed."""
    monkeypatch.setattr(np, "product", np.prod, raising=False)
    h = axes[0][1] - axes[0][0]
    return fplanck.fokker_planck(
        temperature=1.0, drag=boltzmann, extent=[len(axis) * h for axis in axes], resolution=h,
        potential=lambda *x: boltzmann * V(*x), boundary=fplanck.boundary.reflecting,
    )  # fmt: skip


def test_against_fplanck(monkeypatch):
    """Another discretisation, of order 2 too: on this smooth problem its error is 5 % smaller."""
    for n, theirs in ((100, 2.122e-3), (200, 5.31e-4)):
        solver, x, q = gaussian_case(n)
        peer = their_solver(monkeypatch, [x], lambda x: x**2 / 4)
        ours, q_peer = solver.step(q, 1.0, "expm"), peer.propagate(lambda x: norm.pdf(x, 1.5, 0.3), 1.0) / solver.cell
        assert np.abs(q_peer - EXACT.pdf(x)).sum() * solver.cell == pytest.approx(theirs, rel=1e-3)
        assert np.abs(q_peer - ours).sum() * solver.cell < np.abs(ours - EXACT.pdf(x)).sum() * solver.cell


def test_against_fplanck_in_two_dimensions(monkeypatch):
    x = centres(-3, 3, 20)

    def V(x, y):
        return x**2 / 2 + y**4 / 4 + 0.3 * x * y

    solver, peer = FokkerPlanck([x, x], V), their_solver(monkeypatch, [x, x], V)
    q = np.exp(-((solver.axes[0][:, None] - 1) ** 2) - solver.axes[1] ** 2)
    q /= q.sum() * solver.cell
    theirs = peer.propagate(lambda x, y: np.exp(-((x - 1) ** 2) - y**2), 0.3) / solver.cell
    np.testing.assert_allclose(solver.step(q, 0.3, "expm"), theirs, atol=0.01)
    assert np.abs(solver.step(q, 0.3, "expm") - theirs).sum() * solver.cell < 0.02


def test_rates_of_steep_potentials_against_fplanck(monkeypatch):
    """The square-root rates grow like e^{|w|/2}, ours like |w|; at w = 1500 theirs are no longer finite."""
    x = np.linspace(-1, 1, 3)
    for w, ours, theirs in ((10.0, 10.0, 148.4), (1000.0, 1000.0, 1.4e217)):
        V = lambda x, w=w: w * np.abs(x)  # noqa: E731
        assert FokkerPlanck([x], V).generator().max() == pytest.approx(ours, rel=1e-3)
        assert their_solver(monkeypatch, [x], V).master_matrix.max() == pytest.approx(theirs, rel=1e-2)
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(their_solver(monkeypatch, [x], lambda x: 1500 * np.abs(x)).master_matrix.max())


# errors


def test_bad_arguments():
    x = np.linspace(0, 1, 5)
    for axis in (x[:2], np.stack((x, x)), x[::-1], x**2, np.zeros(5), x * np.nan):
        with pytest.raises(ValueError, match="axes must be"):
            FokkerPlanck([axis], np.sin)
    for D in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="D must be positive"):
            FokkerPlanck([x], np.sin, D=D)
    with pytest.raises(ValueError, match="bc must be 'reflecting' or 'periodic', got 'open'"):
        FokkerPlanck([x], np.sin, bc="open")
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match="V must be finite"):
        FokkerPlanck([x], np.log)


def test_bad_densities():
    solver = two_dimensions(6)
    q = random_density(solver)
    for call in (lambda q: solver.step(q, 0.1), lambda q: solver.evolve(q, 0.1, 2), solver.kl, solver.dissipation):
        with pytest.raises(ValueError, match=r"q must have shape \(6, 11\), got \(66,\)"):
            call(q.ravel())
        for bad in (-1e-9, math.nan, math.inf):
            wrong = q.copy()
            wrong[1, 1] = bad
            with pytest.raises(ValueError, match="q must be finite and not negative"):
                call(wrong)
    for dt in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="dt must be positive"):
            solver.step(q, dt)
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        solver.evolve(q, 0.1, 0)
    with pytest.raises(ValueError, match="scheme must be one of be, cn, expm, got 'euler'"):
        solver.step(q, 0.1, "euler")


def test_a_call_that_raises_changes_nothing():
    solver = two_dimensions(6)
    q = random_density(solver)
    expected, before = solver.step(q, 0.1), q.copy()
    with pytest.raises(ValueError):
        solver.step(-q, 0.2)
    np.testing.assert_array_equal(solver.step(q, 0.1), expected)
    np.testing.assert_array_equal(q, before)
    solver.generator().data[:] = 0
    np.testing.assert_array_equal(solver.step(q, 0.2), two_dimensions(6).step(q, 0.2))
