"""Recorded run: the rules of `text` with weight decay that shrinks the parameters of each equally.

A common λ is not comparable: AdamW, Lion and momentum SGD shrink by ηλ a step, Tiger by α·RMS(θ)·λ. Here ηλ is, at the
peak rate, what AdamW with λ = 0.1 has at its best rate without decay; so λ goes as 1/rate. Tiger's λ is one number for
a tensor, which gives that shrink at the RMS it starts with; when the tensor grows, so does its shrink.
"""

import math

from kexue_utils.optimization.tiger.experiments import rules, text
from kexue_utils.optimization.tiger.experiments.runs import GPT, SMOKE
from kexue_utils.optimization.tiger.experiments.stack import kind
from kexue_utils.optimization.tiger.experiments.verdicts import MARGIN
from kexue_utils.optimization.tiger.update import rate
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.replicas import cosine

BEST = {"Tiger": 8e-3, "Lion": 3.2e-4, "AdamW": 2e-3, "SGDM": 0.2}  # on source code, in the record of tiger_text
CUSTOMARY = 0.1  # AdamW's λ for language models
SHRINK = BEST["AdamW"] * CUSTOMARY


class Decay:
    """Decoupled decay of matrices and embeddings, not of gains: θ ← θ − ηλθ besides the rule's own step from θ.

    λ, one for each tensor of each copy, is chosen at the first step so that the mean of ηλ over the tensor's rates is
    p["shrink"] times that step's share of the peak rate.
    """

    def __init__(self, parameters, p):
        super().__init__(parameters, p)
        self.decay = {}

    def one(self, name, theta, g, *state_and_rate):
        if kind(name) == "gain":
            return super().one(name, theta, g, *state_and_rate)
        eta = self.eta(name, theta, state_and_rate[-1])
        if name not in self.decay:
            shrink = self.p["shrink"] * cosine(self.steps - 1, self.p["steps"], self.p["warm"])
            self.decay[name] = shrink / eta.mean(tuple(range(1, eta.ndim)), keepdim=True)
        lost = eta * self.decay[name] * theta
        super().one(name, theta, g, *state_and_rate)
        theta.sub_(lost)

    def eta(self, name, theta, rates):
        return rates


class Tiger(Decay, rules.Tiger):
    """η of tiger-rate, by the RMS of a matrix or of an embedding's row before the step."""

    def eta(self, name, theta, alpha):
        return rate(theta.flatten(1)[:, None] if kind(name) == "matrix" else theta, alpha, "row_rms")


class Lion(Decay, rules.Lion):
    pass


class AdamW(Decay, rules.AdamW):
    pass


class SGDM(Decay, rules.SGDM):
    pass


DECAYED = {f"{rule.__name__} with decay": rule for rule in (Tiger, Lion, AdamW, SGDM)}


def _run(parameters, seeds, device, checkpoint):
    rules.RULES.update(DECAYED)  # training looks a rule up by its name
    return text._run(parameters, seeds, device, checkpoint)


def _units(smoke):
    units = {}
    for rule, own in text.RULES.items():
        p = GPT | {k: v for k, v in own.items() if k != "first"} | {"rule": f"{rule} with decay", "shrink": SHRINK}
        p["rates"] = [BEST[rule] * 2.0**k for k in range(-2, 3)]
        units[rule] = p | (SMOKE | {"rates": [BEST[rule] * 4.0**k for k in range(3)]} if smoke else {})
    return units


def _conclude(units):
    rows = {rule: text._one(unit) for rule, unit in units.items()}
    p = units["Tiger"]["parameters"]
    shrinks = [SHRINK * cosine(t, p["steps"], p["warm"]) for t in range(p["steps"])]
    for rule, row in rows.items():
        row["weight decay"] = SHRINK / row["rate"] / (p["init"] if rule == "Tiger" else 1)  # Tiger's: of RMS p["init"]
    return text.compared(rows) | {
        "margin": MARGIN, "shrink": SHRINK, "kept without steps": math.prod(1 - shrink for shrink in shrinks),
    }  # fmt: skip


DECAY = Experiment(
    title="Tiger, Lion, AdamW and momentum SGD on a small language model, with equal shrink by weight decay",
    units=_units,
    run=_run,
    conclude=_conclude,
)
