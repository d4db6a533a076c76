"""Intervals for the mean of a few independent runs."""

import math

import numpy as np


def _runs(values, argument="values"):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{argument} has shape {values.shape}: an interval needs a list of at least 2 runs")
    if not np.isfinite(values).all():
        raise ValueError(f"{argument} = {values.tolist()}: every run must have a finite result")
    return values


def _level(level):
    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: it must lie strictly between 0 and 1")


def t_quantile(probability, degrees):
    """Quantile of Student's t with `degrees` ≥ 1 degrees of freedom: P(T ≤ x) = probability.

    P(|T| ≤ √ν tan θ) has the closed form of Abramowitz and Stegun 26.7.3-4, monotone in θ: bisection inverts it.
    """
    _level(probability)
    if not (isinstance(degrees, int | np.integer) and degrees >= 1):
        raise ValueError(f"degrees = {degrees!r}: it must be an integer of at least 1")

    def inside(theta):
        odd = degrees % 2
        term = total = (math.cos(theta) if degrees > 1 else 0.0) if odd else 1.0
        for k in range(2 + odd, degrees, 2):  # products (1·3·5…)/(2·4·6…) or (2·4·6…)/(3·5·7…) times powers of cos θ
            term *= (k - 1) / k * math.cos(theta) ** 2
            total += term
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    wanted, low, high = abs(2 * probability - 1), 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < wanted else (low, middle)
    return math.copysign(math.sqrt(degrees) * math.tan(low), probability - 0.5)


def t_interval(values, level=0.95):
    """(mean, low, high): mean ± t · s/√n, exact for independent normal runs.

    Raises ValueError for fewer than 2 runs, a result that is not finite, or a level outside (0, 1).
    """
    values = _runs(values)
    _level(level)
    half = t_quantile((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean, mean - float(half), mean + float(half)


def interval(values, level=0.95):
    """{mean, low, high} of `t_interval`, as records keep it."""
    return dict(zip(("mean", "low", "high"), t_interval(values, level), strict=True))


def bootstrap_interval(values, level=0.95, draws=10_000, seed=0):
    """(mean, low, high): percentile interval of the mean over `draws` resamplings of the runs.

    Too narrow for very few runs (its width is short by √((n−1)/n) before any other error): prefer `t_interval` there.
    """
    values = _runs(values)
    _level(level)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def paired_difference(first, second, level=0.95):
    """{mean, low, high, se, z} of first − second, run by run: what the pairs share (seed, data order) cancels.

    z = mean / SE is how many standard errors the difference is away from 0 (∞ if all pairs agree on one that is not 0).
    """
    first, second = _runs(first, "first"), _runs(second, "second")
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} runs and second {len(second)}: pairs need as many of each")
    difference = first - second
    mean, low, high = t_interval(difference, level)
    se = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    z = mean / se if se else math.copysign(math.inf, mean) if mean else 0.0
    return {"mean": mean, "low": low, "high": high, "se": se, "z": z}
