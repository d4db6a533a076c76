"""The engine: scalar reference, scikit-learn and torch.optim on the same data, independent runs, the ledger, errors."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import SGDClassifier, SGDRegressor

from kexue_utils.optimization import sgd_convergence as sgd
from kexue_utils.optimization.sgd_convergence.engine import BLOCK, CHUNK
from tests.tolerances import assert_close

PLANTED = torch.tensor([0.9, -0.6, 0.3, 1.0], dtype=torch.float64)
d = len(PLANTED)
PROBLEMS = {
    "logistic": sgd.Logistic(PLANTED),
    "hinge": sgd.Hinge(PLANTED),
    "least absolute": sgd.LeastAbsolute(PLANTED),
    "quantile": sgd.Quantile(PLANTED, 0.3),
    "huber": sgd.Huber(PLANTED, 0.4),
}


def zeros(B, d=d):
    return torch.zeros(B, d, dtype=torch.float64)


def scalar_loss(name, u, y):
    """φ and φ' in Python numbers."""
    if name == "logistic":
        return math.log(1 + math.exp(-y * u)), -y / (1 + math.exp(y * u))
    if name == "hinge":
        return max(0.0, 1 - y * u), -y if y * u < 1 else 0.0
    r = u - y
    if name == "least absolute":
        return abs(r), math.copysign(1, r)
    if name == "quantile":
        return max(-0.3 * r, 0.7 * r), 0.7 if r > 0 else -0.3
    return (r * r / 2, r) if abs(r) <= 0.4 else (0.4 * (abs(r) - 0.2), math.copysign(0.4, r))


@pytest.mark.parametrize("name", PROBLEMS)
def test_engine_equals_a_scalar_loop(name):
    problem, eta, R = PROBLEMS[name], sgd.inv_sqrt(150, 1.5), 0.8
    run = sgd.run_sgd(problem, sgd.Ball(R), eta, zeros(3), seed=4)
    x, y = sgd.draw(problem, 3, 150, seed=4)
    for i in range(3):
        theta, online, total = [0.0] * d, 0.0, [0.0] * d
        for row, label, step in zip(x[:, i].tolist(), y[:, i].tolist(), eta.tolist(), strict=True):
            u = sum(a * b for a, b in zip(row, theta, strict=True))
            value, slope = scalar_loss(name, u, label)
            online += value / 150
            total = [a + b / 150 for a, b in zip(total, theta, strict=True)]
            last = theta
            theta = [a - step * slope * b for a, b in zip(theta, row, strict=True)]
            size = math.sqrt(sum(a * a for a in theta))
            theta = [a * min(1, R / size) for a in theta]
        assert float(run.online_loss[i]) == pytest.approx(online, abs=1e-12)
        for found, expected in ((run.final, theta), (run.last, last), (run.average, total)):
            assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


COMMON = {"penalty": None, "learning_rate": "invscaling", "power_t": 0.5, "shuffle": False, "fit_intercept": False}
PEERS = {
    "logistic": lambda alpha: SGDClassifier(loss="log_loss", eta0=alpha, max_iter=1, tol=None, **COMMON),
    "hinge": lambda alpha: SGDClassifier(loss="hinge", eta0=alpha, max_iter=1, tol=None, **COMMON),
    "least absolute": lambda alpha: SGDRegressor(
        loss="epsilon_insensitive", epsilon=0.0, eta0=alpha, max_iter=1, tol=None, **COMMON
    ),
    "huber": lambda alpha: SGDRegressor(loss="huber", epsilon=0.4, eta0=alpha, max_iter=1, tol=None, **COMMON),
}


@pytest.mark.parametrize("name", PEERS)
def test_one_pass_equals_scikit_learn(name):
    problem, alpha, T = PROBLEMS[name], 0.7, 2000
    x, y = sgd.draw(problem, 1, T, seed=2)
    peer = PEERS[name](alpha).fit(x[:, 0].numpy(), y[:, 0].numpy())
    run = sgd.run_sgd(problem, sgd.Unbounded(), sgd.inv_sqrt(T, alpha), zeros(1), data=(x, y))
    assert np.abs(run.final[0].numpy() - peer.coef_.ravel()).max() < 1e-12
    shifted = sgd.run_sgd(problem, sgd.Unbounded(), sgd.inv_sqrt(T + 1, alpha)[1:], zeros(1), data=(x, y))
    assert np.abs(shifted.final[0].numpy() - peer.coef_.ravel()).max() > 1e-6  # η_{t+1} for η_t shows


@pytest.mark.parametrize("name", PROBLEMS)
def test_run_equals_torch_optim(name):
    problem, eta = PROBLEMS[name], sgd.linear_decay(100, 0.5)
    x, y = sgd.draw(problem, 1, 100, seed=3)
    theta = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.0)
    for row, target, step in zip(x[:, 0], y[:, 0], eta.tolist(), strict=True):
        optimizer.param_groups[0]["lr"] = step
        optimizer.zero_grad()
        problem.link(row @ theta, target)[0].backward()
        optimizer.step()
    run = sgd.run_sgd(problem, sgd.Unbounded(), eta, zeros(1), seed=3)
    assert_close(run.final[0], theta.detach())


