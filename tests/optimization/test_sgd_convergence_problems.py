"""Losses: convexity at every subgradient, autograd, exact gradient bounds, expectations, conjugates, errors."""

import math

import pytest
import torch

from kexue_utils.optimization import sgd_convergence as sgd
from tests.tolerances import assert_close

PLANTED = torch.tensor([0.9, -0.6, 0.3, 1.0, 0.2], dtype=torch.float64)
d = len(PLANTED)
PROBLEMS = {
    "logistic": sgd.Logistic(PLANTED, G=2.0),
    "hinge": sgd.Hinge(PLANTED, flip=0.2, G=0.5),
    "least absolute": sgd.LeastAbsolute(PLANTED, noise=0.7),
    "quantile": sgd.Quantile(PLANTED, 0.2, G=3.0),
    "huber": sgd.Huber(PLANTED, 0.4, G=2.0),
}


def thetas(n, seed, scale=1.5):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(problem, n, seed=0):
    return tuple(part[0] for part in problem.sample(n, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_convexity_of_100_000_triples(name):
    """L(θ_2) − L(θ_1) ≥ ⟨θ_2 − θ_1, g(θ_1)⟩, a tenth of the θ_1 on a kink."""
    problem, one, two = PROBLEMS[name], thetas(100_000, 1), thetas(100_000, 2)
    x, y = drawn(problem, 100_000)
    # Moving along x sets ⟨x, θ_1⟩ = y, where hinge, least absolute and quantile have their kinks.
    ten = slice(0, 10_000)
    one[ten] += ((y - (x * one).sum(-1)) / (x * x).sum(-1))[ten, None] * x[ten]
    loss, grad = problem.loss_and_grad(one, (x, y))
    rise = problem.loss(two, (x, y)) - loss
    assert (rise - ((two - one) * grad).sum(-1)).min() > -1e-12
    assert (rise - ((two - one) * problem.grad(two, (x, y))).sum(-1)).min() < -0.1  # not with the gradient at θ_2
    assert (grad.norm(dim=-1) <= problem.G + 1e-12).all()
    assert torch.equal(problem.loss(one, (x, y)), loss) and torch.equal(problem.grad(one, (x, y)), grad)


def test_subgradients_on_the_kink():
    x = torch.tensor([0.6, 0.8, 0, 0, 0], dtype=torch.float64)
    label, target = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    assert_close(sgd.Hinge(PLANTED).grad(x, (x, label)), -x / 2)
    assert not sgd.LeastAbsolute(PLANTED).grad(x / 2, (x, target)).any()
    assert_close(sgd.Quantile(PLANTED, 0.2).grad(x / 2, (x, target)), 0.3 * x)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_equal_autograds(name):
    problem, theta = PROBLEMS[name], thetas(500, 3).requires_grad_()
    batch = drawn(problem, 500)
    loss, grad = problem.loss_and_grad(theta, batch)
    assert_close(grad, torch.autograd.grad(loss.sum(), theta)[0])


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_bound_is_exact(name):
    problem = PROBLEMS[name]
    batch = drawn(problem, 1000)
    assert_close(problem.gradient_bounds(batch), torch.full((1000,), problem.G, dtype=torch.float64))
    problem.check(batch)
    far = 1e6 * batch[0] * torch.tensor([1.0, -1.0]).double()[:, None, None]  # both ends of the loss
    largest = problem.grad(far, tuple(part[None] for part in batch)).norm(dim=-1).amax(0)
    assert_close(largest, torch.full((1000,), problem.G, dtype=torch.float64))


def numbers(name, u, y):
    r = u - y
    return {
        "logistic": torch.log1p(torch.exp(-y * u)),
        "hinge": (1 - y * u).clamp(min=0),
        "least absolute": r.abs(),
        "quantile": torch.maximum(-0.2 * r, 0.8 * r),
        "huber": torch.where(r.abs() <= 0.4, r * r / 2, 0.4 * (r.abs() - 0.2)),
    }[name]


@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_and_conjugates(name):
    problem = PROBLEMS[name]
    _, y = drawn(problem, 50)
    u = torch.linspace(-20, 20, 40_001, dtype=torch.float64)[:, None]
    value, slope = problem.link(u, y)
    assert_close(value, numbers(name, u, y), scale=10)  # up to 20
    inner = slope[20_000]  # a slope that the loss has
    assert_close(
        problem.conjugate(inner, y), (inner * u - value).amax(0), scale=1e7
    )  # the maximum is on a grid of 10⁻³


def test_data_follow_the_planted_model():
    n = 200_000
    for name in PROBLEMS:
        x, _ = drawn(PROBLEMS[name], n)
        assert_close(x.norm(dim=-1).max(), x.norm(dim=-1).min())
        second = x.T @ x / n / (x[0] @ x[0]) * d
        assert (second - torch.eye(d)).abs().max() < 0.02 and (x.mean(0) / x[0].norm()).abs().max() < 0.01
    x, y = drawn(PROBLEMS["logistic"], n)
    u = x @ PLANTED
    assert abs(float((y == 1).double().mean() - u.sigmoid().mean())) < 0.005
    assert abs(float((y * u).mean() - (u * torch.tanh(u / 2)).mean())) < 0.01
    x, y = drawn(PROBLEMS["hinge"], n)
    assert float((y == (x @ PLANTED).sign()).double().mean()) == pytest.approx(0.8, abs=0.005)
    x, y = drawn(PROBLEMS["least absolute"], n)
    noise = y - x @ PLANTED
    assert float(noise.std()) == pytest.approx(0.7, rel=0.01) and abs(float(noise.mean())) < 0.006


def test_planted_parameters_minimise_where_they_should():
    for name in ("logistic", "least absolute", "huber"):
        problem = PROBLEMS[name]
        grad = problem.grad(PLANTED, drawn(problem, 400_000))
        assert (grad.mean(0).abs() < 5 * grad.std(0) / math.sqrt(400_000)).all()
    grad = PROBLEMS["hinge"].grad(PLANTED, drawn(PROBLEMS["hinge"], 400_000))
    assert not (grad.mean(0).abs() < 5 * grad.std(0) / math.sqrt(400_000)).all()


def test_law_of_large_numbers_for_known_expectations():
    n = 200_000
    theta = PLANTED + torch.tensor([0.5, 0, -0.3, 0, 0.1], dtype=torch.float64)
    for problem, at in (
        (sgd.LeastAbsolute(PLANTED, 0.7), theta),
        (sgd.LeastAbsolute(PLANTED, 0.0, G=2.0), theta),
        (sgd.TwoPointAbs([-1.0, 2.0], 0.3), torch.tensor([0.4], dtype=torch.float64)),
    ):
        loss = problem.loss(at, drawn(problem, n))
        assert abs(float(loss.mean() - problem.expected_loss(at))) < 4 * float(loss.std()) / math.sqrt(n)
        repeated = problem.loss(at, drawn(problem, 1)).expand(n)  # x_1 again and again converges to nothing else
        assert abs(float(repeated.mean() - problem.expected_loss(at))) > 4 * float(loss.std()) / math.sqrt(n)
    signs = sgd.Rademacher(3.0).loss(torch.tensor([0.5]), drawn(sgd.Rademacher(3.0), n))
    assert set(signs.unique().tolist()) == {-1.5, 1.5} and abs(float(signs.mean())) < 4 * 1.5 / math.sqrt(n)


def test_expected_absolute_loss_in_closed_form():
    shift = torch.tensor([[0.3, 0, -0.4, 0, 1.2]], dtype=torch.float64)
    mean_entry = math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))  # E|x_1| on the sphere
    plain = sgd.LeastAbsolute(PLANTED, 0.0, G=2.0).expected_loss(PLANTED + shift)
    assert float(plain) == pytest.approx(2 * 1.3 * mean_entry, rel=4e-6)
    noisy = sgd.LeastAbsolute(PLANTED, 0.7)
    assert float(noisy.expected_loss(PLANTED)) == pytest.approx(0.7 * math.sqrt(2 / math.pi), rel=1e-12)
    two = sgd.LeastAbsolute(PLANTED[:2], 0.5)
    angle = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)[:-1]
    a = 0.8 * angle.cos()
    normal = torch.distributions.Normal(0.0, 1.0)
    exact = a * (2 * normal.cdf(a / 0.5) - 1) + math.sqrt(2 / math.pi) * 0.5 * torch.exp(-2 * a * a)
    shift = torch.tensor([[0.8, 0.0]], dtype=torch.float64)
    assert_close(two.expected_loss(PLANTED[:2] + shift)[0], exact.mean(), scale=1e5)  # cdf is computed in float32 steps


