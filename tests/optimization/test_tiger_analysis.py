"""Few bits, runaway and schedule: closed forms against what the numbers do."""

import math

import numpy as np
import pytest
import torch

from kexue_utils.optimization import tiger
from tests.tolerances import assert_close

LOW = (torch.float16, torch.bfloat16)


def stored(dtype):
    """Every finite number of a 16-bit dtype."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return x[x.isfinite()]


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("beta, units", [(0.3, 0), (0.9, 4), (0.945, 9), (0.965, 14), (0.99, 50)])
def test_momentum_stalls_above_zero(dtype, beta, units):
    assert tiger.momentum_stall(beta, dtype) == units
    m = torch.full((1,), {torch.float16: 1e-3, torch.bfloat16: 3e-38}.get(dtype, 3e-39), dtype=dtype)
    pending, g = torch.ones((), dtype=torch.bool), torch.zeros(1, dtype=dtype)
    for _ in range(1500):
        before = m.clone()
        tiger.accumulate_(m, g, pending.fill_(True), beta=beta)
        if torch.equal(m, before):
            break
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert torch.equal(m, before) and m.item() == units * tiny


def test_a_tie_depends_on_how_beta_is_rounded():
    # 0.98 in float32 is above 0.98, so that 25 units stay 25; in 16 bits the product has been rounded to a tie before.
    assert tiger.momentum_stall(0.98, torch.float32) == 25
    assert tiger.momentum_stall(0.98, torch.bfloat16) == tiger.momentum_stall(0.98, torch.float16) == 24
    m = torch.tensor([25.0]) * 2.0**-149
    assert torch.equal(m * 0.98, m)
    with pytest.raises(ValueError, match="any size"):
        tiger.momentum_stall(0.999, torch.bfloat16)
    with pytest.raises(ValueError, match="beta"):
        tiger.momentum_stall(1.0, torch.float32)
    with pytest.raises(TypeError, match="dtype"):
        tiger.momentum_stall(0.9, torch.int32)


@pytest.mark.parametrize("dtype", LOW)
def test_absorption_rule_for_every_number(dtype):
    theta = stored(dtype)
    normal = torch.finfo(dtype).smallest_normal
    for step in (2.0**-13, 3e-5, -(2.0**-16), 1e-2, normal / 2, -normal, 0.75):
        wide = theta.double() - step
        # To nearest even, on a grid that the dtype's own rounding defines: float64 → dtype once.
        expected = round_once(wide, dtype) == theta.double()
        assert torch.equal(tiger.absorbed(theta, step), expected)


def round_once(x, dtype):
    """float64 rounded to the dtype's grid, to nearest even, without float32 in between."""
    p, lowest = (11, -14) if dtype == torch.float16 else (8, -126)
    exponent = (torch.frexp(x)[1] - 1).clamp_min(lowest)
    unit = torch.ldexp(torch.ones_like(x), exponent - p + 1)
    return torch.round(x / unit) * unit


def test_absorption_is_not_underflow():
    theta = torch.tensor([0.02], dtype=torch.bfloat16)
    assert tiger.absorbed(theta, 2e-5).item() and torch.tensor(2e-5, dtype=torch.bfloat16) > 0
    low, high = torch.tensor([1.0, 1.0 + 2**-10], dtype=torch.float16).unbind()
    assert tiger.absorbed(low, -(2.0**-11)) and not tiger.absorbed(high, -(2.0**-11))  # a tie keeps the even one
    assert not tiger.absorbed(low, 2.0**-11) and tiger.absorbed(low, 2.0**-12)  # inwards the grid is finer


@pytest.mark.parametrize(
    "dtype, alpha, expected",
    [
        (torch.float16, 1e-3, (0.002, 0.013)),
        (torch.float16, 5e-4, (0.118, 0.211)),
        (torch.float16, 2.5e-4, (0.435, 0.532)),
        (torch.float16, 1e-4, (0.696, 0.755)),
        (torch.bfloat16, 2e-3, (0.432, 0.532)),
        (torch.bfloat16, 1e-3, (0.696, 0.755)),
        (torch.bfloat16, 1e-4, (0.961, 0.968)),
    ],
)
def test_frozen_fraction(dtype, alpha, expected):
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    for sd, value in zip((0.02, 0.05), expected, strict=True):
        found = tiger.frozen_fraction(alpha, sd, dtype)
        assert abs(found - value) < 0.004  # the measured values are printed with three decimals
        theta = (sd * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)
        after = theta.clone()
        sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
        tiger.step_(after, sign.to(dtype), alpha * sd, weight_decay=0.0)
        drawn = (after == theta).double().mean().item()
        assert abs(drawn - found) < 6 * math.sqrt(found * (1 - found) / n) + 1e-4


def test_frozen_fraction_at_a_tie():
    # η = 2^-13 is half an ulp of [2^-2, 2^-1) in float16: there the even half stays.
    sd = 0.25
    found = tiger.frozen_fraction(2.0**-13 / sd, sd, torch.float16)
    theta = (sd * torch.randn(200_000, generator=torch.Generator().manual_seed(1))).half()
    after = theta.clone()
    tiger.step_(after, torch.ones_like(theta), 2.0**-13, weight_decay=0.0)
    assert abs((after == theta).double().mean().item() - found) < 0.006
    with pytest.raises(ValueError, match="positive"):
        tiger.frozen_fraction(0.0, 1.0, torch.float16)
    with pytest.raises(ValueError, match="sd must be positive and finite"):
        tiger.frozen_fraction(1e-3, math.inf, torch.float16)


