"""Symbolic equality: random points of 40 digits first (one point refutes), then a ladder of sympy's own simplifications."""

import signal
import threading
from contextlib import contextmanager

import mpmath
import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef

from .errors import Refused

POINTS, DIGITS, RELATIVE, SECONDS = 32, 40, mpmath.mpf(10) ** -20, 60
LADDER = {
    "expand": sp.expand,
    "simplify": lambda e: sp.simplify(e.doit()),
    "expand_trig": lambda e: sp.simplify(sp.expand_trig(e)),
    "rewrite(exp)": lambda e: sp.simplify(e.rewrite(sp.exp)),
    "powsimp": lambda e: sp.powsimp(sp.expand_power_base(sp.expand_log(e, force=False), force=False)),
}


def entries(side):
    """A side as a flat list of scalar expressions, with matrix symbols written out."""
    side = sp.sympify(side)
    if isinstance(side, sp.MatrixExpr):
        side = side.doit().as_explicit()
    if isinstance(side, (sp.MatrixBase, sp.NDimArray)):
        return [e for x in sp.flatten(side.tolist()) for e in entries(x)]
    if not isinstance(side, sp.Expr):
        raise Refused(f"a side is {type(side).__name__}, not an expression: return both sides of the equation")
    symbols = {m for m in side.atoms(sp.MatrixSymbol)}
    return [side.xreplace({x: explicit(x) for x in symbols}).doit() if symbols else side]


def explicit(symbol):
    return sp.ImmutableMatrix(*symbol.shape, lambda i, j: sp.Symbol(f"{symbol.name}_{i}_{j}"))


def analytic(expression):
    """Undefined functions replaced by fixed analytic ones, so that a point can be evaluated."""

    def concrete(call):
        seed = np.random.default_rng(list(call.func.__name__.encode()))
        a, b, c = (sp.Rational(int(k), 7) for k in seed.integers(1, 20, 3))
        return a + sum(b * x + sp.exp(c * x / 9) + x**2 / (3 + i) for i, x in enumerate(call.args))

    return expression.replace(lambda e: isinstance(e, AppliedUndef), concrete).doit()


def points(symbols, rng):
    """Random points that respect assumptions and take every sign and quadrant in turn (five bits among 32 points)."""
    for i in range(POINTS):
        bit, point = 0, []
        for symbol in symbols:
            draw = lambda: mpmath.mpf(int(rng.integers(10**12, 10**13))) / 10**12 * mpmath.mpf(2) ** int(rng.integers(-3, 1))  # noqa: E731
            sign = lambda k: -1 if i >> k % 5 & 1 else 1  # noqa: B023, E731
            if symbol.is_integer:
                low = 1 if symbol.is_positive else 0 if symbol.is_nonnegative else 1
                value = mpmath.mpf(int(rng.integers(low, 9)))
                if symbol.is_even is not None:
                    value = 2 * value + (1 if symbol.is_odd else 0)
                if not symbol.is_nonnegative:
                    value, bit = value * sign(bit), bit + 1
                value = -abs(value) if symbol.is_negative else value
            elif symbol.is_nonnegative or symbol.is_positive:
                value = draw()
            elif symbol.is_negative or symbol.is_nonpositive:
                value = -draw()
            elif symbol.is_real:
                value, bit = draw() * sign(bit), bit + 1
            elif symbol.is_imaginary:
                value, bit = mpmath.mpc(0, draw() * sign(bit)), bit + 1
            else:
                value, bit = mpmath.mpc(draw() * sign(bit), draw() * sign(bit + 1)), bit + 2
            point.append(value)
        yield point


def agree(left, right, rng):
    """Do the sides agree at 32 points, relative to their size? Points where a side is undefined do not count."""
    pairs = paired(left, right)
    symbols = sorted({s for pair in pairs for e in pair for s in e.free_symbols}, key=lambda s: s.sort_key())
    evaluate = sp.lambdify(symbols, [e for pair in pairs for e in map(analytic, pair)], modules="mpmath")
    seen = 0
    with mpmath.workdps(DIGITS):
        for point in points(symbols, rng):
            try:
                values = [mpmath.mpmathify(v) for v in evaluate(*point)]
            except (ZeroDivisionError, ValueError):
                continue
            if not all(mpmath.isfinite(v) for v in values):
                continue
            seen += 1
            for a, b in zip(values[::2], values[1::2], strict=True):
                if abs(a - b) > RELATIVE * max(abs(a), abs(b)) + mpmath.mpf(10) ** -35:
                    return False
            if not symbols:
                return True
    if seen < POINTS * 3 // 4:
        raise Refused(f"the sides are defined at {seen} of {POINTS} random points: state the symbols' assumptions")
    return True


def paired(left, right):
    lefts, rights = entries(left), entries(right)
    if len(lefts) != len(rights):
        raise ValueError(f"the sides have {len(lefts)} and {len(rights)} entries")
    return list(zip(lefts, rights, strict=True))


def prove(left, right):
    """The first rung of the ladder that reduces every difference to zero; Refused where sympy cannot decide."""
    used = set()
    with limit(SECONDS):
        for a, b in paired(left, right):
            difference = (a - b).doit()
            for name, step in LADDER.items():
                if step(difference) == 0:
                    used.add(name)
                    break
            else:
                raise Refused("equal at 32 points, but sympy cannot prove it: return floats, and say so in the text")
    return max(used, key=list(LADDER).index)


@contextmanager
def limit(seconds):
    """An error with advice when sympy runs on; a timer only exists in the main thread of a POSIX process."""

    def stop(*_):
        raise Refused(f"sympy did not decide in {seconds} s: split the identity, or return floats (numeric)")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