def test_two_point_problems_in_batches():
    problem = sgd.TwoPointAbs([[0.0, 1.0], [2.0, -1.0]], [0.3, 0.8])
    assert problem.optimum().tolist() == [[0.0], [-1.0]]
    theta = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    assert problem.expected_loss(theta).tolist() == pytest.approx([0.5, 0.2 * 1 + 0.8 * 2])
    single = sgd.TwoPointAbs([0.0, 1.0], 0.3)
    (x,) = drawn(single, 50_000)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.01) and set(x.tolist()) == {0.0, 1.0}
    assert single.grad(torch.tensor([[0.5], [2.0]]), (torch.tensor([0.5, 1.0]),)).tolist() == [[0], [1]]


def test_a_problem_of_ones_own():
    class Quadratic(sgd.ConvexProblem):
        G, d = 2.0, 1

        def loss_and_grad(self, theta, batch):
            return (theta[..., 0] - batch[0]) ** 2 / 2, theta - batch[0][..., None]

        def gradient_bounds(self, batch):
            return batch[0].abs() + 1

    data = (torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None],)
    start = torch.ones(1, 1, dtype=torch.float64)
    run = sgd.run_sgd(Quadratic(), sgd.Box(-1.0, 1.0), sgd.inv_t(50), start, data=data)
    assert float(run.final[0, 0]) == pytest.approx(0, abs=1e-12)  # 1/t steps average the data
    with pytest.raises(ValueError, match=r"gradient bound G=2 violated by sample \(0, 0\), norm 3"):
        sgd.run_sgd(Quadratic(), sgd.Box(-1.0, 1.0), sgd.inv_t(50), start, data=(2 * data[0],))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd.Logistic(PLANTED, G=0), "G must be positive and finite, got 0"),
        (lambda: sgd.Logistic([math.nan, 1]), r"planted must be finite, got \[nan, 1.0\]"),
        (lambda: sgd.Hinge(PLANTED, flip=-0.1), r"flip must lie in \[0, 1\], got -0.1"),
        (lambda: sgd.LeastAbsolute(PLANTED, noise=-1), "noise must be finite and not negative, got -1"),
        (lambda: sgd.Quantile(PLANTED, 1.0), "tau must lie between 0 and 1, got 1.0"),
        (lambda: sgd.Huber(PLANTED, delta=0), "delta must be positive and finite, got 0"),
        (lambda: sgd.Huber(PLANTED, noise=math.inf), "noise must be finite and not negative, got inf"),
        (lambda: sgd.LeastAbsolute([1.0]).expected_loss(torch.ones(1)), "expected_loss needs d >= 2, got d=1"),
        (lambda: sgd.Linear(3, -1.0), "G must be positive and finite, got -1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
