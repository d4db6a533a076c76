"""The best pair of learning rates at every width, and how it scales: with an interval, and never from a grid's edge."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

QUANTITIES = ("eta_A", "eta_B", "ratio")
TEMPERATURE = 0.3


class Grid(NamedTuple):
    """Losses of S seeds at one width: etas_A: (a,) and etas_B: (b,), rising; losses: (S, a, b), ∞ where it diverged."""

    etas_A: np.ndarray
    etas_B: np.ndarray
    losses: np.ndarray


class SlopeInterval(NamedTuple):
    """slope, low, high: of log₂ of the quantity against log₂ n; edge: share of the resamples with a best cell at an
    edge of its grid, whose optimum is cut off there.
    """

    slope: float
    low: float
    high: float
    edge: float


def _rates(name, values):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 3 or not (values > 0).all() or not np.isfinite(values).all():
        raise ValueError(f"{name} must be at least 3 positive rates, got {values.tolist()}")
    steps = np.diff(np.log2(values))
    if not (steps > 0).all() or not np.allclose(steps, steps[0]):
        raise ValueError(f"{name} must rise by a constant factor, got {values.tolist()}")
    return values


def _require_temperature(temperature):
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _log_losses(losses, shape):
    """Natural logarithms, nan counted as ∞."""
    losses = np.asarray(losses, dtype=np.float64)
    if losses.shape != shape:
        raise ValueError(f"losses must have shape (seeds, etas_A, etas_B) = {shape}, got {losses.shape}")
    if not len(losses):
        raise ValueError("losses must be of at least one seed, got none")
    losses = np.where(np.isnan(losses), np.inf, losses)
    if not (losses > 0).all():
        raise ValueError(f"losses must be positive, got {losses.min():g}")
    return np.log(losses)


def _means(logs, weights):
    """Σ_s w_s ℓ_s for every row of weights (draws, S), ∞ where a seed that counts is ∞: (draws, a, b)."""
    finite = np.isfinite(logs)
    total = np.tensordot(weights, np.where(finite, logs, 0.0), 1)
    return np.where(np.tensordot(weights, ~finite, 1) > 0, np.inf, total)


def _soft(means, log_A, log_B, temperature):
    """(log₂ η_A, log₂ η_B, at an edge?) of landscapes (draws, a, b)."""
    flat = means.reshape(len(means), -1)
    if not np.isfinite(flat.min(1)).all():
        raise ValueError("losses must be finite in one cell at least for every seed: all rates diverged")
    best = np.unravel_index(flat.argmin(1), means.shape[1:])
    edge = np.any([(i == 0) | (i == size - 1) for i, size in zip(best, means.shape[1:], strict=True)], axis=0)
    weight = np.exp((flat.min(1, keepdims=True) - flat) / temperature).reshape(means.shape)
    weight /= weight.sum((1, 2), keepdims=True)
    return weight.sum(2) @ log_A, weight.sum(1) @ log_B, edge


def soft_argmin(losses: np.ndarray, etas_A: Sequence[float], etas_B: Sequence[float],
                temperature: float = TEMPERATURE) -> tuple[float, float, bool]:  # fmt: skip
    """(η_A*, η_B*, whether the best cell is at an edge) of a landscape of losses (S, a, b)   (lora-sweep)

    log₂ η* = Σ_c w_c log₂ η_c, w_c ∝ exp(−ℓ_c/τ), ℓ_c the mean over seeds of the natural logarithm of the loss: cells
    within a factor e^τ of the best one count, so that the optimum is not bound to the grid. temperature: τ > 0.
    nan counts as ∞. Raises ValueError for other shapes, losses that are not positive, or no finite one.
    """
    _require_temperature(temperature)
    etas_A, etas_B = _rates("etas_A", etas_A), _rates("etas_B", etas_B)
    logs = _log_losses(losses, (len(losses), len(etas_A), len(etas_B)))
    means = _means(logs, np.full((1, len(logs)), 1 / len(logs)))
    log_A, log_B, edge = _soft(means, np.log2(etas_A), np.log2(etas_B), temperature)
    return 2.0 ** log_A[0], 2.0 ** log_B[0], bool(edge[0])


class SweepResult:
    """A :class:`Grid` of losses for every width; ``temperature`` is that of its soft optimum, see :func:`soft_argmin`.

    grids: {width: (etas_A, etas_B, losses)}. Raises ValueError for widths, rates or losses that are not positive, rates
    that don't rise by a constant factor, or losses of another shape.
    """

    def __init__(self, grids: dict[int, tuple], temperature: float = TEMPERATURE):
        _require_temperature(temperature)
        if not grids or not all(width > 0 for width in grids):
            raise ValueError(f"grids must be by positive widths, got {list(grids)}")
        self.temperature, self.grids, self._logs = temperature, {}, {}
        for width, (etas_A, etas_B, losses) in grids.items():
            etas_A, etas_B = _rates("etas_A", etas_A), _rates("etas_B", etas_B)
            self._logs[width] = _log_losses(losses, (len(losses), len(etas_A), len(etas_B)))
            self.grids[width] = Grid(etas_A, etas_B, np.exp(self._logs[width]))

    @property
    def widths(self) -> list[int]:
        return list(self.grids)

    def at_edge(self, width: int, margin: int = 1) -> list[str]:
        """Ends of the grid from which the best mean log loss is fewer than `margin` cells away: "etas_A low", ….

        margin = 1: the best cell is the last one.
        """
        logs, grid = self._logs[width], self.grids[width]
        means = _means(logs, np.full((1, len(logs)), 1 / len(logs)))[0]
        best, ends = np.unravel_index(means.argmin(), means.shape), []
        for name, i, values in zip(("etas_A", "etas_B"), best, (grid.etas_A, grid.etas_B), strict=True):
            ends += [f"{name} low"] if i < margin else []
            ends += [f"{name} high"] if i >= len(values) - margin else []
        return ends

    def optimum(self) -> dict[int, dict[str, float]]:
        """{width: {eta_A, eta_B, ratio}}, the soft optimum over all seeds   (lora-sweep)

        Raises ValueError where the best cell is at an edge of its grid: the optimum may lie outside.
        """
        found = {}
        for width, grid in self.grids.items():
            ends = self.at_edge(width)
            if ends:
                raise ValueError(
                    f"width {width}: the best cell is at the end of the grid ({', '.join(ends)}): extend it"
                )
            eta_A, eta_B, _ = soft_argmin(grid.losses, grid.etas_A, grid.etas_B, self.temperature)
            found[width] = {"eta_A": float(eta_A), "eta_B": float(eta_B), "ratio": float(eta_B / eta_A)}
        return found

    def slope_ci(self, *, level: float = 0.95, draws: int = 1000, seed: int = 0,
                 joint: bool = False) -> dict[str, SlopeInterval]:  # fmt: skip
        """Slopes of log₂ η* = a + s log₂ n for "eta_A", "eta_B" and "ratio", with their intervals   (lora-sweep)

        Percentile bootstrap over the seeds, independently at every width: right if a seed's draws at different widths
        have nothing in common. joint: the same seeds at all widths of a resample, right in any case. The ends are
        themselves estimates from so many draws: a verdict on which little hangs needs many.
        Raises ValueError as :meth:`optimum`, for one width or one seed only, a level outside (0, 1), or different
        numbers of seeds if joint.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        if len(self.grids) < 2 or min(len(logs) for logs in self._logs.values()) < 2:
            raise ValueError("a slope needs at least 2 widths, its interval at least 2 seeds")
        counts = [len(logs) for logs in self._logs.values()]
        if joint and len(set(counts)) > 1:
            raise ValueError(f"joint needs as many seeds at every width, got {counts}")
        best = self.optimum()
        rng, resampled, edges = np.random.default_rng(seed), {name: [] for name in QUANTITIES}, []
        for width, grid in self.grids.items():
            logs = self._logs[width]
            rng = np.random.default_rng(seed) if joint else rng
            weights = rng.multinomial(len(logs), np.full(len(logs), 1 / len(logs)), size=draws) / len(logs)
            means = _means(logs, weights)
            log_A, log_B, edge = _soft(means, np.log2(grid.etas_A), np.log2(grid.etas_B), self.temperature)
            for name, values in zip(QUANTITIES, (log_A, log_B, log_B - log_A), strict=True):
                resampled[name].append(values)
            edges.append(edge)
        x = np.log2(self.widths)
        x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        found = {}
        for name, columns in resampled.items():
            slope = x @ np.log2([best[width][name] for width in self.widths])
            low, high = np.quantile(x @ np.array(columns), [(1 - level) / 2, (1 + level) / 2])
            found[name] = SlopeInterval(float(slope), float(low), float(high), float(np.any(edges, 0).mean()))
        return found


