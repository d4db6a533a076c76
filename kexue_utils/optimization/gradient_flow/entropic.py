"""JKO steps with an entropic plan on a grid, by scaling iterations in the log domain.

Sources: G. Peyré, SIAM J. Imaging Sci. 8(4), 2323 (2015); https://kexue.fm/archives/9660
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConvergenceError, require_count, require_positive


class EntropicStep(NamedTuple):
    """density: the new q; log_b: scaling of its side, to start the next step from; iterations; residual, in L1."""

    density: Tensor
    log_b: Tensor
    iterations: int
    residual: float


def entropic_jko_step(
    q: Tensor,
    axes: Sequence[Tensor],
    V: Callable[..., Tensor],
    tau: float,
    eps: float,
    tol: float = 1e-11,
    max_iter: int = 10_000,
    log_b: Tensor | None = None,
) -> EntropicStep:
    """One JKO step for F[q] = ∫q(V + log q) with W₂² replaced by min_π ⟨|x−y|²,π⟩ + ε∫π log π   (gf-entropic)

        π = a(x)K(x,y)b(y),   K = e^{−|x−y|²/ε},   γ = ε/2τ,
        a = q_k/Kb,   q' ∝ ((Kᵀa)^γ e^{−V})^{1/(1+γ)},   b = q'/Kᵀa

    q: a density on a grid of evenly spaced points ``axes``, ≥ 0, of shape (len(axis), ...), normalised here; V:
    function of one coordinate tensor a dimension; ``log_b``: from an earlier step, to start nearer. K is a product over
    the dimensions and is applied to one at a time, as a sum of exponentials: n³ operations and memory in 2-D, and
    nothing under- or overflows. Needs a grid no coarser than about √ε/4; biased, like every plan that blurs: a Gaussian
    ends with a variance too large by the factor 1 + ε/4τ. Device and dtype of q. ``tol``: L1 change of q' by a round.
    Raises ValueError for a q of another shape, negative or without mass, tau, eps, tol ≤ 0; ConvergenceError.
    """
    require_positive(tau=tau, eps=eps, tol=tol)
    require_count(max_iter=max_iter)
    if q.shape != tuple(map(len, axes)):
        raise ValueError(f"q must have shape {tuple(map(len, axes))}, got {tuple(q.shape)}")
    if not (q >= 0).all() or not 0 < q.sum() < math.inf:
        raise ValueError("q must be finite, not negative, and have mass")
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    kernels = [-((axis[:, None] - axis) ** 2) / eps for axis in axes]
    energy = V(*torch.meshgrid(*axes, indexing="ij"))
    gamma = eps / (2 * tau)
    log_q = _log_normalize(q.log(), cell)
    log_b = torch.zeros_like(q) if log_b is None else log_b
    new = log_q
    for iteration in range(1, max_iter + 1):
        log_z = _blur(log_q - _blur(log_b, kernels), kernels)
        old, new = new, _log_normalize((gamma * log_z - energy) / (1 + gamma), cell)
        log_b = new - log_z
        residual = ((new.exp() - old.exp()).abs().sum() * cell).item()
        if residual <= tol:
            return EntropicStep(new.exp(), log_b, iteration, residual)
    raise ConvergenceError(f"no entropic JKO step in {max_iter} iterations: the residual is {residual:.3g}")


def _log_normalize(log_q, cell):
    return log_q - log_q.flatten().logsumexp(0) - math.log(cell)


def _blur(log_b, kernels):
    """log Kb up to a constant; K is symmetric."""
    for d, kernel in enumerate(kernels):
        moved = log_b.movedim(d, -1)[..., None, :]
        log_b = torch.logsumexp(moved + kernel, -1).movedim(-1, d)
    return log_b
