"""Naive Bayes over the last few tokens of a text, by counting.

Source: https://kexue.fm/archives/9648
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import log_normalize

# Numbers at a time, so that temporaries stay in the cache and memory does not grow with the text.
_CHUNK = 2**18
_TRAINING_CHUNK = 2**22  # more, as every chunk also makes the W·V² table and its gradient


class NGramNaiveBayes:
    """Next-token prediction from a window of W tokens, each one a piece of evidence of its own.

        log p(x_t|x_{t−W}..x_{t−1}) = Σ_ℓ w_ℓ log p_ℓ(x_t|x_{t−ℓ}) − β log p(x_t) + const        (nb-log, nb-pool)

    ``fit`` counts and sets strict naive Bayes, w_ℓ = 1 and β = W−1; ``fit_weights`` learns w and β.
    For every lag ℓ one smoothed pair table, p_ℓ(x_{t−ℓ}, x_t) ∝ count + alpha, gives p_ℓ(x_{t−ℓ}|x_t),
    p_ℓ(x_t|x_{t−ℓ}) and p(x_t), so that Bayes' rule relates them exactly. ``lag_specific=False`` pools the
    counts of all lags into one table.

    window: W >= 1. alpha > 0: added to every pair count. dtype: of the tables, None = torch's default.
    After ``fit``: log_prior (V,), log_pairs (L, V, V), log p_ℓ(x_{t−ℓ}, x_t) at [ℓ−1, x_{t−ℓ}, x_t], where
    L = W or 1; weights (W,), by lag from 1; beta (0-dim). They live on the device of the ids.
    Raises ValueError for a window or alpha out of range, TypeError for a dtype that is not floating-point.
    """

    def __init__(
        self, window: int, alpha: float = 0.5, lag_specific: bool = True, *, dtype: torch.dtype | None = None
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be >= 1, got {window}")
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating-point, got {dtype}")
        self.window, self.alpha, self.lag_specific, self.dtype = window, alpha, lag_specific, dtype

    def fit(self, ids: Tensor, vocab: int) -> "NGramNaiveBayes":
        """Count the pairs of every lag over the same targets x_{W+1}..x_N; O(W·N) time, O(W·V²) memory.

        ids: (N,) integers in [0, vocab), N > W. Returns self. Raises ValueError for a text that is too short,
        for ids out of range (reads their minimum and maximum) or a vocab < 1, TypeError for ids that are not
        integers; the model is then unchanged.
        """
        ids = self._require_ids(ids, vocab)
        W, n_targets = self.window, len(ids) - self.window
        index = torch.int32 if vocab**2 < torch.iinfo(torch.int32).max else torch.int64
        counts = torch.zeros(W if self.lag_specific else 1, vocab**2, dtype=torch.int64, device=ids.device)
        for start in range(0, n_targets, _CHUNK):
            chunk = ids[start : start + _CHUNK + W].to(index)
            targets = chunk[W:]
            for lag in range(1, W + 1):
                pairs = chunk[W - lag : -lag] * vocab + targets
                counts[(lag - 1) % len(counts)] += torch.bincount(pairs, minlength=vocab**2)
        smoothed = (counts.double() + self.alpha).view(-1, vocab, vocab)
        log_pairs = smoothed.log() - smoothed.sum((-2, -1), keepdim=True).log()
        self.log_pairs = log_pairs.to(self.dtype)
        # The same for every lag, as all are counted over the same targets.
        self.log_prior = log_pairs[0].logsumexp(0).to(self.dtype)
        self.weights = self.log_prior.new_ones(W)
        self.beta = self.log_prior.new_tensor(W - 1)
        self._log_cond = log_normalize(log_pairs).to(self.dtype).expand(W, -1, -1)
        return self

    def log_cond(self, contexts: Tensor) -> Tensor:
        """log p_ℓ(x_t|x_{t−ℓ}) of every token of the windows, in the order of the text.

        contexts: (..., W) integers in [0, V), the last one is x_{t−1}; returns (..., W, V), as
        :func:`combine_log_probs` takes it. Raises ValueError before ``fit`` or for another window, TypeError
        for contexts that are not integers. The range of their values is not read.
        """
        contexts = self._require_contexts(contexts)
        lags = torch.arange(self.window, 0, -1, device=contexts.device)
        return self._log_cond[lags - 1, contexts]

    def predict_log_proba(
        self, contexts: Tensor, *, weights: Tensor | None = None, beta: float | Tensor | None = None
    ) -> Tensor:
        """log p(x_t|window), normalised.

        contexts: (..., W) integers in [0, V), the last one is x_{t−1}. weights: (W,), by lag from 1, and beta:
        in place of the model's own. Returns (..., V). Never holds (..., W, V). Raises as ``log_cond`` does, and
        ValueError for weights of another shape.
        """
        contexts = self._require_contexts(contexts)
        weights = self.weights if weights is None else weights
        if weights.shape != (self.window,):
            raise ValueError(f"weights must have shape ({self.window},), got {tuple(weights.shape)}")
        table = self._table(weights, self.beta if beta is None else beta)
        rows = contexts.reshape(-1, self.window)
        log_p = table.new_empty(len(rows), table.shape[-1])
        step = max(_CHUNK // table.shape[-1], 1)
        for start in range(0, len(rows), step):
            log_p[start : start + step] = self._scores(rows[start : start + step], table).log_softmax(-1)
        return log_p.view(*contexts.shape[:-1], -1)

    def cross_entropy(self, ids: Tensor) -> Tensor:
        """Mean of −log p(x_t|window) over x_{W+1}..x_N, in nats (a 0-dim tensor). ids and errors: as in ``fit``."""
        ids = self._require_ids(ids, self._vocab())
        return self._cross_entropy(ids, self.weights, self.beta)

    def fit_weights(self, ids: Tensor, learn_beta: bool = True) -> "NGramNaiveBayes":
        """Learn the weights w and β by minimising the cross-entropy, a convex problem, with L-BFGS.

        ids: (N,) as in ``fit``, a text that was not counted: on the counted one the tables look too good.
        learn_beta=False holds β at 0 (nb-weighted). Nothing constrains w; where the evidence is empty
        Σw = 1 + β is right (nb-consistency). Returns self; raises as ``fit`` does.
        """
        ids = self._require_ids(ids, self._vocab())
        weights = torch.full_like(self.weights, 1 / self.window).requires_grad_()
        beta = torch.zeros_like(self.beta).requires_grad_(learn_beta)
        optimizer = torch.optim.LBFGS(
            [weights, beta] if learn_beta else [weights], max_iter=200, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            return self._cross_entropy(ids, weights, beta, backward=True)

        with torch.enable_grad():
            optimizer.step(closure)
        self.weights, self.beta = weights.detach(), beta.detach()
        return self

    def _table(self, weights: Tensor, beta: float | Tensor) -> Tensor:
        # One row per (lag, x_j) with its weight and its share of the prior: a window is a sum of W rows.
        return (weights[:, None, None] * self._log_cond - beta / self.window * self.log_prior).flatten(0, 1)

    def _scores(self, contexts: Tensor, table: Tensor) -> Tensor:
        offsets = torch.arange(self.window - 1, -1, -1, device=contexts.device) * len(self.log_prior)
        return F.embedding_bag(contexts + offsets, table, mode="sum")

    def _cross_entropy(self, ids: Tensor, weights: Tensor, beta: Tensor, backward: bool = False) -> Tensor:
        W, n_targets = self.window, len(ids) - self.window
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        step = max(_TRAINING_CHUNK // len(self.log_prior), 1)
        for start in range(0, n_targets, step):
            chunk = ids[start : start + step + W].long()
            scores = self._scores(chunk.unfold(0, W, 1)[:-1], self._table(weights, beta))
            loss = F.cross_entropy(scores, chunk[W:], reduction="sum") / n_targets
            if backward:
                loss.backward()
            total += loss.detach()
        return total

    def _vocab(self) -> int:
        if not hasattr(self, "log_prior"):
            raise ValueError("fit must be called before the model is used")
        return len(self.log_prior)

    def _require_ids(self, ids: Tensor, vocab: int) -> Tensor:
        if vocab < 1:
            raise ValueError(f"vocab must be >= 1, got {vocab}")
        _require_integers("ids", ids)
        if ids.ndim != 1 or len(ids) <= self.window:
            raise ValueError(f"ids must be one text of more than window={self.window} tokens, got {tuple(ids.shape)}")
        low, high = ids.aminmax()
        if low < 0 or high >= vocab:
            raise ValueError(f"ids must lie in [0, vocab={vocab}), got values from {low.item()} to {high.item()}")
        return ids

    def _require_contexts(self, contexts: Tensor) -> Tensor:
        self._vocab()
        _require_integers("contexts", contexts)
        if contexts.shape[-1:] != (self.window,):
            raise ValueError(f"contexts must have shape (..., {self.window}), got {tuple(contexts.shape)}")
        return contexts.long()


def _require_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, got {getattr(x, 'dtype', type(x).__name__)}")
