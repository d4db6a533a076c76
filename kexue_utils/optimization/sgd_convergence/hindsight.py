"""The best fixed θ in hindsight, for many runs at once, with a certificate of how good it is.

    min_{θ∈Θ} (1/T) Σ_t φ(⟨x_t, θ⟩; y_t)  =  max_s −(1/T) Σ_t φ*(s_t; y_t) − sup_{θ∈Θ} ⟨−v, θ⟩,  v = (1/T) Σ_t s_t x_t

Any s that the conjugates φ* allow bounds the minimum from below, so that the gap of a pair (θ, s) is a proof.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .domains import Ball, Box, Domain, moved
from .extremal import Linear
from .problems import Batch, ConvexProblem, LinearModel

NEWTON_STEPS, HALVINGS = 60, 40


class Hindsight(NamedTuple):
    """theta: (B, d) in Θ; loss: its average loss (B,); gap ≥ 0: loss exceeds the minimum by no more, (B,)."""

    theta: Tensor
    loss: Tensor
    gap: Tensor


def duality_gap(problem: LinearModel, data: Batch, domain: Domain, theta: Tensor, mu: float) -> Tensor:
    """mean[φ(u_t) + φ*(s_t) − s_t u_t] + sup_{θ'∈Θ} ⟨v, θ − θ'⟩ ≥ 0 with u_t = ⟨x_t, θ⟩, s_t the slope of φ_μ, (B,)

    An upper bound on how far θ (B, d) in Θ is from the minimum, for any μ > 0; data as in ``hindsight_optimum``.
    """
    x, y = data
    _, slope, _, fenchel = problem.smoothed((x * theta).sum(-1), y, mu)
    v = (slope[..., None] * x).mean(0)
    return fenchel.mean(0) + (v * (theta - domain.extreme(-v))).sum(-1)


def _center(problem, x, y, domain, theta, mu):
    """Minimise Σ_t φ_μ + μ·barrier by Newton's method with backtracking, x (B, T, d); θ stays inside Θ."""

    def smoothed(theta, u):
        value, slope, curvature, _ = problem.smoothed(u, y, mu)
        wall, wall_slope, wall_curvature = domain.barrier(theta)
        gradient = (slope[:, None] @ x)[:, 0] + mu * wall_slope
        return value.sum(-1) + mu * wall, gradient, (x.mT * curvature[:, None]) @ x + mu * wall_curvature

    def value(theta, u):
        return problem.smoothed(u, y, mu)[0].sum(-1) + mu * domain.barrier(theta)[0]

    u = (x @ theta[..., None])[..., 0]
    for _ in range(NEWTON_STEPS):
        now, gradient, hessian = smoothed(theta, u)
        direction = -torch.linalg.solve(hessian, gradient)
        slope = (gradient * direction).sum(-1)
        going = slope < -mu / 10  # a self-concordant function is otherwise within μ/10 of its minimum
        if not going.any():
            break
        direction = torch.where(going[:, None], direction, 0.0)
        du, size = (x @ direction[..., None])[..., 0], torch.ones_like(now)
        for _ in range(HALVINGS):
            ahead = value(theta + size[:, None] * direction, u + size[:, None] * du)
            high = ~(ahead <= now + size * slope * going / 4)
            if not high.any():
                break
            size = torch.where(high, size / 2, size)
        size = torch.where(high, 0.0, size)[:, None]
        theta, u = theta + size * direction, u + size * du
    return theta


@torch.no_grad()
def hindsight_optimum(problem: ConvexProblem, data: Batch, domain: Domain, tol: float = 1e-6) -> Hindsight:
    """argmin_{θ∈Θ} (1/T) Σ_t L(x_t, θ) for each run, within ``tol`` of the minimum by a certificate   (sgd-core)

    data: a batch with leading axes (T, B), as ``draw`` gives it; computed in float64. Linear losses have a closed form
    on any bounded domain. Linear models need a :class:`Ball` or a :class:`Box`: Newton's method on losses smoothed at
    scale μ, with a barrier for Θ, μ → 0; see ``duality_gap`` for the certificate.
    Raises ValueError for other problems and domains, RuntimeError where the gap stays above ``tol``.
    """
    data = tuple(part.to(torch.float64) for part in data)
    domain = moved(domain, data[0])
    if isinstance(problem, Linear):
        g = data[0].mean(0)
        theta = domain.extreme(-g)
        return Hindsight(theta, (g * theta).sum(-1), torch.zeros_like(g[:, 0]))
    if not isinstance(problem, LinearModel) or not isinstance(domain, Ball | Box):
        names = type(problem).__name__, type(domain).__name__
        raise ValueError(f"problem must be linear, or a linear model on a Ball or Box, got {names[0]} on {names[1]}")
    x, y = data[0].transpose(0, 1).contiguous(), data[1].T.contiguous()
    theta = (domain.extreme(x[:, 0]) + domain.extreme(-x[:, 0])) / 2
    mu = problem.G
    while mu > tol / 20:
        theta = _center(problem, x, y, domain, theta, mu)
        gap = duality_gap(problem, data, domain, theta, mu)
        if gap.max() <= tol:
            return Hindsight(theta, problem.loss(theta, data).mean(0), gap)
        mu /= 10
    worst = int(gap.argmax())
    raise RuntimeError(f"no optimum within tol={tol:g}: run {worst} is certified to {gap[worst]:g} only")
