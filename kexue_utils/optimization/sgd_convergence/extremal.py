"""Losses that are not drawn from a model: adversaries, and the instances that attain or refute a bound.

Sources: https://kexue.fm/archives/9902; Harvey, Liaw, Plan, Randhawa arXiv:1812.05217.
"""

import math
from numbers import Integral

import torch
from torch import Tensor

from .domains import Box, _positive, _vector
from .problems import Batch, ConvexProblem
from .schedules import constant


class Linear(ConvexProblem):
    """L_t(θ) = ⟨g_t, θ⟩ for gradients given as data: batches are (g,), (…, d). Raises ValueError unless G > 0."""

    def __init__(self, d: int, G: float = 1.0):
        self.d, self.G = d, _positive("G", G)

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        (g,) = batch
        return (g * theta).sum(-1), g

    def gradient_bounds(self, batch: Batch) -> Tensor:
        return torch.linalg.vector_norm(batch[0], dim=-1)


class Rademacher(Linear):
    """L_t(θ) = ±Gθ, d = 1, fair signs: what no algorithm can learn   (sgd-coin)"""

    def __init__(self, G: float = 1.0):
        super().__init__(1, G)

    def sample(self, B, generator, steps=range(1), dtype=torch.float64):
        bits = torch.randint(2, (len(steps), B, 1), generator=generator, device=generator.device)
        return (self.G * (2 * bits - 1).to(dtype),)


class LinearAdversary(Linear):
    """L_t(θ) = ⟨g_t, θ⟩ with g_1, …, g_T the rows of ``sequence`` (T, d), in every run; G is their largest norm."""

    def __init__(self, sequence: Tensor):
        if sequence.ndim != 2:
            raise ValueError(f"sequence must have shape (T, d), got {tuple(sequence.shape)}")
        super().__init__(sequence.shape[1], float(self.gradient_bounds((sequence,)).max()))
        self.sequence, self.T = sequence, len(sequence)

    def sample(self, B, generator, steps=range(1), dtype=torch.float64):
        rows = self.sequence[steps.start : steps.stop]
        return (rows.to(dtype)[:, None].expand(-1, B, -1),)


class CubeWorstCase(LinearAdversary):
    """Equality in the core bound: regret DG√T in d = T dimensions, one new coordinate a step   (sgd-cube)

    L_t(θ) = Gθ_t on the cube ``domain`` = [−ηG, 0]^T with diagonal D, from ``theta0`` = 0, ``eta`` = D/(G√T); the best
    point is the opposite corner ``comparator``. Raises ValueError unless D, G > 0 and T ≥ 1.
    """

    def __init__(self, T: int, D: float = 1.0, G: float = 1.0):
        self.eta = constant(T) * (_positive("D", D) / (_positive("G", G) * math.sqrt(T)))
        super().__init__(G * torch.eye(T, dtype=torch.float64))
        self.theta0 = torch.zeros(1, T, dtype=torch.float64)
        self.comparator = self.theta0 - G * self.eta
        self.domain = Box(self.comparator[0], self.theta0[0])


def walk_and_rattle(T: int, G: float = 1.0) -> Tensor:
    """Equality in the core bound in one dimension: gradients (T, 1) for [0, D], θ_1 = 0, η = D/(G√T)   (sgd-walk)

    √T times −G, which takes θ from 0 to D, then (T − √T)/2 pairs +G, −G, which bring it back each time: the run's loss
    is 0, that of D is −√T·GD. Raises ValueError unless T is a square.
    """
    n = math.isqrt(T)
    if n * n != T or T < 1:
        raise ValueError(f"T must be a positive square, got {T}")
    signs = torch.ones(T, 1, dtype=torch.float64)
    signs[:n] = signs[n + 1 :: 2] = -1
    return G * signs


class MaxAffine(ConvexProblem):
    """L(θ) = max_i ⟨a_i, θ⟩ + b_i, deterministic; the subgradient is the first maximising row. Batches are empty.

    a: (m, d), or (B, m, d) for a function per run; b: (m,) or (B, m).
    """

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b, self.d = a, b, a.shape[-1]
        self.G = float(torch.linalg.vector_norm(a, dim=-1).max())

    def sample(self, B, generator, steps=range(1), dtype=torch.float64):
        return ()

    def loss_and_grad(self, theta: Tensor, batch: Batch = ()) -> tuple[Tensor, Tensor]:
        loss, index = ((self.a @ theta[..., None])[..., 0] + self.b).max(-1)
        rows = self.a.expand(*index.shape, *self.a.shape[-2:])
        return loss, rows.take_along_dim(index[..., None, None], -2)[..., 0, :]


