"""Paths of points: orders of convergence, descent, steepest directions; against scipy and torchdiffeq."""

import math

import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from kexue_utils.optimization.gradient_flow import (
    NORMS,
    ConvergenceError,
    gd_path,
    gradient_flow,
    modified_gradient,
    prox_path,
    steepest_direction,
)
from tests.tolerances import assert_close

A = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
X0 = torch.tensor([2.0, -1.5], dtype=torch.float64)


def f(x):
    """½xᵀAx + Σ log cosh x_i, convex."""
    return (x * (x @ A)).sum(-1) / 2 + torch.log(torch.cosh(x)).sum(-1)


def grad(x):
    return x @ A + torch.tanh(x)


def hess(x):
    return A + torch.diag_embed(1 - torch.tanh(x) ** 2)


def hvp(x, v):
    return (hess(x) @ v[..., None])[..., 0]


def well(x):
    """(x²−1)², not convex."""
    return ((x**2 - 1) ** 2).sum(-1)


def well_grad(x):
    return 4 * x * (x**2 - 1)


def well_hess(x):
    return torch.diag_embed(12 * x**2 - 4)


def flow(gradient, x, times, tol=1e-12):
    return gradient_flow(gradient, x, times, rtol=tol, atol=tol)


# steps


def test_gradient_descent_is_the_loop():
    x, path = X0, [X0]
    for _ in range(7):
        x = x - 0.1 * grad(x)
        path.append(x)
    assert torch.equal(gd_path(grad, X0, 0.1, 7), torch.stack(path))


def test_closed_forms_of_a_quadratic():
    ts = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    exact = torch.matrix_exp(-A * ts[:, None, None]) @ X0
    torch.testing.assert_close(flow(lambda x: x @ A, X0, ts, 1e-12), exact, rtol=0, atol=1e-10)  # the solver's own
    eye = torch.eye(2, dtype=torch.float64)
    assert_close(gd_path(lambda x: x @ A, X0, 0.1, 9)[-1], torch.linalg.matrix_power(eye - 0.1 * A, 9) @ X0)
    implicit = torch.linalg.matrix_power(torch.linalg.inv(eye + 0.1 * A), 9) @ X0
    assert_close(prox_path(lambda x: x @ A, lambda x: A, X0, 0.1, 9)[-1], implicit)


@pytest.mark.parametrize("kind, order", [("gd", 1), ("gd", 2), ("prox", 1), ("prox", 2)])
def test_orders_of_convergence(kind, order):
    """First order to the flow, second to that of the modified function; T = 1, n = 16, …, 128."""
    errors = []
    for n in (16, 32, 64, 128):
        lr = 1 / n
        path = gd_path(grad, X0, lr, n) if kind == "gd" else prox_path(grad, hess, X0, lr, n)
        follow = grad if order == 1 else modified_gradient(grad, hvp, lr, "explicit" if kind == "gd" else "implicit")
        errors.append((path[-1] - flow(follow, X0, [0.0, 1.0])[-1]).norm())
    found = torch.stack(errors).log2().diff().neg()
    assert ((found - order).abs() < 0.1).all()
    last = {("gd", 1): 4.40e-3, ("gd", 2): 3.75e-5, ("prox", 2): 3.82e-5}.get((kind, order))
    if last:
        assert errors[-1].item() == pytest.approx(last, rel=2e-3)


def test_errors_of_gradient_descent():
    end = flow(grad, X0, [0.0, 1.0])[-1]
    errors = torch.stack([(gd_path(grad, X0, 1 / n, n)[-1] - end).norm() for n in (8, 16, 32, 64, 128)])
    assert errors[0].item() == pytest.approx(7.24e-2, rel=1e-3)
    orders = torch.tensor([1.021, 1.011, 1.006, 1.003], dtype=torch.float64)
    torch.testing.assert_close(errors.log2().diff().neg(), orders, rtol=0, atol=1e-3)


def test_order_is_uniform_on_the_horizon():
    """max over all steps, not only the last."""
    errors = []
    for n in (16, 32, 64):
        path = gd_path(grad, X0, 1 / n, n)
        errors.append((path - flow(grad, X0, torch.arange(n + 1) / n)).norm(dim=-1).max())
    assert torch.stack(errors).log2().diff().neg().tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("lr", [0.05, 0.7, 100.0])
