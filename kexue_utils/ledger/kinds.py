"""The kinds of evidence: computed from what a check returns, each with its own rule for "holds" and "differs".

Tolerances live here and nowhere else.
"""

import sys
from collections.abc import Iterable
from fractions import Fraction
from statistics import NormalDist

import numpy as np

from .errors import Refused

RTOL, ATOL = 1e-9, 1e-11  # numeric: float64 only
SIGMA, SIGMA_MISTAKE = 6.0, 12.0  # statistical: the claim within 6 standard errors, a mistake at least 12 away
MIN_SAMPLES = 10_000  # the normal tail is not to be trusted at 6 sigma with fewer
SLOPE_TOLERANCE = 0.1  # rate: or a quarter of the gap to the mistake, if that is less
DRAWS = {"numeric": 20, "exact": 20, "bound": 20, "symbolic": 1, "definition": 1, "rate": 1, "statistical": 1}
NUMBERS = (int, float, complex, Fraction, np.number)


class Mean:
    """Left side of a statistical check: ``samples`` (n, ...) independent along axis 0, n ≥ 10⁴; its mean is compared."""

    def __init__(self, samples):
        self.samples = to_array(samples)
        if self.samples.ndim == 0 or len(self.samples) < MIN_SAMPLES:
            raise Refused(f"Mean needs at least {MIN_SAMPLES} independent samples along axis 0")
        n = len(self.samples)
        self.mean, self.error = self.samples.mean(0), self.samples.std(0, ddof=1) / n**0.5


class Slope:
    """Left side of a rate check: ``error`` ≈ C·h^order as h → 0; ``h`` and ``error`` positive, at least 4 each."""

    def __init__(self, h, error):
        h, error = to_array(h), to_array(error)
        if h.shape != error.shape or h.ndim != 1 or len(h) < 4:
            raise Refused("Slope needs two vectors of at least 4 step sizes and errors")
        order = np.argsort(-h)
        log_h, log_e = np.log(h[order]), np.log(error[order])
        self.fitted = np.polyfit(log_h, log_e, 1)[0]
        self.last = (log_e[-1] - log_e[-2]) / (log_h[-1] - log_h[-2])


def to_array(side):
    """A side as a numpy array; float32 and lower are refused, because their rounding hides small errors."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(side, torch.Tensor):
        side = side.detach().resolve_conj().resolve_neg().cpu().numpy()
    side = np.asarray(side)
    if side.dtype.kind == "f" and side.dtype.itemsize < 8 or side.dtype.kind == "c" and side.dtype.itemsize < 16:
        raise Refused(f"a side is {side.dtype}: numeric checks are float64 only")
    return side


def parts(side):
    """A tuple is a chain of sides; anything else is one side."""
    return side if isinstance(side, tuple) else (side,)


def is_sympy(side):
    sympy = sys.modules.get("sympy")
    return sympy is not None and isinstance(side, (sympy.Basic, sympy.MatrixBase))


def classify(cases, *, has_rng, has_tight, literal):
    """The kind of a check, from its first draw's ``cases`` [(left, right, mistakes)] and the shape of its source."""
    if has_tight:
        return "bound"
    sides = [part for left, right, _ in cases for side in (left, right) for part in parts(side)]
    if any(isinstance(side, Slope) for side in sides):
        return "rate"
    if any(isinstance(side, Mean) for side in sides):
        return "statistical"
    if any(is_sympy(side) for side in sides):
        return "symbolic"
    for side in sides:
        if isinstance(side, (bool, np.bool_)) or to_array(side).dtype == bool and to_array(side).size < 2:
            raise Refused("a side is a bare True or False: return both sides of the equation, not a verdict")
    if literal and not has_rng:
        return "definition"
    return "exact" if all(is_exact(side) for side in sides) else "numeric"


def is_exact(side):
    array = to_array(side)
    return array.dtype.kind in "iub" or array.dtype == object and all(isinstance(x, (int, Fraction)) for x in array.flat)