def _extended(values, end, by):
    factor = values[1] / values[0]
    powers = factor ** np.arange(1, by + 1)
    return values[-1] * powers if end == "high" else values[0] / powers[::-1]


def width_sweep(fn: Callable, widths: Sequence[int], etas_A, etas_B, seeds: Sequence[int], *, extend: int = 0,
                margin: int = 1, temperature: float = TEMPERATURE) -> SweepResult:  # fmt: skip
    """Losses of every pair of rates at every width   (lora-sweep)

    fn: (width, etas_A, etas_B, seeds) → losses (seeds, etas_A, etas_B), array or tensor; nan and inf count as ∞.
    etas_A, etas_B: rates that rise by a constant factor, or functions of the width that return them.
    extend: how many times a grid whose best cell is fewer than `margin` cells from an end may be continued there by
    a quarter of its length; only the new cells are computed. Raises ValueError as :class:`SweepResult`.
    """
    grids = {}
    for width in widths:
        axes = [np.asarray(e(width) if callable(e) else e, dtype=np.float64) for e in (etas_A, etas_B)]
        by = [max(1, len(values) // 4) for values in axes]
        losses = _array(fn(width, *axes, seeds))
        for _ in range(extend):
            ends = SweepResult({width: (*axes, losses)}).at_edge(width, margin)
            if not ends:
                break
            for end in ends:
                axis = 0 if end.startswith("etas_A") else 1
                new = list(axes)
                new[axis] = _extended(axes[axis], end.split()[1], by[axis])
                strip = _array(fn(width, *new, seeds))
                order = (losses, strip) if end.endswith("high") else (strip, losses)
                losses = np.concatenate(order, axis + 1)
                parts = (axes[axis], new[axis]) if end.endswith("high") else (new[axis], axes[axis])
                axes[axis] = np.concatenate(parts)
        grids[width] = (*axes, losses)
    return SweepResult(grids, temperature)


def _array(losses):
    return np.asarray(losses.cpu() if hasattr(losses, "cpu") else losses, dtype=np.float64)
