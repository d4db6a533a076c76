"""Recorded run: a byte-level transformer learns sympy's source and is fine-tuned on Python's help topics with LoRA.

Which pair of learning rates is best, and what is it worth? Every pair ("cell") trains on the same frozen model, side by
side with the others. The seeds that choose the rates are not those that judge them.
"""

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue_utils.optimization.lora_plus.cells import CellAdam
from kexue_utils.position.rope_base_beta import RopeAttention, RotaryEmbedding
from kexue_utils.training.corpora import deal_blocks, pydoc_topics, python_sources
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.loop import fit
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.replicas import cosine
from kexue_utils.training.transformer import Transformer, autocast, decayed

RATIOS = {"ratio 1": 0, "ratio 16": 4}  # log₂
CHOOSERS = 1000  # number of the first seed that chooses


class StackedLoRA(nn.Module):
    """y = base(x) + (xA_c)B_c for C adapters of one frozen layer; c is a block of rows of x, (C·b, T, n).

    lora_A: (C, r, n), as `LoRALinear` stores them, lora_B: (C, m, r), s = 1.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor):
        super().__init__()
        cells, r, _ = lora_A.shape
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_A.new_zeros(cells, base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        z = torch.bmm(x.reshape(len(self.lora_A), -1, x.shape[-1]), self.lora_A.mT)
        return y + torch.bmm(z, self.lora_B.mT).view_as(y)


def new_model(parameters: dict) -> Transformer:
    """A causal transformer over bytes with rotary positions."""
    d, heads = parameters["d_model"], parameters["heads"]
    rope = RotaryEmbedding(d // heads)
    return Transformer(256, d, parameters["layers"], lambda: RopeAttention(d, heads, rope=rope))


def adapted_layers(model: Transformer):
    """(parent, name, layer) of every linear map but the last: queries, keys and values, output, both of the MLP."""
    for block in model.blocks:
        yield from ((block.attention, name, getattr(block.attention, name)) for name in ("qkv", "out"))
        yield from ((block.mlp, name, getattr(block.mlp, name)) for name in ("0", "2"))


def first_factors(model: Transformer, r: int, seed: int) -> list[Tensor]:
    """A ~ N(0, 1/n) of every adapted layer, stored as (r, n); B is 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(r, layer.in_features) for *_, layer in adapted_layers(model)]
    return [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]


