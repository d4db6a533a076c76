"""Gaussian targets, where flow, implicit, split and noisy steps are all known exactly.

Source: https://kexue.fm/archives/9660; A. Wibisono, arXiv:1802.08089; M. Diao et al., arXiv:2304.05398
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import require_positive

ArrayLike = Tensor | Sequence | float


def _spectral(S: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a symmetric matrix, through its eigenvalues."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * function(values)[..., None, :]) @ vectors.mT


def _apply(M, v):
    return (M @ v[..., None])[..., 0]


def _require_spd(name, S):
    S = torch.as_tensor(S, dtype=torch.float64)
    square = S.ndim >= 2 and S.shape[-1] == S.shape[-2]
    if not square or (S - S.mT).abs().max() > 1e-9 * S.abs().max() or torch.linalg.cholesky_ex(S).info.any():
        raise ValueError(f"{name} must be symmetric positive definite, got {S.tolist()}")
    return S


def bures_w2(m1: ArrayLike, C1: ArrayLike, m2: ArrayLike, C2: ArrayLike) -> Tensor:
    """Squared distance W₂² of two Gaussians: |m₁−m₂|² + tr(C₁ + C₂ − 2(C₁^½ C₂ C₁^½)^½)   (gf-w2)

    m: (..., d), C: (..., d, d), symmetric positive definite; returns (...), float64. Near 0 it is exact to about
    10⁻¹⁶ tr C, its root to 10⁻⁸. Raises ValueError for a covariance that is not symmetric positive definite.
    """
    C1, C2 = _require_spd("C1", C1), _require_spd("C2", C2)
    shift = torch.as_tensor(m1, dtype=torch.float64) - torch.as_tensor(m2, dtype=torch.float64)
    root = _spectral(C1, torch.sqrt)
    # abs: rounding may leave a little less than 0.
    overlap = torch.linalg.eigvalsh(root @ C2 @ root).abs().sqrt().sum(-1)
    trace = torch.einsum("...ii->...", C1 + C2)
    return (shift**2).sum(-1) + (trace - 2 * overlap).abs()


class GaussianTarget:
    """The target p = N(μ, Σ*), with V = −log p = ½(x−μ)ᵀA(x−μ) + const, A = Σ*⁻¹, and F[q] = KL(q‖p).

    cov: Σ*, (..., d, d), mean: μ, (..., d). All methods map the mean m (..., d) and covariance S (..., d, d) of a
    Gaussian q to those of the next one, exactly, in float64, batched, differentiable.
    Raises ValueError for a covariance, here or in a method, that is not symmetric positive definite.
    """

    def __init__(self, cov: ArrayLike, mean: ArrayLike = 0.0):
        self.cov = _require_spd("covariance", cov)
        self.mean = torch.as_tensor(mean, dtype=torch.float64) + self.cov.new_zeros(self.cov.shape[-1])
        self.A = _spectral(self.cov, torch.reciprocal)
        self.eye = torch.eye(self.cov.shape[-1], dtype=torch.float64, device=self.cov.device)

    def _centred(self, m, S):
        return torch.as_tensor(m, dtype=torch.float64) - self.mean, _require_spd("S", S)

    def ou_marginal(self, m0: ArrayLike, S0: ArrayLike, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The flow (Ornstein–Uhlenbeck): m_t = μ + e^{−At}(m₀−μ), Σ_t = Σ* + e^{−At}(Σ₀−Σ*)e^{−At}   (gf-ou)

        t: a number, or times of shape (...), that broadcast with the batch. Returns (m_t, Σ_t).
        """
        m, S = self._centred(m0, S0)
        t = torch.as_tensor(t, dtype=torch.float64)[..., None]
        decay = _spectral(self.A, lambda rates: torch.exp(-rates * t))
        return self.mean + _apply(decay, m), self.cov + decay @ (S - self.cov) @ decay

    def kl(self, m: ArrayLike, S: ArrayLike) -> Tensor:
        """KL(N(m, S)‖p) = ½(tr AS − d − log det AS + (m−μ)ᵀA(m−μ)), in nats   (gf-gap)"""
        m, S = self._centred(m, S)
        AS = self.A @ S
        quadratic = torch.einsum("...ii->...", AS - self.eye) + (m * _apply(self.A, m)).sum(-1)
        return (quadratic - torch.linalg.slogdet(AS).logabsdet) / 2

    def fisher_information(self, m: ArrayLike, S: ArrayLike) -> Tensor:
        """I(q|p) = ∫q|∇log(q/p)|² = tr((A−S⁻¹)S(A−S⁻¹)) + |A(m−μ)|²   (gf-energy, gf-sobolev)

        The rate at which KL falls along the flow.
        """
        m, S = self._centred(m, S)
        slope = self.A - _spectral(S, torch.reciprocal)
        return torch.einsum("...ij,...jk,...ki->...", slope, S, slope) + (_apply(self.A, m) ** 2).sum(-1)

    def jko_step(self, m: ArrayLike, S: ArrayLike, tau: float) -> tuple[Tensor, Tensor]:
        """The minimiser of W₂²(q, q_k)/2τ + KL(q‖p), in closed form for any d   (gf-jko, gf-gaussian-jko)

            m' = μ + (I+τA)⁻¹(m−μ),   R S' R = S,   R = I + τA − τS'⁻¹ ≻ 0

        R is the map back from the new Gaussian to the old one. As S'⁻¹ = R S⁻¹ R, it solves R + τ R S⁻¹ R = I + τA,
        a quadratic equation in Y = S^{−½} R S^{−½}; no matrices need commute. Raises ValueError for tau ≤ 0.
        """
        require_positive(tau=tau)
        m, S = self._centred(m, S)
        B = self.eye + tau * self.A
        inverse_root = _spectral(S, torch.rsqrt)
        # Y⁻¹ with Y = (√(1+4τC) − 1)/2τ, without the cancellation of small τ.
        Y_inverse = _spectral(inverse_root @ B @ inverse_root, lambda C: (1 + torch.sqrt(1 + 4 * tau * C)) / (2 * C))
        half = inverse_root @ Y_inverse
        return self.mean + torch.linalg.solve(B, m[..., None])[..., 0], half @ half.mT

    def fb_step(self, m: ArrayLike, S: ArrayLike, h: float) -> tuple[Tensor, Tensor]:
        """Forward step on V, JKO step on the entropy: S̃ = (I−hA)S(I−hA), S' = ½(S̃ + 2hI + (S̃(S̃+4hI))^½)   (gf-split)

        Its fixed point is p itself for h ≤ 1/λ_max(A). Beyond, the forward step carries points over the mean: the fixed
        point is another law, in one dimension of variance hσ²/(2σ²−h), and from 2/λ_max(A) on there is none. Raises
        ValueError for h ≤ 0.
        """
        require_positive(h=h)
        m, S = self._forward(m, S, h)
        return m, _spectral(S, lambda s: (s + 2 * h + torch.sqrt(s * (s + 4 * h))) / 2)

    def ula_step(self, m: ArrayLike, S: ArrayLike, h: float) -> tuple[Tensor, Tensor]:
        """One step of the unadjusted Langevin algorithm, x' = x − h∇V(x) + √(2h) ξ: S' = (I−hA)S(I−hA) + 2hI   (gf-ula)

        Raises ValueError for h ≤ 0.
        """
        require_positive(h=h)
        m, S = self._forward(m, S, h)
        return m, S + 2 * h * self.eye

    def _forward(self, m, S, h):
        m, S = self._centred(m, S)
        step = self.eye - h * self.A
        return self.mean + _apply(step, m), step @ S @ step

    def ula_stationary(self, h: float) -> Tensor:
        """Covariance that ULA ends in, (A − hA²/2)⁻¹; in one dimension σ²/(1 − h/2σ²), not σ²   (gf-ula)

        Raises ValueError for h ≤ 0 and for h ≥ 2/λ_max(A), where the step expands.
        """
        require_positive(h=h)
        if h >= (limit := 2 / torch.linalg.eigvalsh(self.A).max().item()):
            raise ValueError(f"h must be less than 2/lambda_max(A) = {limit:.6g}, got {h}")
        return _spectral(self.A, lambda rate: 1 / (rate - h * rate**2 / 2))

    def entropic_jko_step_1d(self, m: ArrayLike, v: ArrayLike, tau: float, eps: float) -> tuple[Tensor, Tensor]:
        """JKO with an entropic plan, W₂² → min ⟨c,π⟩ + ε∫π log π, for d = 1, from N(m, v)   (gf-entropic)

            v' = v/M² + ε/2M,   M = B − τ/v' > 0,   B = 1 + τ/σ²,   m' = μ + (m−μ)/B

        M is the positive root of (τ+ε/2)M² + (v−εB/2)M − Bv = 0. The variance ends near σ²(1 + ε/4τ).
        m, v: (...); returns (m', v'). Raises ValueError for d > 1, v ≤ 0, tau ≤ 0 or eps < 0.
        """
        require_positive(tau=tau)
        if self.cov.shape[-1] != 1:
            raise ValueError(f"the target must have one dimension, got {self.cov.shape[-1]}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        m, v = (torch.as_tensor(value, dtype=torch.float64) for value in (m, v))
        if not (v > 0).all():
            raise ValueError(f"v must be positive, got {v.tolist()}")
        B = 1 + tau / self.cov[..., 0, 0]
        linear = v - eps * B / 2
        M = (torch.sqrt(linear**2 + 4 * (tau + eps / 2) * B * v) - linear) / (2 * tau + eps)
        mean = self.mean[..., 0]
        return mean + (m - mean) / B, v / M**2 + eps / (2 * M)
