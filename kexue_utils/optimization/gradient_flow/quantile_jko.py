"""JKO steps on a line, in the quantile function: a convex problem with a tridiagonal Hessian.

Source: https://kexue.fm/archives/9660; F. Santambrogio, arXiv:1609.03890
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, solveh_banded
from scipy.special import ndtr

from .errors import ConvergenceError, require_positive

GRIDS = ("stretched", "midpoint")
_DECREMENT = 1e-18  # squared length of the last Newton step; the error left is of the order of its square
_MAX_NEWTON, _MAX_HALVINGS = 100, 60
_ROUNDING = 1e-14  # of the objective


class JKOInfo(NamedTuple):
    """newton_iters; residual: largest entry of the gf-optimality equation; objective_drop: of W₂²/2τ + F, ≥ 0."""

    newton_iters: int
    residual: float
    objective_drop: float


def _mass(z_low, z_high):
    """Φ(z_high) − Φ(z_low), from the nearer tail: differences of Φ near 1 would lose every digit."""
    flip = z_low > 0
    low, high = np.where(flip, -z_high, z_low), np.where(flip, -z_low, z_high)
    return ndtr(high) - ndtr(low)


class QuantileJKO1D:
    """JKO steps for F[q] = ∫q(V + log q) in one dimension: X_{k+1} = argmin over increasing X of   (gf-quantile)

        ∫₀¹ [(X−X_k)²/2τ + V(X) − log X'(u)] du,      stationary: (X−X_k)/τ + V'(X) + d/du(1/X') = 0   (gf-optimality)

    V, dV, d2V: the potential and its derivatives on float64 numpy arrays. The problem is strictly convex if V'' > −1/τ.
    ``grid``: ``"stretched"``, n nodes u = Φ(z) for n equal steps of z in ±zmax (None: 2√(ln n)), error in W₂ about
    n^−1.8; or ``"midpoint"``, u = (i+½)/n, whose outermost cells hold 1/n of the mass and leave an error n^−½.
    State: X (n,), the quantiles at u (n,), set by :meth:`from_quantile` or :meth:`from_density`; w (n,), the mass of
    each node, sums to 1; du (n−1,), the mass between neighbours.
    Raises ValueError for an unknown grid, n < 3 or zmax ≤ 0.
    """

    def __init__(
        self,
        V: Callable[[np.ndarray], np.ndarray],
        dV: Callable[[np.ndarray], np.ndarray],
        d2V: Callable[[np.ndarray], np.ndarray],
        grid: str = "stretched",
        n: int = 400,
        zmax: float | None = None,
    ):
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
        if n < 3:
            raise ValueError(f"n must be at least 3, got {n}")
        zmax = 2 * math.sqrt(math.log(n)) if zmax is None else zmax
        require_positive(zmax=zmax)
        self.V, self.dV, self.d2V, self.X = V, dV, d2V, None
        if grid == "midpoint":
            self.u = (np.arange(n) + 0.5) / n
            self.w, self.du = np.full(n, 1 / n), np.full(n - 1, 1 / n)
        else:
            z = np.linspace(-zmax, zmax, n)
            between = np.concatenate(([-np.inf], (z[1:] + z[:-1]) / 2, [np.inf]))
            self.u, self.w, self.du = ndtr(z), _mass(between[:-1], between[1:]), _mass(z[:-1], z[1:])

    def from_quantile(self, Q: Callable[[np.ndarray], np.ndarray]) -> "QuantileJKO1D":
        """Start from a quantile function, X = Q(u); returns self. Raises ValueError if Q does not increase."""
        X = np.asarray(Q(self.u), dtype=np.float64)
        if X.shape != self.u.shape or not (np.diff(X) > 0).all():
            raise ValueError("Q must be an increasing function on (0, 1)")
        self.X = X
        return self

    def from_density(self, x: np.ndarray, q: np.ndarray) -> "QuantileJKO1D":
        """Start from a density q > 0, linear between the increasing points x (m,), normalised here; returns self.

        Its quantiles are exact. Raises ValueError for another shape, points that do not increase, a q not positive.
        """
        x, q = np.asarray(x, dtype=np.float64), np.asarray(q, dtype=np.float64)
        if x.ndim != 1 or q.shape != x.shape or len(x) < 2 or not (np.diff(x) > 0).all():
            raise ValueError(f"x and q must be increasing points and densities there, got {x.shape} and {q.shape}")
        if not ((q > 0) & np.isfinite(q)).all():
            raise ValueError(f"q must be positive, got {q.min():g}")
        dx, dq = np.diff(x), np.diff(q)
        cdf = np.concatenate(([0.0], np.cumsum((q[1:] + q[:-1]) / 2 * dx)))

        def quantile(u):
            level = u * cdf[-1]
            i = np.searchsorted(cdf, level, side="right") - 1
            slope, rest = dq[i] / dx[i], level - cdf[i]
            # q_i s + slope s²/2 = rest, without dividing by a slope of 0
            return x[i] + 2 * rest / (q[i] + np.sqrt(q[i] ** 2 + 2 * slope * rest))

        return self.from_quantile(quantile)

    def step(self, tau: float) -> JKOInfo:
        """One JKO step of size τ; moves X. Newton with halved steps, O(n) each   (gf-jko, gf-quantile)

        Raises ValueError for tau ≤ 0 or before a start; ConvergenceError if a Hessian is not positive definite
        (V'' ≤ −1/τ somewhere) or the steps do not end. X is then unchanged.
        """
        require_positive(tau=tau)
        self._require_start()
        X = start = self.X
        for newton_iters in range(1, _MAX_NEWTON + 1):
            gradient = self._gradient(X, start, tau)
            try:
                direction = solveh_banded(self._hessian(X, tau), -gradient)
            except LinAlgError:
                raise ConvergenceError(f"the JKO problem is not convex for tau = {tau}: V'' <= -1/tau") from None
            decrement = -gradient @ direction
            X = self._descend(X, direction, start, tau)
            if decrement <= _DECREMENT:
                residual = np.abs(self._gradient(X, start, tau) / self.w).max()
                drop = self._objective(start, start, tau) - self._objective(X, start, tau)
                self.X = X
                return JKOInfo(newton_iters, float(residual), float(drop))
        raise ConvergenceError(f"no JKO step in {_MAX_NEWTON} Newton steps: the decrement is {decrement:.3g}")

    def _objective(self, X, start, tau):
        """Up to the constant Σ du log du."""
        return self.w @ ((X - start) ** 2 / (2 * tau) + self.V(X)) - self.du @ np.log(np.diff(X))

    def _gradient(self, X, start, tau):
        density = self.du / np.diff(X)
        gradient = self.w * ((X - start) / tau + self.dV(X))
        gradient[:-1] += density
        gradient[1:] -= density
        return gradient

    def _hessian(self, X, tau):
        """In the upper banded form of scipy."""
        stiffness = self.du / np.diff(X) ** 2
        bands = np.zeros((2, len(X)))
        bands[0, 1:] = -stiffness
        bands[1] = self.w * (1 / tau + self.d2V(X))
        bands[1, :-1] += stiffness
        bands[1, 1:] += stiffness
        return bands

    def _descend(self, X, direction, start, tau):
        """The longest of the halved steps that stays increasing and does not raise the objective."""
        value, t = self._objective(X, start, tau), 1.0
        highest = value + _ROUNDING * abs(value)
        for _ in range(_MAX_HALVINGS):
            Y = X + t * direction
            if (np.diff(Y) > 0).all() and self._objective(Y, start, tau) <= highest:
                return Y
            t /= 2
        raise ConvergenceError(f"no JKO step: no part of a Newton step lowers the objective {value:.6g}")

    def density(self, x: np.ndarray) -> np.ndarray:
        """q(x), from q(X(u)) = 1/X'(u) between the nodes, linear from one to the next; 0 outside of them."""
        self._require_start()
        return np.interp(x, (self.X[1:] + self.X[:-1]) / 2, self.du / np.diff(self.X), left=0, right=0)

    def moments(self) -> tuple[float, float]:
        """Mean and variance of q."""
        self._require_start()
        mean = self.w @ self.X
        return float(mean), float(self.w @ (self.X - mean) ** 2)

    def _require_start(self):
        if self.X is None:
            raise ValueError("X must be set first, by from_quantile or from_density")
