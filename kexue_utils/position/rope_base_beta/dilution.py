"""Attention dilution: how softmax over n keys flattens as n grows, and the log n scale against it.

Sources: https://kexue.fm/archives/8823, https://kexue.fm/archives/9706
"""

import math

import numpy as np
import torch
from torch import Tensor


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
    n = torch.as_tensor(n_visible, dtype=torch.float64)
    if not torch.compiler.is_compiling() and bool((n < 1).any()):
        raise ValueError(f"n_visible must be at least 1, got {n.min().item():g}")
    return unchecked_logn_scale(n, train_len, mode)


def unchecked_logn_scale(n, train_len, mode):
    """:func:`logn_scale` for positions that are known to be right: reads no value, so nothing waits for the device."""
    scale = n.log() / math.log(train_len)
    return scale if mode == "train" else scale.clamp(min=1)


def needle_probability(n: Tensor | float, c: float, t: Tensor | float = 1.0) -> Tensor:
    """Attention to one key whose logit is c·t above those of n−1 equal others: p = 1/(1 + (n−1)e^{−ct})   (rope-needle)

    With t = ln n/ln L it tends to 1, ½, 0 for c >, =, < ln L; with constant t always to 0. float64.
    """
    n, t = torch.as_tensor(n, dtype=torch.float64), torch.as_tensor(t, dtype=torch.float64)
    return 1 / (1 + (n - 1) * torch.exp(-c * t))


def gaussian_entropy(n: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Entropy of softmax over n logits drawn from N(0, σ²), for large n: H = ln n − σ²/2   (rope-entropy)

    In nats, float64. Needs σ clearly below the freezing point √(2 ln n), see :func:`frozen_entropy`.
    """
    n, sigma = torch.as_tensor(n, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64)
    return n.log() - sigma**2 / 2


def entropy_preserving_scale(n: Tensor | float, train_len: float, sigma: float) -> Tensor:
    """The t that gives n Gaussian logits tσ the entropy of L logits σ: t = √(1 + 2 ln(n/L)/σ²)   (rope-preserving)

    float64. Of rate √(ln n), not ln n; it has the slope of ln n/ln L at n = L only if σ² = ln L. Holds while tσ stays
    clearly below √(2 ln n).
    """
    n = torch.as_tensor(n, dtype=torch.float64)
    return torch.sqrt(1 + 2 * torch.log(n / train_len) / sigma**2)


def frozen_entropy(u: Tensor | float) -> Tensor:
    """Mean entropy of softmax in the frozen phase: E H → ψ(1) − ψ(1−u), u = √(2 ln n)/(tσ) < 1   (rope-frozen)

    The weights are then Poisson–Dirichlet with parameter u; ψ is the digamma function. In nats, float64.
    Source: B. Derrida, Random-energy model, Phys. Rev. B 24, 2613 (1981).
    """
    u = torch.as_tensor(u, dtype=torch.float64)
    return -np.euler_gamma - torch.digamma(1 - u)  # ψ(1) = −γ