def test_proximal_points_are_stationary_and_descend(lr):
    rng = torch.Generator().manual_seed(0)
    start = 5 * torch.randn(50, 2, generator=rng, dtype=torch.float64)
    path = prox_path(grad, hess, start, lr, 5)
    old, new = path[:-1], path[1:]
    assert (new - old + lr * grad(new)).abs().max() < 1e-12 * (1 + lr) * (1 + start.abs().max())
    assert (f(new) + (new - old).square().sum(-1) / (2 * lr) <= f(old) + 1e-12).all()
    assert (f(new) + (new - old).square().sum(-1) / lr <= f(old) + 1e-12).all()  # f is convex


def test_a_hessian_that_is_the_same_for_the_whole_batch():
    """Even where the batch is as large as the dimension."""
    start = torch.stack((X0, 3 * X0.flip(0)))
    together = prox_path(lambda x: x @ A, lambda x: A, start, 0.3, 2)
    for i in range(2):
        assert_close(together[:, i], prox_path(lambda x: x @ A, lambda x: A, start[i], 0.3, 2))


def test_newton_may_stop_at_a_maximum():
    """(x²−1)² from 0: a stationary point, where the proximal points of α = ½ are ±√½."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(prox_path(well_grad, well_hess, zero, 0.5, 2), torch.zeros(3, 1, dtype=torch.float64))
    near = prox_path(well_grad, well_hess, zero + 0.9, 0.5, 1)[-1]
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    values = (grid - 0.9) ** 2 / (2 * 0.5) + (grid**2 - 1) ** 2
    assert near.item() == pytest.approx(grid[values.argmin()].item(), abs=1e-5)


def test_descent_guarantee_of_the_global_proximal_point():
    """From 0 the minimisers are ±√½: with 1/2α it holds, with 1/α, right for convex f only, it does not."""
    x = torch.tensor([0.5], dtype=torch.float64).sqrt()
    assert_close(x / 0.5 + well_grad(x), torch.zeros(1, dtype=torch.float64))
    drop, moved = 1 - well(x), x.square().sum()
    assert_close(drop - moved / (2 * 0.5), torch.tensor(0.25, dtype=torch.float64))
    assert_close(drop - moved / 0.5, torch.tensor(-0.25, dtype=torch.float64))


def test_proximal_minus_gradient_step():
    """α²Hg + O(α³), with the constants that the chapter quotes."""
    g, constants = grad(X0), []
    for lr in (0.1, 0.05, 0.025):
        gap = prox_path(grad, hess, X0, lr, 1)[1] - gd_path(grad, X0, lr, 1)[1] - lr**2 * hvp(X0, g)
        constants.append((gap.norm() / lr**3).item())
    assert constants == pytest.approx([13.5, 14.9, 15.7], abs=0.06)


def test_stiff_quadratic_diverges_explicitly_and_contracts_implicitly():
    one = torch.ones(1, dtype=torch.float64)
    assert_close(
        gd_path(lambda x: 4 * x, one, 0.6, 3)[:, 0], torch.tensor([1, -1.4, 1.96, -2.744], dtype=torch.float64)
    )
    eye = torch.full((1, 1), 4.0, dtype=torch.float64)
    assert_close(prox_path(lambda x: 4 * x, lambda x: eye, one, 0.6, 1)[1], one / 3.4)


# the flow


def test_dissipation():
    """f(x(0)) − f(x(T)) = ∫|∇f|², the integral carried along as a third coordinate."""

    def extended(y):
        g = grad(y[:2])
        return torch.cat((g, -g.square().sum(dim=0, keepdim=True)))

    end = flow(extended, torch.cat((X0, torch.zeros(1, dtype=torch.float64))), [0.0, 2.0])[-1]
    assert (end[2] + f(end[:2]) - f(X0)).abs() < 1e-9  # the solver's own error
    assert f(X0) - f(end[:2]) > 1


def test_descent_lemma():
    """f(x') ≤ f(x) − α(1 − Lα/2)|∇f|²: for L-smooth f, with equality for ½Lx²."""
    rng = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(500, 2, generator=rng, dtype=torch.float64)
    L = torch.linalg.eigvalsh(A).max() + 1
    for lr in (0.01, 0.3, 0.6):
        new, squared = gd_path(grad, x, lr, 1)[1], grad(x).square().sum(-1)
        assert (f(new) <= f(x) - lr * (1 - L * lr / 2) * squared + 1e-12).all()
        new = gd_path(lambda x: 3 * x, x, lr, 1)[1]
        assert_close(1.5 * new**2, 1.5 * x**2 - lr * (1 - 3 * lr / 2) * (3 * x) ** 2, scale=10)


def test_flow_against_scipy():
    rng = torch.Generator().manual_seed(1)
    start = 2 * torch.randn(5, 2, generator=rng, dtype=torch.float64)
    ts = torch.tensor([0.0, 0.1, 1.0, 4.0], dtype=torch.float64)
    for gradient in (grad, well_grad):

        def velocity(t, y, gradient=gradient):
            return -gradient(torch.from_numpy(y).view(5, 2)).flatten().numpy()

        solved = solve_ivp(velocity, (0, 4), start.flatten().numpy(), "DOP853", ts, rtol=1e-12, atol=1e-13).y
        ours = gradient_flow(gradient, start, ts)
        expected = torch.from_numpy(solved.T).view(4, 5, 2)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)  # ten times rtol of the solver


