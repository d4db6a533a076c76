"""How much each factor lowers the loss in one step, and the ratio of learning rates at which both do as much.

Source: https://kexue.fm/archives/10001; S. Hayou, N. Ghosh, B. Yu, arXiv:2402.12354
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .factors import lora_gradients, require_factors
from .linear import LoRALinear


def first_order_change(G_A: Tensor, G_B: Tensor, dA: Tensor, dB: Tensor) -> Tensor:
    """ΔL = ⟨G_A, ΔA⟩ + ⟨G_B, ΔB⟩ up to the second order in the steps, (…)   (lora-first-order)"""
    return (G_A * dA).sum((-2, -1)) + (G_B * dB).sum((-2, -1))


def sign_contributions(G_A: Tensor, G_B: Tensor, eta_A: float, eta_B: float) -> tuple[Tensor, Tensor]:
    """ΔL_A = −η_A‖G_A‖₁ and ΔL_B = −η_B‖G_B‖₁ of the steps −η sign(G), (…) each   (lora-sign)"""
    return -eta_A * G_A.abs().sum((-2, -1)), -eta_B * G_B.abs().sum((-2, -1))


def sign_ratio(G_A: Tensor, G_B: Tensor) -> Tensor:
    """η_B/η_A at which sign steps of both factors lower the loss by as much: ‖G_A‖₁/‖G_B‖₁   (lora-ratio)

    "As much" compares the totals of the two factors, whatever their numbers of entries. Returns (…); ∞ where G_B = 0.
    """
    return G_A.abs().sum((-2, -1)) / G_B.abs().sum((-2, -1))


def sgd_ratio(G_A: Tensor, G_B: Tensor) -> Tensor:
    """The same for steps −ηG: ‖G_A‖²/‖G_B‖² in the Frobenius norm   (lora-sgd)"""
    return G_A.square().sum((-2, -1)) / G_B.square().sum((-2, -1))


def coherence(B: Tensor, D: Tensor) -> Tensor:
    """κ = ‖BDᵀ‖₁/(r·|B|·‖D‖₁), with |B| the mean magnitude of B's entries   (lora-ratio)

    How far the examples' D lie along the rows of B: 0 for D orthogonal to them, √(π/2)/√m = 1.25/√m on average for
    Gaussian D that know nothing of a Gaussian B, of order 1 for D made from the rows of B.
    B: (…, r, m), D: (…, b, m); returns (…), nan for B = 0 or D = 0.
    """
    r = B.shape[-2]
    return (D @ B.mT).abs().sum((-2, -1)) / (r * B.abs().mean((-2, -1)) * D.abs().sum((-2, -1)))


def coherence_ratio(X: Tensor, D: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`sign_ratio` as n·|x|/|z| · |B|·κ, with |·| mean magnitudes of X, XA and B, and κ the coherence   (lora-ratio)

    Exact for one example, b = 1: ‖G_A‖₁/‖G_B‖₁ = (‖x‖₁/‖z‖₁)·(‖BDᵀ‖₁/‖D‖₁); for more, an estimate that leaves out what
    the examples' signs cancel. X: (…, b, n), D: (…, b, m), A: (…, n, r), B: (…, r, m); returns (…).
    """
    x, z, size = (v.abs().mean((-2, -1)) for v in (X, X @ A, B))
    return X.shape[-1] * x / z * size * coherence(B, D)


