"""Does a bound say how losses will end? Fitting it, ranking by it with ties, and the drop of a cooldown."""

import numpy as np
import torch
from scipy.optimize import nnls

from kexue_utils.optimization.sgd_convergence.bounds import last_iterate_bound

DRAWS = 2000


def parts(eta: torch.Tensor, points) -> tuple[np.ndarray, np.ndarray]:
    """A_t = 1/(2η_{1:t}) and B_t = ½(Σ_{s<t} η_s²/η_{s+1:t} + η_t) at the steps `points`: D²A_t + G²B_t is the bound

    on the last loss of every prefix (sgd-identity).
    """
    found = [[float(last_iterate_bound(eta[:t], *scale)) for t in points] for scale in ((1.0, 0.0), (0.0, 1.0))]
    return np.array(found[0]), np.array(found[1])


def fit(curves) -> dict:
    """{floor, D, G, rms}: the least squares fit of loss = floor + D²A_t + G²B_t, none of the three negative.

    curves: (A, B, losses), arrays of one length each, of the runs to fit together.
    """
    A, B, loss = (np.concatenate(column) for column in zip(*curves, strict=True))
    design = np.stack([np.ones_like(A), A, B], 1)
    scale = np.abs(design).max(0)
    (floor, D2, G2), rest = nnls(design / scale, loss)
    floor, D2, G2 = floor / scale[0], D2 / scale[1], G2 / scale[2]
    return {"floor": floor, "D": D2**0.5, "G": G2**0.5, "rms": rest / len(loss) ** 0.5}


def signs(losses: np.ndarray, mean=None) -> np.ndarray:
    """sign(L_i − L_j) of the mean losses (n, seeds), 0 for a pair closer than 2 standard errors of its paired
    difference; `mean`: other mean losses (n,) in place of those, with the same errors.
    """
    apart = losses[:, None] - losses[None]
    error = apart.std(-1, ddof=1) / losses.shape[1] ** 0.5
    mean = losses.mean(1) if mean is None else mean
    apart = mean[:, None] - mean[None]
    return np.sign(apart) * (np.abs(apart) > 2 * error)


def agreement(measured: np.ndarray, predicted: np.ndarray) -> dict:
    """Rank correlations of two matrices of signs (n, n), 0 for ties: Spearman's of the ranks (n + 1 + Σ_j s_ij)/2,

    Kendall's τ_b, and the share of the measured pairs that are no ties and are predicted in the same order.
    """
    ranks = measured.sum(1), predicted.sum(1)
    both, pairs = (measured * predicted).sum(), (np.abs(measured).sum(), np.abs(predicted).sum())
    if not pairs[0] or not pairs[1]:
        return {"spearman": 0.0, "kendall": 0.0, "pairs in order": 0.0}
    return {
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "kendall": float(both / (pairs[0] * pairs[1]) ** 0.5),
        "pairs in order": float((1 + both / (np.abs(measured) * np.abs(predicted)).sum()) / 2),
    }


def compare(losses: np.ndarray, bounds: np.ndarray, level=0.95) -> dict:
    """`agreement` of final losses (n, seeds) with bounds (n,), each with a percentile interval over resampled seeds.

    A resample moves the mean losses; what counts as a tie keeps the standard errors of all the seeds.
    """
    predicted = np.sign(bounds[:, None] - bounds[None])
    measured = signs(losses)
    picks = np.random.default_rng(0).integers(losses.shape[1], size=(DRAWS, losses.shape[1]))
    drawn = [agreement(signs(losses, losses[:, pick].mean(1)), predicted) for pick in picks]
    result = {"ties": int((measured == 0).sum() - len(losses)) // 2, "pairs": len(losses) * (len(losses) - 1) // 2}
    for name, value in agreement(measured, predicted).items():
        low, high = np.quantile([one[name] for one in drawn], [(1 - level) / 2, (1 + level) / 2])
        result[name] = {"value": value, "low": float(low), "high": float(high)}
    return result


def drop(points: np.ndarray, curve: np.ndarray, start: float) -> dict:
    """A curve's fall after step `start`: its size, its shape (share of it done at each later point, against the share

    of the cooldown done), and the share of the cooldown after which half of it is done.
    """
    begin = np.interp(start, points, curve)
    inside = points > start
    done = np.concatenate([[0.0], (points[inside] - start) / (points[-1] - start)])
    shape = np.concatenate([[0.0], (begin - curve[inside]) / (begin - curve[-1])])
    over = int(np.argmax(shape >= 0.5))
    half = done[over - 1] + (0.5 - shape[over - 1]) / (shape[over] - shape[over - 1]) * (done[over] - done[over - 1])
    return {"size": float(begin - curve[-1]), "done": done.tolist(), "shape": shape.tolist(), "half": float(half)}
