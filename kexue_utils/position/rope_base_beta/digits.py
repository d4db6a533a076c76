"""Numerals in mixed radices, exactly: the digits of a position and the phases that they quantise.

Integers and ``fractions.Fraction`` only; the low digit comes first.
Source: https://kexue.fm/archives/9675 and https://kexue.fm/archives/9706
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import prod
from numbers import Integral, Rational


def _require_radices(radices: Iterable[int]) -> list[int]:
    radices = list(radices)
    if not radices or any(not isinstance(radix, Integral) or radix < 2 for radix in radices):
        raise ValueError(f"radices must be integers >= 2, at least one, got {radices}")
    return radices


def digits(n: Rational, radices: Sequence[int]) -> list[Rational]:
    """Digits of n in mixed radices, low digit first: d_m = ⌊n/(β_1⋯β_{m−1})⌋ mod β_m   (rope-digit, rope-mixed-digit)

    n: an integer or a Fraction, 0 ≤ n < β_1⋯β_D; the fractional part of n stays in the lowest digit.
    radices: β_1, …, β_D, integers ≥ 2 ([10] * 3 for three decimal digits).
    Raises TypeError for a float; ValueError for n out of range, for bad radices.
    Source: https://kexue.fm/archives/9706
    """
    radices = _require_radices(radices)
    if not isinstance(n, Rational):
        raise TypeError(f"n must be an integer or a Fraction, got {type(n).__name__}")
    if not 0 <= n < prod(radices):
        raise ValueError(f"n must satisfy 0 <= n < {prod(radices)} for radices {radices}, got {n}")
    found = []
    for radix in radices:
        n, digit = divmod(n, radix)
        found.append(digit)
    return found


def undigits(digs: Sequence[Rational], radices: Sequence[int]) -> Rational:
    """The number that digits denote, low digit first: n = Σ_m d_m β_1⋯β_{m−1}   (rope-digit, rope-mixed-digit)

    digs: integers or Fractions, one for each radix; a digit may exceed its radix, as in the interpolated
    numeral [4½, 7, 8] of 874½. Inverse of :func:`digits`.
    Raises TypeError for a float digit; ValueError for bad radices or another number of digits than of radices.
    Source: https://kexue.fm/archives/9675
    """
    radices = _require_radices(radices)
    if len(digs) != len(radices):
        raise ValueError(f"digs must have one digit for each of {len(radices)} radices, got {len(digs)}")
    for digit in digs:
        if not isinstance(digit, Rational):
            raise TypeError(f"digs must be integers or Fractions, got {type(digit).__name__}")
    n = 0
    for digit, radix in zip(reversed(digs), reversed(radices), strict=True):
        n = n * radix + digit
    return n


def phase_digits(n: Rational, base: int, D: int) -> list[Fraction]:
    """The phases that the digits of n quantise, in turns: φ_m(n)/2π = n/B^m, m = 1, …, D   (rope-bridge)

    d_m(n) = ⌊B · frac(φ_m/2π)⌋ exactly, and RoPE's angle ϑ_m = n/B^{m−1} is φ_m times B/2π, one constant for all m.
    n: an integer or a Fraction; base: B, an integer ≥ 2; D: the number of digits.
    Raises TypeError for a float n, ValueError for base < 2 or D < 1.
    """
    _require_radices([base])
    if not isinstance(n, Rational):
        raise TypeError(f"n must be an integer or a Fraction, got {type(n).__name__}")
    if not isinstance(D, Integral) or D < 1:
        raise ValueError(f"D must be a positive integer, got {D}")
    return [Fraction(n) / base**m for m in range(1, D + 1)]
