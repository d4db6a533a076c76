"""Two small regressions on which widths can be swept: all learning rates and seeds of one width in a few products.

Source of the second: S. Hayou, N. Ghosh, B. Yu, arXiv:2402.12354
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import OPTIMIZERS
from .contribution import coherence, coherence_ratio, sign_ratio
from .factors import lecun_factors

PROBLEMS = ("linear", "network")
LATENT = 8


class Toy(NamedTuple):
    """S regressions of b examples, one per seed. X: (S, b, n); base: XW₀, (S, b, m), or None for W₀ = 0; head: None or
    the output weights w, (S, m); Y: targets, (S, b, m), or (S, b) with a head; A, B: the factors that training starts
    from, (S, n, r) and (S, r, m).
    """

    X: Tensor
    base: Tensor | None
    head: Tensor | None
    Y: Tensor
    A: Tensor
    B: Tensor


def outputs(toy: Toy, Y: Tensor) -> Tensor:
    """What the toy makes of Y = XW (S, …, b, m): Y itself, or w·√2 relu(Y) if it has a head."""
    if toy.head is None:
        return Y
    return 2**0.5 * torch.einsum("s...m,sm->s...", Y.relu(), toy.head)


def draw_toy(problem: str, n: int, m: int, seeds: Sequence[int], *, r: int = 4, b: int = 16, init: str = "A",
             dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Toy:  # fmt: skip
    """The regression of every seed, the same on every device, with a student of rank r.

    X = √2 relu(Z W_in): b examples of n features made from 8 latent ones, Z ~ N(0, 1), W_in ~ N(0, 1/8).

    - ``"linear"``   Y = XA*B*, the student is XAB
    - ``"network"``  y = w·√2 relu(X(W₀ + A*B*)), the student w·√2 relu(X(W₀ + AB)), W₀ ~ N(0, 1/n), w ~ N(0, 1/m).
      Only XW₀ enters: it is drawn as RᵀΞ/√n, Xᵀ = QR, Ξ ~ N(0, 1) of shape (b, m), which has the same law.

    A*, B* as :func:`lecun_factors` draws them; init ``"A"``: A is drawn likewise and B = 0, ``"B"``: the reverse.
    Raises ValueError for another problem or init, or sizes that are not positive.
    """
    if problem not in PROBLEMS or init not in ("A", "B"):
        raise ValueError(f"problem must be one of {PROBLEMS} and init 'A' or 'B', got {problem!r} and {init!r}")
    if min(n, m, r, b) < 1 or not len(seeds):
        raise ValueError(f"n, m, r, b must be positive and seeds not empty, got {n}, {m}, {r}, {b} and {seeds}")
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, generator=generator):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        X = 2**0.5 * (normal(b, LATENT) @ normal(LATENT, n) / LATENT**0.5).relu()
        teacher_A, teacher_B = lecun_factors(n, m, r, generator=generator)
        A, B = lecun_factors(n, m, r, generator=generator)
        W = torch.linalg.qr(X.mT, mode="r").R.mT
        drawn.append((X, W @ normal(W.shape[1], m) / n**0.5, normal(m) / m**0.5, (X @ teacher_A) @ teacher_B, A, B))
    X, base, head, Y, A, B = (torch.stack(part).to(device, dtype) for part in zip(*drawn, strict=True))
    A, B = (A, torch.zeros_like(B)) if init == "A" else (torch.zeros_like(A), B)
    if problem == "linear":
        return Toy(X, None, None, Y, A, B)
    toy = Toy(X, base, head, Y, A, B)
    return toy._replace(Y=outputs(toy, base + Y))


class Observation(NamedTuple):
    """Of every seed and cell, (S, C): κ, η_B/η_A for equal contributions, what κ predicts for it, and the loss
    (lora-ratio).
    """

    coherence: Tensor
    ratio: Tensor
    predicted: Tensor
    loss: Tensor


def loss_gradients(toy: Toy, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(L, ∂L/∂A, ∂L/∂B, D = ∂L/∂Y) of L = ‖output − target‖² over its value at AB = 0   (lora-gradients)

    A: (S, n, C, r) and B: (S, C, r, m) for C cells a seed, an order in which X meets all cells in one product.
    L: (S, C), gradients in the shapes of A and B, D: (S, C, b, m).
    """
    z = torch.einsum("sbn,sncr->scbr", toy.X, A)
    Y = z @ B if toy.base is None else toy.base[:, None] + z @ B
    start = torch.zeros_like(toy.Y) if toy.base is None else outputs(toy, toy.base)
    scale = (start - toy.Y).square().flatten(1).sum(1)
    error = outputs(toy, Y) - toy.Y[:, None]
    loss = error.square().flatten(2).sum(2) / scale[:, None]
    D = error.mul_(2 / scale.view(-1, *[1] * (error.ndim - 1)))
    if toy.head is not None:
        D = D[..., None] * (Y > 0) * (2**0.5 * toy.head[:, None, None])
    G_A = torch.einsum("sbn,scbr->sncr", toy.X, D @ B.mT)
    return loss, G_A, z.mT @ D, D


