"""Is one better than the other? Paired differences against a margin, several at once."""

import math

import numpy as np
from scipy.stats import t as student

from kexue_utils.training.intervals import paired_difference

MARGIN = 0.01  # nats


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of n times n − k + 1, never decreasing, at most 1."""
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - k) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def at_most(pairs: dict[str, tuple[list, list]], margin: float = MARGIN) -> dict[str, dict]:
    """Is the first loss at most the second, give or take the margin? One family, Holm-adjusted, run by run.

    d = first − second. "reproduced": d < margin; "contradicted": d > 0 and not known to be below the margin, both at
    5 % two-sided (the 95 % interval of d, widened for the family); else "undecided". pairs: {name: (first, second)}.
    """
    found = {name: paired_difference(*pair) for name, pair in pairs.items()}
    below, above = [], []
    for (first, _), one in zip(pairs.values(), found.values(), strict=True):
        degrees, se = len(first) - 1, max(one["se"], math.ulp(1.0))
        below.append(2 * float(student.sf((margin - one["mean"]) / se, degrees)))
        above.append(2 * float(student.sf(one["mean"] / se, degrees)))
    for one, low, high in zip(found.values(), holm(below), holm(above), strict=True):
        one["p below margin"], one["p above zero"] = low, high
        one["verdict"] = "reproduced" if low < 0.05 else "contradicted" if high < 0.05 else "undecided"
    return found


def vertex(x: list[float], y: list[float]) -> float:
    """Where the parabola through three points is lowest, between the outer two; their lower one if it is concave."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    if bend <= 0:
        return x[0] if y[0] < y[2] else x[2]
    return min(max((x[0] + x[1]) / 2 - left / (2 * bend), x[0]), x[2])


def best_of_each(x: list[float], losses: list[list[float]]) -> list[float] | None:
    """Of every run, the best x: by a parabola through the lowest mean loss and its neighbours; None at an end.

    losses: one list for each x, run by run.
    """
    i = int(np.argmin(np.mean(losses, 1)))
    if not 0 < i < len(x) - 1:
        return None
    return [vertex(x[i - 1 : i + 2], [losses[j][run] for j in (i - 1, i, i + 1)]) for run in range(len(losses[0]))]
