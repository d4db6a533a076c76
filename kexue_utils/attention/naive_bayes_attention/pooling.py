"""Pooling of log-probabilities: strict naive Bayes and its weighted generalisations.

Everything works on log-probabilities with the candidates x_t on the last dimension. An impossible
candidate is −inf; no function here turns it into NaN or +inf, in values or in gradients.
Source: https://kexue.fm/archives/9648
"""

import math

import torch
from torch import Tensor


def _require_floating(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def log_normalize(log_p: Tensor, dim: int = -1) -> Tensor:
    """Log-probabilities from unnormalised ones: log p(y) = s(y) − log Σ_y e^{s(y)}.

    Shapes: any; normalised over ``dim``. Any floating dtype. A row in which every candidate is
    impossible (−inf) has no distribution: it stays −inf, with gradient 0.
    Raises TypeError for a tensor that is not floating-point.
    """
    _require_floating(log_p=log_p)
    empty = log_p.isneginf().all(dim, keepdim=True)
    return log_p.masked_fill(empty, 0.0).log_softmax(dim).masked_fill(empty, -math.inf)


def combine_log_probs(
    log_cond: Tensor,
    log_prior: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    beta: float | Tensor = 0.0,
    dim: int = -2,
    normalize_weights: bool = True,
    allow_negative: bool = False,
    normalize: bool = True,
) -> Tensor:
    """Pool the experts' log p(x_t|x_j) over j into log p(x_t|x_{<t}).

    normalize_weights=True:   (1+β) Σ_j a_j log p(x_t|x_j) − β log p(x_t),  a = w / Σ_j w_j   (nb-pool, nb-weighted)
    normalize_weights=False:        Σ_j w_j log p(x_t|x_j) − β log p(x_t)                     (nb-consistency)

    log_cond: (..., J, V), the experts on ``dim``, the candidates last. log_prior: (V,) or (..., V).
    weights: (..., J); None means 1/J each, under both rules. beta: a number or a 0-dim tensor.
    Returns (..., V), normalised over V if ``normalize``. Any floating dtype, computed in float32 at least;
    the result has the widest dtype among the tensors given.

    −inf: an expert of weight 0 has no say (0·(−inf) = 0); a candidate that is impossible for an expert of
    non-zero weight, or under the prior where one is given, is impossible in the result, whatever the signs.
    J = 0 returns the prior. Gradients are finite throughout.

    Raises ValueError: beta ≠ 0 or J = 0 without a prior; shapes that do not match; a negative weight unless
    ``allow_negative``; weights that sum to 0 when they are to be normalised; TypeError: a tensor that is
    not floating-point. The last two rules on weights read their values (one synchronisation on an
    accelerator); under torch.compile they are not checked.
    Source: https://kexue.fm/archives/9648; log-linear opinion pool: Genest & Zidek 1986.
    """
    _require_floating(log_cond=log_cond, log_prior=log_prior, weights=weights)
    if log_cond.ndim < 2 or dim in (-1, log_cond.ndim - 1) or not -log_cond.ndim <= dim < log_cond.ndim:
        raise ValueError(
            f"dim must be a dimension of log_cond other than its last, got {dim} for shape {tuple(log_cond.shape)}"
        )
    experts = log_cond.movedim(dim, -2)
    *_, J, _ = experts.shape
    if log_prior is None and (J == 0 or isinstance(beta, Tensor) or beta != 0):
        raise ValueError(f"log_prior must be given when beta is not 0 or there is no expert, got beta={beta}, J={J}")
    if log_prior is not None and log_prior.shape[-1:] != experts.shape[-1:]:
        raise ValueError(
            f"log_prior must have V={experts.shape[-1]} candidates on its last dimension, got {tuple(log_prior.shape)}"
        )
    if weights is not None and weights.shape[-1:] != (J,):
        raise ValueError(f"weights must have J={J} entries on their last dimension, got {tuple(weights.shape)}")
    if weights is not None and not torch.compiler.is_compiling():
        if not allow_negative and bool((weights < 0).any()):
            raise ValueError(f"weights must be >= 0 unless allow_negative, got minimum {weights.min().item()}")
        if normalize_weights and J > 0 and bool((weights.sum(-1) == 0).any()):
            raise ValueError("weights must not sum to 0 when they are normalised, got a row with sum 0")

    dtype = experts.dtype
    for x in (log_prior, weights):
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    wide = torch.promote_types(dtype, torch.float32)

    if J == 0:
        beta = -1.0  # no evidence: both rules then leave the prior
    a = experts.new_ones(J, dtype=wide) / J if weights is None else weights.to(wide)
    if normalize_weights and weights is not None:
        a = a / a.sum(-1, keepdim=True)
    a = a[..., None]
    # The finite part and the vetoes go separate ways, so that no product 0·(−inf) arises, here or in backward.
    impossible = experts.isneginf()
    pooled = (a * experts.to(wide).masked_fill(impossible, 0.0)).sum(-2)
    vetoed = (impossible & (a != 0)).any(-2)
    if log_prior is not None:
        vetoed = vetoed | log_prior.isneginf()
        prior = log_prior.to(wide).masked_fill(log_prior.isneginf(), 0.0)
        pooled = ((1 + beta) * pooled if normalize_weights else pooled) - beta * prior
    pooled = pooled.masked_fill(vetoed, -math.inf)
    return (log_normalize(pooled) if normalize else pooled).to(dtype)


def strict_naive_bayes(log_cond: Tensor, log_prior: Tensor) -> Tensor:
    """Strict naive Bayes in its reversed, predictive form (nb-reversed, nb-log).

    log p(x_t|x_{<t}) = Σ_{j<t} log p(x_t|x_j) − (t−2) log p(x_t) + const,  with J = t−1 experts

    log_cond: (..., J, V); log_prior: (V,) or (..., V); returns (..., V), normalised over V. J = 0 gives the
    prior and J = 1 the bigram. Dtypes, −inf and errors as in :func:`combine_log_probs`.
    Source: https://kexue.fm/archives/9648
    """
    _require_floating(log_cond=log_cond)
    if log_cond.ndim < 2:
        raise ValueError(f"log_cond must have shape (..., J, V), got {tuple(log_cond.shape)}")
    J = log_cond.shape[-2]
    return combine_log_probs(log_cond, log_prior, weights=log_cond.new_ones(J), beta=J - 1, normalize_weights=False)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ_y p(y) (log p(y) − log q(y)), in nats, over the last dimension.

    log_p, log_q: (..., V), broadcast against each other; returns (...). A candidate with p(y) = 0 adds 0;
    one with q(y) = 0 < p(y) makes it +inf. Raises TypeError for a tensor that is not floating-point.
    """
    _require_floating(log_p=log_p, log_q=log_q)
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def pool_objective(log_q: Tensor, log_cond: Tensor, weights: Tensor) -> Tensor:
    """What the log-linear pool minimises over q: Σ_j a_j KL(q‖p_j) (nb-compromise).

    With Σ_j a_j = 1 the minimiser is q ∝ Π_j p_j^{a_j}, the result of :func:`combine_log_probs` at β = 0,
    and the minimum is −log Σ_y Π_j p_j(y)^{a_j}.
    log_q: (..., V); log_cond: (..., J, V); weights: (..., J); returns (...).
    Raises ValueError where V or J do not match, TypeError for a tensor that is not floating-point.
    Source: Genest & Zidek 1986.
    """
    _require_floating(log_q=log_q, log_cond=log_cond, weights=weights)
    if log_cond.ndim < 2 or log_q.shape[-1:] != log_cond.shape[-1:] or weights.shape[-1:] != log_cond.shape[-2:-1]:
        raise ValueError(
            "log_q (..., V), log_cond (..., J, V) and weights (..., J) must agree in V and J, got "
            f"{tuple(log_q.shape)}, {tuple(log_cond.shape)} and {tuple(weights.shape)}"
        )
    return (weights * kl_divergence(log_q.unsqueeze(-2), log_cond)).sum(-1)


def in_context_posterior(
    log_likelihood: Tensor, log_prior: Tensor | None = None, *, head: str = "sum", scale: float = 1.0
) -> Tensor:
    """Class posterior that an attention head computes from t demonstrations, with values log p(x_i|θ) (nb-icl).

    head="sum":   scale · Σ_i log p(x_i|θ) + log p(θ) + const      linear attention with constant features
    head="mean":  scale · (1/t) Σ_i log p(x_i|θ) + log p(θ) + const       softmax attention with equal scores

    The sum head at scale 1 is the exact posterior of i.i.d. demonstrations; the mean head at scale c is so
    at t = c only. log_likelihood: (..., t, K) for K classes; log_prior: (K,) or (..., K), None = uniform;
    returns (..., K), normalised. Raises ValueError for t = 0, a shape that does not match or an unknown
    head, TypeError for a tensor that is not floating-point.
    Source: https://kexue.fm/archives/9648; Xie et al. 2111.02080.
    """
    _require_floating(log_likelihood=log_likelihood, log_prior=log_prior)
    if log_likelihood.ndim < 2 or log_likelihood.shape[-2] == 0:
        raise ValueError(f"log_likelihood must have shape (..., t, K) with t >= 1, got {tuple(log_likelihood.shape)}")
    if log_prior is not None and log_prior.shape[-1:] != log_likelihood.shape[-1:]:
        raise ValueError(
            f"log_prior must have K={log_likelihood.shape[-1]} classes on its last dimension, "
            f"got {tuple(log_prior.shape)}"
        )
    if head not in ("sum", "mean"):
        raise ValueError(f"head must be 'sum' or 'mean', got {head!r}")
    evidence = log_likelihood.sum(-2) if head == "sum" else log_likelihood.mean(-2)
    scores = scale * evidence
    return log_normalize(scores if log_prior is None else scores + log_prior)