@pytest.mark.parametrize("problem", [*PROBLEMS.values(), sgd.Rademacher(), sgd.TwoPointAbs([0.0, 1.0], 0.3)])
def test_a_run_does_not_depend_on_its_batch(problem):
    """Alone, in a batch that crosses blocks, with more steps to come: the same path; other seeds and runs differ."""
    B, T = BLOCK + 44, CHUNK + 16
    eta = sgd.inv_sqrt(T, 0.5)
    many = sgd.run_sgd(problem, sgd.Ball(1.0), eta, zeros(B, problem.d), seed=9)
    for i in (0, 1, BLOCK - 1, BLOCK, B - 1):
        alone = sgd.run_sgd(problem, sgd.Ball(1.0), eta, zeros(1, problem.d), seed=9, first=i)
        assert_close(alone.final[0], many.final[i])  # vectorised functions round by place, the data are the same
        assert_close(alone.online_loss[0], many.online_loss[i])
    few = sgd.draw(problem, 5, 10, seed=9, first=BLOCK - 2)
    for part, whole in zip(few, sgd.draw(problem, B, T, seed=9), strict=True):
        assert torch.equal(part, whole[:10, BLOCK - 2 : BLOCK + 3])
    given = sgd.run_sgd(problem, sgd.Ball(1.0), eta, zeros(B, problem.d), data=sgd.draw(problem, B, T, seed=9))
    assert torch.equal(given.final, many.final)
    other = sgd.run_sgd(problem, sgd.Ball(1.0), eta, zeros(B, problem.d), seed=10)
    assert not torch.equal(other.online_loss, many.online_loss)
    assert len(many.online_loss.unique()) > B / 4  # chance repeats few of the signs' losses


