"""Expectations and worst cases without sampling: every path of a small problem is enumerated.

Sources: https://kexue.fm/archives/9902, https://kexue.fm/archives/11469
"""

from fractions import Fraction
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import require_positive
from .domains import Domain, Unbounded, _positive
from .extremal import TwoPointAbs


class Expectation(NamedTuple):
    """last: q_t = E[L(θ_t)] − min L, (…, T); average: E[L(θ̄)] − min L of θ̄ = (1/T) Σ θ_t, (…)."""

    last: Tensor
    average: Tensor


def _length(eta: Tensor, limit: int) -> int:
    require_positive(eta)
    T = eta.shape[-1]
    if T > limit:
        raise ValueError(f"eta must have at most {limit} steps, as 2^T paths are enumerated, got {T}")
    return T


def exact_expectation(problem: TwoPointAbs, eta: Tensor, theta0, domain: Domain | None = None) -> Expectation:
    """Expected excess losses of SGD on |θ − x| with two values of x, over all sample paths   (sgd-batch, sgd-weighted)

    eta: (T,), or (…, T) for a schedule per problem, T ≤ 16; theta0: a number or (…), with the leading shape of the
    problem's p. θ_t is one of 2^{t−1} nodes of a tree, so x_t is independent of it by construction. domain: Π_Θ, none
    by default. Raises ValueError for more steps and for steps that are not positive.
    """
    T, domain = _length(eta, 16), domain or Unbounded()
    theta = torch.as_tensor(theta0, dtype=torch.float64).expand(1, *problem.p.shape)
    weight, total = torch.ones_like(theta), theta
    least = problem.expected_loss(problem.optimum())

    def excess(theta):
        return (weight * (problem.expected_loss(theta[..., None]) - least)).sum(0)

    last = [excess(theta)]
    for t in range(T - 1):
        after = [theta - eta[..., t] * (theta - problem.a[..., i]).sign() for i in (0, 1)]
        theta = domain.project(torch.cat(after)[..., None])[..., 0]
        weight = torch.cat([weight * (1 - problem.p), weight * problem.p])
        total = torch.cat([total, total]) + theta
        last.append(excess(theta))
    return Expectation(torch.stack(last, -1), excess(total / T))


class WorstCase(NamedTuple):
    """regret: the largest average regret; signs: the gradients' signs that cause it, (T,); start: its θ_1."""

    regret: float
    signs: Tensor
    start: float


def worst_sign_sequence(eta: Tensor, D: float, G: float, starts=None) -> WorstCase:
    """The worst of all 2^T sequences of losses ±Gθ on [0, D], by enumeration   (sgd-walk, sgd-sqrt)

    eta: (T,), T ≤ 20; starts: θ_1 to try, {0, D/2, D} by default. The best fixed θ is 0 or D. Raises ValueError for
    more steps, for steps that are not positive, for D, G ≤ 0.
    """
    T, D, G = _length(eta, 20), _positive("D", D), _positive("G", G)
    starts = torch.tensor([0, D / 2, D] if starts is None else starts, dtype=torch.float64)
    theta = starts[:, None]
    loss = walked = torch.zeros_like(theta)  # Σ g_t θ_t and Σ g_t of every sequence so far
    for step in eta:
        loss = torch.cat([loss + G * theta, loss - G * theta], 1)
        walked = torch.cat([walked + G, walked - G], 1)
        theta = torch.cat([theta - step * G, theta + step * G], 1).clamp(0, D)
    regret = loss - (walked * D).clamp(max=0)
    best, place = regret.flatten().max(0)
    start, path = divmod(int(place), 2**T)
    signs = torch.tensor([1.0 - 2 * (path >> t & 1) for t in range(T)], dtype=torch.float64)
    return WorstCase(float(best) / T, signs, float(starts[start]))


def worst_grid_regret(steps: Tensor, width: int) -> Tensor:
    """Largest regret Σ g_t(θ_t − θ*) of losses ±θ on the grid {0, …, width} for each start, by dynamic programming

    steps: (T,) integers, ηG in units of the grid; any order, so it shows what an increasing schedule can lose. Returns
    (width+1,) integers, exact, in O(T·width): V_t(θ) = max_± ±(θ − θ*) + V_{t+1}(Π(θ ∓ η_t)) for θ* = 0 and θ* = width.
    Raises ValueError unless the steps are positive integers.
    """
    if steps.is_floating_point() or not (steps > 0).all():
        raise ValueError(f"steps must be positive integers, got {steps.tolist()}")
    grid = torch.arange(width + 1)
    offset = grid - torch.tensor([[0], [width]])
    value = torch.zeros_like(offset)
    for step in steps.flip(0).tolist():
        down, up = (grid - step).clamp(min=0), (grid + step).clamp(max=width)
        value = torch.maximum(offset + value[:, down], value[:, up] - offset)
    return value.amax(0)


def mean_abs_walk(T: int) -> Fraction:
    """E|ε_1 + … + ε_T| of fair signs: T·C(T−1, ⌊(T−1)/2⌋)·2^{1−T}, ~ √(2T/π)   (sgd-lower)

    DG/2 times it is the least expected regret that an online algorithm can have on Rademacher losses on [−D/2, D/2].
    Raises ValueError for T < 1.
    """
    if T < 1:
        raise ValueError(f"T must be positive, got {T}")
    return Fraction(T * comb(T - 1, (T - 1) // 2), 2 ** (T - 1))