@torch.no_grad()
def train_cells(toy: Toy, eta_A: Tensor, eta_B: Tensor, *, optimizer: str = "adam", steps: int = 60,
                decay: bool = True, observe: Sequence[int] = ()) -> tuple[Tensor, dict[int, Observation]]:  # fmt: skip
    """Train every seed's student at C pairs of rates side by side: (final loss (S, C), {t: `Observation` at step t})

    eta_A, eta_B: (C,). optimizer: ``"adam"`` (β = 0.9, 0.99, no ε), ``"sign"`` or ``"sgd"``; the loss is relative to
    that of AB = 0, on all b examples. decay: rates fall linearly to 0; if not, they are constant. A loss that is not
    finite is ∞. Raises ValueError for another optimizer, rates of other shapes, or times to observe outside 0…steps.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if eta_A.ndim != 1 or eta_A.shape != eta_B.shape:
        raise ValueError(f"eta_A and eta_B must both be (C,), got {tuple(eta_A.shape)} and {tuple(eta_B.shape)}")
    if steps < 1 or not set(observe) <= set(range(steps + 1)):
        raise ValueError(f"steps must be positive and observe within 0...steps, got {steps} and {tuple(observe)}")
    C = len(eta_A)
    A = toy.A[:, :, None].repeat(1, 1, C, 1)
    B = toy.B[:, None].repeat(1, C, 1, 1)
    cells = OPTIMIZERS[optimizer]([A, B], [eta_A.to(A)[:, None], eta_B.to(B)[:, None, None]])
    observed = {}
    for t in range(steps + 1):
        loss, G_A, G_B, D = loss_gradients(toy, A, B)
        if t in observe:
            predicted = coherence_ratio(toy.X[:, None], D, A.transpose(1, 2), B)
            observed[t] = Observation(coherence(B, D), sign_ratio(G_A.transpose(1, 2), G_B), predicted, loss)
        if t < steps:
            cells.step([G_A, G_B], 1 - t / steps if decay else 1.0)
    return loss.nan_to_num(nan=torch.inf, posinf=torch.inf), observed


def train_grid(toy: Toy, etas_A: Sequence[float], etas_B: Sequence[float], **options) -> Tensor:
    """Final losses (S, len(etas_A), len(etas_B)) of every pair of rates; options of :func:`train_cells`   (lora-sweep)

    All cells of a seed share data and start, so that they are compared in pairs.
    """
    pairs = torch.cartesian_prod(*(torch.as_tensor(e, dtype=torch.float64) for e in (etas_A, etas_B)))
    loss, _ = train_cells(toy, *pairs.reshape(-1, 2).unbind(1), **options)
    return loss.view(-1, len(etas_A), len(etas_B))
