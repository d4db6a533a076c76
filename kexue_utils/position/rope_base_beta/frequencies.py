"""Frequency tables of rotary position embeddings, plain and stretched, in float64.

Every method divides the frequency of digit m = 1, …, D (pair j = m−1, D = d/2) by its cumulative stretch Λ_m:

    θ'_j = θ_j / Λ_{j+1},   θ_j = base^{−2j/d}

Sources: https://kexue.fm/archives/9675, https://kexue.fm/archives/9706; Position Interpolation arXiv:2306.15595;
NTK-aware scaled RoPE (bloc97, 2023); YaRN arXiv:2309.00071; LongRoPE arXiv:2402.13753; Llama 3.1 arXiv:2407.21783.
"""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

METHODS = ("none", "pi", "ntk", "ntk_old", "ntk_fixed", "ntk_mixed", "dynamic",
           "yarn", "yarn_paper", "llama3", "longrope")  # fmt: skip
_NEED_TRAIN_LEN = ("dynamic", "yarn", "yarn_paper", "llama3", "longrope")


def _require(dim, base, method, scale, train_len, b, alpha, beta_fast, length, factors):
    if not isinstance(dim, Integral) or dim <= 0 or dim % 2:
        raise ValueError(f"dim must be a positive even integer, got {dim}")
    if not base > 1:
        raise ValueError(f"base must be greater than 1, got {base}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not scale >= 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if method in _NEED_TRAIN_LEN and train_len is None:
        raise ValueError(f"train_len is required for method {method!r}")
    if train_len is not None and not train_len > 1:
        raise ValueError(f"train_len must be greater than 1, got {train_len}")
    if method in ("ntk", "dynamic") and dim == 2:
        raise ValueError(f"dim must be at least 4 for method {method!r}, whose exponent is 2/(dim-2), got 2")
    if method == "ntk_mixed" and not 0 <= b <= 1:
        raise ValueError(f"b must lie in [0, 1], got {b}: only then is every stretch λ_m >= 1 and non-increasing in m")
    if method in ("yarn", "yarn_paper", "llama3") and not 0 < alpha < beta_fast:
        raise ValueError(f"alpha and beta_fast must satisfy 0 < alpha < beta_fast, got {alpha} and {beta_fast}")
    if method == "dynamic" and not (length is not None and length >= 1):
        raise ValueError(f"length must be given and at least 1 for method 'dynamic', got {length}")
    if method == "longrope" and (factors is None or len(factors) != dim // 2 or any(not f > 0 for f in factors)):
        raise ValueError(f"factors must be {dim // 2} positive numbers (dim // 2) for method 'longrope', got {factors}")


def cumulative_stretch(
    dim: int,
    method: str = "none",
    scale: float = 1.0,
    *,
    base: float = 10000.0,
    train_len: float | None = None,
    b: float = 0.625,
    alpha: float = 1.0,
    beta_fast: float | None = None,
    length: float | None = None,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """How much each digit is stretched: Λ_m = θ_{m−1}/θ'_{m−1}, m = 1, …, D = d/2, float64 (D,), high frequency first.

    With k = ``scale``, L = ``train_len``:

    - ``none``        1, direct extrapolation                                          (rope-extrapolation)
    - ``pi``          k, position interpolation                                        (rope-pi)
    - ``ntk``         k^{2(m−1)/(d−2)}, bloc97's NTK-aware base                        (rope-ntk)
    - ``dynamic``     ``ntk`` at scale k·n/L − (k−1) if n = ``length`` > L, else 1     (rope-dynamic)
    - ``ntk_old``     k^{2(m−1)/d}, the base change base → k·base                      (rope-old)
    - ``ntk_fixed``   k^{2m/d}                                                         (rope-fixed)
    - ``ntk_mixed``   exp(a m^b), a = ln k/(d/2)^b; b = 1 is ``ntk_fixed``, 0 is ``pi``  (rope-family)
    - ``yarn_paper``  1/((1−γ)/k + γ), γ = clip((r−α)/(β_f−α), 0, 1), r = Lθ/2π        (rope-yarn)
    - ``llama3``      the same ramp with β_f = 4, Llama 3.1's
    - ``yarn``        γ linear in the pair index, as in the released code              (rope-yarn-code),
                      which for L < 2πα, less than one turn of any pair, stretches nothing: here all but one pair
    - ``longrope``    Λ given: ``factors``, found by search

    b is read by ``ntk_mixed`` only, ``alpha`` = α and ``beta_fast`` = β_f (None: 32, and 4 for ``llama3``) by the yarn
    family only, ``length`` by ``dynamic`` only, ``factors`` by ``longrope`` only.
    Raises ValueError for an odd or non-positive dim, scale < 1, an unknown method, a missing ``train_len``,
    b outside [0, 1], not 0 < alpha < beta_fast, and where ``length`` or ``factors`` are missing or wrong.
    """
    if beta_fast is None:
        beta_fast = 4.0 if method == "llama3" else 32.0
    _require(dim, base, method, scale, train_len, b, alpha, beta_fast, length, factors)
    k, D, L = scale, dim // 2, train_len
    m = torch.arange(1, D + 1, dtype=torch.float64)
    if method == "none":
        return torch.ones_like(m)
    if method == "longrope":
        return torch.tensor(list(factors), dtype=torch.float64)
    if method == "ntk_old":
        return k ** ((m - 1) / D)
    if method == "ntk_fixed":
        return k ** (m / D)
    if method == "ntk_mixed":
        return torch.exp(math.log(k) / D**b * m**b)
    if method == "pi":
        return torch.full_like(m, k)
    if method == "ntk":
        return k ** ((m - 1) / (D - 1))
    if method == "dynamic":
        k = dynamic_scale(length, L, k)
        return k ** ((m - 1) / (D - 1))
    if method == "yarn":
        fast, slow = (D * math.log(L / (2 * math.pi * turns)) / math.log(base) for turns in (beta_fast, alpha))
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
        gamma = 1 - ((m - 1 - low) / max(high - low, 1)).clamp(0, 1)
    else:
        turns = L * base ** ((1 - m) / D) / (2 * math.pi)
        gamma = ((turns - alpha) / (beta_fast - alpha)).clamp(0, 1)
    return 1 / ((1 - gamma) / k + gamma)


def rope_inv_freq(
    dim: int,
    *,
    base: float = 10000.0,
    method: str = "none",
    scale: float = 1.0,
    train_len: float | None = None,
    b: float = 0.625,
    alpha: float = 1.0,
    beta_fast: float | None = None,
    length: float | None = None,
    factors: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Frequencies of rotary embeddings in radians per token: θ'_j = base^{−2j/d}/Λ_{j+1}, j = 0, …, d/2−1

    Returns (d/2,), decreasing, computed in float64 and cast to ``dtype`` last. Methods, options and errors as in
    :func:`cumulative_stretch`; the equations are rope-sinusoidal (plain) and rope-stretched.
    Source: https://kexue.fm/archives/9706
    """
    stretch = cumulative_stretch(dim, method, scale, base=base, train_len=train_len, b=b, alpha=alpha,
                                 beta_fast=beta_fast, length=length, factors=factors)  # fmt: skip
    j = torch.arange(dim // 2, dtype=torch.float64)
    return (base ** (-2 * j / dim) / stretch).to(device=device, dtype=dtype)


def dynamic_scale(length: float, train_len: float, factor: float) -> float:
    """The stretch that the dynamic NTK rule asks for at length n: s·n/L − (s−1) for n > L, else 1   (rope-dynamic)

    length: n; train_len: L; factor: s ≥ 1. With s = 1 it is n/L; with s = k at n = kL it is k² − k + 1, not k.
    Raises ValueError for train_len ≤ 1 or factor < 1.
    """
    if not train_len > 1:
        raise ValueError(f"train_len must be greater than 1, got {train_len}")
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return factor * max(length, train_len) / train_len - (factor - 1)


def yarn_attention_factor(scale: float) -> float:
    """YaRN's factor on q and on k, √(1/t) = 0.1 ln k + 1: logits grow by its square   (rope-yarn-temperature)

    Raises ValueError for scale < 1. Source: arXiv:2309.00071
    """
    if not scale >= 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return 0.1 * math.log(scale) + 1


def attention_factor(method: str, scale: float, train_len: float | None = None) -> float:
    """The factor on q and on k that comes with a method: YaRN's, LongRoPE's √(1 + ln k/ln L) (rope-longrope), else 1.

    Raises ValueError for an unknown method, and for ``longrope`` without train_len.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method in ("yarn", "yarn_paper"):
        return yarn_attention_factor(scale)
    if method == "longrope":
        if train_len is None or not train_len > 1:
            raise ValueError(f"train_len must be greater than 1 for method 'longrope', got {train_len}")
        return math.sqrt(1 + math.log(scale) / math.log(train_len))
    return 1.0
