"""f-divergences and the velocity fields of their Wasserstein gradient flows.

Source: https://kexue.fm/archives/9660; https://kexue.fm/archives/6016
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def _kl_qp(r):
    return -r.log(), -1 / r, 1 / r**2


def _kl_pq(r):
    return r * r.log(), r.log() + 1, 1 / r


def _chi2_qp(r):
    return 1 / r - 1, -1 / r**2, 2 / r**3


def _chi2_pq(r):
    return (r - 1) ** 2, 2 * (r - 1), torch.full_like(r, 2)


def _hellinger(r):
    return (1 - r.sqrt()) ** 2, 1 - r.rsqrt(), r.rsqrt() / (2 * r)


def _jensen_shannon(r):
    m = (1 + r) / 2
    return (r * r.log() - 2 * m * m.log()) / 2, (r / m).log() / 2, 1 / (4 * r * m)


_DIVERGENCES = {
    "kl_qp": _kl_qp,
    "kl_pq": _kl_pq,
    "chi2_qp": _chi2_qp,
    "chi2_pq": _chi2_pq,
    "hellinger": _hellinger,
    "jensen_shannon": _jensen_shannon,
}
DIVERGENCES = tuple(_DIVERGENCES)


class FDivergence(NamedTuple):
    """D_f(p‖q) = ∫q f(r), r = p/q, and what its gradient flow needs; see :func:`f_divergence`.

    derivatives: r → (f, f', f''), on float tensors of any shape with r > 0.
    """

    name: str
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    def f(self, r: Tensor) -> Tensor:
        """f(r), with f(1) = 0."""
        return self.derivatives(r)[0]

    def first_variation(self, r: Tensor) -> Tensor:
        """δD/δq = f(r) − r f'(r), up to a constant   (gf-divergence)"""
        f, df, _ = self.derivatives(r)
        return f - r * df

    def gain(self, r: Tensor) -> Tensor:
        """How strongly the flow climbs the ratio: v = gain(r)·∇r with gain = r f''(r) > 0   (gf-divergence)"""
        return r * self.derivatives(r)[2]

    def velocity(self, r: Tensor, grad_r: Tensor) -> Tensor:
        """v = −∇(δD/δq) = r f''(r)∇r of the flow ∂q/∂t = −∇·(qv); r: (...), grad_r: (..., d)   (gf-divergence)"""
        return self.gain(r)[..., None] * grad_r


def f_divergence(name: str) -> FDivergence:
    """The divergence of p from q that a name stands for, D = ∫q f(p/q)   (gf-divergence)

    - ``kl_qp``           KL(q‖p), f = −log r: the only one whose flow is linear in q
    - ``kl_pq``           KL(p‖q), f = r log r
    - ``chi2_qp``         χ²(q‖p), f = 1/r − 1
    - ``chi2_pq``         χ²(p‖q), f = (r−1)²
    - ``hellinger``       ∫(√p−√q)², f = (1−√r)²
    - ``jensen_shannon``  ½KL(p‖m) + ½KL(q‖m), m = (p+q)/2

    Raises ValueError for another name.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"name must be one of {', '.join(DIVERGENCES)}, got {name!r}")
    return FDivergence(name, _DIVERGENCES[name])
