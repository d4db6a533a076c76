"""The best fixed θ in hindsight, for many runs at once, with a certificate of how good it is.

    min_{θ∈Θ} (1/T) Σ_t φ(⟨x_t, θ⟩; y_t)  =  max_s −(1/T) Σ_t φ*(s_t; y_t) − sup_{θ∈Θ} ⟨−v, θ⟩,  v = (1/T) Σ_t s_t x_t

Any slopes s that φ has bound the minimum from below, so that the gap of a pair (θ, s) is a proof. Both are found by a
primal-dual interior-point method, all runs in step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .domains import Ball, Box, Domain, moved
from .extremal import Linear
from .problems import Batch, ConvexProblem, Kinked, LinearModel, Logistic

# μ shrinks by the second each time; a step goes at most the third of the way to where a positive variable is 0.
ITERATIONS, SHRINK, STAY = 100, 0.1, 0.995


class Hindsight(NamedTuple):
    """theta: (B, d) in Θ; loss: its average loss (B,); gap: how far above the minimum that is at most (B,)."""

    theta: Tensor
    loss: Tensor
    gap: Tensor


def duality_gap(problem: LinearModel, data: Batch, domain: Domain, theta: Tensor, slopes: Tensor) -> Tensor:
    """mean_t[φ(u_t) + φ*(s_t) − s_t u_t] + sup_{θ'∈Θ} ⟨v, θ − θ'⟩, u_t = ⟨x_t, θ⟩, v = mean_t s_t x_t: (B,)

    At least as large as the average loss of θ minus the minimum, for θ (B, d) in Θ and any slopes s (T, B) that φ has.
    data: (x, y) with leading axes (T, B).
    """
    x, y = data
    u = (x * theta).sum(-1)
    fenchel = problem.link(u, y)[0] + problem.conjugate(slopes, y) - slopes * u
    v = (slopes[..., None] * x).mean(0)
    return fenchel.mean(0) + (v * (theta - domain.extreme(-v))).sum(-1)


def _reach(value: Tensor, change: Tensor) -> Tensor:
    """Largest a ≤ 1/STAY for which value + a·change ≥ 0 along the last axis, for value > 0: (B,)."""
    return (-value / change).where(change < 0, 1 / STAY).amin(-1).clamp(max=1 / STAY)


class _Smooth:
    """Slopes of the logistic loss follow u: s = φ'(u)."""

    def __init__(self, problem, u, y):
        self.problem, self.u, self.y = problem, u, y

    @property
    def slopes(self):
        return self.problem.link(self.u, self.y)[1]

    def linearise(self, mu):
        return self.slopes, -self.slopes * (self.y + self.slopes)

    def toward(self, du, mu):
        self.du = du
        return torch.full_like(du[:, 0], 1 / STAY)

    def move(self, size):
        self.u = self.u + size * self.du

    def products(self):
        return self.u[:, :0]


class _Sharp:
    """Slopes c + σ are variables of their own: v = εσ + p − q, p(h − σ) = μ, q(h + σ) = μ on the central path."""

    def __init__(self, problem, u, y):
        self.c, self.h, kappa = problem.kink(y)
        self.epsilon, v = problem.roundness, u - kappa
        self.sigma = torch.zeros_like(v)
        self.p, self.q = v.clamp(min=0) + 1, v.neg().clamp(min=0) + 1

    @property
    def slopes(self):
        return self.c + self.sigma

    def linearise(self, mu):
        """s' and w with s' + w·du the slopes of the next point on the central path."""
        above, below = self.h - self.sigma, self.h + self.sigma
        self.weight = 1 / (self.epsilon + self.p / above + self.q / below)
        self.free = self.weight * (self.p - self.q - mu / above + mu / below)
        return self.slopes + self.free, self.weight

    def toward(self, du, mu):
        above, below = self.h - self.sigma, self.h + self.sigma
        self.dsigma = self.weight * du + self.free
        self.dp = (mu + self.p * self.dsigma) / above - self.p
        self.dq = (mu - self.q * self.dsigma) / below - self.q
        pairs = (self.p, self.dp), (self.q, self.dq), (above, -self.dsigma), (below, self.dsigma)
        return torch.stack([_reach(*pair) for pair in pairs]).amin(0)

    def move(self, size):
        self.p, self.q = self.p + size * self.dp, self.q + size * self.dq
        self.sigma = self.sigma + size * self.dsigma

    def products(self):
        return torch.cat([self.p * (self.h - self.sigma), self.q * (self.h + self.sigma)], -1)


@torch.no_grad()
def hindsight_optimum(problem: ConvexProblem, data: Batch, domain: Domain, tol: float = 1e-6) -> Hindsight:
    """argmin_{θ∈Θ} (1/T) Σ_t L(x_t, θ) for each run, within ``tol`` of the minimum by a certificate   (sgd-core)

    data: a batch with leading axes (T, B), as ``draw`` gives it; computed in float64. Linear losses have a closed form
    on any bounded domain; linear models need a :class:`Ball` or a :class:`Box` with an interior.
    Raises ValueError for other problems and domains, RuntimeError where the gap stays above ``tol``.
    """
    data = tuple(part.to(torch.float64) for part in data)
    domain = moved(domain, data[0])
    if isinstance(problem, Linear):
        g = data[0].mean(0)
        theta = domain.extreme(-g)
        return Hindsight(theta, (g * theta).sum(-1), torch.zeros_like(g[:, 0]))
    if not isinstance(problem, Logistic | Kinked) or not isinstance(domain, Ball | Box):
        names = type(problem).__name__, type(domain).__name__
        raise ValueError(f"problem must be linear, or a linear model on a Ball or Box, got {names[0]} on {names[1]}")
    x, y = data[0].transpose(0, 1).contiguous(), data[1].T.contiguous()
    theta = (domain.extreme(x[:, 0]) + domain.extreme(-x[:, 0])) / 2
    u = (x @ theta[..., None])[..., 0]
    loss = (_Sharp if isinstance(problem, Kinked) else _Smooth)(problem, u, y)
    rooms, normals, bend = domain.rooms(theta)
    if not (rooms > 0).all():
        raise ValueError("domain must have an interior, got a box with lo = hi in a coordinate")
    slack, force = rooms, 1 / rooms  # r and ζ of each wall: r = room, rζ = μ on the central path
    mu, gap = torch.ones_like(u[:, :1]), torch.full_like(u[:, 0], torch.inf)
    eye = torch.eye(problem.d).to(theta)
    for _ in range(ITERATIONS):
        slopes, weight = loss.linearise(mu)
        push = (mu - force * (rooms - slack)) / slack
        pull = (slopes[:, None] @ x)[:, 0] - (push[:, None] @ normals)[:, 0]
        hessian = (x.mT * weight[:, None]) @ x + (normals.mT * (force / slack)[:, None]) @ normals
        hessian = hessian + bend * force.sum(-1)[:, None, None] * eye
        dtheta = -torch.linalg.solve(hessian, pull)
        dslack = rooms - slack + (normals @ dtheta[..., None])[..., 0]
        dforce = (mu - force * dslack) / slack - force
        reach = loss.toward((x @ dtheta[..., None])[..., 0], mu), _reach(slack, dslack), _reach(force, dforce)
        size = (STAY * torch.stack(reach).amin(0) * (gap > tol))[:, None]
        theta, slack, force = theta + size * dtheta, slack + size * dslack, force + size * dforce
        loss.move(size)
        rooms, normals, bend = domain.rooms(theta)
        # μ waits for the walls: were it far below what r and the room still differ by, r would stick at 0
        walls = force * (slack + (rooms - slack).abs())
        mu = SHRINK * torch.cat([loss.products(), walls], -1).mean(-1, keepdim=True)
        found = domain.project(theta)
        gap = duality_gap(problem, data, domain, found, loss.slopes.T)
        if (gap <= tol).all():
            return Hindsight(found, problem.loss(found, data).mean(0), gap)
    worst = int(gap.argmax())
    raise RuntimeError(f"no optimum within tol={tol:g}: run {worst} is certified to {gap[worst]:g} only")
