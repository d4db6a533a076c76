"""Best fixed points against scipy, their certificates, and a search for violations of the core bound."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from kexue_utils.optimization import sgd_convergence as sgd
from tests.tolerances import assert_close

PLANTED = torch.tensor([0.9, -0.6, 0.3], dtype=torch.float64)
d, T, B = 3, 40, 30
PROBLEMS = {
    "logistic": sgd.Logistic(PLANTED, G=2.0),
    "hinge": sgd.Hinge(PLANTED),
    "least absolute": sgd.LeastAbsolute(PLANTED),
    "quantile": sgd.Quantile(PLANTED, 0.3),
    "huber": sgd.Huber(PLANTED, 0.3),
}
DOMAINS = {
    "ball": sgd.Ball(2.0),
    "small ball": sgd.Ball(0.3, [0.2, 0.5, 0.0]),
    "box": sgd.Box([-2.0, -0.1, -2.0], [2.0, 0.1, 1.5]),
}


def objective(name, x, y, theta):
    """The average loss in numpy, written out."""
    u = x @ theta
    r = u - y
    return {
        "logistic": lambda: np.logaddexp(0, -y * u),
        "hinge": lambda: np.maximum(0, 1 - y * u),
        "least absolute": lambda: np.abs(r),
        "quantile": lambda: np.maximum(-0.3 * r, 0.7 * r),
        "huber": lambda: np.where(np.abs(r) <= 0.3, r * r / 2, 0.3 * (np.abs(r) - 0.15)),
    }[name]().mean()


@pytest.mark.parametrize("where", DOMAINS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_optima_lie_within_their_certificates(name, where):
    problem, domain = PROBLEMS[name], DOMAINS[where]
    data = x, y = sgd.draw(problem, B, T, seed=1)
    for tol in (1e-3, 1e-9):
        found = sgd.hindsight_optimum(problem, data, domain, tol)
        assert (found.gap <= tol).all() and (found.gap > -1e-12).all()
        assert domain.contains(found.theta, 1e-12).all()
        assert_close(found.loss, problem.loss(found.theta, data).mean(0))
    assert found.loss[0] == pytest.approx(objective(name, x[:, 0].numpy(), y[:, 0].numpy(), found.theta[0].numpy()))
    others = domain.project(found.theta + 0.1 * torch.randn(200, B, d, dtype=torch.float64))
    for theta in others:
        assert (problem.loss(theta, data).mean(0) >= found.loss - tol).all()


@pytest.mark.parametrize("name", ["least absolute", "hinge", "quantile"])
def test_optima_equal_linear_programmes(name):
    """On a box: minimise Σ e_t with e_t ≥ both pieces of each loss, by HiGHS."""
    problem, box = PROBLEMS[name], DOMAINS["box"]
    x, y = sgd.draw(problem, 8, T, seed=2)
    found = sgd.hindsight_optimum(problem, (x, y), box, 1e-9)
    for i in range(8):
        a, b = x[:, i].numpy(), y[:, i].numpy()
        pieces = {
            "least absolute": [(a, b), (-a, -b)],
            "hinge": [(-b[:, None] * a, -np.ones(T)), (0 * a, np.zeros(T))],
            "quantile": [(0.7 * a, 0.7 * b), (-0.3 * a, -0.3 * b)],
        }[name]
        rows = np.vstack([np.hstack([slope, -np.eye(T)]) for slope, _ in pieces])
        limits = list(zip(box.lo.tolist(), box.hi.tolist(), strict=True)) + [(None, None)] * T
        solved = linprog(
            np.r_[np.zeros(d), np.ones(T) / T], rows, np.concatenate([offset for _, offset in pieces]), bounds=limits
        )
        assert solved.status == 0 and float(found.loss[i]) == pytest.approx(solved.fun, abs=2e-9)


@pytest.mark.parametrize("name", ["logistic", "huber"])
def test_optima_equal_slsqp(name):
    problem, ball = PROBLEMS[name], DOMAINS["small ball"]
    x, y = sgd.draw(problem, 8, T, seed=3)
    found = sgd.hindsight_optimum(problem, (x, y), ball, 1e-9)
    center = ball.center.numpy()
    inside = {"type": "ineq", "fun": lambda theta: ball.R**2 - ((theta - center) ** 2).sum()}
    for i in range(8):
        solved = minimize(
            lambda theta, i=i: objective(name, x[:, i].numpy(), y[:, i].numpy(), theta), center, method="SLSQP",
            constraints=[inside], options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        assert float(found.loss[i]) == pytest.approx(solved.fun, abs=1e-7)  # its gradient is numeric


def test_the_certificate_holds_for_any_slopes():
    problem, ball = PROBLEMS["logistic"], DOMAINS["ball"]
    data = sgd.draw(problem, B, T, seed=4)
    best = sgd.hindsight_optimum(problem, data, ball, 1e-10).loss
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        theta = ball.project(torch.randn(B, d, generator=generator, dtype=torch.float64))
        slopes = -data[1] * torch.rand(T, B, generator=generator, dtype=torch.float64)
        gap = sgd.duality_gap(problem, data, ball, theta, slopes)
        assert (problem.loss(theta, data).mean(0) - best <= gap + 1e-9).all()
        own = problem.link((data[0] * theta).sum(-1), data[1])[1]
        least = sgd.duality_gap(problem, data, ball, theta, own)
        gradient = problem.grad(theta, data).mean(0)
        assert_close(least, (gradient * theta).sum(-1) + ball.R * gradient.norm(dim=-1))


def test_linear_losses_have_a_closed_form():
    problem, domain = sgd.Linear(2, 3.0), sgd.L1Ball(2.0)
    g = torch.randn(50, 20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sgd.hindsight_optimum(problem, (g,), domain)
    assert_close(found.loss, -2 * g.mean(0).abs().amax(-1))
    assert_close(found.loss, problem.loss(found.theta, (g,)).mean(0))
    assert not found.gap.any()


def test_float32_data_and_one_step():
    problem = PROBLEMS["least absolute"]
    data = sgd.draw(problem, 5, 1, dtype=torch.float32)
    found = sgd.hindsight_optimum(problem, data, sgd.Ball(3.0))
    assert found.loss.dtype == torch.float64 and found.loss.max() <= 1e-6


@pytest.mark.parametrize("family", ["logistic", "hinge", "least absolute"])
def test_no_random_instance_violates_the_core_bound(family):
    """10 800 instances: three families, two schedules and a random one, against the best point in hindsight."""
    generator, worst = torch.Generator().manual_seed(len(family)), []
    for draw in range(3):
        radius, G = (float(torch.rand((), generator=generator)) * 3 + 0.2 for _ in range(2))
        planted = torch.randn(4, generator=generator).double()
        problem = {"logistic": sgd.Logistic, "hinge": sgd.Hinge, "least absolute": sgd.LeastAbsolute}[family]
        problem, domain, N, steps = problem(planted, G=G), sgd.Ball(radius), 400, (20, 60, 100)[draw]
        data = sgd.draw(problem, N, steps, seed=draw)
        best = sgd.hindsight_optimum(problem, data, domain, 1e-6 * radius * G)
        start = domain.project(torch.randn(N, 4, generator=generator).double())
        random = torch.rand(steps, generator=generator).double().sort(descending=True).values * radius / G
        for eta in (
            sgd.constant(steps, 2 * radius / (G * math.sqrt(steps))),
            sgd.inv_sqrt(steps, math.sqrt(2) * radius / G),
            random,
        ):
            run = sgd.run_sgd(problem, domain, eta, start, seed=draw, comparator=best.theta, ledger=True)
            bound = float(sgd.core_bound(eta, domain.diameter, G))
            assert (run.ledger.regret + best.gap <= bound).all()
            assert run.ledger.slacks.min() > -1e-9 * bound
            assert_close(run.ledger.bound, torch.full((N,), bound, dtype=torch.float64), scale=bound + 1)
            worst.append(float((run.ledger.regret / bound).max()))
    # The search alone has few teeth: a bound that is a tenth too small would survive it.
    assert 0.3 < max(worst) < 0.9


@pytest.mark.parametrize(
    ("problem", "domain", "error", "message"),
    [
        (PROBLEMS["hinge"], sgd.Simplex(), ValueError, "problem must be linear, .* got Hinge on Simplex"),
        (PROBLEMS["hinge"], sgd.Unbounded(), ValueError, "got Hinge on Unbounded"),
        (PROBLEMS["hinge"], sgd.Box([0, 0, 1], [1, 1, 1]), ValueError, "domain must have an interior, got a box"),
        (sgd.TwoPointAbs([0.0, 1.0], 0.5), sgd.Box(0.0, 1.0), ValueError, "got TwoPointAbs on Box"),
    ],
)
def test_bad_input(problem, domain, error, message):
    data = sgd.draw(problem, 2, 3)
    with pytest.raises(error, match=message):
        sgd.hindsight_optimum(problem, data, domain)


def test_linear_losses_need_a_bounded_domain():
    with pytest.raises(ValueError, match="domain must be bounded to have an extreme point, got Unbounded"):
        sgd.hindsight_optimum(sgd.Rademacher(), sgd.draw(sgd.Rademacher(), 2, 3), sgd.Unbounded())


def test_an_accuracy_out_of_reach_is_said():
    problem = PROBLEMS["hinge"]
    with pytest.raises(RuntimeError, match=r"no optimum within tol=1e-18: run \d is certified to .* only"):
        sgd.hindsight_optimum(problem, sgd.draw(problem, 2, 30), sgd.Ball(1.0), 1e-18)


def test_walls_that_the_first_steps_overshoot_do_not_stop_the_rest():
    # the optimum lies on the ball; a μ that falls faster than the distance from it leaves the slack at 0
    problem = sgd.Logistic(torch.full((128,), 128**-0.5, dtype=torch.float64))
    found = sgd.hindsight_optimum(problem, sgd.draw(problem, 60, 500, seed=7), sgd.Ball(2.0), tol=1e-11)
    assert (found.theta.norm(dim=1) > 2 - 1e-6).any() and found.gap.max() <= 1e-11
