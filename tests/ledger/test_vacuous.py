"""Checks that could not fail, in every disguise that we could think of: each is refused, and says why."""

from fractions import Fraction
from functools import lru_cache, partial, wraps

import numpy as np
import pytest
import sympy as sp
import torch
from checking import failure, record

from kexue_utils.attention.naive_bayes_attention import combine_log_probs, log_normalize
from kexue_utils.ledger import Mean, Slope, show


def rotation(m, theta=0.3):
    c, s = np.cos(m * theta), np.sin(m * theta)
    return np.array([[c, -s], [s, c]])


def logged(function):
    @wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


@logged
def wrapped(x):
    return x**2 + 1


@lru_cache(None)
def cached(x):
    return x**2 + 1


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Module(torch.nn.Module):
    def forward(self, x):
        return 2 * x + 1


class Shape:
    def __init__(self, x):
        self.x = x

    @property
    def area(self):
        return 3 * self.x**2

    @staticmethod
    def scale(x):
        return 2 * x


alias, module, double_module = rotation, Module(), partial(Module.forward, None)


def same_expression(rng):
    x = rng.normal(size=3)
    return x, x, x + 1


def same_expression_under_two_names(rng):
    x = rng.normal(size=3)
    a = np.exp(x)
    b = np.exp(x)
    return a, b, a + 1


def through_an_alias(rng):
    m = rng.normal()
    return rotation(m), alias(m), rotation(-m)


def through_a_module(rng):
    x = torch.from_numpy(rng.normal(size=3))
    return module(x), Module()(x), x


def through_a_partial(rng):
    x = rng.normal()
    return Module.forward(None, x), double_module(x), x


def through_a_decorator(rng):
    x = rng.normal()
    return wrapped(x), wrapped(x) + 0.0, x


def through_a_cache(rng):
    x = rng.normal()
    return cached(x), 1 * cached(x), x


def through_a_property(rng):
    x = rng.normal()
    return Shape(x).area, 1 * Shape(x).area, x


def through_a_static_method(rng):
    x = rng.normal()
    return Shape.scale(x), 1 * Shape.scale(x), x


def through_autograd(rng):
    x = torch.from_numpy(rng.normal(size=3))
    return Cube.apply(x), 1 * Cube.apply(x), x


