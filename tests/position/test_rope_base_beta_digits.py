"""Digits: against Python's own conversions, exact round trips, the posts' numbers, errors."""

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexue_utils.position.rope_base_beta import digits, phase_digits, undigits


def test_python_writes_the_same_digits():
    for base, write in ((2, bin), (8, oct), (16, hex)):
        for n in range(1, base**3):
            assert digits(n, [base] * 3)[::-1] == [int(c, 16) for c in write(n)[2:].zfill(3)]
    assert all(digits(n, [10] * 4)[::-1] == [int(c) for c in f"{n:04}"] for n in range(10_000))


@given(st.data())
def test_round_trip_in_mixed_radices(data):
    radices = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=6))
    n = data.draw(st.integers(0, prod(radices) - 1)) + data.draw(st.sampled_from([0, Fraction(1, 3)]))
    digs = digits(n, radices)
    assert undigits(digs, radices) == n
    assert all(0 <= d < radix for d, radix in zip(digs, radices, strict=True))


def test_seconds_of_a_week():
    assert digits(3 * 86400 + 4 * 3600 + 5 * 60 + 6, (60, 60, 24, 7)) == [6, 5, 4, 3]


def test_numbers_of_the_posts():
    assert digits(1749, [16] * 3)[::-1] == [6, 13, 5] and digits(1749, [13] * 3)[::-1] == [10, 4, 7]
    assert digits(Fraction(1749, 2), [10] * 3)[::-1] == [8, 7, Fraction(9, 2)]
    assert undigits([9, 4, 7], [10] * 3) == 749 and undigits([8, 9, 14], [10] * 3) == 1498
    assert undigits([Fraction(9, 2), 7, 8], [10] * 3) == Fraction(1749, 2)


def test_phases_are_quantised_by_the_digits():
    for base, D in ((2, 5), (3, 4), (10, 3)):
        for n in range(base**D):
            phases = phase_digits(n, base, D)
            assert phases == [Fraction(n, base**m) for m in range(1, D + 1)]
            assert [int(base * (phase % 1)) for phase in phases] == digits(n, [base] * D)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: digits(8, [2, 2, 2]), ValueError, r"0 <= n < 8 for radices \[2, 2, 2\], got 8"),
        (lambda: digits(-1, [2]), ValueError, "0 <= n < 2 .* got -1"),
        (lambda: digits(1.5, [2]), TypeError, "n must be an integer or a Fraction, got float"),
        (lambda: digits(1, []), ValueError, r"radices must be integers >= 2, at least one, got \[\]"),
        (lambda: digits(1, [10, 1]), ValueError, r"radices must .* got \[10, 1\]"),
        (lambda: digits(1, [2.5]), ValueError, r"radices must .* got \[2.5\]"),
        (lambda: undigits([1, 2], [10]), ValueError, "digs must have one digit for each of 1 radices, got 2"),
        (lambda: undigits([0.5], [10]), TypeError, "digs must be integers or Fractions, got float"),
        (lambda: undigits([1], [1]), ValueError, "radices must"),
        (lambda: phase_digits(0.1, 10, 2), TypeError, "n must be an integer or a Fraction, got float"),
        (lambda: phase_digits(1, 1, 2), ValueError, "radices must"),
        (lambda: phase_digits(1, 10, 0), ValueError, "D must be a positive integer, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