def corpora(parameters: dict, device: torch.device):
    """(bytes to learn first, training bytes, validation and test windows (count, T + 1)) on the device."""
    # A fifth of the topics' paragraphs stand in several of them.
    topics, T = "\n\n".join(dict.fromkeys(pydoc_topics().split("\n\n"))).encode(), parameters["T"]
    first = topics if parameters["pretrain"] == "help topics" else b"\0".join(python_sources().values())
    train, *held_out = deal_blocks(topics, 0, parameters["held_out"])
    windows = []
    for part in held_out:
        rows = torch.from_numpy(part[: len(part) // (T + 1) * (T + 1)].reshape(-1, T + 1).astype(np.int64))
        windows.append(rows.to(device))
    validation, test = windows
    chosen = torch.linspace(0, len(validation) - 1, min(parameters["windows"], len(validation))).long()
    first, train = (torch.from_numpy(np.frombuffer(x, np.uint8).copy()).to(device) for x in (first, train))
    return first, train, validation[chosen.to(device)], test


def windows_at(data: Tensor, count: int, T: int, seed: int, step: int) -> Tensor:
    """(count, T + 1) bytes from random places, a function of seed and step alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    start = torch.randint(len(data) - T, (count, 1), generator=generator)
    return data[(start + torch.arange(T + 1)).to(data.device)].long()


def pretrain(parameters: dict, data: Tensor, checkpoint=None) -> Transformer:
    """The model that all cells adapt, frozen."""
    p = parameters
    torch.manual_seed(0)
    model = new_model(p).to(data.device)

    def batch(step):
        ids = windows_at(data, p["pretrain_batch"], p["T"], 0, step)
        return ids[:, :-1], ids[:, 1:]

    def loss(model, ids, targets):
        return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())

    rate = p["pretrain_rate"] * (128 / p["d_model"]) ** 0.5
    optimizer = torch.optim.AdamW(decayed(model, 0.1), lr=rate, betas=(0.9, 0.95), fused=data.device.type == "cuda")
    fit(model, loss, batch, p["pretrain_steps"], optimizer, checkpoint=checkpoint, every=500,
        description=f"d = {p['d_model']}")  # fmt: skip
    return model.requires_grad_(False)


def cell_losses(model: Transformer, ids: Tensor, cells: int) -> Tensor:
    """Mean loss of every cell on its rows of ids (C·b, T + 1): (C,)."""
    with autocast(ids.device):
        logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")
    return losses.view(cells, -1).mean(1)


@torch.no_grad()
def evaluate(model: Transformer, windows: Tensor, cells: int, at_once: int) -> Tensor:
    """Mean loss of every cell on all windows, (C,)."""
    total = 0.0
    for part in windows.split(at_once):
        total = total + cell_losses(model, part.repeat(cells, 1), cells) * len(part)
    return total / len(windows)


def fine_tune(model: Transformer, cells: list, parameters: dict, train: Tensor, validation: Tensor, test=None):
    """Train every cell (log₂ η_A, log₂ η_B, seed) side by side; (curve rows [step, losses (C,)], test losses (C,)).

    Cells of one seed share their start and their data. The model is as before afterwards.
    """
    p, device = parameters, train.device
    seeds = sorted({seed for *_, seed in cells})
    starts = {seed: first_factors(model, p["r"], seed) for seed in seeds}
    layers = list(adapted_layers(model))
    for i, (parent, name, layer) in enumerate(layers):
        stack = torch.stack([starts[seed][i] for *_, seed in cells]).to(device)
        setattr(parent, name, StackedLoRA(layer, stack))
    try:
        adapters = [getattr(parent, name) for parent, name, _ in layers]
        factors = [a.lora_A for a in adapters] + [a.lora_B for a in adapters]
        rates = [2.0 ** torch.tensor([cell[i] for cell in cells], device=device).view(-1, 1, 1) for i in (0, 1)]
        optimizer = CellAdam(factors, [rates[0]] * len(adapters) + [rates[1]] * len(adapters))
        place = torch.tensor([seeds.index(seed) for *_, seed in cells], device=device)
        thin, curve = max(1, p["steps"] // p["points"]), []
        for step in progress(p["steps"], f"{len(cells)} cells"):
            ids = torch.stack([windows_at(train, p["batch"], p["T"], seed, step) for seed in seeds])[place].flatten(
                0, 1
            )
            losses = cell_losses(model, ids, len(cells))
            optimizer.step(list(torch.autograd.grad(losses.sum(), factors)), cosine(step, p["steps"]))
            if (step + 1) % thin == 0 or step + 1 == p["steps"]:
                curve.append([step + 1, evaluate(model, validation, len(cells), p["batch"])])
        tested = None if test is None else evaluate(model, test, len(cells), p["batch"])
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
    return curve, tested


def search(losses: dict, cell, train, corner: list, octaves: int, size: int, shifts: int = 3):
    """(best point of a box, whether it lies inside), the box moved while the best one is at its border.

    Points are the corner and up to size − 1 steps of `octaves` on from it, on every axis; cell: point → cell;
    losses: {cell: losses of the choosers}, filled by train(cells) for those that are missing; best: of the mean.
    """
    for attempt in range(shifts + 1):
        box = list(product(*[[start + octaves * i for i in range(size)] for start in corner]))
        missing = [cell(point) for point in box if cell(point) not in losses]
        losses |= train(missing)
        best = min(box, key=lambda point: _mean(losses[cell(point)]))
        ends = [(start, start + octaves * (size - 1)) for start in corner]
        moves = [(x == last) - (x == first) for x, (first, last) in zip(best, ends, strict=True)]
        if not any(moves) or attempt == shifts:
            return best, not any(moves)
        corner = [start + 2 * octaves * move for start, move in zip(corner, moves, strict=True)]


def _mean(values):
    """nan, where a cell diverged, is worse than anything."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else math.inf


def tune(parameters: dict, train) -> tuple[dict, dict, dict]:
    """(losses {cell: choosers' losses}, {name: best cell}, {name: inside?}) for free rates and for the fixed `RATIOS`.

    train: cells → {cell: losses}. Pairs of rates 4 apart first; then the lines η_B/η_A = 1 and 16, down to rates 2
    apart; then pairs 2 apart around the best of all that, so that free rates are never worse than a line.
    """
    size, losses, best, inside = parameters["size"], {}, {}, {}
    search(losses, tuple, train, parameters["corner"], 2, size)
    for name, ratio in RATIOS.items():

        def line(point, ratio=ratio):
            return point[0], point[0] + ratio

        (middle,), _ = search(losses, line, train, parameters["corner"][:1], 2, size)
        point, inside[name] = search(losses, line, train, [middle - size // 2], 1, size)
        best[name] = line(point)
    middle = min(losses, key=lambda cell: _mean(losses[cell]))
    best["tuned"], inside["tuned"] = search(losses, tuple, train, [x - size // 2 for x in middle], 1, size)
    return losses, best, inside


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    first, train, validation, test = corpora(p, device)
    model = pretrain(p, first, checkpoint)
    before = evaluate(model, test, 1, 64).item()
    choosers = [CHOOSERS + i for i in range(p["choosers"])]

    def train_cells(pairs):
        found, at_once = {}, max(1, p["at_once"] // len(choosers))
        for begin in range(0, len(pairs), at_once):
            part = pairs[begin : begin + at_once]
            cells = [(*pair, seed) for pair in part for seed in choosers]
            curve, _ = fine_tune(model, cells, p, train, validation)
            found |= dict(zip(part, curve[-1][1].view(len(part), -1).tolist(), strict=True))
        return found

    losses, best, inside = tune(p, train_cells)
    cells = [(*best[name], seed) for name in best for seed in seeds]
    curve, tested = fine_tune(model, cells, p, train, validation, test)
    tested = tested.view(len(best), -1).tolist()
    rows = [[step, values.view(len(best), -1).tolist()] for step, values in curve]
    tuning = {f"{a} {b}": values for (a, b), values in sorted(losses.items())}
    return [
        {"before": before, "tuning": tuning, "inside": inside,
         "judged": {name: {"log2 rates": list(best[name]), "test": tested[i][s],
                           "curve": [[step, values[i][s]] for step, values in rows]} for i, name in enumerate(best)}}
        for s in range(len(seeds))
    ]  # fmt: skip


def steps_to(curve: list, target: float) -> float | None:
    """Where the curve [[step, loss], …], straight between its points, first reaches the target; None if it doesn't."""
    previous = None
    for step, loss in curve:
        if loss is not None and loss <= target:
            if previous is None:
                return float(step)
            share = (previous[1] - target) / (previous[1] - loss)
            return previous[0] + share * (step - previous[0])
        previous = (step, loss)
    return None


def _conclude(units):
    summary, verdicts = {}, []
    for unit, result in units.items():
        runs = result["runs"]
        tests = {name: [run["judged"][name]["test"] for run in runs] for name in runs[0]["judged"]}
        rates = {name: judged["log2 rates"] for name, judged in runs[0]["judged"].items()}
        found = {"before": runs[0]["before"], "log2 rates": rates, "inside": runs[0]["inside"],
                 "log2 ratio": rates["tuned"][1] - rates["tuned"][0],
                 "test": {name: interval(values) for name, values in tests.items()}}  # fmt: skip
        for better, worse in (("tuned", "ratio 1"), ("ratio 16", "ratio 1"), ("tuned", "ratio 16")):
            found[f"gain of {better} over {worse}"] = paired_difference(tests[worse], tests[better])
        speed = []
        for run in runs:
            slow, fast = (run["judged"][name]["curve"] for name in ("ratio 1", "tuned"))
            step = steps_to(fast, slow[-1][1])
            speed.append(slow[-1][0] / step if step else None)
        found["speed-up of tuned over ratio 1"] = interval(speed) if None not in speed else None
        gain = found["gain of tuned over ratio 1"]
        verdicts.append(gain["low"] > 0 and found["log2 ratio"] > 0 and all(found["inside"].values()))
        summary[unit] = found
    summary["verdict"] = "reproduced" if all(verdicts) else "not reproduced"
    return summary


def _units(smoke):
    base = {"d_model": 128, "layers": 4, "heads": 2, "T": 128, "r": 8, "pretrain": "sympy", "pretrain_batch": 128,
            "pretrain_steps": 1000, "pretrain_rate": 1e-3, "held_out": 12, "windows": 64, "batch": 8, "steps": 240,
            "points": 12, "choosers": 3, "size": 6, "corner": [-16, -14], "at_once": 144}  # fmt: skip
    if smoke:
        base |= {"d_model": 16, "layers": 1, "T": 16, "r": 2, "pretrain": "help topics", "pretrain_batch": 8,
                 "pretrain_steps": 30, "windows": 8, "held_out": 1, "batch": 2, "steps": 6, "points": 3, "choosers": 2,
                 "size": 3, "corner": [-8, -6], "at_once": 16}  # fmt: skip
    widths = (128, 256, 512, 1024) if not smoke else (16,)
    return {f"d = {d}": base | {"d_model": d, "heads": max(2, d // 64)} for d in widths}


FINETUNE = Experiment(
    title="LoRA on a byte-level transformer: the best pair of learning rates at four widths, and what it gains",
    units=_units,
    run=_run,
    conclude=_conclude,
)
