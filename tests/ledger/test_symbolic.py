"""Symbolic equality: what must be refuted, what must be proved, what sympy cannot decide."""

import numpy as np
import pytest
import sympy as sp
from checking import failure, record, survivors

from kexue_utils.ledger.errors import Refused
from kexue_utils.ledger.symbolic import agree, points, prove

x, y = sp.symbols("x y", real=True)
z, w = sp.symbols("z w")
p, q = sp.symbols("p q", positive=True)
n = sp.Symbol("n", integer=True)
even, odd = sp.Symbol("e", integer=True, even=True), sp.Symbol("o", integer=True, odd=True)
f, g = sp.Function("f"), sp.Function("g")
A, B = sp.MatrixSymbol("A", 2, 2), sp.MatrixSymbol("B", 2, 2)


def same(left, right):
    return agree(left, right, np.random.default_rng(0))


@pytest.mark.parametrize(
    "left, right",
    [
        (sp.sqrt(x**2), x),
        (sp.sqrt(z**2), z),
        (sp.log(z * w), sp.log(z) + sp.log(w)),
        (sp.log(x**2), 2 * sp.log(x)),
        (sp.atan(x) + sp.atan(1 / x), sp.pi / 2),
        (sp.sqrt(z * w), sp.sqrt(z) * sp.sqrt(w)),
        ((-1) ** n, sp.Integer(1)),
        (sp.cos(sp.pi * even / 2), sp.Integer(1)),
        (sp.Abs(x + y), sp.Abs(x) + sp.Abs(y)),
        (sp.expand((x - 1) ** 24), (x - 1) ** 24 + sp.Rational(1, 10**9)),
        (f(x) * g(x), g(x) ** 2),
        (f(x * y), f(x) * f(y)),
        (sp.diff(f(x) * g(x), x), f(x).diff(x) * g(x).diff(x)),
        (A * B, B * A),
        (sp.Trace(A * B), sp.Trace(A) * sp.Trace(B)),
        (sp.nan, x),
        (sp.zoo, x),
        (sp.conjugate(z), z),
    ],
    ids=str,
)
def test_refuted(left, right):
    assert not same(left, right)


@pytest.mark.parametrize(
    "left, right",
    [
        (sp.sqrt(p**2), p),
        (sp.log(p * q), sp.log(p) + sp.log(q)),
        ((-1) ** even, sp.Integer(1)),
        (sp.cos(sp.pi * odd), sp.Integer(-1)),
        ((x - 1) ** 24, sp.expand((x - 1) ** 24)),
        (sp.sin(x + y), sp.sin(x) * sp.cos(y) + sp.cos(x) * sp.sin(y)),
        (sp.tanh(x), (sp.exp(2 * x) - 1) / (sp.exp(2 * x) + 1)),
        (sp.diff(f(x) * g(x), x), f(x).diff(x) * g(x) + f(x) * g(x).diff(x)),
        ((A * B).T, B.T * A.T),
        (sp.Trace(A * B), sp.Trace(B * A)),
        (sp.Matrix([[x, y]]) * sp.Matrix([y, x]), sp.Matrix([2 * x * y])),
        (sp.Integral(x * y, (x, 0, 1)), y / 2),
        (p**x * p**y, p ** (x + y)),
    ],
    ids=str,
)
def test_proved(left, right):
    assert same(left, right)
    assert prove(left, right) is not None


def test_shapes_and_undefined_points():
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(2, 1\)"):
        same(sp.Matrix([[x, y]]), sp.Matrix([x, y]))
    with pytest.raises(Refused, match="state the symbols' assumptions"):
        same(sp.Piecewise((x, z > 0), (y, True)), x)


def test_points_respect_assumptions_and_take_every_sign():
    negative, count = sp.Symbol("m", negative=True), sp.Symbol("k", integer=True, nonnegative=True)
    symbols = [p, negative, count, even, odd, x, y, z]
    columns = dict(zip(symbols, zip(*points(symbols, np.random.default_rng(0)), strict=True), strict=True))
    assert all(v > 0 for v in columns[p]) and all(v < 0 for v in columns[negative])
    assert all(v % 2 == 0 for v in columns[even]) and all(v % 2 == 1 for v in columns[odd])
    assert {(a > 0, b > 0) for a, b in zip(columns[x], columns[y], strict=True)} == {
        (i, j) for i in (True, False) for j in (True, False)
    }
    assert len({(v.real > 0, v.imag > 0) for v in columns[z]}) == 4 and min(columns[count]) == 0


def test_many_symbols_do_not_share_their_signs():
    many = sp.symbols("s0:8", real=True)
    assert not same(sp.sqrt(many[0] ** 2 * many[7] ** 2) + sum(many), many[0] * many[7] + sum(many))


def test_a_check_names_its_rung():
    def doubled():
        return sp.sin(2 * x), 2 * sp.sin(x) * sp.cos(x), sp.sin(x)

    bundle = record(doubled)
    assert bundle["kind"] == "symbolic" and bundle["evidence"].startswith("32 points, ")
    assert survivors(bundle["mutants"]) == []

    def wrong():
        return sp.log(z * w), sp.log(z) + sp.log(w), z

    assert failure(wrong) == "✗ test · symbolic · does not hold (draw 0)\n  left   log(w*z)\n  right  log(w) + log(z)"


def test_what_sympy_cannot_decide_is_called_numeric():
    def heptagon():
        return sp.cos(sp.pi / 7) - sp.cos(2 * sp.pi / 7) + sp.cos(3 * sp.pi / 7), sp.Rational(1, 2), sp.Integer(1)

    def arctangents():
        return sp.atan(p) + sp.atan(1 / p), sp.pi / 2, sp.pi

    for function in (heptagon, arctangents):
        bundle = record(function)
        assert (bundle["kind"], bundle["evidence"]) == ("numeric", "sympy cannot decide")


def test_chain_of_expressions():
    def chain():
        return (sp.sin(2 * x), 2 * sp.sin(x) * sp.cos(x)), (2 * sp.sin(x) * sp.cos(x), sp.sin(x + x)), (sp.sin(x), x)

    assert record(chain)["kind"] == "symbolic"
