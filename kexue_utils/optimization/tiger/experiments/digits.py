"""Recorded run: which β is best for Tiger on images, each at its best learning rate. The post advises 0.945 for vision.

A small residual network of 3 × 3 convolutions on scikit-learn's digits, shifted by up to a pixel in training. Rates are
chosen on validation images by seeds of their own; other seeds are judged, on test images.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue_utils.optimization.tiger.experiments import rules
from kexue_utils.optimization.tiger.experiments.grids import BETAS, best_beta
from kexue_utils.optimization.tiger.experiments.runs import PARTS, clipped
from kexue_utils.optimization.tiger.experiments.verdicts import MARGIN, vertex
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.replicas import Replicas, cosine

RECOMMENDED = 0.945
TUNING_SEEDS = list(range(1000, 1008))


def images(device) -> dict[str, tuple[Tensor, Tensor]]:
    """{part: (pixels (n, 8, 8) from −1 to 1, classes (n,))}: of every five of the 1,797 digits, the first is a test and
    the second is for validation. ModuleNotFoundError without scikit-learn.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, classes = torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target)
    turn = torch.arange(len(classes)) % 5
    where = {"test": turn == 0, "validation": turn == 1, "train": turn > 1}
    return {part: (pixels[rows].to(device), classes[rows].to(device)) for part, rows in where.items()}


class Net(nn.Module):
    """Images (…, 8, 8) → logits (…, 10): two residual convolutions of 8 × 8 pixels, then two of 4 × 4.

    No biases, and gains of norms have names that begin with "norm", by which the rules know them.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.Linear(9, channels, bias=False)
        self.convolutions = nn.ModuleList(nn.Linear(9 * channels, channels, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(channels, bias=False) for _ in range(5))
        self.head = nn.Linear(channels, 10, bias=False)

    def forward(self, pixels):
        x = self.stem(neighbours(pixels[..., None]))
        for i, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=False)):
            x = x + F.gelu(convolution(neighbours(norm(x))))
            if i == 1:
                x = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2)).mean((-2, -4))
        return self.head(self.norms[-1](x).mean((-2, -3)))


def neighbours(x: Tensor) -> Tensor:
    """(…, h, w, c) → (…, h, w, 9c): every pixel's 3 × 3 neighbourhood, zeros beyond the border."""
    h, w = x.shape[-3:-1]
    wide = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([wide[..., i : i + h, j : j + w, :] for i in range(3) for j in range(3)], -1)


def draws(p: dict, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """(numbers of the images of every step, shift of each by 0, 1, 2 rows and columns): (steps, batch), (…, 2)."""
    generator, size = torch.Generator().manual_seed(seed), (p["steps"], p["batch"])
    return torch.randint(count, size, generator=generator), torch.randint(3, (*size, 2), generator=generator)


def train(p: dict, rates: list, seeds: list, device, description=None) -> dict:
    """Tiger from every seed at every peak rate; {part: loss, part accuracy: share of right classes}, (rates, seeds)."""
    data = images(device)
    pixels, classes = data["train"]
    wide = F.pad(pixels, (1, 1, 1, 1), value=-1.0)
    replicas = Replicas(lambda: Net(p["channels"]), seeds, rates, device)
    parameters = list(replicas.parameters.values())
    rule = rules.Tiger(replicas.parameters, p)
    peaks = torch.tensor(rates, device=device).repeat_interleave(len(seeds))
    which, shifts = (
        torch.stack(one, 1).to(device)
        for one in zip(*[draws(p, seed, len(classes)) for seed in seeds], strict=True)
    )  # fmt: skip
    span = torch.arange(8, device=device)
    for t in progress(p["steps"], description):
        i, j = (shifts[t][..., None] + span).unbind(-2)
        logits = replicas.losses(wide[which[t][..., None, None], i[..., None], j[..., None, :]])
        wanted = classes[which[t]].repeat(len(rates), 1)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape).mean(1)
        gradients = clipped(torch.autograd.grad(losses.sum(), parameters), p["clip"])
        rule.update(gradients, peaks * cosine(t, p["steps"], p["warm"]))
    found, everyone = {}, torch.arange(len(peaks), device=device)
    with torch.no_grad():
        for part in PARTS:
            pixels, classes = data[part]
            logits = replicas.losses_of(everyone, pixels)
            nats = F.cross_entropy(logits.mT, classes.expand(len(logits), -1), reduction="none").mean(1)
            found |= {part: nats, f"{part} accuracy": (logits.argmax(-1) == classes).double().mean(1)}
    return {name: replicas.by_rate(values) for name, values in found.items()}


