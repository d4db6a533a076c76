"""Attention dilution: how softmax over n keys flattens as n grows, and the log n scale against it.

Sources: https://kexue.fm/archives/8823, https://kexue.fm/archives/9706
"""

import math

import numpy as np
import torch
from torch import Tensor


def _number_of_keys(n, name="n") -> Tensor:
    n = torch.as_tensor(n, dtype=torch.float64)
    if not torch.compiler.is_compiling() and not bool((n >= 1).all()):
        raise ValueError(f"{name} must be at least 1, got {n.min().item():g}")
    return n


def logn_scale(n_visible: Tensor | float, train_len: float, *, mode: str = "train") -> Tensor:
    """Factor on the logits (or on q) of a query that sees n keys: ln n/ln L   (rope-logn-train)

    mode ``"train"``: ln n/ln L, for training with it; 1 at n = L, 0 at n = 1, where a single key needs no scale.
    mode ``"posthoc"``: max(1, ln n/ln L), for a model trained without (rope-logn-posthoc): nothing changes up to L.
    n_visible: a number or a tensor of any shape (1-based query positions); returns float64 of that shape.
    Raises ValueError for n < 1 (not checked under torch.compile), train_len ≤ 1, or an unknown mode.
    """
    if mode not in ("train", "posthoc"):
        raise ValueError(f"mode must be 'train' or 'posthoc', got {mode!r}")
    if not train_len > 1:
        raise ValueError(f"train_len must be greater than 1, got {train_len}")
    return unchecked_logn_scale(_number_of_keys(n_visible, "n_visible"), train_len, mode)


def unchecked_logn_scale(n, train_len, mode):
    """:func:`logn_scale` for positions that are known to be right: reads no value, so nothing waits for the device."""
    scale = n.log() / math.log(train_len)
    return scale if mode == "train" else scale.clamp(min=1)


def needle_probability(n: Tensor | float, c: float, t: Tensor | float = 1.0) -> Tensor:
    """Attention to one key whose logit is c·t above those of n−1 equal others: p = 1/(1 + (n−1)e^{−ct})   (rope-needle)

    With t = ln n/ln L it tends to 1, ½, 0 for c >, =, < ln L; with constant t always to 0; it stays at p for
    t = (ln(n−1) + ln p/(1−p))/c (rope-needle-constant). float64. Raises ValueError for n < 1.
    """
    n, t = _number_of_keys(n), torch.as_tensor(t, dtype=torch.float64)
    return 1 / (1 + (n - 1) * torch.exp(-c * t))


def gaussian_entropy(n: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Entropy of softmax over n logits drawn from N(0, σ²), for large n: H = ln n − σ²/2   (rope-entropy)

    In nats, float64. Needs σ clearly below the freezing point √(2 ln n), see :func:`frozen_entropy`.
    Raises ValueError for n < 1.
    """
    n, sigma = _number_of_keys(n), torch.as_tensor(sigma, dtype=torch.float64)
    return n.log() - sigma**2 / 2


def entropy_preserving_scale(n: Tensor | float, train_len: float, sigma: float) -> Tensor:
    """The t that gives n Gaussian logits tσ the entropy of L logits σ: t = √(1 + 2 ln(n/L)/σ²)   (rope-preserving)

    float64. Of rate √(ln n), not ln n; it has the slope of ln n/ln L at n = L only if σ² = ln L. Holds while tσ stays
    clearly below √(2 ln n). Raises ValueError for σ ≤ 0, train_len < 1 or n < L·e^{−σ²/2}, whose logits cannot be
    made so flat: even equal ones have less entropy.
    """
    n = _number_of_keys(n)
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if not train_len >= 1:
        raise ValueError(f"train_len must be at least 1, got {train_len}")
    square = 1 + 2 * torch.log(n / train_len) / sigma**2
    if bool((square < 0).any()):
        least = train_len * math.exp(-(sigma**2) / 2)
        raise ValueError(f"n must be at least train_len * exp(-sigma**2 / 2) = {least:g}, got {n.min().item():g}")
    return torch.sqrt(square)


def frozen_entropy(u: Tensor | float) -> Tensor:
    """Mean entropy of softmax in the frozen phase: E H → ψ(1) − ψ(1−u), u = √(2 ln n)/(tσ) < 1   (rope-frozen)

    The weights are then Poisson–Dirichlet with parameter u; ψ is the digamma function. In nats, float64.
    Raises ValueError unless 0 < u < 1.
    Source: B. Derrida, Random-energy model, Phys. Rev. B 24, 2613 (1981).
    """
    u = torch.as_tensor(u, dtype=torch.float64)
    if not bool(((u > 0) & (u < 1)).all()):
        raise ValueError(f"u must lie between 0 and 1, got {u.tolist()}")
    return -np.euler_gamma - torch.digamma(1 - u)  # ψ(1) = −γ
