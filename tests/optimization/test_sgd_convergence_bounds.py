"""Bounds against their formulas written as loops, closed forms, each other, and the table of schedules."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue_utils.optimization import sgd_convergence as sgd
from tests.tolerances import assert_close

steps = st.lists(st.integers(1, 50).map(lambda n: n / 16), min_size=1, max_size=9)
sizes = st.integers(1, 20).map(lambda n: n / 4)


def written_out(name, eta, D, G):
    """The bounds as the page prints them, in Python numbers."""
    T = len(eta)
    if name == "core_bound":
        return D**2 / (2 * T * eta[-1]) + G**2 / (2 * T) * sum(eta)
    if name == "core_bound_general":
        rises = sum(max(1 / b - 1 / a, 0) for a, b in pairwise(eta))
        return D**2 / (2 * T) * (1 / eta[0] + rises) + G**2 / (2 * T) * sum(eta)
    squares = sum(e * e for e in eta)
    if name == "weighted_bound":
        return (D**2 + G**2 * squares) / (2 * sum(eta))
    if name == "average_bound_unbounded":
        return (D**2 + G**2 * squares) / (2 * T * eta[-1])
    if name == "last_iterate_bound_inv":
        noise = sum(eta[t - 1] ** 2 / (T - t) for t in range(1, T))
        return D**2 / (2 * T * eta[-1]) + G**2 * eta[-1] / 2 + G**2 / (2 * eta[-1]) * noise
    noise = sum(eta[t - 1] ** 2 / sum(eta[t:]) for t in range(1, T)) + eta[-1]
    return D**2 / (2 * sum(eta)) + G**2 / 2 * noise


ANY = ("core_bound_general", "weighted_bound", "last_iterate_bound")
FALLING = ("core_bound", "average_bound_unbounded", "last_iterate_bound_inv")


@pytest.mark.parametrize("name", ANY + FALLING)
@given(steps, sizes, sizes)
def test_bounds_are_their_formulas(name, eta, D, G):
    eta = sorted(eta, reverse=True) if name in FALLING else eta
    value = getattr(sgd, name)(torch.tensor(eta, dtype=torch.float64), D, G)
    assert_close(value, torch.tensor(written_out(name, eta, D, G), dtype=torch.float64))


@given(steps, sizes, sizes)
def test_bounds_that_agree(eta, D, G):
    eta = torch.tensor(eta, dtype=torch.float64)
    falling = eta.sort(descending=True).values
    assert_close(sgd.core_bound_general(falling, D, G), sgd.core_bound(falling, D, G))
    assert sgd.core_bound_general(eta, D, G) >= sgd.core_bound_general(falling, D, G) * (1 - 1e-12)
    level = sgd.constant(len(eta), float(eta[0]))
    assert_close(sgd.last_iterate_bound_inv(level, D, G), sgd.last_iterate_bound(level, D, G))
    assert_close(sgd.average_bound_unbounded(level, D, G), sgd.core_bound(level, D, G))
    assert_close(sgd.weighted_bound(level, D, G), sgd.core_bound(level, D, G))


def test_bounds_take_many_schedules():
    eta = torch.rand(3, 4, 7, dtype=torch.float64).sort(dim=-1, descending=True).values
    for name in ANY + FALLING:
        bound = getattr(sgd, name)
        each = torch.stack([torch.stack([bound(row, 2.0, 3.0) for row in rows]) for rows in eta])
        assert_close(bound(eta, 2.0, 3.0), each)


def test_constant_step_of_the_post():
    for T, D, G in ((1, 2.0, 3.0), (7, 0.5, 1.0), (100, 4.0, 0.25)):
        best, value = sgd.best_scale(sgd.core_bound, sgd.constant(T), D, G)
        assert float(best) == pytest.approx(D / (G * math.sqrt(T)), rel=1e-12)
        assert float(value) == pytest.approx(D * G / math.sqrt(T), rel=1e-12)
        assert sgd.sharp_linear_bound(T, float(best), D, G) == pytest.approx(D * G / math.sqrt(T), rel=1e-12)
        assert sgd.sharp_linear_bound(T, 2 * float(best), D, G) == pytest.approx(1.25 * D * G / math.sqrt(T), rel=1e-12)


def test_inverse_root_schedule_of_the_post():
    D, G = 2.0, 3.0
    alpha = D / (math.sqrt(2) * G)
    closed = D**2 / (2 * alpha) + G**2 * alpha
    assert closed == pytest.approx(math.sqrt(2) * D * G)
    for T in (1, 2, 10, 100, 1000, 10_000):
        assert sgd.core_bound(sgd.inv_sqrt(T, alpha), D, G) < closed / math.sqrt(T)
    ratios = [float(sgd.core_bound(sgd.inv_sqrt(T, alpha), D, G)) * math.sqrt(T) / closed for T in (100, 1000, 10_000)]
    assert [round(ratio, 4) for ratio in ratios] == [0.9647, 0.9886, 0.9964]


def test_last_iterate_of_the_inverse_root_schedule():
    for T in (1, 2, 17, 300):
        D, G, alpha = 2.0, 0.5, 1.5
        harmonic = sum(1 / t for t in range(1, T))
        closed = D**2 / (2 * alpha) + G**2 * alpha / 2 + G**2 * alpha * harmonic
        value = sgd.last_iterate_bound_inv(sgd.inv_sqrt(T, alpha), D, G)
        assert value * math.sqrt(T) == pytest.approx(closed, rel=1e-12)


def test_linear_decay_exactly():
    for T in (1, 2, 5, 40):
        harmonic = sum((Fraction(1, t) for t in range(1, T)), Fraction(0))
        noise = Fraction(2, T + 1) * (T - 1 + harmonic) + Fraction(1, T + 1)
        assert sgd.last_iterate_bound(sgd.linear_decay(T), 1.0, 0.0) == pytest.approx(1 / T, rel=1e-12)
        assert sgd.last_iterate_bound(sgd.linear_decay(T), 0.0, 1.0) == pytest.approx(float(noise / 2), rel=1e-12)


TABLE = {
    "constant": (sgd.constant, [2.485, 2.913, 3.284], 0.343),
    "inverse root": (sgd.inv_sqrt, [2.253, 2.570, 2.871], 0.199 * math.sqrt(1000)),
    "linear": (sgd.linear_decay, [2.036, 2.006, 2.001], 0.997),
    "cosine": (sgd.cosine, [2.092, 2.063, 2.060], 0.969),
    "wsd": (sgd.wsd, [2.2205, 2.172, 2.161], 0.512),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_of_schedules(name):
    schedule, values, scale = TABLE[name]
    for T, expected in zip((100, 1000, 10_000), values, strict=True):
        for D, G in ((1.0, 1.0), (3.0, 0.5)):
            alpha, value = sgd.best_scale(sgd.last_iterate_bound, schedule(T), D, G)
            assert float(value) * math.sqrt(T) / (D * G) == pytest.approx(expected, abs=6e-4)
            if T == 1000:
                assert float(alpha) * G * math.sqrt(T) / D == pytest.approx(scale, abs=0.02)
            assert_close(sgd.last_iterate_bound(alpha * schedule(T), D, G), value)
            for other in (0.99, 1.01):
                assert sgd.last_iterate_bound(other * alpha * schedule(T), D, G) > value


def test_bound_that_divides_by_the_last_step_is_useless_for_decay_to_zero():
    worst = {
        name: float(sgd.best_scale(sgd.last_iterate_bound_inv, schedule(1000), 1.0, 1.0)[1]) * math.sqrt(1000)
        for name, (schedule, _, _) in TABLE.items()
    }
    assert round(worst["constant"], 3) == 2.913 and round(worst["inverse root"], 3) == 3.996
    assert min(worst["linear"], worst["cosine"]) > 700 and worst["wsd"] > 290


def test_anytime_curve_is_the_bound_of_every_prefix():
    eta = sgd.cosine(50, 0.3)
    curve = sgd.anytime_curve(eta, 2.0, 1.0)
    assert len(curve) == 50 and curve[-1] == sgd.last_iterate_bound(eta, 2.0, 1.0)
    assert curve[0] == pytest.approx(4 / (2 * float(eta[0])) + float(eta[0]) / 2)
    wsd = sgd.anytime_curve(sgd.wsd(400, 1 / 40), 1.0, 1.0)
    assert wsd[-1] < 0.85 * wsd[319]  # the bound drops with the cooldown, as losses do


def test_best_schedule_is_linear_but_for_its_last_step():
    for T, value, linear in ((20, 1.93310, 2.09524), (100, 2.00114, 2.03608)):
        found = sgd.best_schedule(T)
        again = sgd.best_schedule(T, start=sgd.inv_sqrt(T, 0.3))
        least = float(sgd.last_iterate_bound(found, 1.0, 1.0)) * math.sqrt(T)
        assert least == pytest.approx(value, abs=1e-5)
        assert float(sgd.last_iterate_bound(again, 1.0, 1.0)) * math.sqrt(T) == pytest.approx(least, abs=1e-6)
        best_linear = sgd.best_scale(sgd.last_iterate_bound, sgd.linear_decay(T), 1.0, 1.0)[1]
        assert float(best_linear) * math.sqrt(T) == pytest.approx(linear, abs=1e-5)
        assert sgd.is_nonincreasing(found[:-1]) and found[-1] > 2 * found[-2]
    ends = sgd.best_schedule(20)[-3:] * math.sqrt(20)
    assert_close(ends, torch.tensor([0.2110, 0.1754, 0.4235]), scale=1e8)  # four digits
    scaled = sgd.best_schedule(20, D1=3.0, G=0.5)
    assert_close(scaled, 6 * sgd.best_schedule(20), scale=1e6)  # a search stops short of rounding


def test_fit_rate_recovers_slope_and_error():
    T = torch.tensor([100.0, 300.0, 1000.0, 3000.0])
    exact = 3 * T**-0.5
    slope, error = sgd.fit_rate(T, exact, 0.01 * exact)
    assert slope == pytest.approx(-0.5, abs=1e-6)
    spread = (T.log() - T.log().mean()).square().sum()
    assert error == pytest.approx(float(0.01 / spread.sqrt()), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.01 * torch.randn(2000, 4, generator=generator)
    slopes = torch.tensor([sgd.fit_rate(T, exact * row, 0.01 * exact)[0] for row in noise])
    assert float(slopes.std()) == pytest.approx(error, rel=0.08)  # 2000 samples: 1.6 % standard error
    heavy = torch.tensor([1.0, 1e-3, 1.0, 1.0])  # one exact point among vague ones changes the weights
    bent = exact * torch.tensor([1.0, 1.0, 1.0, 2.0])
    y, weight = bent.log().double(), (bent / heavy).double() ** 2
    design = torch.stack([torch.ones(4), T.log()], 1).double()
    solved = torch.linalg.solve(design.T @ (weight[:, None] * design), design.T @ (weight * y))
    assert sgd.fit_rate(T, bent, heavy)[0] == pytest.approx(float(solved[1]), rel=1e-6)


ETA = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd.core_bound(ETA, 1, 1), r"schedule increases at t=2 \(from 1 to 2\); use core_bound_general"),
        (lambda: sgd.average_bound_unbounded(ETA, 1, 1), "schedule increases at t=2 .* use weighted_bound"),
        (lambda: sgd.last_iterate_bound_inv(ETA, 1, 1), "schedule increases at t=2 .* use last_iterate_bound"),
        (lambda: sgd.core_bound(torch.stack([ETA.sort(descending=True).values, ETA]), 1, 1), "increases at t=2"),
        (lambda: sgd.core_bound_general(ETA - 0.5, 1, 1), "positive and finite, got eta=0 at t=3"),
        (lambda: sgd.weighted_bound(-ETA, 1, 1), "got eta=-1 at t=1"),
        (lambda: sgd.last_iterate_bound(ETA * math.nan, 1, 1), "got eta=nan at t=1"),
        (lambda: sgd.last_iterate_bound(ETA / 0, 1, 1), "got eta=inf at t=1"),
        (lambda: sgd.weighted_bound(ETA[:0], 1, 1), r"eta must be a schedule of shape \(T,\), got shape \(0,\)"),
        (lambda: sgd.weighted_bound(ETA[0], 1, 1), r"got shape \(\)"),
        (lambda: sgd.weighted_bound(ETA, -1, 1), "D and G must not be negative, got -1 and 1"),
        (lambda: sgd.weighted_bound(ETA, 1, -2), "D and G must not be negative, got 1 and -2"),
        (lambda: sgd.best_scale(sgd.core_bound, ETA, 0, 1), "D and G must be positive, got 0 and 1"),
        (lambda: sgd.best_scale(sgd.core_bound, ETA, 1, 0), "D and G must be positive, got 1 and 0"),
        (lambda: sgd.best_schedule(3, start=-ETA), "got eta=-1 at t=1"),
        (lambda: sgd.fit_rate([1, 1], [1, 2], [1, 1]), r"T must hold two different values at least, got \[1.0, 1.0\]"),
        (lambda: sgd.fit_rate([1, 2], [1, -2], [1, 1]), "y must be positive, got -2"),
        (lambda: sgd.fit_rate([1, 2], [1, 2], [0, 1]), "yerr must be positive, got 0"),
        (lambda: sgd.fit_rate([0, 2], [1, 2], [1, 1]), "T must be positive, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.integers(1, 40), sizes)
def test_schedules_are_their_formulas(T, alpha):
    t = torch.arange(1, T + 1, dtype=torch.float64)
    expected = {
        sgd.constant: 0 * t + alpha,
        sgd.inv_sqrt: alpha / t.sqrt(),
        sgd.inv_t: alpha / t,
        sgd.linear_decay: alpha * (T + 1 - t) / (T + 1),
        sgd.polynomial: alpha * ((T + 1 - t) / (T + 1)) ** 2,
        sgd.cosine: alpha * torch.cos(math.pi * t / (2 * T + 2)) ** 2,
        sgd.wsd: alpha * torch.minimum(torch.ones(T, dtype=torch.float64), (T + 1 - t) / (0.2 * T + 1)),
    }
    for schedule, values in expected.items():
        found = schedule(T, alpha)
        assert found.dtype == torch.float64 and (found > 0).all() and sgd.is_nonincreasing(found)
        assert_close(found, values)
    assert sgd.step(T, alpha, every=3).tolist() == pytest.approx([alpha * 0.1 ** (i // 3) for i in range(T)])
    warm = sgd.warmup(sgd.constant(T, alpha), 4)
    assert warm.tolist() == pytest.approx([alpha * min(1, (i + 1) / 4) for i in range(T)])
    assert sgd.is_nonincreasing(warm) == (T == 1)


def test_wsd_decays_over_its_fraction():
    eta = sgd.wsd(100, 2.0, decay_frac=0.3)
    assert int((eta == 2).sum()) == 70 and eta[-1] == pytest.approx(2 / 31)
    assert (sgd.wsd(10, decay_frac=0.0) == 1).all()
    assert_close(sgd.wsd(10, decay_frac=1.0), sgd.linear_decay(10) * 11 / 11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd.constant(0), "T must be a positive integer, got 0"),
        (lambda: sgd.inv_t(2.5), "T must be a positive integer, got 2.5"),
        (lambda: sgd.inv_sqrt(3, -1.0), "alpha must be positive and finite, got -1.0"),
        (lambda: sgd.cosine(3, math.inf), "alpha must be positive and finite, got inf"),
        (lambda: sgd.polynomial(3, p=0), "p must be positive, got 0"),
        (lambda: sgd.wsd(3, decay_frac=1.5), r"decay_frac must lie in \[0, 1\], got 1.5"),
        (lambda: sgd.step(3, every=0), "every must be a positive integer, got 0"),
        (lambda: sgd.step(3, every=1, factor=0.0), "factor must be positive, got 0.0"),
        (lambda: sgd.warmup(ETA, 0), "n must be a positive integer, got 0"),
    ],
)
def test_bad_schedules(call, message):
    with pytest.raises(ValueError, match=message):
        call()