def _run(parameters, seeds, device, checkpoint):
    p, rates = parameters, parameters["rates"]
    tuning = train(p, rates, TUNING_SEEDS, device, f"{p['name']}: {len(rates)} rates")["validation"]
    best = int(np.argmin([_mean(losses) for losses in tuning]))
    judged = train(p, [rates[best]], seeds, device, f"{p['name']}: {len(seeds)} seeds at the best")
    return [
        {name: row[0][s] for name, row in judged.items()}
        | {"rate": rates[best]}
        | ({"tuning": tuning} if s == 0 else {})
        for s in range(len(seeds))
    ]  # fmt: skip


def _mean(losses):
    """What a rate is chosen by: a run that diverged makes it the worst."""
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def _units(smoke):
    units = {}
    for beta in (0.9, RECOMMENDED, 0.99) if smoke else BETAS:
        p = {
            "name": f"β = {beta:g}", "betas": [beta], "lr_scale": "rms", "channels": 32, "batch": 32, "steps": 1000,
            "clip": 1.0, "warm": 0.1, "rates": [2e-3 * 2**k for k in range(7)],
        }  # fmt: skip
        units[p["name"]] = p | ({"channels": 4, "batch": 4, "steps": 10, "rates": [2e-2, 4e-2]} if smoke else {})
    return units


def _nats(loss):
    """A loss; a run that diverged, which may be None in a record, counts as a guess among the classes: ln 10."""
    return min(math.inf if loss is None else loss, math.log(10))


def best_horizon(tuning: dict[float, list], draws: int = 4000) -> dict:
    """log₂ 1/(1 − β) of the lowest mean validation loss, each β at its best rate, by the parabola through three β.

    tuning: {β: losses (rates, seeds)}. Returns {mean, low, high}; the interval is of bootstrap, seeds drawn for all β
    together and every rate chosen anew in each draw, so that the noise of that choice is in it.
    """
    betas = sorted(tuning)
    x = [-math.log2(1 - beta) for beta in betas]
    losses = np.array([[[_nats(loss) for loss in rate] for rate in tuning[beta]] for beta in betas])

    def lowest(seeds):
        least = losses[:, :, seeds].mean(2).min(1)
        i = int(np.argmin(least))
        return vertex(x[i - 1 : i + 2], least[i - 1 : i + 2]) if 0 < i < len(x) - 1 else x[i]

    count = losses.shape[2]
    picks = np.random.default_rng(0).integers(count, size=(draws, count))
    low, high = np.quantile([lowest(pick) for pick in picks], [0.025, 0.975])
    return {"mean": lowest(np.arange(count)), "low": low, "high": high}


def _conclude(units):
    rows = {}
    for unit in units.values():
        p, runs = unit["parameters"], unit["runs"]
        tests, right = [_nats(run["test"]) for run in runs], [run["test accuracy"] for run in runs]
        rows[p["betas"][0]] = {
            "rate": runs[0]["rate"], "rate inside the grid": p["rates"][0] < runs[0]["rate"] < p["rates"][-1],
            "validation": [_nats(run["validation"]) for run in runs],
            "tests": tests, "test": interval(tests), "accuracies": right, "accuracy": interval(right),
        }  # fmt: skip
    found = best_beta(rows, RECOMMENDED)
    return found | {
        "recommended's accuracy − best other's": paired_difference(
            rows[RECOMMENDED]["accuracies"], rows[found["best other"]]["accuracies"]
        ),
        "log2 of the best horizon 1/(1 − β)": best_horizon(
            {unit["parameters"]["betas"][0]: unit["runs"][0]["tuning"] for unit in units.values()}
        ),
        "margin": MARGIN,
    }  # fmt: skip


DIGITS = Experiment(
    title="Which β is best for Tiger on images of digits, each at its best learning rate",
    units=_units,
    run=_run,
    conclude=_conclude,
)