@pytest.mark.parametrize(
    "function, of",
    [
        (through_an_alias, rotation),
        (through_a_module, Module),
        (through_a_partial, Module.forward),
        (through_a_decorator, wrapped),
        (through_a_cache, cached),
        (through_a_property, Shape),
        (through_a_static_method, Shape.scale),
        (through_autograd, Cube),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tautology_is_blind(function, of):
    assert "blind: rejects none" in failure(function, of=[of])
    assert "blind: no change of" in failure(function)  # a notebook's own function need not be named


@pytest.mark.parametrize("function", [same_expression, same_expression_under_two_names])
def test_two_sides_with_one_syntax_tree(function):
    assert "both sides are the same expression" in failure(function)


def test_a_tautology_of_the_library():
    def unnamed(rng):
        x = torch.from_numpy(rng.normal(size=3))
        return log_normalize(x), log_normalize(x) + 0, x

    assert "log_normalize\n  name it in of=[…]" in failure(unnamed)
    assert "blind: rejects none" in failure(unnamed, of=[log_normalize])

    def through_a_helper(rng):
        x = torch.from_numpy(rng.normal(size=3))

        def helper(y):
            return log_normalize(y)

        return helper(x), log_normalize(x), x

    assert "name it in of=[…]" in failure(through_a_helper)


def softened(x):
    return np.exp(x) / np.exp(x).sum()


def under_its_name_in_the_mistake_only(rng):
    x = rng.normal(size=3)
    return soft(x), 1 * soft(x), softened(2 * x)


def under_its_name_in_the_inputs_only(rng):
    x = softened(rng.normal(size=3))
    return soft(x), 1 * soft(x), x


def two_parts_of_one_call(rng):
    x = rng.normal(size=3)
    a, b = (softened(y) for y in (x, x))
    return a, 1 * b, x


def the_shared_value_itself(rng):
    x = rng.normal(size=3)
    y = softened(x)
    return y, 1 * y, x


soft = softened


@pytest.mark.parametrize(
    "function",
    [
        under_its_name_in_the_mistake_only,
        under_its_name_in_the_inputs_only,
        two_parts_of_one_call,
        the_shared_value_itself,
    ],
)
def test_no_tautology_hides_behind_a_name(function):
    assert "blind: no change of softened" in failure(function)


def test_names_and_calls_agree():
    def uncalled(rng):
        x = rng.normal()
        return np.sin(2 * x), 2 * np.sin(x) * np.cos(x), np.sin(x)

    assert "never calls rotation, which it names" in failure(uncalled, of=[rotation])
    assert "never calls Shape, which it names" in failure(uncalled, of=[Shape])
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(Module())
    for unwritten in (np.sin, scripted, 3):
        with pytest.raises(TypeError, match="not a Python function; name the reference"):
            record(uncalled, of=[unwritten])


def two_verdicts(rng):
    x = rng.normal(size=3)
    return (2 * x == x + x).all(), True, False


def verdict_entry_by_entry(rng):
    x = rng.normal(size=3)
    return np.isclose(2 * x, x + x), np.ones(3, bool), np.zeros(3, bool)


def verdict_as_number(rng):
    x = rng.normal(size=3)
    return int((2 * x == x + x).all()), 1, 0


def verdict_times_a_number(rng):
    x = rng.normal()
    return np.allclose(2 * x, x + x) * x, x, 2 * x


def verdict_under_a_mask(rng):
    x, mask = rng.normal(size=9), rng.random(9) < 0.5
    return np.isclose(2 * x, x + x) & mask, mask, ~mask


def residual(rng):
    x = rng.normal(size=9)
    gap = np.sin(2 * x) - 2 * np.sin(x) * np.cos(x)
    return np.abs(gap).max(), 0.0, 1.0


def ratio(rng):
    x = rng.normal(size=9)
    return np.sin(2 * x).sum() / (2 * np.sin(x) * np.cos(x)).sum(), 1, 2.0


def copied(rng):
    x = rng.normal(size=9)
    y = np.exp(x)
    return y, y.copy(), x


def simplified():
    x = sp.Symbol("x")
    slope = sp.diff(sp.sin(x) ** 2, x)
    return slope, sp.simplify(slope), sp.sin(x)


def same_expression_in_a_chain(rng):
    x = rng.normal()
    return (np.sin(2 * x), x), (2 * np.sin(x) * np.cos(x), x), (np.sin(x), x)


def same_expression_case_by_case(rng):
    for n in (2, 3):
        x = rng.normal(size=n)
        a = np.exp(x)
        b = np.exp(x)
        yield a, b, a + 1


def constant(rng):
    x = rng.normal(size=3)
    return x - x + 2, 0 * x + 2, x


def unused_rng(rng):
    return np.sin(1.0) ** 2 + np.cos(1.0) ** 2, np.exp(0.0), 2


def literal_left(rng):
    x = rng.normal()
    return 1.0, np.cos(x) ** 2 + np.sin(x) ** 2, x


def underflow(rng):
    x = 400 + rng.random(size=3)
    return np.exp(-x - x), np.exp(-x) ** 2, np.exp(-x)


def nearly_underflow(rng):
    x = 20 + rng.random(size=3)
    return np.exp(-x - x), np.exp(-x) ** 2, np.exp(-x)


def parallel_vectors(rng):
    q = rng.normal(size=2)
    k = 2 * q
    return q @ rotation(3) @ k, k @ rotation(3) @ q, q @ rotation(-3) @ k


def no_mistake(rng):
    x = rng.normal()
    return np.sin(2 * x), 2 * np.sin(x) * np.cos(x)


def coinciding_mistake(rng):
    n = int(rng.integers(1, 4))
    return np.full(n, 1.0).sum() * n, float(n**2), 3.0 * n - 2


def infinite_mistake(rng):
    x = rng.normal()
    return np.sin(2 * x), 2 * np.sin(x) * np.cos(x), np.inf


def verdict_only(rng):
    return True


def no_cases(rng):
    for x in rng.normal(size=0):
        yield x, x + 0, x + 1


def unknown_argument(rng, n):
    return n + n, 2 * n, n


def constant_samples(rng):
    x = rng.normal()
    return Mean(np.full(20_000, 1.0)), x / x, 2.0


def few_samples(rng):
    return Mean(rng.normal(size=9_999)), 0.0, 1.0


def heavy_tails(rng):
    return Mean(rng.standard_cauchy(size=20_000) ** 3), 0.0, 1e30


def attained_everywhere(rng, tight):
    x = rng.normal(size=3)
    return np.exp(x + x), np.exp(x) ** 2, np.exp(x) / 2


def low_precision(dtype):
    def function(rng):
        x = rng.normal(size=3)
        x = torch.from_numpy(x).to(dtype) if isinstance(dtype, torch.dtype) else x.astype(dtype)
        return 2 * x, x + x, x

    return function


@pytest.mark.parametrize(
    "function, reason",
    [
        (two_verdicts, "a side is a bare True or False"),
        (verdict_entry_by_entry, "the same on every draw"),
        (verdict_as_number, "the same on every draw"),
        (verdict_times_a_number, "allclose is a verdict"),
        (verdict_under_a_mask, "no change of the right side is noticed"),
        (same_expression_in_a_chain, "both sides are the same expression, x"),
        (same_expression_case_by_case, "both sides are the same expression"),
        (residual, "a difference or ratio of both"),
        (ratio, "a difference or ratio of both"),
        (copied, "both sides are the same expression"),
        (simplified, "both sides are the same expression"),
        (constant, "the same on every draw"),
        (unused_rng, "the same on every draw"),
        (literal_left, "the left side is a literal"),
        (underflow, "the same on every draw"),
        (nearly_underflow, "both sides stay below 1e-09"),
        (parallel_vectors, "classic mistake 1 differs on 0 of 20 draws"),
        (no_mistake, "no classic mistake is returned"),
        (coinciding_mistake, "classic mistake 1 differs on"),
        (infinite_mistake, "a classic mistake is not finite"),
        (verdict_only, "write the two sides out"),
        (no_cases, "the check yields no case"),
        (unknown_argument, "a check takes rng and tight, not n"),
        (constant_samples, "the samples are constant"),
        (few_samples, "Mean needs at least 10000"),
        (heavy_tails, "heavy tails are not checked by means"),
        (attained_everywhere, "attained on every draw"),
        (low_precision(torch.float32), "torch.float32: numeric checks are float64 only"),
        (low_precision(torch.bfloat16), "torch.bfloat16: numeric checks are float64 only"),
        (low_precision(torch.complex64), "torch.complex64: numeric checks are float64 only"),
        (low_precision(np.float16), "float16: numeric checks are float64 only"),
        (low_precision(np.float32), "float32: numeric checks are float64 only"),
        (low_precision(np.longdouble), ": numeric checks are float64 only"),
    ],
)
def test_refused(function, reason):
    text = failure(function)
    assert text.startswith("✗ test · refused") and reason in text


def test_verdicts_without_draws():
    def all_true():
        x = np.arange(4)
        return np.isclose(2 * x, x + x), np.ones(4, bool), np.zeros(4, bool)

    def of_sympy():
        x = sp.Symbol("x")
        return sp.Eq(x + x, 2 * x), sp.true, sp.false

    assert "nothing but True" in failure(all_true)
    assert "not an expression" in failure(of_sympy)


def test_order_equal_to_the_mistake():
    def rate():
        h = 2.0 ** -np.arange(3, 10)
        return Slope(h, h**2), 2, 2

    assert "does not hold" in failure(rate)  # no slope is within a quarter of a gap that is 0


def test_what_changes_outside_itself_is_refused():
    state = []

    def growing(rng):
        state.append(1)
        x = rng.normal()
        return np.sin(2 * x), 2 * np.sin(x) * np.cos(x) + (len(state) > 60), np.sin(x)

    assert "does not hold when it is run again" in failure(growing)


def test_a_mistake_of_another_shape_is_an_error():
    def shapes(rng):
        x = rng.normal(size=3)
        return 2 * x, x + x, x[:2]

    text = failure(shapes)
    assert "raised" in text and "the sides have shapes (3,) and (2,)" in text


def test_arguments_are_lists_and_slack_has_a_reason():
    def holds(rng):
        x = rng.normal()
        return np.sin(2 * x), 2 * np.sin(x) * np.cos(x), np.sin(x)

    with pytest.raises(TypeError, match="uses must be a list"):
        record(holds, uses="nb-bayes")
    with pytest.raises(ValueError, match="relative slack up to 0.1, reason"):
        record(holds, tight=0.02)


class TestRightChecksPass:
    """The neighbours of what is refused."""

    def test_a_function_in_the_mistake_only(self):
        def mistake_only(rng):
            x = torch.from_numpy(rng.normal(size=(2, 3)))
            return x.exp().sum(), sum(x.exp().flatten()), log_normalize(x).sum()

        assert record(mistake_only)["functions"] == {}

    def test_the_same_expression_of_a_name_with_another_value(self):
        def rebound(rng):
            x = rng.normal(size=5)
            before = np.sort(x)
            x = x[::-1]
            after = np.sort(x)
            return before, after, x

        assert record(rebound)["state"] == "holds"

    def test_sums_that_are_nought_or_one(self):
        def deviations(rng):
            x = rng.normal(size=5)
            return (x - x.mean()).sum(), 0.0, x.sum()

        def normalised(rng):
            x = torch.from_numpy(rng.random(5)).expand(2, 5)
            return (x / x.sum(1, keepdim=True)).sum(1), torch.ones(2).double().expand(2), x.sum(1)

        assert record(deviations)["state"] == record(normalised)["state"] == "holds"

    def test_inputs_that_both_sides_share(self):
        def shared(rng):
            x = inputs(rng.normal())
            return x @ x, (x**2).sum(), x.sum()

        def handed(rng):
            x, y = draw(rng), draw(rng)
            return (x + y) ** 2, x**2 + 2 * x * y + y**2, x**2 + y**2

        assert record(shared)["state"] == record(handed)["state"] == "holds"

    def test_invariance_under_a_change_of_state(self):
        def invariant(rng):
            x = rng.normal(size=5)
            before = np.sort(x)
            rng.shuffle(x)
            after = np.sort(x)
            return before, after, x

        assert record(invariant)["state"] == "holds"

    def test_a_zero_right_side(self):
        def gradient(rng):
            x = torch.from_numpy(rng.normal(size=3)).requires_grad_()
            (slope,) = torch.autograd.grad(x.softmax(0)[0], x)
            return slope.sum(), 0.0, slope.abs().sum()

        assert "rhs → rhs + 1" in record(gradient)["mutants"]

    def test_sides_of_other_number_types(self):
        def fractions():
            for n in range(1, 6):
                half = np.array([Fraction(k, 2) for k in range(n)], object)
                yield half.sum(), Fraction(n * (n - 1), 4), Fraction(n * n, 4)

        def integer_and_float(rng):
            n = int(rng.integers(2, 50))
            return n * (n + 1), 2.0 * sum(range(n + 1)), n * n

        def large():
            for n in (30, 40):
                yield sum(2**k for k in range(2 * n)), 4**n - 1, 4**n

        assert record(fractions)["kind"] == record(large)["kind"] == "exact"
        assert record(integer_and_float)["kind"] == "numeric"

    def test_a_tight_case_without_draws(self):
        def average(rng, tight):
            x = np.ones(5) if tight else rng.normal(size=5)
            return np.exp(x.mean()), np.exp(x).mean(), np.exp(x).min()

        assert record(average)["kind"] == "bound"


def inputs(x):
    return np.array([x, 2 * x, x + 1])


def draw(rng):
    return combine_log_probs(torch.from_numpy(rng.normal(size=(2, 3))), weights=torch.tensor([0.25, 0.75]).double())


def test_nothing_stays_behind():
    assert show.records == []
    assert not {"__swapped_matmul__", "__doubled__"} & set(globals())