def test_flow_against_torchdiffeq():
    ts = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, x: -well_grad(x), X0, ts, rtol=1e-9, atol=1e-12, method="dopri5")
    torch.testing.assert_close(gradient_flow(well_grad, X0, ts), theirs, rtol=0, atol=1e-6)  # tolerances differ


def test_flow_is_of_fifth_order():
    """A tolerance 2^−10 times smaller needs about 4 times the evaluations."""
    calls = []

    def counted(x):
        calls.append(x)
        return grad(x)

    counts = []
    for exponent in (20, 30, 40):
        calls.clear()
        gradient_flow(counted, X0, [0.0, 5.0], rtol=2.0**-exponent, atol=2.0**-exponent)
        counts.append(len(calls))
    assert 3 < counts[1] / counts[0] < 5 and 3 < counts[2] / counts[1] < 5


def test_flow_starts_at_the_first_time_and_does_not_depend_on_those_between():
    few = flow(grad, X0, [1.0, 3.0])
    many = flow(grad, X0, torch.linspace(1, 3, 41))
    assert torch.equal(few[0], X0) and many.shape == (41, 2)
    torch.testing.assert_close(many[-1], few[-1], rtol=0, atol=1e-12)


def test_batch_of_flows():
    start = torch.stack((X0, -X0, 3 * X0)).reshape(3, 1, 2)
    together = flow(grad, start, [0.0, 1.0])
    for i in range(3):
        torch.testing.assert_close(together[:, i], flow(grad, start[i], [0.0, 1.0]), rtol=0, atol=1e-12)


def test_flow_that_leaves_to_infinity():
    """dx/dt = x² from 1 ends at t = 1."""
    with pytest.raises(ConvergenceError, match=r"vanishes at t = (1|0\.99)"):
        gradient_flow(lambda x: -(x**2), torch.ones(1, dtype=torch.float64), [0.0, 2.0])


def test_float32():
    end = gradient_flow(lambda x: x, torch.ones(3), [0.0, 1.0], rtol=1e-5, atol=1e-7)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end[-1], torch.full((3,), math.exp(-1)), rtol=1e-4, atol=0)


# steepest descent


def norms(rng):
    """(name, g, P, primal norm, dual norm) for random g."""
    g = torch.randn(6, generator=rng, dtype=torch.float64)
    G = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    root = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    P = root @ root.mT + torch.eye(6)
    inverse = torch.linalg.inv(P)

    def singular(u):
        return torch.linalg.svdvals(u)

    yield "l2", g, None, lambda u: u.norm(dim=-1), g.norm()
    yield "linf", g, None, lambda u: u.abs().amax(-1), g.abs().sum()
    yield "l1", g, None, lambda u: u.abs().sum(-1), g.abs().max()
    yield "spectral", G, None, lambda u: singular(u).amax(-1), singular(G).sum()
    yield "mahalanobis", g, P, lambda u: (u * (u @ P)).sum(-1).sqrt(), (g @ inverse @ g).sqrt()


@pytest.mark.parametrize("seed", range(3))
def test_steepest_directions(seed):
    """Norm 1, value −‖g‖_*, and nothing of norm 1 goes down faster."""
    rng = torch.Generator().manual_seed(seed)
    seen = []
    for name, g, P, norm, dual in norms(rng):
        u = steepest_direction(g, name, P)
        assert_close(norm(u), torch.ones((), dtype=torch.float64))
        assert_close((g * u).sum(), -dual, scale=10)
        others = torch.randn(10_000, *g.shape, generator=rng, dtype=torch.float64)
        others = others / norm(others)[(...,) + (None,) * g.ndim]
        near = u + 0.01 * others
        near = near / norm(near)[(...,) + (None,) * g.ndim]
        for v in (others, near):
            assert ((v * g).flatten(1).sum(1) >= -dual - 1e-12).all()
        seen.append(name)
    assert tuple(seen) == NORMS


