"""Paths of points down a function f: gradient descent, proximal steps, and the flow that both discretise.

Source: https://kexue.fm/archives/9660; F. Santambrogio, arXiv:1609.03890; D. Barrett, B. Dherin, arXiv:2009.11162
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import ConvergenceError, require_count, require_positive

NORMS = ("l2", "linf", "l1", "spectral", "mahalanobis")

# Dormand and Prince's pair of orders 5 and 4: rows of the stages (the last one is the solution), and its error.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0
_SMALLEST_STEP = 1e-14  # of the whole interval
_MAX_NEWTON, _MAX_HALVINGS = 100, 60


def gd_path(grad: Callable[[Tensor], Tensor], x0: Tensor, lr: float, steps: int) -> Tensor:
    """Gradient descent: x_{k+1} = x_k − α∇f(x_k), k = 0, …, steps−1   (gf-gd)

    grad: ∇f, a function of tensors of the shape of x0; lr: α > 0, any x0 shape and dtype, batches included.
    Returns (steps+1, *x0.shape), x0 first. On a horizon T it is O(α) away from :func:`gradient_flow` (gf-order).
    Raises ValueError for an lr or steps that is not positive.
    """
    require_positive(lr=lr)
    require_count(steps=steps)
    path = [x0]
    for _ in range(steps):
        path.append(path[-1] - lr * grad(path[-1]))
    return torch.stack(path)


def prox_path(
    grad: Callable[[Tensor], Tensor],
    hess: Callable[[Tensor], Tensor],
    x0: Tensor,
    lr: float,
    steps: int,
    tol: float = 1e-12,
) -> Tensor:
    """Proximal steps, x_{k+1} = argmin_x |x−x_k|²/2α + f(x), that is x_{k+1} = x_k − α∇f(x_{k+1})   (gf-prox)

    grad, hess: ∇f and its Hessian as functions of x (..., d), with values (..., d) and (..., d, d). Returns
    (steps+1, ..., d), x0 first. Newton from x_k with step halving: it finds a stationary point, which is the minimiser
    if α < 1/λ⁻, −λ⁻ the most negative curvature of f; for convex f, with any α. ``tol``: the largest entry
    of x − x_k + α∇f(x), relative to (1+α)(1 + max|x_k|).
    Raises ValueError for an lr or steps that is not positive; ConvergenceError, with step and residual.
    """
    require_positive(lr=lr, tol=tol)
    require_count(steps=steps)
    path = [x0]
    for step in range(steps):
        path.append(_prox(grad, hess, path[-1], lr, tol, step))
    return torch.stack(path)


def _prox(grad, hess, x0, lr, tol, step):
    def residual(x):
        return x - x0 + lr * grad(x)

    eye = torch.eye(x0.shape[-1], dtype=x0.dtype, device=x0.device)
    x, r = x0, residual(x0)
    enough = tol * (1 + lr) * (1 + x0.abs().max())
    for _ in range(_MAX_NEWTON):
        if r.abs().max() <= enough:
            return x
        direction, info = torch.linalg.solve_ex(eye + lr * hess(x), r[..., None])
        if info.any():
            break
        x, r = _halve(residual, x, r, direction[..., 0])
    raise ConvergenceError(f"no proximal point at step {step}: the residual is {r.abs().max():.3g}, not {enough:.3g}")


def _halve(residual, x, r, direction):
    """Newton's step, halved for each member of the batch until its residual does not grow."""
    t = torch.ones_like(x[..., :1])
    for _ in range(_MAX_HALVINGS):
        y = x - t * direction
        new = residual(y)
        grows = ~(new.norm(dim=-1, keepdim=True) <= r.norm(dim=-1, keepdim=True))  # nan grows
        if not grows.any():
            break
        t = torch.where(grows, t / 2, t)
    return y, new


