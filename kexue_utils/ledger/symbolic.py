"""Symbolic equality: random points of 40 digits first (one refutes), then a ladder of sympy's own simplifications."""

import mpmath
import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef
from sympy.printing.pycode import MpmathPrinter

from .errors import Refused

POINTS, DIGITS = 32, 40
RELATIVE, ABSOLUTE = mpmath.mpf("1e-20"), mpmath.mpf("1e-35")
PRINTED = {"fully_qualified_modules": False, "inline": True, "allow_unknown_functions": True, "order": "none"}
LADDER = {
    "expand": sp.expand,
    "simplify": lambda e: sp.simplify(e.doit()),
    "expand_trig": lambda e: sp.simplify(sp.expand_trig(e)),
    "rewrite(exp)": lambda e: sp.simplify(e.rewrite(sp.exp)),
    "powsimp": lambda e: sp.powsimp(sp.expand_power_base(sp.expand_log(e))),
}


def paired(left, right):
    """The scalar equations that an equation of expressions, matrices or arrays stands for."""
    (shape, lefts), (shape_right, rights) = entries(left), entries(right)
    if shape != shape_right:
        raise ValueError(f"the sides have shapes {shape} and {shape_right}")
    return list(zip(lefts, rights, strict=True))


def entries(side):
    """A side's shape and its scalar expressions, with matrix symbols written out."""
    side = sp.Array(side) if isinstance(side, (list, np.ndarray)) else sp.sympify(side)
    if isinstance(side, sp.MatrixExpr):
        side = side.doit().as_explicit()
    if isinstance(side, (sp.MatrixBase, sp.NDimArray)):
        return tuple(side.shape), [e for x in sp.flatten(side.tolist()) for e in entries(x)[1]]
    if not isinstance(side, sp.Expr):
        raise Refused(f"a side is {type(side).__name__}, not an expression: return both sides of the equation")
    symbols = side.atoms(sp.MatrixSymbol)
    return (), [side.xreplace({x: explicit(x) for x in symbols}).doit() if symbols else side]


def explicit(symbol):
    return sp.ImmutableMatrix(*symbol.shape, lambda i, j: sp.Symbol(f"{symbol.name}_{i}_{j}"))


def analytic(expression):
    """Undefined functions replaced by fixed analytic ones, so that a point can be evaluated."""

    def concrete(call):
        seed = np.random.default_rng(list(call.func.__name__.encode()))
        a, b, c = (sp.Rational(int(k), 7) for k in seed.integers(1, 20, 3))
        return a + sum(b * x + sp.exp(c * x / 9) + x**2 / (3 + i) for i, x in enumerate(call.args))

    return expression.replace(lambda e: isinstance(e, AppliedUndef), concrete).doit(integrals=False)


def points(symbols, rng):
    """Random points that respect assumptions and take every sign and quadrant in turn (five bits among 32 points)."""
    for i in range(POINTS):
        signs = iter([1 - 2 * (i >> bit & 1) for bit in range(5)] + [1 - 2 * int(b) for b in rng.integers(0, 2, 200)])
        yield [value(symbol, rng, signs) for symbol in symbols]


def value(symbol, rng, signs):
    """One value for a symbol: what its assumptions leave open is drawn, its signs come from ``signs``."""
    if symbol.is_integer:
        size = rng.integers(0 if symbol.is_nonnegative and not symbol.is_positive else 1, 9)
        size = mpmath.mpf(int(size if symbol.is_even is None else 2 * size - bool(symbol.is_odd)))
    else:
        size = mpmath.mpf(int(rng.integers(10**12, 10**13))) / 10**12 * mpmath.mpf(2) ** int(rng.integers(-3, 1))
    if symbol.is_nonnegative:
        return size
    if symbol.is_nonpositive:
        return -size
    if symbol.is_real:
        return size * next(signs)
    if symbol.is_imaginary:
        return mpmath.mpc(0, size * next(signs))
    return mpmath.mpc(size * next(signs), size * mpmath.mpf(int(rng.integers(10, 90))) / 30 * next(signs))


def agree(left, right, rng):
    """Do the sides agree at 32 points, relative to their size? Points where a side is undefined do not count."""
    flat = [analytic(e) for pair in paired(left, right) for e in pair]
    if any(e.has(sp.nan, sp.zoo, sp.oo, -sp.oo) and not e.has(sp.Integral, sp.Sum) for e in flat):
        return False
    symbols = sorted({s for e in flat for s in e.free_symbols}, key=lambda s: s.sort_key())
    # No docstring and no ordered terms: printing them is most of what lambdify takes.
    printer = MpmathPrinter(PRINTED)
    evaluate = sp.lambdify(symbols, flat, modules="mpmath", printer=printer, docstring_limit=0)

    def apart(point, digits):
        """Does some pair differ there? None where a side is not defined."""
        with mpmath.workdps(digits):
            try:
                values = [mpmath.mpmathify(v) for v in evaluate(*point)]
            except (ArithmeticError, ValueError, TypeError, mpmath.libmp.NoConvergence):
                return None
            if not all(map(mpmath.isfinite, values)):
                return None
            return any(abs(a - b) > RELATIVE * max(abs(a), abs(b)) + ABSOLUTE
                       for a, b in zip(values[::2], values[1::2], strict=True))  # fmt: skip

    seen = 0
    for point in points(symbols, rng) if symbols else [[]] * POINTS:
        differ = apart(point, DIGITS)
        if differ and apart(point, 4 * DIGITS):  # again, as large terms may have cancelled
            return False
        seen += differ is not None
        if not symbols and seen:
            return True
    if seen < POINTS * 3 // 4:
        raise Refused(f"the sides are defined at {seen} of {POINTS} random points: state the symbols' assumptions")
    return True


def prove(left, right):
    """The highest rung of the ladder that it takes to reduce every difference to zero; None if sympy cannot decide."""
    used = [0]
    for a, b in paired(left, right):
        difference = (a - b).doit()
        rungs = (i for i, step in enumerate(LADDER.values()) if step(difference) == 0)
        used.append(next(rungs, None))
    return None if None in used else list(LADDER)[max(used)]
