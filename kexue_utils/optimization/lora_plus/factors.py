"""Two factors in place of a matrix, W = W₀ + AB, in the convention Y = XW: what they cost, and how they move.

X: (…, b, n), W₀: (…, n, m), A: (…, n, r), B: (…, r, m), D = ∂L/∂Y: (…, b, m), G = ∂L/∂W = XᵀD: (…, n, m).
Every function takes any floating dtype, any device, and leading dimensions that broadcast.
Sources: https://kexue.fm/archives/9590, https://kexue.fm/archives/10001
"""

import torch
from torch import Tensor


def require_factors(A: Tensor, B: Tensor) -> None:
    """ValueError unless A is (…, n, r) and B (…, r, m), r ≥ 1."""
    if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2] or A.shape[-1] < 1:
        raise ValueError(f"A and B must be (..., n, r) and (..., r, m), got {tuple(A.shape)} and {tuple(B.shape)}")


def lora_forward(X: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Y = XW₀ + (XA)B, without ever forming AB   (lora-forward)

    Returns (…, b, m). Raises ValueError for factors that don't fit each other.
    """
    require_factors(A, B)
    return X @ W0 + (X @ A) @ B


def lora_gradients(X: Tensor, D: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂A = Xᵀ(DBᵀ) = GBᵀ and ∂L/∂B = (XA)ᵀD = AᵀG, without forming G   (lora-gradients)

    Returns (…, n, r) and (…, r, m). Raises ValueError for factors that don't fit each other.
    """
    require_factors(A, B)
    return X.mT @ (D @ B.mT), (X @ A).mT @ D


def factored_flops(b: int, n: int, m: int, r: int) -> int:
    """6br(n + m): what XW₀ + (XA)B adds to the frozen layer   (lora-flops)

    Forward and backward with the gradient of the input, a multiplication and an addition counted as 2.
    """
    return 6 * b * r * (n + m)


def materialised_flops(b: int, n: int, m: int, r: int) -> int:
    """6nmr + 2bnm: what X(W₀ + AB) adds, for AB, G, GBᵀ and AᵀG   (lora-flops)"""
    return 6 * n * m * r + 2 * b * n * m


def lora_increment(A: Tensor, B: Tensor, G: Tensor, eta: float) -> Tensor:
    """A'B' − AB after a step of SGD on both factors: −η(GBᵀB + AAᵀG) + η²GBᵀAᵀG   (lora-increment)

    Evaluated through the factors; returns (…, n, m). Raises ValueError for factors that don't fit each other.
    """
    require_factors(A, B)
    G_A, G_B = G @ B.mT, A.mT @ G
    return eta**2 * (G_A @ G_B) - eta * (G_A @ B + A @ G_B)


def projected_gradient(G: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Gvᵀv + uuᵀG: the direction of SGD on fresh factors A = u, B = v; E[uuᵀ] = I, E[vᵀv] = I make its mean 2G
    (lora-projection)

    u: (…, n, 1), v: (…, 1, m), which broadcast; returns (…, n, m).
    """
    return (G @ v.mT) @ v + u @ (u.mT @ G)


def additive_update(A: Tensor, B: Tensor) -> Tensor:
    """A[I_r … I_r] + [I_r; …; I_r]B, for r = 1 the matrix A1 + 1B of row and column offsets   (lora-additive)

    Returns (…, n, m). Raises ValueError for factors that don't fit each other and unless r divides n and m.
    """
    require_factors(A, B)
    (n, r), m = A.shape[-2:], B.shape[-1]
    if n % r or m % r:
        raise ValueError(f"r must divide n and m, got r={r}, n={n}, m={m}")
    columns = A.repeat(*[1] * (A.ndim - 1), m // r)
    return columns + B.repeat(*[1] * (B.ndim - 2), n // r, 1)


def lecun_factors(n: int, m: int, r: int, *, generator: torch.Generator, batch: tuple[int, ...] = (),
                  dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A ~ N(0, 1/n) and B ~ N(0, 1/r): entries of XA and XAB have variance 1 where those of X do   (lora-lecun)

    Drawn on the generator's device: (*batch, n, r) and (*batch, r, m).
    """
    options = {"generator": generator, "dtype": dtype, "device": generator.device}
    return torch.randn(*batch, n, r, **options) / n**0.5, torch.randn(*batch, r, m, **options) / r**0.5


def rescaled(A: Tensor, B: Tensor, eta_A: float, eta_B: float, c: float) -> tuple[Tensor, Tensor, float, float]:
    """(A/c, cB, η_A/c, cη_B): the same AB for ever under sign updates, at a ratio η_B/η_A that is c² times as large
    (lora-rescale)

    Raises ValueError unless c > 0 and finite.
    """
    if not 0 < c < float("inf"):
        raise ValueError(f"c must be positive and finite, got {c}")
    return A / c, c * B, eta_A / c, c * eta_B
