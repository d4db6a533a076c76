"""Where the bounds are attained, approached or broken: extremal instances, enumerations, exact expectations."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch

from kexue_utils.optimization import sgd_convergence as sgd
from tests.tolerances import assert_close

D, G = 2.0, 3.0


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.mark.parametrize("T", [1, 4, 25, 100])
def test_cube_attains_the_core_bound(T):
    cube = sgd.CubeWorstCase(T, D, G)
    run = sgd.run_sgd(cube, cube.domain, cube.eta, cube.theta0, comparator=cube.comparator, ledger=True)
    assert float(run.ledger.regret) * T == pytest.approx(D * G * math.sqrt(T), rel=1e-12)
    assert float(sgd.core_bound(cube.eta, cube.domain.diameter, G)) == pytest.approx(D * G / math.sqrt(T), rel=1e-12)
    assert run.ledger.slacks.abs().max() < 1e-14
    assert_close(run.final, cube.comparator)
    assert bool(cube.domain.contains(cube.comparator))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100])
def test_walk_attains_the_core_bound_in_one_dimension(n):
    T, domain = n * n, sgd.Box(0.0, D)
    walk, eta = sgd.LinearAdversary(sgd.walk_and_rattle(T, G)), sgd.constant(n * n, D / (G * n))
    run = sgd.run_sgd(walk, domain, eta, zeros(1, 1), comparator=zeros(1, 1) + D, ledger=n < 100)
    assert float(run.online_loss - run.comparator_loss) == pytest.approx(D * G / n, rel=1e-9)
    # On the grid of step ηG = D/n no sequence does worse from any start.
    assert int(sgd.worst_grid_regret(torch.ones(T, dtype=torch.int64), n).max()) == n * n


def brute_force(eta, starts):
    worst = -math.inf
    for start, signs in product(starts, product((1, -1), repeat=len(eta))):
        theta, loss = start, 0.0
        for g, step in zip(signs, eta, strict=True):
            loss += G * g * theta
            theta = min(max(theta - step * G * g, 0.0), D)
        worst = max(worst, loss - min(0.0, G * D * sum(signs)))
    return worst / len(eta)


def test_enumeration_of_all_sign_sequences():
    for eta in ([0.3], [0.4, 0.1, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1]):
        found = sgd.worst_sign_sequence(torch.tensor(eta, dtype=torch.float64), D, G)
        assert found.regret == pytest.approx(brute_force(eta, (0.0, D / 2, D)), rel=1e-12)
        adversary = sgd.LinearAdversary(G * found.signs[:, None])
        ends = torch.tensor([[0.0], [D]], dtype=torch.float64)
        start = torch.full((2, 1), found.start, dtype=torch.float64)
        run = sgd.run_sgd(adversary, sgd.Box(0.0, D), torch.tensor(eta), start, comparator=ends)
        assert float((run.online_loss - run.comparator_loss).max()) == pytest.approx(found.regret, rel=1e-7)
    one = sgd.worst_sign_sequence(torch.tensor([0.3]), D, G, starts=[0.5])
    assert one.start == 0.5 and one.regret == pytest.approx(4.5) and one.signs.tolist() == [-1.0]


def test_worst_ratios_to_the_core_bound():
    constant = {1: 1, 2: 0.9142, 4: 1, 8: 0.9571, 9: 1, 12: 0.98803, 16: 1, 18: 0.99836}
    inverse_root = {1: 0.94281, 2: 0.80627, 4: 0.78570, 8: 0.72926, 12: 0.73149, 16: 0.77060, 18: 0.77752}
    for T, ratio in constant.items():
        worst = sgd.worst_sign_sequence(sgd.constant(T, D / (G * math.sqrt(T))), D, G)
        assert worst.regret * math.sqrt(T) / (D * G) == pytest.approx(ratio, abs=1e-12 if ratio == 1 else 1e-4)
    for T, ratio in inverse_root.items():
        eta = sgd.inv_sqrt(T, D / (math.sqrt(2) * G))
        worst = sgd.worst_sign_sequence(eta, D, G).regret
        assert worst / float(sgd.core_bound(eta, D, G)) == pytest.approx(ratio, abs=1e-5)
    # The first step in place of the last would be no bound for a decreasing schedule.
    eta = sgd.inv_sqrt(4, D / (math.sqrt(2) * G))
    first = D**2 / (2 * float(eta[0])) + G**2 / 2 * float(eta.sum())
    assert sgd.worst_sign_sequence(eta, D, G).regret * 4 > 1.1 * first


def test_increasing_schedule_breaks_the_core_bound_and_not_the_general_one():
    grid, width = torch.arange(1, 101), 200  # steps .01, .02, …, 1 on [0, 2] in hundredths
    eta = grid / 100.0
    worst = float(sgd.worst_grid_regret(grid, width).max()) / 100
    naive = 4 / (2 * float(eta[-1])) + float(eta.sum()) / 2
    assert naive == pytest.approx(27.25) and worst == pytest.approx(50.70) and worst / naive > 1.86
    assert float(sgd.core_bound_general(eta.double(), 2.0, 1.0)) * 100 == pytest.approx(225.25)
    tiny = torch.tensor([1e-6] * 99 + [2.0], dtype=torch.float64)
    push = sgd.LinearAdversary(-torch.ones(100, 1, dtype=torch.float64))
    run = sgd.run_sgd(push, sgd.Box(0.0, 2.0), tiny, zeros(1, 1), comparator=zeros(1, 1) + 2)
    naive = 4 / (2 * float(tiny[-1])) + float(tiny.sum()) / 2
    assert float(run.online_loss - run.comparator_loss) * 100 / naive == pytest.approx(99.995, abs=1e-3)


def test_grid_programme_equals_enumeration():
    steps = torch.tensor([1, 3, 2, 2, 4, 1, 3])
    worst = sgd.worst_grid_regret(steps, 6)
    for start in range(7):
        eta = steps.double() / G
        found = sgd.worst_sign_sequence(eta, 6.0, G, starts=[float(start)])
        assert found.regret * 7 / G == pytest.approx(int(worst[start]), rel=1e-12)


def test_lower_bound_for_any_algorithm():
    for T in range(1, 13):
        walks = [abs(sum(signs)) for signs in product((1, -1), repeat=T)]
        assert sgd.mean_abs_walk(T) == Fraction(sum(walks), 2**T)
    assert float(sgd.mean_abs_walk(10_000)) / 100 / 2 == pytest.approx(math.sqrt(1 / (2 * math.pi)), abs=1e-5)
    for T in (100, 1000):
        problem, domain = sgd.Rademacher(G), sgd.Box(-D / 2, D / 2)
        eta, B = sgd.constant(T, D / (G * math.sqrt(T))), 4000
        run = sgd.run_sgd(problem, domain, eta, zeros(B, 1), seed=5)
        best = sgd.hindsight_optimum(problem, sgd.draw(problem, B, T, seed=5), domain)
        regret = run.online_loss - best.loss
        expected, error = D * G / 2 * float(sgd.mean_abs_walk(T)) / T, float(regret.std()) / math.sqrt(B)
        assert abs(float(regret.mean()) - expected) < 4 * error < 0.05 * expected


def two_signs(T, turn):
    signs = torch.ones(T, 1, dtype=torch.float64)
    signs[:turn] = -1
    return sgd.LinearAdversary(signs)


def test_without_a_domain_the_average_regret_grows():
    """Starting at a comparator, D_1 = 0: on the losses' minimiser with as many signs of each kind."""
    for T, quarter, half in ((400, 0.1339, 0.08262), (1600, 0.1493, None), (6400, 0.1578, 0.08099)):
        for turn, ratio in ((T // 4, quarter), (T // 2, half)):
            if ratio is None:
                continue
            adversary, eta = two_signs(T, turn), sgd.inv_sqrt(T)
            run = sgd.run_sgd(adversary, sgd.Unbounded(), eta, zeros(1, 1))
            assert float(run.online_loss) / math.sqrt(T) == pytest.approx(ratio, abs=6e-5)
            kept = sgd.run_sgd(adversary, sgd.Box(-1.0, 1.0), eta, zeros(1, 1), comparator=zeros(1, 1))
            assert float(kept.online_loss) < float(sgd.core_bound(eta, 2.0, 1.0)) < float(run.online_loss)
    assert ratio == pytest.approx(math.sqrt(2) - 4 / 3, abs=2e-4)


def random_two_point_problems(N, T, seed, falling=False):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    problem = sgd.TwoPointAbs(4 * uniform(N, 2) - 2, uniform(N))
    theta0, eta = 4 * uniform(N) - 2, (3 * uniform(N, T) - 2.5).exp() * 4 ** (2 * uniform(N, 1) - 1)
    eta = eta.sort(dim=-1, descending=True).values if falling else eta
    return problem, theta0, eta, (theta0 - problem.optimum()[:, 0]).abs()


def test_exact_expectation_is_the_mean_over_all_paths():
    problem, theta0, eta, _ = random_two_point_problems(3, 4, seed=1)
    found = sgd.exact_expectation(problem, eta, theta0, sgd.Box(-1.5, 1.5))
    for n in range(3):
        last, average = [0.0] * 4, 0.0
        (a, b), p = problem.a[n].tolist(), float(problem.p[n])

        def loss(theta, a=a, b=b, p=p):
            return (1 - p) * abs(theta - a) + p * abs(theta - b)

        for path in product((0, 1), repeat=4):
            theta, seen = float(theta0[n]), []
            weight = math.prod(p if bit else 1 - p for bit in path)
            for bit, step in zip(path, eta[n].tolist(), strict=True):
                seen.append(theta)
                x = b if bit else a
                theta = min(max(theta - step * ((theta > x) - (theta < x)), -1.5), 1.5)
            last = [total + weight * loss(value) for total, value in zip(last, seen, strict=True)]
            average += weight * loss(sum(seen) / 4)
        least = min(loss(a), loss(b))
        assert found.last[n].tolist() == pytest.approx([value - least for value in last], abs=1e-12)
        assert float(found.average[n]) == pytest.approx(average - least, abs=1e-12)


def test_exact_expectation_against_simulation():
    """θ_t is independent of x_t: the online loss and the expected loss of the iterates have one mean."""
    problem, eta, B = sgd.TwoPointAbs([-1.0, 1.0], 0.3), sgd.inv_sqrt(12, 0.7), 20_000
    exact = sgd.exact_expectation(problem, eta, 0.5)
    run = sgd.run_sgd(problem, sgd.Unbounded(), eta, torch.full((B, 1), 0.5), record=["loss", "theta"])
    least = float(problem.expected_loss(problem.optimum()))
    for sample, value in (
        (run.online_loss - least, exact.last.mean()),
        (problem.expected_loss(run.records["theta"]).mean(0) - least, exact.last.mean()),
        (problem.expected_loss(run.last) - least, exact.last[-1]),
        (problem.expected_loss(run.average) - least, exact.average),
    ):
        assert abs(float(sample.mean() - value)) < 4.5 * float(sample.std()) / math.sqrt(B)
    # Evaluated on the sample it has just been fitted to, the next iterate looks better than it is.
    (x,) = sgd.draw(problem, B, 12)
    after = torch.cat([run.records["theta"][1:], run.final[None]])
    biased = (after[..., 0] - x).abs().mean(0) - least
    assert float(biased.mean() - exact.last.mean()) < -20 * float(biased.std()) / math.sqrt(B)


def test_bounds_in_expectation_hold_for_every_problem():
    """No violation over all paths of 10 000 random problems, and nearly equality somewhere."""
    closest = dict.fromkeys(("weighted", "segment", "average", "last", "last_inv"), 0.0)
    for seed, T in enumerate((2, 3, 5, 8, 10)):
        problem, theta0, eta, D1 = random_two_point_problems(1000, T, seed)
        q = sgd.exact_expectation(problem, eta, theta0).last
        ratios = {
            "weighted": (eta * q).sum(-1) / eta.sum(-1) / bounds(sgd.weighted_bound, eta, D1),
            "last": q[:, -1] / bounds(sgd.last_iterate_bound, eta, D1),
            # From step k on, with the iterate of that step as comparator.
            "segment": (eta * (q - q[:, :1]))[:, 1:].sum(-1) / bounds(sgd.weighted_bound, eta, 0 * D1) / eta.sum(-1),
        }
        problem, theta0, eta, D1 = random_two_point_problems(1000, T, seed + 100, falling=True)
        expected = sgd.exact_expectation(problem, eta, theta0)
        ratios["average"] = expected.last.mean(-1) / bounds(sgd.average_bound_unbounded, eta, D1)
        ratios["last_inv"] = expected.last[:, -1] / bounds(sgd.last_iterate_bound_inv, eta, D1)
        assert (expected.average <= expected.last.mean(-1) + 1e-12).all()  # Jensen
        for name, ratio in ratios.items():
            assert ratio.max() <= 1 + 1e-12, name
            closest[name] = max(closest[name], float(ratio.max()))
    assert closest["weighted"] > 0.98 and closest["average"] > 0.9 and closest["last"] > 0.8, closest


def bounds(bound, eta, D1):
    """A bound for a D_1 per problem: the part of D_1² and that of G² = 1 add up."""
    return D1**2 * bound(eta, 1.0, 0.0) + bound(eta, 0.0, 1.0)


def test_first_distance_cannot_replace_the_diameter():
    violated = []
    for seed in range(4):
        problem, theta0, eta, D1 = random_two_point_problems(1000, 8, seed, falling=True)
        regret = sgd.exact_expectation(problem, eta, theta0).last.mean(-1)
        ratio = regret / (D1**2 * sgd.core_bound(eta, 1.0, 0.0) + sgd.core_bound(eta, 0.0, 1.0))
        violated.append(float(ratio.max()))
    assert max(violated) > 1.3


def test_sharp_linear_decay_on_random_functions():
    """L(θ_T) − L(u) ≤ (1/T) Σ ⟨g_t, z_t − u⟩ ≤ D_1²/(2γT) + (γ/2T) Σ ‖g_t‖², pathwise, with z_t of constant steps."""
    generator = torch.Generator().manual_seed(3)
    B, T, d, m, gamma = 3000, 12, 3, 5, 0.7
    a, b = (torch.randn(B, m, *rest, generator=generator, dtype=torch.float64) for rest in ((d,), ()))
    start, u = (torch.randn(B, d, generator=generator, dtype=torch.float64) for _ in range(2))
    problem = sgd.MaxAffine(a, b)
    eta = gamma * (1 - torch.arange(1, T + 1, dtype=torch.float64) / T)
    run = sgd.run_sgd(problem, sgd.Unbounded(), eta, start, record=["theta", "grad"])
    g = run.records["grad"]
    z = start - gamma * (g.cumsum(0) - g)
    last = problem.loss(run.last, ()) - problem.loss(u, ())
    middle = (g * (z - u)).sum(-1).mean(0)
    upper = ((start - u) ** 2).sum(-1) / (2 * gamma * T) + gamma / 2 * (g * g).sum(-1).mean(0)
    assert (last <= middle + 1e-12).all() and (middle <= upper + 1e-12).all()
    assert (middle - last).min() < 1e-12  # attained: no smaller constant would do
    assert problem.G == pytest.approx(float(a.norm(dim=-1).max()))
    rows = (a @ run.last[..., None])[..., 0] + b
    assert_close(problem.loss(run.last, ()), rows.max(-1).values)
    assert_close(problem.grad(run.last, ()), a[torch.arange(B), rows.argmax(-1)])


@pytest.mark.parametrize(
    ("T", "ratio", "constant", "half"), [(4, 0.5, 2.0, 1.245), (8, 0.25, 2.0, 1.124), (16, 0.125, 2.0, 1.062)]
)
def test_sharp_linear_decay_on_the_absolute_value(T, ratio, constant, half):
    start = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:, None]
    absolute = sgd.TwoPointAbs([0.0, 0.0], 0.5)
    t, gamma = torch.arange(1, T + 1, dtype=torch.float64), 1 / math.sqrt(T)
    bound = start[:, 0] ** 2 / (2 * gamma * T) + gamma / 2
    for ramp, expected in (((1 - t / T), ratio), (torch.ones(T), constant), ((1 - t / (2 * T)), half)):
        run = sgd.run_sgd(absolute, sgd.Unbounded(), gamma * ramp.double(), start)
        assert float((run.last[:, 0].abs() / bound).max()) == pytest.approx(expected, abs=0.0025)


def harvey(T, eta, ties="first"):
    problem = sgd.HarveyLowerBound(T, ties)
    run = sgd.run_sgd(problem, sgd.Ball(1.0), eta, zeros(1, T), record=["gnorm"])
    return float(problem.loss(run.final)), float(run.online_loss), float(run.records["gnorm"].max())


def test_last_iterate_of_the_inverse_root_schedule_keeps_its_logarithm():
    for T, slow, flat, linear, other in ((64, 0.0584, 0.0491, 0.0687, 0.072), (256, 0.0554, 0.0511, 0.0681, 0.084),
                                         (1024, 0.0536, 0.0518, 0.0678, 0.080)):  # fmt: skip
        root, log = math.sqrt(T), math.log(T)
        last, average, gradient = harvey(T, sgd.inv_sqrt(T))
        assert last * root / log == pytest.approx(slow, abs=6e-5) and last >= log / (32 * root)
        assert average * root == pytest.approx(flat, abs=6e-5) and gradient <= 0.515
        assert harvey(T, sgd.linear_decay(T, 2 / root))[0] * root == pytest.approx(linear, abs=6e-5)
        assert harvey(T, sgd.inv_sqrt(T), "last")[0] * root == pytest.approx(other, abs=6e-4)


def test_harvey_function_is_its_matrix():
    T = 6
    problem, theta = sgd.HarveyLowerBound(T), torch.randn(4, T, dtype=torch.float64)
    h = zeros(T + 1, T)
    for i, j in product(range(1, T + 2), range(1, T + 1)):
        h[i - 1, j - 1] = 1 / (8 * (T - j + 1)) if j < i else -math.sqrt(i) / (2 * math.sqrt(T)) if j == i else 0
    assert_close(problem.pieces(theta), theta @ h.T)
    same = sgd.MaxAffine(h, zeros(T + 1))
    assert_close(problem.loss(theta), same.loss(theta, ()))
    assert_close(problem.grad(theta), same.grad(theta, ()))
    level = zeros(1, T)  # all rows maximise: the first and the last differ
    assert_close(problem.grad(level)[0], h[0])
    assert_close(sgd.HarveyLowerBound(T, "last").grad(level)[0], h[-1])
    assert h.norm(dim=1).max() <= problem.G


ETA = torch.full((3,), 0.1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd.worst_sign_sequence(sgd.constant(21), 1, 1), "at most 20 steps, as 2.T paths .* got 21"),
        (lambda: sgd.worst_sign_sequence(-ETA, 1, 1), "steps must be positive and finite, got eta=-0.1 at t=1"),
        (lambda: sgd.worst_sign_sequence(ETA, 0, 1), "D must be positive and finite, got 0"),
        (lambda: sgd.worst_sign_sequence(ETA, 1, -1), "G must be positive and finite, got -1"),
        (lambda: sgd.exact_expectation(sgd.TwoPointAbs([0, 1], 0.5), sgd.constant(17), 0.0), "at most 16 steps"),
        (lambda: sgd.worst_grid_regret(ETA, 3), "steps must be positive integers"),
        (lambda: sgd.worst_grid_regret(torch.tensor([1, 0]), 3), r"steps must be positive integers, got \[1, 0\]"),
        (lambda: sgd.mean_abs_walk(0), "T must be positive, got 0"),
        (lambda: sgd.walk_and_rattle(8), "T must be a positive square, got 8"),
        (lambda: sgd.walk_and_rattle(0), "T must be a positive square, got 0"),
        (lambda: sgd.CubeWorstCase(4, D=-1.0), "D must be positive and finite, got -1.0"),
        (lambda: sgd.CubeWorstCase(4, G=0.0), "G must be positive and finite, got 0.0"),
        (lambda: sgd.CubeWorstCase(0), "T must be a positive integer, got 0"),
        (lambda: sgd.HarveyLowerBound(0), "T must be a positive integer, got 0"),
        (lambda: sgd.HarveyLowerBound(3, ties="random"), "ties must be 'first' or 'last', got 'random'"),
        (lambda: sgd.TwoPointAbs([0, 1], 1.5), r"p must lie in \[0, 1\], got 1.5"),
        (lambda: sgd.TwoPointAbs([0, 1, 2], 0.5), r"a must have shape \(2,\) to go with p, got \(3,\)"),
        (lambda: sgd.LinearAdversary(torch.ones(3)), r"sequence must have shape \(T, d\), got \(3,\)"),
        (lambda: sgd.LinearAdversary(torch.zeros(3, 1)), "G must be positive and finite, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
