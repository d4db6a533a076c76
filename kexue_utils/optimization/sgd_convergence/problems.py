"""Convex losses L(x_t, θ) with closed-form subgradients and an exact bound G on their norms.

A batch is a tuple of tensors with equal leading axes: (B, …) for one step of B runs, (T, B, …) for T steps.
Source: https://kexue.fm/archives/9902
"""

import math

import torch
from torch import Tensor

from .domains import _positive, _vector

Batch = tuple[Tensor, ...]


class ConvexProblem:
    """What the engine asks of a problem; subclass it for losses of your own.

    ``G``: sup ‖g‖ over samples and θ
    ``d``: dimension of θ; ``T``: the most steps it has data for
    ``sample(B, generator, steps, dtype)``: data of the steps in the range ``steps`` (counted from 0) for B runs
    ``loss_and_grad(theta, batch)``: L(x, θ) (…) and a subgradient (…, d), for θ (…, d)
    ``gradient_bounds(batch)``: sup over θ of ‖g‖ for each sample, (…)
    """

    G: float
    d: int
    T: float = math.inf

    def sample(self, B: int, generator: torch.Generator, steps: range = range(1), dtype=torch.float64) -> Batch:
        raise NotImplementedError

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def gradient_bounds(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def loss(self, theta: Tensor, batch: Batch = ()) -> Tensor:
        return self.loss_and_grad(theta, batch)[0]

    def grad(self, theta: Tensor, batch: Batch = ()) -> Tensor:
        return self.loss_and_grad(theta, batch)[1]

    def check(self, batch: Batch) -> None:
        """Raise ValueError, naming the sample, where a gradient can exceed G by more than rounding."""
        norms = self.gradient_bounds(batch)
        over = (~(norms <= self.G * (1 + 16 * torch.finfo(norms.dtype).eps))).nonzero()
        if len(over):
            index = tuple(over[0].tolist())
            raise ValueError(f"gradient bound G={self.G:g} violated by sample {index}, norm {norms[index]:g}")


class LinearModel(ConvexProblem):
    """L = φ(u; y) with u = ⟨x, θ⟩: features x uniform on a sphere of radius G/Lip(φ), so that sup ‖g‖ = G exactly.

    Batches are (x, y), x (…, d), y (…). planted: θ°, (d,), from which the targets are drawn. Sphere and noise treat all
    directions alike, so on a ball about the start one θ° is as good as a random one of its norm. Raises ValueError
    unless G > 0.
    """

    lipschitz = 1.0

    def __init__(self, planted, G: float = 1.0):
        self.planted, self.G = _vector("planted", planted), _positive("G", G)
        self.d = len(self.planted)

    def targets(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """y for u = ⟨x, θ°⟩, both (…)."""
        raise NotImplementedError

    def link(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """φ(u; y) and a subgradient φ'(u; y)."""
        raise NotImplementedError

    def conjugate(self, slope: Tensor, y: Tensor) -> Tensor:
        """φ*(s; y) = sup_u su − φ(u; y), for slopes s that φ has."""
        raise NotImplementedError

    def sample(self, B: int, generator: torch.Generator, steps: range = range(1), dtype=torch.float64) -> Batch:
        x = _normal((len(steps), B, self.d), generator, dtype)
        x *= self.G / self.lipschitz / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x, self.targets(x @ self.planted.to(x), generator)

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch
        value, slope = self.link((x * theta).sum(-1), y)
        return value, slope[..., None] * x

    def gradient_bounds(self, batch: Batch) -> Tensor:
        return self.lipschitz * torch.linalg.vector_norm(batch[0], dim=-1)


def _normal(shape, generator: torch.Generator, dtype) -> Tensor:
    """Drawn in float32 for every dtype: much faster on a CPU, and the same data in all of them."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _signs(like: Tensor, generator: torch.Generator, p) -> Tensor:
    """1 with probability p, else −1."""
    uniform = torch.rand(like.shape, generator=generator, device=generator.device)
    return torch.where(uniform < p, 1.0, -1.0).to(like)


class Logistic(LinearModel):
    """log(1 + e^{−yu}), labels ±1 with P(y = 1) = σ(u°): θ° minimises the expected loss."""

    def targets(self, u, generator):
        return _signs(u, generator, u.sigmoid())

    def link(self, u, y):
        margin = y * u
        return torch.nn.functional.softplus(-margin), -y * torch.sigmoid(-margin)

    def conjugate(self, slope, y):
        pi = slope.neg() * y
        return torch.xlogy(pi, pi) + torch.xlogy(1 - pi, 1 - pi)


class Kinked(LinearModel):
    """φ(u) = max_{|σ| ≤ h} (c + σ)v − εσ²/2 with v = u − κ and ``kink(y)`` = (c, h, κ): slopes from c − h to c + h.

    ε = ``roundness``: 0 for a sharp kink at κ, where the subgradient is c.
    """

    roundness = 0.0

    def kink(self, y: Tensor):
        raise NotImplementedError

    def link(self, u, y):
        c, h, kappa = self.kink(y)
        v = u - kappa
        slope = c + h * v.sign()
        return v * slope, slope

    def conjugate(self, slope, y):
        c, _, kappa = self.kink(y)
        return slope * kappa + self.roundness / 2 * (slope - c) ** 2


class Hinge(Kinked):
    """max(0, 1 − yu), labels y = ±sign u°, the wrong sign with probability ``flip``. ValueError unless 0 ≤ flip ≤ 1."""

    def __init__(self, planted, flip: float = 0.1, G: float = 1.0):
        super().__init__(planted, G)
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], got {flip}")
        self.flip = flip

    def targets(self, u, generator):
        return -u.sign() * _signs(u, generator, self.flip)

    def kink(self, y):
        return -y / 2, 0.5, y


class Regression(LinearModel):
    """Losses of r = u − y with targets y = u° + noise·N(0, 1). Raises ValueError unless noise ≥ 0."""

    def __init__(self, planted, noise: float = 0.5, G: float = 1.0):
        super().__init__(planted, G)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be finite and not negative, got {noise}")
        self.noise = float(noise)

    def targets(self, u, generator):
        return u + self.noise * _normal(u.shape, generator, u.dtype)


class LeastAbsolute(Kinked, Regression):
    """|r|: θ° minimises the expected loss."""

    def kink(self, y):
        return 0.0, 1.0, y

    def expected_loss(self, theta: Tensor) -> Tensor:
        """E|⟨x, θ − θ°⟩ − noise·N(0, 1)|, (…, d) → (…), d ≥ 2, to rounding: a periodic integral over the angle to x.

        With a = G‖θ − θ°‖cos φ and φ of density ∝ sin^{d−2} φ: E|a − σn| = a·erf(a/√2σ) + σ√(2/π)·e^{−a²/2σ²}.
        Where σ ≪ a the kink of |a| leaves a relative error of 3·10⁻⁶. Raises ValueError for d = 1.
        """
        if self.d < 2:
            raise ValueError(f"expected_loss needs d >= 2, got d={self.d}")
        angle = torch.linspace(0, math.pi, 1025, dtype=theta.dtype, device=theta.device)
        weight = angle.sin() ** (self.d - 2)
        weight[[0, -1]] /= 2  # the trapezium rule's ends
        a = self.G * torch.linalg.vector_norm(theta - self.planted.to(theta), dim=-1, keepdim=True) * angle.cos()
        scaled = a / (math.sqrt(2) * max(self.noise, torch.finfo(a.dtype).tiny))
        mean = a * scaled.erf() + self.noise * math.sqrt(2 / math.pi) * (-scaled * scaled).exp()
        return (mean * weight).sum(-1) / weight.sum()


class Quantile(Kinked, Regression):
    """The pinball loss max(−τr, (1 − τ)r), whose minimiser is a τ-quantile. Raises ValueError unless 0 < tau < 1."""

    def __init__(self, planted, tau: float, noise: float = 0.5, G: float = 1.0):
        super().__init__(planted, noise, G)
        if not 0 < tau < 1:
            raise ValueError(f"tau must lie between 0 and 1, got {tau}")
        self.tau, self.lipschitz = tau, max(tau, 1 - tau)

    def kink(self, y):
        return 0.5 - self.tau, 0.5, y


class Huber(Kinked, Regression):
    """r²/2 for |r| ≤ δ, δ(|r| − δ/2) beyond: θ° minimises the expected loss. Raises ValueError unless delta > 0."""

    roundness = 1.0

    def __init__(self, planted, delta: float = 0.5, noise: float = 0.5, G: float = 1.0):
        super().__init__(planted, noise, G)
        self.delta = self.lipschitz = _positive("delta", delta)

    def kink(self, y):
        return 0.0, self.delta, y

    def link(self, u, y):
        r = u - y
        slope = r.clamp(-self.delta, self.delta)
        return slope * (r - slope / 2), slope