def close(left, right):
    """Numeric equality of two sides; shapes that differ are an error, not an inequality."""
    left, right = to_array(left), to_array(right)
    if left.shape != right.shape:
        raise ValueError(f"the sides have shapes {left.shape} and {right.shape}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return False
    return bool((np.abs(left - right) <= ATOL + RTOL * np.maximum(np.abs(left), np.abs(right))).all())


def equal(left, right):
    left, right = to_array(left), to_array(right)
    if left.shape != right.shape:
        raise ValueError(f"the sides have shapes {left.shape} and {right.shape}")
    return bool((left == right).all())


def within(left, right, sigma):
    """Is every component of the mean within ``sigma`` standard errors?"""
    right = to_array(right)
    if left.mean.shape != right.shape:
        raise ValueError(f"the sides have shapes {left.mean.shape} and {right.shape}")
    if not np.all(left.error > 0):
        raise Refused("the samples are constant: this is not a statistical check")
    return bool((np.abs(left.mean - right) <= sigma * left.error).all())


def follows(left, order, mistakes):
    """Does the fitted order agree, to a quarter of the gap to the nearest mistake?"""
    tolerance = min([SLOPE_TOLERANCE, *(abs(order - m) / 4 for m in mistakes)])
    return bool(abs(left.fitted - order) <= tolerance and abs(left.last - order) <= 2 * tolerance)


def holds(kind, left, right, mistakes=(), tight=False, slack=0.0):
    """Does one case hold under the rule of its kind?"""
    if kind == "rate":
        return follows(left, right, mistakes)
    lefts, rights = parts(left), parts(right)
    if len(lefts) != len(rights):
        raise ValueError(f"a chain needs as many left sides ({len(lefts)}) as right sides ({len(rights)})")
    if kind == "statistical":
        normal = NormalDist()  # Bonferroni over components
        return all(within(a, b, -normal.inv_cdf(normal.cdf(-SIGMA) / a.mean.size)) for a, b in zip(lefts, rights, strict=True))
    if kind == "bound":
        return all(below(a, b, tight, slack) for a, b in zip(lefts, rights, strict=True))
    same = equal if kind == "exact" else close
    return all(same(a, b) for a, b in zip(lefts, rights, strict=True))


def below(left, right, tight, slack):
    left, right = to_array(left), to_array(right)
    if left.shape != right.shape:
        raise ValueError(f"the sides have shapes {left.shape} and {right.shape}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return False
    scale = np.maximum(np.abs(left), np.abs(right))
    if tight:
        return bool((np.abs(left - right) <= max(slack, RTOL) * scale + ATOL).all())
    return bool((left <= right + ATOL + RTOL * scale).all())


def differs(kind, left, mistake):
    """Does a classic mistake differ from the left side in this case? (Bounds are judged over all draws instead.)"""
    if kind == "statistical":
        return any(not within(a, b, SIGMA_MISTAKE) for a, b in zip(parts(left), parts(mistake), strict=True))
    for value in parts(mistake):
        if to_array(value).dtype.kind in "fc" and not np.isfinite(to_array(value)).all():
            raise Refused("a classic mistake is not finite: nothing is compared")
    return not holds(kind, left, mistake)


def scaled(side, factor):
    """A side times a number, for the two mutants that every check has."""
    if isinstance(side, tuple):
        return tuple(scaled(part, factor) for part in side)
    if is_sympy(side) or isinstance(side, NUMBERS):
        return factor * side
    array = to_array(side)
    if array.dtype == bool:
        raise TypeError("truth values are not scaled")
    return factor * array


def frozen(side):
    """Something hashable that tells two sides apart bit by bit, to see whether a draw reaches them."""
    if isinstance(side, tuple):
        return tuple(map(frozen, side))
    if isinstance(side, (Mean, Slope)) or is_sympy(side):
        return object()
    array = to_array(side)
    return tuple(map(repr, array.flat)) if array.dtype == object else (array.shape, array.tobytes())


def as_cases(result):
    """What a check returned or yielded, as a list of (left, right, mistakes)."""
    if not isinstance(result, tuple) and isinstance(result, Iterable) and not hasattr(result, "shape"):
        result = list(result)
    rows = result if isinstance(result, list) else [result]
    for row in rows:
        if not isinstance(row, tuple) or len(row) < 2:
            raise Refused("a check returns (left side, right side, classic mistake, …), or yields such tuples")
    if not rows:
        raise Refused("the check yields no case")
    return [(left, right, mistakes) for left, right, *mistakes in rows]
