"""The Fokker–Planck equation on a grid: conservative, positive, and exact at equilibrium.

Sources: D. Scharfetter, H. Gummel (1969); J. Chang, G. Cooper (1970); https://kexue.fm/archives/9660
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import eigsh, splu
from scipy.special import gammaln, logsumexp, xlogy

from .errors import require_count, require_positive

SCHEMES = ("be", "cn", "expm")
# What keeps the pivots of an M-matrix on its diagonal, and then its factors without a positive off-diagonal entry.
_M_MATRIX = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
_SHIFT, _SEED = -1e-3, 0  # of the eigenvalue solver
_JUMPS = 500.0  # mean number of jumps in a piece of an exponential; exp(-_JUMPS) must not underflow


def bernoulli(z: np.ndarray) -> np.ndarray:
    """B(z) = z/(e^z − 1), B(0) = 1; to rounding for every z, without overflow   (gf-scharfetter)"""
    a = np.abs(np.asarray(z, dtype=np.float64))
    small = a * np.exp(-a)
    return np.divide(small, -np.expm1(-a), out=np.ones_like(a), where=a > 0) + np.maximum(-z, 0)


class FokkerPlanck:
    """∂q/∂t = ∇·(q∇V) + D∆q on a grid, by Scharfetter and Gummel's fluxes   (gf-fokker-planck, gf-scharfetter)

        J_{i+½} = −(D/h)[B(−w)q_{i+1} − B(w)q_i],   w = (V_{i+1}−V_i)/D,   dq_i/dt = −(J_{i+½}−J_{i−½})/h

    A Markov chain on the cells: mass is kept, densities stay ≥ 0, and e^{−V/D} on the grid is exactly stationary.
    Second order in h. axes: for each dimension (1 or 2) the centres of the cells, evenly spaced; V: function of one
    coordinate array a dimension; ``bc``: ``"reflecting"`` (no flux through the walls) or ``"periodic"`` (the last
    cell is a neighbour of the first). Densities are float64 arrays of ``shape``, with Σ q · ``cell`` = 1.
    Raises ValueError for axes that are not evenly spaced or too short, D ≤ 0, another bc, a V that is not finite.
    """

    def __init__(
        self,
        axes: Sequence[np.ndarray],
        V: Callable[..., np.ndarray],
        D: float = 1.0,
        bc: str = "reflecting",
    ):
        require_positive(D=D)
        if bc not in ("reflecting", "periodic"):
            raise ValueError(f"bc must be 'reflecting' or 'periodic', got {bc!r}")
        self.axes = [_require_axis(axis) for axis in axes]
        self.shape = tuple(map(len, self.axes))
        self.cell = float(np.prod([axis[1] - axis[0] for axis in self.axes]))
        values = np.broadcast_to(V(*np.meshgrid(*self.axes, indexing="ij")), self.shape)
        if not np.isfinite(values).all():
            raise ValueError("V must be finite on the grid")
        self.D, self.energy = D, values.ravel() / D
        self._log_p = -self.energy - logsumexp(-self.energy) - np.log(self.cell)
        self._edges(bc == "periodic")
        self._L = self._matrix(self.ahead, self.back)
        self._c = self._lu = None

    def _edges(self, periodic):
        """Neighbouring cells a, b and the rates of the jumps a → b and b → a."""
        index = np.arange(len(self.energy)).reshape(self.shape)
        a, b, scale = [], [], []
        for d, axis in enumerate(self.axes):
            keep = len(axis) if periodic else len(axis) - 1
            here, there = (np.take(np.roll(index, -s, d), range(keep), d).ravel() for s in (0, 1))
            a, b = [*a, here], [*b, there]
            scale.append(np.full(len(here), self.D / (axis[1] - axis[0]) ** 2))
        self.a, self.b, scale = map(np.concatenate, (a, b, scale))
        w = self.energy[self.b] - self.energy[self.a]
        self.ahead, self.back = scale * bernoulli(w), scale * bernoulli(-w)

    def _matrix(self, from_a, from_b):
        """The sparse matrix with jumps a → b, b → a off the diagonal and columns that sum to 0 with ahead, back."""
        a, b, n = self.a, self.b, len(self.energy)
        entries = np.concatenate((from_a, from_b, -self.ahead, -self.back))
        rows, columns = np.concatenate((b, a, a, b)), np.concatenate((a, b, a, b))
        return sp.csc_array(sp.coo_array((entries, (rows, columns)), shape=(n, n)))

    def generator(self) -> sp.csc_array:
        """L of dq/dt = Lq, sparse (cells, cells): columns sum to 0, off the diagonal it is ≥ 0   (gf-scharfetter)"""
        return self._L.copy()

    def stationary(self) -> np.ndarray:
        """p = e^{−V/D}/Z on the grid, where every flux is 0."""
        return np.exp(self._log_p).reshape(self.shape)

    def step(self, q: np.ndarray, dt: float, scheme: str = "be") -> np.ndarray:
        """q a time dt later; the factorised matrix is kept for the next step of the same size.

        - ``be``    implicit Euler, (I − dt L)q' = q: order 1, q' ≥ 0 and KL falls, for every dt
        - ``cn``    Crank–Nicolson: order 2, positive only for dt ≤ 2/max|L_ii|, beyond which it warns
        - ``expm``  e^{dt L}q, exact in time, q' ≥ 0; costs about dt·max|L_ii| products with L

        Raises ValueError for a q of another shape, with negative or infinite cells, dt ≤ 0, another scheme.
        """
        return self._advance(self._require_density(q), dt, scheme).reshape(self.shape)

    def evolve(self, q: np.ndarray, dt: float, steps: int, scheme: str = "be") -> np.ndarray:
        """q at 0, dt, …, steps·dt: (steps+1, *shape). Scheme and errors as in :meth:`step`."""
        require_count(steps=steps)
        path = [self._require_density(q)]
        for _ in range(steps):
            path.append(self._advance(path[-1], dt, scheme))
        return np.stack(path).reshape(len(path), *self.shape)

    def _advance(self, q, dt, scheme):
        require_positive(dt=dt)
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        if scheme == "expm":
            return self._exponential(q, dt)
        if scheme == "be":
            return self._solve(q, dt)
        _warn_of_signs(self._L, dt)
        return self._solve(q + dt / 2 * (self._L @ q), dt / 2)

    def _solve(self, q, c):
        """(I − cL)⁻¹ q. An M-matrix is solved without a subtraction: nothing gets negative."""
        if self._c != c:
            self._lu = splu(sp.csc_array(sp.eye_array(len(q)) - c * self._L), **_M_MATRIX)
            self._c = c
        return self._lu.solve(q)

    def _exponential(self, q, t):
        """e^{tL}q as the mean over Poisson many jumps of the chain I + L/Λ, which has no negative entry."""
        rate = -self._L.diagonal().min()
        jump = sp.csr_array(sp.eye_array(len(q)) + self._L / rate)
        pieces = int(np.ceil(rate * t / _JUMPS))
        weights = _poisson(rate * t / pieces)
        for _ in range(pieces):
            total = weights[0] * q
            for weight in weights[1:]:
                q = jump @ q
                total += weight * q
            q = total
        return q

    def kl(self, q: np.ndarray) -> float:
        """KL(q‖p) = Σ q log(q/p) · cell in nats, p = e^{−V/D}/Z on the grid   (gf-gap)"""
        q = self._require_density(q)
        return float((xlogy(q, q) - q * self._log_p).sum() * self.cell)

    def dissipation(self, q: np.ndarray) -> float:
        """−dKL(q‖p)/dt along dq/dt = Lq, summed over the edges, each term ≥ 0   (gf-energy)

        The flux through an edge times the fall of log(q/p) over it; tends to D·I(q|p). inf if a cell of q is empty.
        """
        q = self._require_density(q)
        with np.errstate(divide="ignore"):
            potential = np.log(q) + self.energy
        flux = self.ahead * q[self.a] - self.back * q[self.b]
        return float((flux * (potential[self.a] - potential[self.b])).sum() * self.cell)

    def spectral_gap(self) -> float:
        """The smallest rate of decay that is not 0: KL(q_t‖p) falls like e^{−2·gap·t} in the end   (gf-gap)

        The second eigenvalue of −L, from the symmetric matrix p^{−½}Lp^{½}. Absolute error about 10⁻¹⁶·max|L_ii|.
        """
        symmetric = np.sqrt(self.ahead * self.back)
        matrix = -self._matrix(symmetric, symmetric)
        start = np.random.default_rng(_SEED).normal(size=len(self.energy))
        return float(eigsh(matrix, k=2, sigma=_SHIFT, v0=start, return_eigenvectors=False).max())

    def _require_density(self, q):
        q = np.asarray(q, dtype=np.float64)
        if q.shape != self.shape:
            raise ValueError(f"q must have shape {self.shape}, got {q.shape}")
        if not ((q >= 0) & np.isfinite(q)).all():
            raise ValueError(f"q must be finite and not negative, its least value is {q.min():g}")
        return q.ravel()


def _poisson(mean):
    """The probabilities of 0, 1, …, as far as they matter in float64."""
    k = np.arange(int(mean + 9 * np.sqrt(mean) + 20))
    return np.exp(k * np.log(mean) - mean - gammaln(k + 1))


def _warn_of_signs(L, dt):
    limit = 2 / -L.diagonal().min()
    if dt > limit:
        warnings.warn(f"cn may turn negative for dt > 2/max|L_ii| = {limit:.3g}, got {dt}", stacklevel=4)


def _require_axis(axis):
    axis = np.asarray(axis, dtype=np.float64)
    if axis.ndim != 1 or len(axis) < 3:
        raise ValueError(f"axes must be arrays of at least 3 cells, got shape {axis.shape}")
    h = np.diff(axis)
    if not (h[0] > 0 and np.allclose(h, h[0], rtol=1e-6, atol=0)):
        raise ValueError(f"axes must be increasing and evenly spaced, got steps from {h.min():g} to {h.max():g}")
    return axis