def test_direction_of_one_norm_is_beaten_in_another():
    g = torch.tensor([3.0, 1.0], dtype=torch.float64)
    l2 = steepest_direction(g, "l2")
    assert g @ (l2 / l2.abs().max()) > g @ steepest_direction(g, "linf") + 0.1
    assert g @ (l2 / l2.abs().sum()) > g @ steepest_direction(g, "l1") + 0.1


def test_directions_in_batches_and_of_low_rank():
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    P = torch.diag_embed(torch.rand(4, 3, generator=rng, dtype=torch.float64) + 0.1)
    for name, metric in (("l2", None), ("linf", None), ("l1", None), ("mahalanobis", P)):
        rows = [steepest_direction(g[i], name, None if metric is None else P[i]) for i in range(4)]
        assert_close(steepest_direction(g, name, metric), torch.stack(rows))
    rank_one = g[0][:, None] * g[1]
    assert_close(steepest_direction(rank_one, "spectral"), -rank_one / (g[0].norm() * g[1].norm()))
    assert_close(steepest_direction(torch.stack((rank_one, 0 * rank_one)), "spectral")[1], 0 * rank_one)


@given(st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=5), st.floats(0.1, 10))
def test_directions_do_not_depend_on_the_size_of_the_gradient(values, factor):
    g = torch.tensor(values, dtype=torch.float64)
    for name in ("l2", "linf", "l1"):
        if g.abs().max() > 1e-3:
            assert_close(steepest_direction(factor * g, name), steepest_direction(g, name))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_direction(norm):
    zero = torch.zeros(3, 3, dtype=torch.float64)
    P = torch.eye(3, dtype=torch.float64)
    assert torch.equal(steepest_direction(zero, norm, P), zero)


# errors


def test_bad_arguments():
    for bad in (0.0, -0.1, float("nan"), float("inf")):
        for call in (lambda lr: gd_path(grad, X0, lr, 1), lambda lr: prox_path(grad, hess, X0, lr, 1),
                     lambda lr: modified_gradient(grad, hvp, lr)):  # fmt: skip
            with pytest.raises(ValueError, match="lr must be positive"):
                call(bad)
        with pytest.raises(ValueError, match="rtol must be positive"):
            gradient_flow(grad, X0, [0, 1], rtol=bad)
    for bad in (0, -1, 1.5):
        for call in (lambda n: gd_path(grad, X0, 0.1, n), lambda n: prox_path(grad, hess, X0, 0.1, n)):
            with pytest.raises(ValueError, match="steps must be a positive integer"):
                call(bad)
    for bad in ([0.0], [0.0, 0.0], [1.0, 0.0], [0.0, float("nan")]):
        with pytest.raises(ValueError, match="ts must be at least two increasing times"):
            gradient_flow(grad, X0, bad)
    with pytest.raises(ValueError, match="kind must be 'explicit' or 'implicit', got 'both'"):
        modified_gradient(grad, hvp, 0.1, "both")
    with pytest.raises(ValueError, match="norm must be one of l2, linf, l1, spectral, mahalanobis, got 'l3'"):
        steepest_direction(X0, "l3")
    with pytest.raises(ValueError, match="P is required"):
        steepest_direction(X0, "mahalanobis")
    with pytest.raises(ValueError, match="P must be symmetric positive definite"):
        steepest_direction(X0, "mahalanobis", -torch.eye(2, dtype=torch.float64))


def test_proximal_step_without_a_solution():
    """No x near the start solves x − x₀ + α e^{…} = 0: the message says where Newton stood."""
    x0 = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ConvergenceError, match=r"no proximal point at step 0: the residual is 1, not \de-12"):
        prox_path(lambda x: -x - 1, lambda x: -torch.ones(1, 1, dtype=torch.float64), x0, 1.0, 3)
    with pytest.raises(ConvergenceError, match="at step 0"):
        prox_path(lambda x: -x + 1 + x**2, lambda x: torch.diag_embed(2 * x - 1), x0 + 0.5, 1.0, 1)