def test_float32_follows_float64():
    problem, eta = PROBLEMS["logistic"], sgd.inv_sqrt(200, 0.5)
    double, single = (
        sgd.run_sgd(problem, sgd.Ball(1.0), eta, zeros(50), dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    assert single.final.dtype == torch.float32 and double.final.dtype == torch.float64
    assert_close(single.final, double.final, torch.float32, scale=5)  # the rounding of 200 steps


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("schedule", [sgd.constant, sgd.inv_sqrt])
def test_ledger_accounts_for_every_unit(name, schedule):
    problem, domain, T, B = PROBLEMS[name], sgd.Ball(2.0), 100, 40
    generator = torch.Generator().manual_seed(0)
    start, comparator = (domain.project(torch.randn(B, d, generator=generator).double()) for _ in range(2))
    eta = schedule(T, 1.0)
    names = ["loss", "average_loss", "dist", "gnorm", "theta", "grad"]
    run = sgd.run_sgd(problem, domain, eta, start, comparator=comparator, ledger=True, record=names, seed=1)
    ledger, bound = run.ledger, sgd.core_bound(eta, domain.diameter, problem.G)
    assert_close(ledger.bound, bound.expand(B))
    assert (ledger.slacks > -1e-12).all()
    assert_close(ledger.regret, run.online_loss - run.comparator_loss)
    # Each slack by its formula from the recorded path.
    theta, g, e = run.records["theta"], run.records["grad"], eta[:, None]
    path = torch.cat([theta, run.final[None]])
    a = ((path - comparator) ** 2).sum(-1)
    inner = (g * (theta - comparator)).sum(-1)
    assert_close(ledger.convexity, inner.mean(0) - ledger.regret)
    ahead = ((theta - e[..., None] * g - comparator) ** 2).sum(-1)
    assert_close(ledger.projection, ((ahead - a[1:]) / (2 * e)).mean(0), scale=4)  # a difference of squares
    jumps = (1 / (2 * e)).diff(dim=0, prepend=torch.zeros(1, 1, dtype=torch.float64))
    assert_close(ledger.diameter, (jumps * (domain.diameter**2 - a[:-1])).mean(0))
    assert_close(ledger.distance, a[-1] / (2 * eta[-1] * T))
    assert_close(ledger.gradient, (e / 2 * (problem.G**2 - (g * g).sum(-1))).mean(0))
    one_step = run.records["loss"] - problem.loss(comparator, sgd.draw(problem, B, T, seed=1))
    assert (one_step <= (a[:-1] - a[1:]) / (2 * e) + e / 2 * (g * g).sum(-1) + 1e-12).all()
    assert_close(run.records["dist"], a[:-1].sqrt())
    assert_close(run.records["gnorm"], g.norm(dim=-1))
    assert_close(run.records["average_loss"][-1], run.online_loss)
    assert_close(run.records["loss"].mean(0), run.online_loss)
    assert_close(run.average, theta.mean(0))
    assert torch.equal(run.last, theta[-1])


def test_records_keep_every_stride():
    problem = PROBLEMS["hinge"]
    every = sgd.run_sgd(problem, sgd.Ball(1.0), sgd.constant(20), zeros(2), record=["loss", "average_loss"])
    some = sgd.run_sgd(problem, sgd.Ball(1.0), sgd.constant(20), zeros(2), record=["loss", "average_loss"], stride=6)
    assert list(some.kept) == [6, 12, 18] and list(every.kept) == list(range(1, 21))
    for name in ("loss", "average_loss"):
        assert torch.equal(some.records[name], every.records[name][5::6])
    assert some.comparator_loss is None and some.ledger is None


def test_records_are_not_overwritten():
    """A linear loss's gradient is its data: still there after the next chunk is drawn."""
    T, problem = 2 * CHUNK + 1, sgd.Rademacher()
    run = sgd.run_sgd(problem, sgd.Box(-1.0, 1.0), sgd.constant(T), zeros(3, 1), record=["grad"])
    assert torch.equal(run.records["grad"], sgd.draw(problem, 3, T)[0])


def test_zero_steps_stay_where_they_are():
    run = sgd.run_sgd(PROBLEMS["hinge"], sgd.Ball(1.0), torch.tensor([0.5, 0.0]), zeros(3))
    assert torch.equal(run.last, run.final) and run.final.abs().max() > 0


def test_step_by_hand():
    theta, g = torch.tensor([[3.0, 4.0], [1.0, -2.0]], dtype=torch.float64)[:, None]
    loss, grad, target, after = sgd.sgd_step(sgd.Linear(2, 3.0), sgd.Ball(2.5), theta, (g,), torch.tensor(0.5))
    assert loss.tolist() == [-5] and grad.tolist() == [[1, -2]] and target.tolist() == [[2.5, 5]]
    assert_close(after, 2.5 * target / target.norm())


HINGE, BALL, ETA = PROBLEMS["hinge"], sgd.Ball(1.0), sgd.constant(5)
DATA = sgd.draw(HINGE, 2, 5)
LONG = (torch.cat([DATA[0][:4], 1.5 * DATA[0][4:]]), DATA[1])


def run(eta=ETA, theta0=None, domain=BALL, problem=HINGE, **options):
    return sgd.run_sgd(problem, domain, eta, zeros(2) if theta0 is None else theta0, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(data=LONG), r"gradient bound G=1 violated by sample \(4, 0\), norm 1.5"),
        (lambda: run(data=(DATA[0] * math.nan, DATA[1])), r"gradient bound G=1 violated by sample \(0, 0\), norm nan"),
        (lambda: run(data=(DATA[0][:, :1], DATA[1])), r"leading axes \(T, B\) = \(5, 2\), got shapes \[\(5, 1, 4\)"),
        (lambda: run(eta=torch.tensor([0.1, -0.2])), "steps must be finite and not negative, got eta=-0.2 at t=2"),
        (lambda: run(eta=torch.tensor([0.1, math.nan])), "got eta=nan at t=2"),
        (lambda: run(eta=torch.tensor([math.inf])), "got eta=inf at t=1"),
        (lambda: run(eta=torch.ones(0)), r"eta must be a schedule of shape \(T,\), got shape \(0,\)"),
        (lambda: run(eta=torch.ones(2, 2)), r"eta must be a schedule of shape \(T,\), got shape \(2, 2\)"),
        (lambda: run(theta0=zeros(2, 3)), r"theta0 must have shape \(B, 4\), got \(2, 3\)"),
        (lambda: run(theta0=zeros(2) + 1), r"theta0 must lie in the domain, got \[1.0, 1.0, 1.0, 1.0\] in run 0"),
        (lambda: run(comparator=zeros(1)), r"comparator must have shape \(B, 4\), got \(1, 4\)"),
        (lambda: run(comparator=zeros(2) + 1), "comparator must lie in the domain"),
        (lambda: run(ledger=True), "comparator must be given for the ledger and for the record 'dist'"),
        (lambda: run(record=["dist"]), "comparator must be given for the ledger and for the record 'dist'"),
        (lambda: run(record=["losses"]), r"record must be among .* got \('losses',\) and 1"),
        (lambda: run(record=["loss"], stride=0), "stride >= 1, got .* and 0"),
        (lambda: run(eta=sgd.warmup(ETA, 3), comparator=zeros(2), ledger=True), "schedule increases at t=2"),
        (lambda: run(eta=ETA * 0, comparator=zeros(2), ledger=True), "steps must be positive and finite, got eta=0"),
        (
            lambda: run(domain=sgd.Unbounded(), comparator=zeros(2), ledger=True),
            "domain must be bounded for the ledger",
        ),
        (
            lambda: run(problem=sgd.LinearAdversary(torch.ones(3, 4))),
            "eta must have at most the 3 steps of the problem, got 5",
        ),
    ],
)
def test_bad_input_changes_nothing(call, message):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run().final, sgd.run_sgd(HINGE, BALL, ETA, zeros(2)).final)


def test_the_global_generator_and_the_arguments_are_left_alone():
    before, start = torch.get_rng_state(), zeros(3)
    run(theta0=start, comparator=zeros(3), ledger=True, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before) and not start.any()
    assert HINGE.planted.dtype == torch.float64 and BALL.center.dtype == torch.float64