def test_adam_displacement():
    beta1, beta2 = 0.9, 0.999
    m = v = path = 0.0
    for t in range(3000):
        g = float(t == 0)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        path += m / math.sqrt(v)
    assert tiger.adam_displacement() == pytest.approx(path, rel=1e-9)
    assert round(path, 2) == 31.77
    with pytest.raises(ValueError, match="beta1"):
        tiger.adam_displacement(0.9999, 0.9)


def test_a_constant_sign_leads_to_the_bound():
    theta, m = torch.tensor([1.0, -0.3], dtype=torch.float64), torch.tensor([2.0, -1e-300], dtype=torch.float64)
    start = theta.clone()
    for _ in range(1000):
        tiger.step_(theta, m, 1e-3, weight_decay=0.01)
    assert_close(theta, tiger.constant_sign(start, m.sign(), 1e-3, 0.01, 1000), scale=1000)  # as many roundings
    assert tiger.constant_sign(1.0, 1.0, 0.1, 0.01, 1e9) == -100
    with pytest.raises(ValueError, match="eta"):
        tiger.constant_sign(1.0, 1.0, 0.0, 0.01, 3)
    for sign in (3.0, torch.tensor([1.0, 0.5])):
        with pytest.raises(ValueError, match="sign must be -1, 0 or 1"):
            tiger.constant_sign(1.0, sign, 0.1, 0.01, 3)


def test_functions_of_one_tensor_refuse_unknown_options():
    theta = torch.ones(2, 3)
    with pytest.raises(ValueError, match="lr_scale must be one of rms, row_rms, half, none, got 'row'"):
        tiger.rate(theta, 1e-3, "row")
    for sign_power in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sign_power must be in"):
            tiger.direction(theta, sign_power)


@pytest.mark.parametrize(
    "alpha, fraction, steps", [(1e-3, 0.5, 8521), (1e-3, 0.99, 13115), (2e-3, 0.5, 4263), (1e-4, 0.5, 85174)]
)
def test_runaway_is_logistic(alpha, fraction, steps):
    path = tiger.runaway(0.02, alpha, 0.01, steps + 1)
    first = int((path >= fraction * 100).nonzero()[0])
    assert abs(first - steps) <= 1
    assert tiger.runaway_time(alpha, 0.01, 0.02, fraction) == pytest.approx(first, rel=0.01)
    assert float(path.max()) < 100
    if steps < 5000:  # and this is what the optimizer does to a row without gradients
        row = torch.nn.Parameter(torch.full((1, 8), 0.02, dtype=torch.float64))
        optimizer = tiger.Tiger([row], lr=alpha, lr_scale="row_rms", weight_decay=0.01)
        for t in range(300):
            row.grad = -torch.ones_like(row) if t == 0 else torch.zeros_like(row)
            optimizer.step()
        assert_close(row.detach()[0], path[300].expand(8))


def test_runaway_errors():
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        tiger.runaway(0.1, 0.1, 0.1, -1)
    with pytest.raises(ValueError, match="r must be positive"):
        tiger.runaway(0.0, 1e-3, 0.01, 3)
    with pytest.raises(ValueError, match="below"):
        tiger.runaway_time(1e-3, 0.01, 200.0, 0.5)


@pytest.mark.parametrize("beta, k", [(0.965, 4), (0.9, 2), (0.99, 16)])
def test_smooth_beta(beta, k):
    smooth = tiger.smooth_beta(beta, k)
    second_order = beta + (k - 1) / (2 * k) * (1 - beta) ** 2
    assert abs(smooth**k - second_order) < (1 - beta) ** 3
    for bad in ((1.0, 4), (0.9, 0), (0.9, 1.5)):
        with pytest.raises(ValueError, match="must be"):
            tiger.smooth_beta(*bad)


@pytest.mark.parametrize("schedule", [{1000: 1.0, 2000: 0.1}, {0: 1.0}, {0: 0.5, 10: 1.0}, {40: 2.0, 7: 1.0, 100: 0.0}])
def test_piecewise_linear_is_interpolation(schedule):
    for from_zero in (True, False):
        knots = dict(sorted(schedule.items()))
        if from_zero:
            knots = {0: 0.0} | knots if 0 not in knots else knots
        for t in (0, 1, 6.5, 7, 20, 40, 999, 1000, 1500, 2000, 5000):
            expected = np.interp(t, list(knots), list(knots.values()))
            assert tiger.piecewise_linear(t, schedule, from_zero) == pytest.approx(expected, abs=1e-15)


def test_schedule_of_the_official_code_counts_micro_batches():
    # Cycle c of k = 4 ends at the 0-based micro-batch 4c − 1: a warm-up of "40000" is over with update 10001.
    schedule = {40_000: 1.0}
    values = [tiger.piecewise_linear(4 * c - 1, schedule) for c in (1, 5000, 10_000, 10_001)]
    assert values == [3 / 40_000, 19_999 / 40_000, 39_999 / 40_000, 1.0]
    for bad in ({}, {-1: 1.0}):
        with pytest.raises(ValueError, match="knots"):
            tiger.piecewise_linear(1, bad)
    with pytest.raises(ValueError, match="negative"):
        tiger.piecewise_linear(-1, schedule)
