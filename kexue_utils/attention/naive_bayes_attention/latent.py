"""Noise on the read-out vector, and how fast it dies out in the Dirac limit.

Source: https://kexue.fm/archives/9648; https://kexue.fm/archives/1870
"""

from torch import Tensor


def softmax_laplacian(h: Tensor, w: Tensor) -> Tensor:
    """Laplacian in h of p_y(h) = softmax(h·w)_y (nb-laplacian).

    Δ_h p_y = p_y (‖w_y − μ‖² − tr Cov_p(w)),  μ = Σ_y p_y w_y

    h: (..., d), w: (V, d); returns (..., V). Any floating dtype. Raises ValueError where d does not match.
    """
    if w.ndim != 2 or h.shape[-1:] != w.shape[-1:]:
        raise ValueError(f"h (..., d) and w (V, d) must agree in d, got {tuple(h.shape)} and {tuple(w.shape)}")
    p = (h @ w.T).softmax(-1)
    mu = p @ w
    distance = (w - mu.unsqueeze(-2)).square().sum(-1)
    return p * (distance - (p * distance).sum(-1, keepdim=True))


def dirac_limit_coefficient(h: Tensor, w: Tensor) -> Tensor:
    """c in TV(E_z softmax(z·w), softmax(h·w)) = c σ² + O(σ⁴) for z ~ N(h, σ²I): c = ¼ Σ_y |Δ_h p_y| (nb-dirac).

    How much a noisy latent vector differs from its Dirac limit: the mean over z moves p_y by ½σ²Δ_h p_y,
    and the total variation is half the sum of such moves. h: (..., d), w: (V, d); returns (...).
    Raises as :func:`softmax_laplacian` does.
    """
    return softmax_laplacian(h, w).abs().sum(-1) / 4
