"""Tiger, Lion, AdamW and momentum SGD for stacks of models: each copy with its own learning rate. No weight decay."""

import torch
from torch import Tensor

from kexue_utils.optimization.tiger.experiments.stack import kind
from kexue_utils.optimization.tiger.update import accumulate_, rate, shrink_, step_

SHRINK = 0.99
SCALES = {"gain": "half", "embedding": "row_rms", "matrix": "rms"}


class Rule:
    """One update of every copy. parameters: {name: (P, …)}; `update` takes gradients in their order and rates (P,)."""

    moments = 1

    def __init__(self, parameters: dict[str, Tensor], p: dict):
        self.parameters, self.p, self.steps = parameters, p, 0
        self.state = [[torch.zeros_like(q.detach()) for _ in range(self.moments)] for q in parameters.values()]

    @torch.no_grad()
    def update(self, gradients, rates: Tensor) -> None:
        self.steps += 1
        for (name, q), g, state in zip(self.parameters.items(), gradients, self.state, strict=True):
            self.one(name, q, g, *state, rates.view(-1, *[1] * (q.ndim - 1)))


class Tiger(Rule):
    """The library's own functions, each copy as a row: its matrices flat, with the RMS of a row (tiger-rate).

    p["lr_scale"]: "rms", by the kind of the parameter as `tiger_param_groups` has it, or "none".
    """

    def one(self, name, theta, g, m, alpha):
        scale = "none" if self.p["lr_scale"] == "none" else SCALES[kind(name)]
        if kind(name) == "matrix":
            theta, g, m, alpha = theta.flatten(1), g.flatten(1), m.flatten(1), alpha.flatten(1)
            scale = "row_rms" if scale == "rms" else scale  # a row is a copy's whole matrix
        fine = g.flatten(1).isfinite().all(1).view(-1, *[1] * (g.ndim - 1))
        eta = rate(theta, alpha, scale)
        accumulate_(m, g, torch.ones_like(fine), fine, beta=self.p["betas"][0])
        shrink_(theta, fine, SHRINK, float(kind(name) == "gain"))
        rounding = self.p.get("rounding") == "stochastic"
        step_(theta, m, torch.where(fine, eta, 0.0), weight_decay=0.0, stochastic_rounding=rounding)


class Lion(Rule):
    """θ ← θ − η sign(β₁m + (1−β₁)g), then m ← β₂m + (1−β₂)g   (tiger-lion, arXiv:2302.06675)"""

    def one(self, name, theta, g, m, eta):
        first, second = self.p["betas"]
        theta.sub_(eta * m.lerp(g, 1 - first).sign_())
        m.lerp_(g, 1 - second)


class AdamW(Rule):
    """θ ← θ − η m̂/(√v̂ + ε), ε = 10⁻⁸: no weight decay   (tiger-adamw)"""

    moments = 2

    def one(self, name, theta, g, m, v, eta):
        first, second = self.p["betas"]
        m.lerp_(g, 1 - first)
        v.mul_(second).addcmul_(g, g, value=1 - second)
        size = (v / (1 - second**self.steps)).sqrt_().add_(1e-8)
        theta.sub_(eta / (1 - first**self.steps) * m / size)


class SGDM(Rule):
    """m ← βm + g, θ ← θ − ηm"""

    def one(self, name, theta, g, m, eta):
        m.mul_(self.p["betas"][0]).add_(g)
        theta.sub_(eta * m)


RULES = {rule.__name__: rule for rule in (Tiger, Lion, AdamW, SGDM)}