def gradient_flow(
    grad: Callable[[Tensor], Tensor],
    x0: Tensor,
    ts: Tensor | Sequence[float],
    rtol: float = 1e-9,
    atol: float = 1e-12,
) -> Tensor:
    """The flow dx/dt = −∇f(x) at the times ts, x(ts[0]) = x0   (gf-flow)

    Dormand–Prince 5(4), one step size for the whole batch, chosen by its worst entry; steps end on every t of ts.
    grad: ∇f of tensors of the shape of x0, which is arbitrary (float64 for the default tolerances). Returns
    (len(ts), *x0.shape). f falls along it at the rate |∇f|² (gf-dissipation).
    Raises ValueError for ts that do not increase; ConvergenceError where the step vanishes (x leaves to infinity).
    """
    ts = torch.as_tensor(ts, dtype=torch.float64).tolist()
    if len(ts) < 2 or any(not a < b for a, b in zip(ts, ts[1:], strict=False)):
        raise ValueError(f"ts must be at least two increasing times, got {ts}")
    require_positive(rtol=rtol, atol=atol)

    def velocity(x):
        return -grad(x)

    x, t, k = x0, ts[0], velocity(x0)
    h = span = ts[-1] - ts[0]
    path = [x0]
    for target in ts[1:]:
        while t < target:
            step = min(h, target - t)
            y, k_y, error = _dormand_prince(velocity, x, k, step)
            ratio = (error.abs() / (atol + rtol * torch.maximum(x.abs(), y.abs()))).max().item()
            change = min(_GROW, max(_SHRINK, _SAFETY * ratio**-0.2)) if 0 < ratio < float("inf") else _SHRINK
            if ratio <= 1:
                t, x, k = (target if step == target - t else t + step), y, k_y
                h = max(h, step * change)
            else:
                h = step * change
            if h < _SMALLEST_STEP * span:
                raise ConvergenceError(
                    f"the step of the flow vanishes at t = {t:.6g}, where max|x| = {x.abs().max():.3g}"
                )
        path.append(x)
    return torch.stack(path)


def _dormand_prince(velocity, x, k, h):
    """One step: the point of order 5, the velocity there, and the difference from order 4."""
    ks = [k]
    for row in _STAGES:
        y = x + h * sum(a * stage for a, stage in zip(row, ks, strict=True))
        ks.append(velocity(y))
    return y, ks[-1], h * sum(e * stage for e, stage in zip(_ERROR, ks, strict=True))


def modified_gradient(
    grad: Callable[[Tensor], Tensor], hvp: Callable[[Tensor, Tensor], Tensor], lr: float, kind: str = "explicit"
) -> Callable[[Tensor], Tensor]:
    """Gradient of f ± (α/4)|∇f|², whose flow the steps of size α follow to O(α²): g ± (α/2)Hg   (gf-modified)

    grad: g = ∇f; hvp(x, v): Hv, the Hessian of f at x times v. ``kind``: ``"explicit"`` for gradient descent (+),
    ``"implicit"`` for proximal steps (−). Returns a function of x.
    Raises ValueError for another kind or an lr that is not positive. Source: arXiv:2009.11162
    """
    require_positive(lr=lr)
    if kind not in ("explicit", "implicit"):
        raise ValueError(f"kind must be 'explicit' or 'implicit', got {kind!r}")
    half = lr / 2 if kind == "explicit" else -lr / 2

    def modified(x):
        g = grad(x)
        return g + half * hvp(x, g)

    return modified


def steepest_direction(g: Tensor, norm: str, P: Tensor | None = None) -> Tensor:
    """The unit step of steepest descent, argmin of ⟨g, u⟩ over ‖u‖ = 1, in a norm of choice   (gf-norms, gf-natural)

    - ``l2``           −g/|g|
    - ``linf``         −sign g
    - ``l1``           −sign(g_i) e_i, i = argmax |g_i| (the first one)
    - ``spectral``     −UVᵀ of a matrix G = USVᵀ, of its singular directions that are not 0
    - ``mahalanobis``  −P⁻¹g/√(gᵀP⁻¹g), for ‖u‖² = uᵀPu; with P the Fisher matrix, the natural gradient

    ⟨g, u⟩ = −‖g‖_*, minus the dual norm. g: (..., d), for ``spectral`` (..., m, n); P: (..., d, d), symmetric positive
    definite. Returns the shape of g; zeros where g is 0.
    Raises ValueError for an unknown norm, and for a P that is missing or not positive definite.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "linf":
        return -g.sign()
    if norm == "l1":
        largest = g.abs().argmax(-1, keepdim=True)
        return torch.zeros_like(g).scatter(-1, largest, -g.gather(-1, largest).sign())
    if norm == "spectral":
        U, S, Vh = torch.linalg.svd(g, full_matrices=False)
        rounding = S[..., :1] * max(g.shape[-2:]) * torch.finfo(g.dtype).eps
        return -(U * (S > rounding)[..., None, :]) @ Vh
    steep = g if norm == "l2" else _solve_metric(P, g)
    dual = (g * steep).sum(-1, keepdim=True).sqrt()
    return -steep / torch.where(dual > 0, dual, 1)


def _solve_metric(P, g):
    if P is None:
        raise ValueError("P is required for norm 'mahalanobis'")
    L, info = torch.linalg.cholesky_ex(P)
    if info.any():
        raise ValueError("P must be symmetric positive definite")
    return torch.cholesky_solve(g[..., None], L)[..., 0]
