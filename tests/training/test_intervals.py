import math

import numpy as np
import pytest
import scipy.stats

from kexue_utils.training.intervals import bootstrap_interval, interval, paired_difference, t_interval, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 31, 200])
@pytest.mark.parametrize("probability", [0.005, 0.3, 0.5, 0.9, 0.975, 0.9995])
def test_quantile_equals_scipys(degrees, probability):
    assert math.isclose(
        t_quantile(probability, degrees), scipy.stats.t.ppf(probability, degrees), rel_tol=1e-9, abs_tol=1e-9
    )


def test_t_interval_equals_scipys():
    values = np.random.default_rng(0).normal(size=5)
    low, high = scipy.stats.t.interval(0.9, 4, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(t_interval(values, 0.9), [values.mean(), low, high], rtol=1e-9)


def test_an_interval_has_names():
    assert interval([1.0, 2.0, 4.0], 0.9) == dict(zip(("mean", "low", "high"), t_interval([1, 2, 4], 0.9), strict=True))
    assert interval([1.0, 2.0, 4.0])["low"] < interval([1.0, 2.0, 4.0], 0.9)["low"] < 7 / 3


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(1).exponential(size=2000)
    half = 1.96 * values.std() / math.sqrt(2000)
    mean, low, high = bootstrap_interval(values)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)


def test_paired_difference_cancels_what_the_pairs_share():
    g = np.random.default_rng(2)
    shared, noise = 100 * g.normal(size=6), 0.01 * g.normal(size=6)
    found = paired_difference(shared + 1 + noise, shared)
    test = scipy.stats.ttest_rel(shared + 1 + noise, shared)
    assert found["z"] == pytest.approx(test.statistic, rel=1e-6) and found["low"] < 1 < found["high"]
    assert found["high"] - found["low"] < 0.1
    assert paired_difference([2, 3], [1, 2])["z"] == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([1.0]), r"values has shape \(1,\)"),
        (lambda: t_interval([1.0, math.nan]), "values = .*finite"),
        (lambda: t_interval([1.0, 2.0], level=1), "level = 1"),
        (lambda: t_quantile(0.9, 0), "degrees = 0"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "first has 2 runs and second 3"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
