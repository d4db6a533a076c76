"""The kinds of evidence: computed from what a check returns, each with its own rule for "holds" and "differs".

Tolerances live here and nowhere else.
"""

import re
import sys
from collections.abc import Hashable, Iterable
from fractions import Fraction
from numbers import Integral, Number, Rational
from statistics import NormalDist

import numpy as np

from .errors import Refused

RTOL, ATOL = 1e-9, 1e-11  # numeric: float64 only
TINY = 1e-9  # sides that never exceed it would differ by ATOL alone
SIGMA, SIGMA_MISTAKE = 6.0, 12.0  # statistical: the claim within 6 standard errors, a mistake at least 12 away
MIN_SAMPLES = 10_000  # the normal tail is not to be trusted at 6 sigma with fewer
HEAVY = 0.1  # statistical: no single sample may make up this share of the variance
SLOPE_TOLERANCE = 0.1  # rate: or a quarter of the gap to the mistake, if that is less
DRAWS = {"numeric": 20, "exact": 20, "bound": 20, "symbolic": 1, "definition": 1, "rate": 1, "statistical": 1}


class Mean:
    """Left side of a statistical check: ``samples`` (n, …), independent along axis 0, n ≥ 10⁴."""

    def __init__(self, samples):
        samples = to_array(samples)
        if samples.ndim == 0 or len(samples) < MIN_SAMPLES:
            raise Refused(f"Mean needs at least {MIN_SAMPLES} independent samples along axis 0")
        self.mean, self.error = samples.mean(0), samples.std(0, ddof=1) / len(samples) ** 0.5
        squares = np.abs(samples - self.mean) ** 2
        with np.errstate(invalid="ignore"):
            self.heaviest = np.nan_to_num(squares.max(0) / squares.sum(0)).max()


class Slope:
    """Left side of a rate check: ``error`` ≈ C·h^order as h → 0; ``h`` and ``error`` positive, at least 4 each."""

    def __init__(self, h, error):
        h, error = to_array(h), to_array(error)
        if h.shape != error.shape or h.ndim != 1 or len(h) < 4 or not (h > 0).all() or len(set(h.tolist())) < len(h):
            raise Refused("Slope needs two vectors of at least 4 distinct step sizes h > 0 and their errors")
        self.fitted = self.last = np.nan  # an error of 0 or nan has no slope: it agrees with no order
        if (error > 0).all() and np.isfinite(error).all():
            order = np.argsort(-h)
            log_h, log_e = np.log(h[order]), np.log(error[order])
            self.fitted = np.polyfit(log_h, log_e, 1)[0]
            self.last = (log_e[-1] - log_e[-2]) / (log_h[-1] - log_h[-2])


def to_array(side):
    """A side as a numpy array; float32 and lower are refused, because their rounding hides small errors."""
    torch = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(side, torch.Tensor)
    dtype = str(side.dtype if is_tensor else (side := np.asarray(side)).dtype)
    if re.search(r"float|complex", dtype) and not dtype.endswith(("float64", "complex128")):
        raise Refused(f"a side is {dtype}: numeric checks are float64 only")
    if is_tensor:
        side = side.detach().resolve_conj().resolve_neg().cpu().numpy()
    if side.dtype.kind not in "biufcO" or side.dtype == object and not all(isinstance(x, Number) for x in side.flat):
        raise Refused(f"a side is not made of numbers: {side.reshape(-1)[:1].tolist()!r:.40}")
    if side.dtype == object and not is_exact(side):  # Fractions among floats; a numpy integer among Fractions
        side = side.astype(complex if any(isinstance(x, complex) for x in side.flat) else float)
    return side


def is_exact(array):
    exact = (Integral, Fraction)
    return array.dtype.kind in "iub" or array.dtype == object and all(isinstance(x, exact) for x in array.flat)


def parts(side):
    """A tuple is a chain of sides; anything else is one side."""
    return side if isinstance(side, tuple) else (side,)


def pairs(left, right):
    """The links of a chain, (left, right) by (left, right)."""
    lefts, rights = parts(left), parts(right)
    if len(lefts) != len(rights):
        raise ValueError(f"a chain needs as many left sides ({len(lefts)}) as right sides ({len(rights)})")
    return list(zip(lefts, rights, strict=True))


def is_sympy(side):
    sympy = sys.modules.get("sympy")
    return sympy is not None and isinstance(side, (sympy.Basic, sympy.MatrixBase, sympy.NDimArray))


