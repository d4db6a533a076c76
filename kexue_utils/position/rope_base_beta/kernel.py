"""The mean attention kernel of rotary positions: what relative distance alone does to a score.

Sources: https://kexue.fm/archives/8265, https://kexue.fm/archives/9675
"""

import math

import mpmath
import numpy as np
import torch
from torch import Tensor


def mean_kernel(r: Tensor | float, inv_freq: Tensor) -> Tensor:
    """Mean over the pairs of the score of equal unit vectors at distance r: K(r) = (1/D) Σ_j cos(rθ_j)   (rope-kernel)

    r: a number or a tensor of any shape; inv_freq: θ, (D,); returns float64 of the shape of r.
    """
    r = torch.as_tensor(r, dtype=torch.float64, device=inv_freq.device)
    return (r[..., None] * inv_freq.to(torch.float64)).cos().mean(-1)


def mean_kernel_limit(r: Tensor | float, base: float = 10000.0) -> Tensor:
    """K(r) for D → ∞: ∫₀¹ cos(r·base^{−t}) dt = (Ci(r) − Ci(r/base))/ln base   (rope-kernel-limit)

    Ci is the cosine integral. r: a number or a tensor of any shape, r ≠ 0; even in r. Returns float64, on the CPU.
    At D = 32 the sum :func:`mean_kernel` is far from it for r ≥ 100: its spectrum is under-sampled.
    Raises ValueError for r = 0 (where K = 1) and for base ≤ 1.
    """
    r = torch.as_tensor(r, dtype=torch.float64).cpu().abs()
    if not base > 1:
        raise ValueError(f"base must be greater than 1, got {base}")
    if bool((r == 0).any()):
        raise ValueError("r must not be 0, where the cosine integral diverges (K(0) = 1)")
    ci = np.vectorize(lambda x: float(mpmath.ci(x)), otypes=[float])
    return torch.from_numpy(np.asarray(ci(r) - ci(r / base))) / math.log(base)