def feature_changes(X: Tensor, D: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean magnitudes, per unit of learning rate, of XΔA, (XA)ΔB and (XΔA)B for sign steps   (lora-feature)

    Of orders n, 1 and n|B|: Y moves by as much at every width if η_A = Θ(1/n) and η_B = Θ(1). Returns (…) three times.
    """
    G_A, G_B = lora_gradients(X, D, A, B)
    XdA = X @ G_A.sign()
    return tuple(change.abs().mean((-2, -1)) for change in (XdA, (X @ A) @ G_B.sign(), XdA @ B))


def post_ratio(n: float, m: float, r: float) -> float:
    """η_B/η_A = (n/m)·√(n/r), the post's estimate   (lora-post)"""
    return n / m * (n / r) ** 0.5


def incoherent_ratio(n: float, m: float, r: float) -> float:
    """η_B/η_A ~ n/√(mr) where D knows nothing of B: κ ~ m^(−½), |B| ~ r^(−½), |x| ~ |z|   (lora-ratio)"""
    return n / (m * r) ** 0.5


def coherent_ratio(n: float, r: float) -> float:
    """η_B/η_A ~ n/r where D lies along the rows of B: κ ~ r^(−½), |B| ~ r^(−½), |x| ~ |z|   (lora-ratio)"""
    return n / r


class Contribution(NamedTuple):
    """l1_A, l1_B: ‖∂L/∂A‖₁, ‖∂L/∂B‖₁; coherence: κ; suggested_ratio: η_B/η_A = l1_A/l1_B   (lora-ratio)"""

    l1_A: Tensor
    l1_B: Tensor
    coherence: Tensor
    suggested_ratio: Tensor


class ContributionMeter:
    """Adds up, over the batches of one step, what :func:`contribution` is made of; nothing waits for the device.

    A: (…, n, r), B: (…, r, m), a snapshot is not taken: don't step between updates. scale: s of Y = XW₀ + s(XA)B.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float = 1.0):
        require_factors(A, B)
        self.A, self.B, self.scale = A.detach(), B.detach(), scale
        self.G_A, self.G_B = torch.zeros_like(self.A), torch.zeros_like(self.B)
        self.projected = self.total = 0.0  # ‖BDᵀ‖₁ and ‖D‖₁

    @torch.no_grad()
    def update(self, x: Tensor, grad_y: Tensor) -> None:
        """x: (…, b, n), grad_y = ∂L/∂Y: (…, b, m). Raises ValueError where they don't fit the factors."""
        n, m = self.A.shape[-2], self.B.shape[-1]
        if x.shape[:-1] != grad_y.shape[:-1] or x.shape[-1] != n or grad_y.shape[-1] != m or x.ndim < 2:
            raise ValueError(
                f"x and grad_y must be (..., b, {n}) and (..., b, {m}), got {tuple(x.shape)} and {tuple(grad_y.shape)}"
            )
        if self.A.ndim == 2:  # all other dimensions are examples
            x, grad_y = x.reshape(-1, n), grad_y.reshape(-1, m)
        x, D = x.to(self.A), grad_y.to(self.B)
        G_A, G_B = lora_gradients(x, D, self.A, self.B)
        self.G_A, self.G_B = self.G_A + self.scale * G_A, self.G_B + self.scale * G_B
        self.projected = self.projected + (D @ self.B.mT).abs().sum((-2, -1))
        self.total = self.total + D.abs().sum((-2, -1))

    def result(self) -> Contribution:
        """Of all batches together. ValueError before the first."""
        if isinstance(self.total, float):
            raise ValueError("no batch yet: call update(x, grad_y) first")
        kappa = self.projected / (self.B.shape[-2] * self.B.abs().mean((-2, -1)) * self.total)
        l1_A, l1_B = (G.abs().sum((-2, -1)) for G in (self.G_A, self.G_B))
        return Contribution(l1_A, l1_B, kappa, l1_A / l1_B)


def _meter(adapted):
    if isinstance(adapted, LoRALinear):
        return ContributionMeter(adapted.lora_A.mT, adapted.lora_B.mT, adapted.scaling)
    A, B = adapted
    return ContributionMeter(A, B)


def contribution(adapted: LoRALinear | tuple[Tensor, Tensor], x: Tensor, grad_y: Tensor) -> Contribution:
    """What the two factors' gradients promise, and the ratio of learning rates that makes it equal   (lora-ratio)

    adapted: a :class:`LoRALinear`, or factors (A, B) of shapes (…, n, r) and (…, r, m); x: (…, b, n), its input;
    grad_y: (…, b, m), the gradient of the loss of one step at its output. Leading dimensions of A and B are separate
    adapters; those that only x has are examples. At a zero factor the ratio is 0 or ∞: ask after the first steps.
    Raises ValueError for shapes that don't fit. For batches one by one: :class:`ContributionMeter`.
    """
    meter = _meter(adapted)
    meter.update(x, grad_y)
    return meter.result()


@contextmanager
def watch_contributions(model: nn.Module) -> Iterator[dict[str, ContributionMeter]]:
    """Meters of every adapter of `model`, by name, fed by the backward passes inside the `with` block   (lora-ratio)

    Call ``result()`` on them afterwards, before the optimizer's step. They see the layers' inputs before dropout.
    Raises ValueError for a model without adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("model has no adapters: inject LoRA first")
    meters = {name: _meter(layer) for name, layer in layers.items()}

    def hook(meter):
        def forward(module, inputs, named, output):
            if output.requires_grad:
                x = (inputs[0] if inputs else named["x"]).detach()
                output.register_hook(lambda grad: meter.update(x, grad))

        return forward

    handles = [layers[name].register_forward_hook(hook(meter), with_kwargs=True) for name, meter in meters.items()]
    try:
        yield meters
    finally:
        for handle in handles:
            handle.remove()
