"""Closed convex sets Θ with their Euclidean projections, batched over leading axes.

Source: https://kexue.fm/archives/9902
"""

import copy
import math

import torch
from torch import Tensor


def moved(thing, like: Tensor):
    """A shallow copy of a domain or problem whose tensors have the dtype and device of ``like``."""
    thing = copy.copy(thing)
    vars(thing).update({name: value.to(like) for name, value in vars(thing).items() if isinstance(value, Tensor)})
    return thing


def _vector(name: str, value) -> Tensor:
    value = torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64))
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got {value.tolist()}")
    return value


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


class Domain:
    """A closed convex set Θ ⊆ ℝ^d.

    ``project(x)``: Π_Θ(x), the nearest point, (…, d) → (…, d)   (sgd-obtuse, sgd-projection)
    ``contains(x, tol)``: whether x lies within ``tol`` of Θ in every coordinate, (…, d) → (…) bool
    ``extreme(v)``: a point of Θ that maximises ⟨v, θ⟩, (…, d) → (…, d); ValueError where Θ is unbounded
    ``diameter``: D = sup ‖θ − θ'‖ over Θ, ``math.inf`` where Θ is unbounded
    """

    diameter: float = math.inf

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def contains(self, x: Tensor, tol: float = 1e-9) -> Tensor:
        return (x - self.project(x)).abs().amax(-1) <= tol

    def extreme(self, v: Tensor) -> Tensor:
        raise ValueError(f"domain must be bounded to have an extreme point, got {type(self).__name__}")


class Unbounded(Domain):
    """All of ℝ^d: SGD without projection."""

    def project(self, x: Tensor) -> Tensor:
        return x


class Ball(Domain):
    """{θ: ‖θ − center‖ ≤ R}, D = 2R. center: (d,), the origin by default. Raises ValueError unless R > 0."""

    def __init__(self, R: float, center=0.0):
        self.R, self.center = _positive("R", R), _vector("center", center)
        self.diameter = 2 * self.R

    def project(self, x: Tensor) -> Tensor:
        offset = x - self.center
        norm = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        return torch.addcmul(self.center, offset, self.R / norm.clamp(min=self.R))

    def extreme(self, v: Tensor) -> Tensor:
        return self.center + self.R * torch.nn.functional.normalize(v, dim=-1)

    def rooms(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Concave functions r_j ≥ 0 exactly in Θ, (…, J), their gradients (…, J, d), and b in ∇²r_j = −b·I."""
        offset = x - self.center
        return self.R**2 - (offset * offset).sum(-1, keepdim=True), -2 * offset[..., None, :], 2.0


class Box(Domain):
    """{θ: lo ≤ θ ≤ hi}, D = ‖hi − lo‖; in one dimension an interval.

    lo, hi: (d,) or numbers for d = 1. Raises ValueError where lo > hi or shapes differ, and for x of another d.
    """

    def __init__(self, lo, hi):
        self.lo, self.hi = _vector("lo", lo), _vector("hi", hi)
        if self.lo.shape != self.hi.shape:
            raise ValueError(f"lo and hi must have one shape, got {tuple(self.lo.shape)} and {tuple(self.hi.shape)}")
        above = (self.lo > self.hi).nonzero()
        if len(above):
            i = int(above[0, 0])
            raise ValueError(f"lo must not exceed hi, got lo={self.lo[i]:g} > hi={self.hi[i]:g} in coordinate {i}")
        self.diameter = float(torch.linalg.vector_norm(self.hi - self.lo))

    def project(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.lo.shape:
            raise ValueError(f"x must have {len(self.lo)} coordinates like the box, got shape {tuple(x.shape)}")
        return torch.minimum(torch.maximum(x, self.lo), self.hi)

    def extreme(self, v: Tensor) -> Tensor:
        return torch.where(v > 0, self.hi, self.lo)

    def rooms(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """As for :class:`Ball`: the distances from the 2d walls."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        normals = torch.cat([eye, -eye]).expand(*x.shape[:-1], -1, -1)
        return torch.cat([x - self.lo, self.hi - x], -1), normals, 0.0


class Simplex(Domain):
    """{θ ≥ 0, Σθ = s}, D = √2·s for d ≥ 2. Raises ValueError unless s > 0."""

    def __init__(self, s: float = 1.0):
        self.s = _positive("s", s)
        self.diameter = math.sqrt(2) * self.s

    def project(self, x: Tensor) -> Tensor:
        """θ = max(x − τ, 0) with the τ that makes the sum s, known from the k largest entries that stay positive."""
        ordered = x.sort(dim=-1, descending=True).values
        k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        threshold = (ordered.cumsum(-1) - self.s) / k
        last = (ordered > threshold).sum(-1, keepdim=True) - 1
        return (x - threshold.gather(-1, last)).clamp(min=0)

    def extreme(self, v: Tensor) -> Tensor:
        return self.s * torch.nn.functional.one_hot(v.argmax(-1), v.shape[-1]).to(v)


class L1Ball(Domain):
    """{θ: Σ|θ_i| ≤ R}, D = 2R. Raises ValueError unless R > 0."""

    def __init__(self, R: float = 1.0):
        self.R = _positive("R", R)
        self.diameter = 2 * self.R

    def project(self, x: Tensor) -> Tensor:
        size = x.abs()
        outside = size.sum(-1, keepdim=True) > self.R
        return torch.where(outside, x.sign() * Simplex(self.R).project(size), x)

    def extreme(self, v: Tensor) -> Tensor:
        return v.sign() * Simplex(self.R).extreme(v.abs())


class HalfSpace(Domain):
    """{θ: ⟨a, θ⟩ ≤ b}. a: (d,), not 0, else ValueError."""

    def __init__(self, a, b: float):
        self.a, self.b = _vector("a", a), float(b)
        if not self.a.any():
            raise ValueError("a must not be zero")

    def project(self, x: Tensor) -> Tensor:
        excess = ((x * self.a).sum(-1, keepdim=True) - self.b).clamp(min=0)
        return x - excess / (self.a * self.a).sum() * self.a


class Affine(Domain):
    """{θ: Aθ = b}. A: (k, d) of rank k < d, b: (k,). Raises ValueError for other shapes or ranks."""

    def __init__(self, A, b):
        self.A, self.b = torch.as_tensor(A, dtype=torch.float64), _vector("b", b)
        if self.A.ndim != 2 or len(self.A) != len(self.b):
            raise ValueError(f"A must have a row for each of {len(self.b)} entries of b, got {tuple(self.A.shape)}")
        k, d = self.A.shape
        rank = int(torch.linalg.matrix_rank(self.A))
        if not rank == k < d:
            raise ValueError(f"A must have full row rank below its {d} columns, got {k} rows of rank {rank}")
        self.inverse = torch.linalg.pinv(self.A)

    def project(self, x: Tensor) -> Tensor:
        return x - (x @ self.A.T - self.b) @ self.inverse.T
