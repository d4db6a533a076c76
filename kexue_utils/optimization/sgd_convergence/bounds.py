"""What the theorems promise: upper bounds on an average or a last loss, for any schedule η_1, …, η_T.

All take a schedule (…, T), float64, and return the bound (…), differentiable in η; D: the diameter of Θ,
D1: ‖θ_1 − θ*‖, G: a bound on gradient norms. In the schedule's scale α each is A/α + Bα with A ∝ D² and B ∝ G².
All raise ValueError for a step that is not positive, naming its t, and for D < 0 or G < 0.
Sources: https://kexue.fm/archives/9902, 11469, 11480, 11494; Zinkevich 2003; Defazio et al. arXiv:2310.07831.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .schedules import constant


def require_positive(eta: Tensor) -> None:
    """Raise ValueError, naming t, where a step η_t is not positive and finite."""
    if not eta.ndim or not eta.shape[-1]:
        raise ValueError(f"eta must be a schedule of shape (T,), got shape {tuple(eta.shape)}")
    bad = (~((eta > 0) & torch.isfinite(eta))).nonzero()
    if len(bad):
        value, t = eta[tuple(bad[0])], int(bad[0, -1]) + 1
        raise ValueError(f"steps must be positive and finite, got eta={value:g} at t={t}")


def require_nonincreasing(eta: Tensor, instead: str) -> None:
    """Raise ValueError, naming t and the bound to use ``instead``, where η_t > η_{t−1}."""
    up = (eta[..., 1:] > eta[..., :-1]).nonzero()
    if len(up):
        before, after = eta[tuple(up[0])], eta[(*up[0, :-1], up[0, -1] + 1)]
        raise ValueError(f"schedule increases at t={int(up[0, -1]) + 2} (from {before:g} to {after:g}); use {instead}")


def _require(eta: Tensor, D: float, G: float) -> None:
    require_positive(eta)
    if not (D >= 0 and G >= 0):
        raise ValueError(f"D and G must not be negative, got {D} and {G}")


def core_bound(eta: Tensor, D: float, G: float) -> Tensor:
    """Average regret of projected SGD on every sample path: D²/(2Tη_T) + (G²/2T) Σ_t η_t   (sgd-core)

    Raises ValueError for a schedule that increases somewhere.
    """
    _require(eta, D, G)
    require_nonincreasing(eta, "core_bound_general")
    T = eta.shape[-1]
    return D**2 / (2 * T * eta[..., -1]) + G**2 / (2 * T) * eta.sum(-1)


def core_bound_general(eta: Tensor, D: float, G: float) -> Tensor:
    """The same for any positive schedule: (D²/2T)(1/η_1 + Σ_{t≥2} (1/η_t − 1/η_{t−1})₊) + (G²/2T) Σ_t η_t

    It is the core bound where the schedule does not increase   (sgd-general)
    """
    _require(eta, D, G)
    inverse = 1 / eta
    climb = inverse[..., 0] + inverse.diff(dim=-1).clamp(min=0).sum(-1)
    return (D**2 * climb + G**2 * eta.sum(-1)) / (2 * eta.shape[-1])


def weighted_bound(eta: Tensor, D1: float, G: float) -> Tensor:
    """No projection, any schedule: Σ η_t q_t / Σ η_t ≤ (D_1² + G² Σ η_t²)/(2 Σ η_t), q_t = E[L(θ_t)] − L(θ*)

    (sgd-weighted)
    """
    _require(eta, D1, G)
    return (D1**2 + G**2 * (eta * eta).sum(-1)) / (2 * eta.sum(-1))


def average_bound_unbounded(eta: Tensor, D1: float, G: float) -> Tensor:
    """No projection, η non-increasing: (1/T) Σ q_t ≤ (D_1² + G² Σ η_t²)/(2Tη_T)   (sgd-weighted)

    θ* must minimise L, as the proof drops q_t ≥ 0. Raises ValueError for a schedule that increases somewhere.
    """
    _require(eta, D1, G)
    require_nonincreasing(eta, "weighted_bound")
    return (D1**2 + G**2 * (eta * eta).sum(-1)) / (2 * eta.shape[-1] * eta[..., -1])


def last_iterate_bound_inv(eta: Tensor, D1: float, G: float) -> Tensor:
    """q_T ≤ D_1²/(2Tη_T) + G²η_T/2 + (G²/2η_T) Σ_{t<T} η_t²/(T−t), η non-increasing   (sgd-last)

    Its last sum divides by η_T: useless for schedules that decay to zero. Raises ValueError for one that increases.
    """
    _require(eta, D1, G)
    require_nonincreasing(eta, "last_iterate_bound")
    T, last = eta.shape[-1], eta[..., -1]
    left = torch.arange(T - 1, 0, -1, dtype=eta.dtype, device=eta.device)
    noise = last + (eta[..., :-1] ** 2 / left).sum(-1) / last
    return D1**2 / (2 * T * last) + G**2 / 2 * noise


def last_iterate_bound(eta: Tensor, D1: float, G: float) -> Tensor:
    """q_T ≤ D_1²/(2η_{1:T}) + (G²/2)(Σ_{t<T} η_t²/η_{t+1:T} + η_T), η_{a:b} = η_a + … + η_b, any schedule

    (sgd-any)
    """
    _require(eta, D1, G)
    rest = eta.flip(-1).cumsum(-1).flip(-1)
    noise = (eta[..., :-1] ** 2 / rest[..., 1:]).sum(-1) + eta[..., -1]
    return D1**2 / (2 * rest[..., 0]) + G**2 / 2 * noise


def anytime_curve(eta: Tensor, D1: float, G: float) -> Tensor:
    """``last_iterate_bound`` of every prefix η_1, …, η_t, t = 1, …, T: (T,) → (T,), in O(T²) time and O(T) memory."""
    return torch.stack([last_iterate_bound(eta[:t], D1, G) for t in range(1, len(eta) + 1)])


def sharp_linear_bound(T: int, gamma: float, D1: float, G: float) -> float:
    """Last loss of η_t = γ(1 − t/T): q_T ≤ D_1²/(2γT) + γG²/2, which is D_1G/√T at γ = D_1/(G√T)   (sgd-sharp)"""
    return float(core_bound(constant(T, gamma), D1, G))


def best_scale(bound: Callable[[Tensor, float, float], Tensor], eta: Tensor, D: float, G: float):
    """The α that makes bound(αη, D, G) = A/α + Bα least, and the least value: √(A/B), 2√(AB)   (sgd-table)

    bound: any of this module that takes a schedule. Returns a pair of tensors (…). D and G must be positive.
    """
    if not (D > 0 and G > 0):
        raise ValueError(f"D and G must be positive, got {D} and {G}")
    A, B = bound(eta, D, 0.0), bound(eta, 0.0, G)
    return (A / B).sqrt(), 2 * (A * B).sqrt()


def best_schedule(T: int, D1: float = 1.0, G: float = 1.0, start: Tensor | None = None) -> Tensor:
    """The schedule (T,) of the least ``last_iterate_bound``, found numerically over log η   (sgd-discrete)

    start: a schedule to start from, constant D_1/(G√T) by default. O(T) memory; a second for T = 100.
    """
    start = constant(T, D1 / (G * T**0.5)) if start is None else start
    require_positive(start)
    log_eta = start.log().requires_grad_()
    search = torch.optim.LBFGS([log_eta], max_iter=2000, history_size=50, tolerance_grad=1e-12, tolerance_change=1e-15,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def objective():
        search.zero_grad()
        value = last_iterate_bound(log_eta.exp(), D1, G) * T**0.5 / (D1 * G)
        value.backward()
        return value

    search.step(objective)
    return log_eta.detach().exp()
