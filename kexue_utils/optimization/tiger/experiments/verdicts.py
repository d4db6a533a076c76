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