def classify(cases, *, has_rng, has_tight, literal):
    """The kind of a check, from its first draw's ``cases`` [(left, right, mistakes)] and the shape of its source."""
    sides = [side for left, right, _ in cases for pair in pairs(left, right) for side in pair]
    for special, kind in [(Slope, "rate"), (Mean, "statistical")]:
        if any(isinstance(side, special) for side in sides):
            if [isinstance(side, special) for side in sides] != [True, False] * (len(sides) // 2):
                raise Refused(f"{special.__name__}(…) is the left side, a number the right")
            return kind
    if any(is_sympy(side) for side in sides):
        return "symbolic"
    arrays = [to_array(side) for side in sides]
    if any(a.dtype == bool and a.size < 2 for a in arrays):
        raise Refused("a side is a bare True or False: return both sides of the equation, not a verdict")
    if has_tight:
        return "bound"
    if literal and not has_rng:
        return "definition"
    return "exact" if all(map(is_exact, arrays)) else "numeric"


def aligned(left, right):
    """Two sides as arrays; shapes that differ are an error, not an inequality."""
    left, right = left.mean if isinstance(left, Mean) else to_array(left), to_array(right)
    if left.shape != right.shape:
        raise ValueError(f"the sides have shapes {left.shape} and {right.shape}")
    return left, right


def close(left, right, slack=0.0):
    """Equal up to rounding (or up to ``slack``, relative)?"""
    with np.errstate(invalid="ignore"):
        return np.abs(left - right) <= ATOL + max(RTOL, slack) * np.maximum(np.abs(left), np.abs(right))


def holds(kind, left, right, mistakes=(), tight=False, slack=0.0):
    """Does one case hold under the rule of its kind?"""
    if kind == "symbolic":
        from .symbolic import agree  # loads sympy

        return all(agree(a, b, np.random.default_rng([0, 1])) for a, b in pairs(left, right))
    return all(link_holds(kind, a, b, mistakes, tight, slack) for a, b in pairs(left, right))


def link_holds(kind, left, right, mistakes, tight, slack):
    if kind == "rate":
        tolerance = min([SLOPE_TOLERANCE, *(abs(right - m) / 4 for m in mistakes)])
        return bool(abs(left.fitted - right) <= tolerance and abs(left.last - right) <= 2 * tolerance)
    a, b = aligned(left, right)
    if kind == "exact":
        return bool((a == b).all())
    if kind == "statistical":  # Bonferroni over components
        normal = NormalDist()
        return agrees(left, b, -normal.inv_cdf(normal.cdf(-SIGMA) / max(a.size, 1)))
    if a.dtype == object or b.dtype == object:
        a, b = a.astype(float), b.astype(float)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return False
    if kind == "bound" and not tight:
        return bool(((a <= b) | close(a, b)).all())
    return bool(close(a, b, slack if tight else 0.0).all())


def agrees(mean, right, sigma):
    """Is every component of the mean within ``sigma`` standard errors (up to rounding, where it does not vary)?"""
    close = np.abs(mean.mean - right) <= sigma * mean.error + ATOL + RTOL * np.abs(right)
    return bool((close & np.isfinite(right)).all())


def differs(kind, left, right, mistake, tight=False, slack=0.0):
    """Does a classic mistake differ from the left side in this case? (In a rate it sets the tolerance.)"""
    if kind == "rate":
        return right != mistake
    for a, b in pairs(left, mistake) if kind != "symbolic" else ():
        if not np.isfinite(aligned(a, b)[1].astype(complex)).all():
            raise Refused("a classic mistake is not finite: nothing is compared")
    if kind == "statistical":
        return any(not agrees(a, to_array(b), SIGMA_MISTAKE) for a, b in pairs(left, mistake))
    return not holds(kind, left, mistake, (), tight, slack)


def inspect(kind, cases, literal):
    """Refuse sides that hold for a reason that has nothing to do with the equation (``cases``: those without tight)."""
    links = [link for left, right, _ in cases for link in pairs(left, right)]
    if kind == "exact" and all(b.dtype == bool and (b.all() or not b.any()) for b in (to_array(b) for _, b in links)):
        raise Refused("a side is nothing but True (or False): return both sides of the equation, not a verdict")
    if kind in ("numeric", "bound") and not literal:
        size = max(np.abs(to_array(side)).max(initial=0) for link in links for side in link)
        if size < TINY and not is_zero([right for _, right in links]):
            raise Refused(f"both sides stay below {TINY:g}: they underflow, and nothing is compared")
    if kind == "bound" and all(close(*aligned(a, b)).all() for a, b in links):
        raise Refused("the bound is attained on every draw: it is an equation, check it as one")
    if kind == "statistical":
        if any(not (a.error > 0).any() for a, _ in links):
            raise Refused("the samples are constant: this is not a statistical check")
        if (share := max(a.heaviest for a, _ in links)) > HEAVY:
            raise Refused(f"one sample makes up {share:.0%} of a variance: heavy tails are not checked by means")


def is_zero(rights):
    """Are the right sides the number 0? Doubling or negating them changes nothing."""
    return all(side == 0 if is_sympy(side) else not np.any(to_array(side)) for right in rights for side in parts(right))


def changed(side, change):
    """``change`` applied to every link of a side, for the mutants that every check has."""
    if isinstance(side, tuple):
        return tuple(changed(part, change) for part in side)
    if is_sympy(side) or np.isscalar(side) and not isinstance(side, (bool, np.bool_)) or isinstance(side, Rational):
        return change(side)
    array = to_array(side)
    if array.dtype == bool:
        raise TypeError("there is no arithmetic of truth values")
    return change(array.astype(object) if array.dtype.kind == "u" else array)


def frozen(side):
    """Something hashable that tells two sides apart bit by bit, to see whether a draw reaches them."""
    if isinstance(side, tuple):
        return tuple(map(frozen, side))
    if isinstance(side, (Mean, Slope)):
        return repr(vars(side))
    if is_sympy(side):
        return side if isinstance(side, Hashable) else str(side)
    array = to_array(side)
    return tuple(map(repr, array.flat)) if array.dtype == object else (array.shape, array.tobytes())


def as_cases(result):
    """What a check returned or yielded, as a list of (left, right, mistakes)."""
    if not isinstance(result, tuple) and isinstance(result, Iterable) and not hasattr(result, "shape"):
        result = list(result)
    rows = result if isinstance(result, list) else [result]
    if not rows:
        raise Refused("the check yields no case")
    for row in rows:
        if not isinstance(row, tuple) or len(row) < 2:
            raise Refused("a check returns (left side, right side, classic mistake, …), or yields such tuples")
    return [(left, right, mistakes) for left, right, *mistakes in rows]
