"""Optimizers for many small problems side by side, every one ("cell") with learning rates of its own."""

import torch
from torch import Tensor

TINY = 1e-30  # keeps 0/0 away in float32 too; an epsilon that a gradient can feel would end the sign regime


class _Cells:
    """parameters: tensors that are changed in place; rates: one tensor for each, which broadcasts against it."""

    def __init__(self, parameters: list[Tensor], rates: list[Tensor]):
        self.parameters, self.rates, self.steps = parameters, rates, 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor], factor: float = 1.0) -> None:
        """One step at `factor` times the rates; the gradients may be overwritten."""
        self.steps += 1
        for i, gradient in enumerate(gradients):
            self.parameters[i].sub_(self.direction(i, gradient).mul_(self.rates[i] * factor))


class CellSGD(_Cells):
    """θ ← θ − ηg"""

    def direction(self, i: int, gradient: Tensor) -> Tensor:
        return gradient


class CellSign(_Cells):
    """θ ← θ − η sign(g), Adam with β₁ = β₂ = 0"""

    def direction(self, i: int, gradient: Tensor) -> Tensor:
        return gradient.sign_()


class CellAdam(_Cells):
    """Adam without an ε to speak of: the path is the same for the loss and for a millionth of it."""

    def __init__(self, parameters, rates, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(parameters, rates)
        self.betas = betas
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def direction(self, i: int, gradient: Tensor) -> Tensor:
        (b1, b2), m, v = self.betas, self.first[i], self.second[i]
        m.lerp_(gradient, 1 - b1)
        v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        root = torch.sqrt(v, out=gradient).div_((1 - b2**self.steps) ** 0.5).add_(TINY)
        return torch.div(m, root, out=root).div_(1 - b1**self.steps)


OPTIMIZERS = {"adam": CellAdam, "sign": CellSign, "sgd": CellSGD}