class HarveyLowerBound(ConvexProblem):
    """f(θ) = max_{i ≤ T+1} ⟨h_i, θ⟩ on the unit ball of ℝ^T: with η_t = 1/√t from 0 the last loss is ~ log T/√T

    h_ij = 1/(8(T−j+1)) for j < i, −√i/(2√T) for j = i, 0 for j > i; G = 1   (sgd-harvey)
    ties: which maximising row is the subgradient, "first" as in the paper or "last", with which the log T disappears.
    O(T) a step. Raises ValueError for T < 1 and for other ties. Source: arXiv:1812.05217
    """

    G = 1.0

    def __init__(self, T: int, ties: str = "first"):
        if not isinstance(T, Integral) or T < 1:
            raise ValueError(f"T must be a positive integer, got {T}")
        if ties not in ("first", "last"):
            raise ValueError(f"ties must be 'first' or 'last', got {ties!r}")
        self.d, self.ties = T, ties
        j = torch.arange(1, T + 1, dtype=torch.float64)
        self.a, self.b = 1 / (8 * (T - j + 1)), (j / T).sqrt() / 2

    def sample(self, B, generator, steps=range(1), dtype=torch.float64):
        return ()

    def pieces(self, theta: Tensor) -> Tensor:
        """⟨h_i, θ⟩ for i = 1, …, T+1: (…, T) → (…, T+1)."""
        before = torch.nn.functional.pad((self.a * theta).cumsum(-1), (1, 0))
        return before - torch.nn.functional.pad(self.b * theta, (0, 1))

    def loss_and_grad(self, theta: Tensor, batch: Batch = ()) -> tuple[Tensor, Tensor]:
        pieces = self.pieces(theta)
        loss = pieces.amax(-1, keepdim=True)
        at = (pieces == loss).to(torch.uint8)
        i = self.d - at.flip(-1).argmax(-1, keepdim=True) if self.ties == "last" else at.argmax(-1, keepdim=True)
        j = torch.arange(self.d, device=theta.device)
        return loss[..., 0], self.a * (j < i) - self.b * (j == i)


class TwoPointAbs(ConvexProblem):
    """L(x, θ) = |θ − x|, x = a_1 with probability p, else a_0; d = 1, G = 1: small enough to enumerate   (sgd-weighted)

    a: (…, 2), p: (…), a problem for each leading index. Batches are (x,), (…). Raises ValueError unless 0 ≤ p ≤ 1.
    """

    d, G = 1, 1.0

    def __init__(self, a, p):
        self.a, self.p = _vector("a", a), torch.as_tensor(p, dtype=torch.float64)
        if self.a.shape != (*self.p.shape, 2):
            raise ValueError(f"a must have shape {(*self.p.shape, 2)} to go with p, got {tuple(self.a.shape)}")
        if not ((self.p >= 0) & (self.p <= 1)).all():
            raise ValueError(f"p must lie in [0, 1], got {self.p.tolist()}")

    def sample(self, B, generator, steps=range(1), dtype=torch.float64):
        uniform = torch.rand((len(steps), B), generator=generator, dtype=torch.float64, device=generator.device)
        return (torch.where(uniform < self.p, self.a[..., 1], self.a[..., 0]).to(dtype),)

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        r = theta - batch[0][..., None]
        return r.abs()[..., 0], r.sign()

    def gradient_bounds(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch[0])

    def expected_loss(self, theta: Tensor) -> Tensor:
        """(1 − p)|θ − a_0| + p|θ − a_1|, (…, 1) → (…)."""
        return (1 - self.p) * (theta[..., 0] - self.a[..., 0]).abs() + self.p * (theta[..., 0] - self.a[..., 1]).abs()

    def optimum(self) -> Tensor:
        """The likelier point, a minimiser of the expected loss: (…, 1)."""
        return torch.where(self.p > 0.5, self.a[..., 1], self.a[..., 0])[..., None]
