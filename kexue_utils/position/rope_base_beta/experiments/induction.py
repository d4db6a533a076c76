"""Recorded run: a model small enough to train on a laptop copies what stood one period ago, at 8 times its length.

Nothing is trained at the longer length: the frequencies are stretched by every method, with and without log n.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue_utils.position.rope_base_beta import RopeAttention, RotaryEmbedding
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.recorder import Experiment

TRAIN_LEN = 64
B_SWEEP = (0.25, 0.5, 0.625, 0.75, 0.875)
# β_f = 32 turns, YaRN's default, are never made in 64 tokens (at most 64/2π = 10.2): it has to shrink with the window.
STRETCHES = {"none": {}, "pi": {}, "ntk_old": {}, "ntk": {}, "ntk_fixed": {}}
STRETCHES |= {f"ntk_mixed b={b:g}": {"method": "ntk_mixed", "b": b} for b in B_SWEEP}
STRETCHES |= {
    "yarn_paper β_f=32": {"method": "yarn_paper"},
    "yarn_paper β_f=8": {"method": "yarn_paper", "beta_fast": 8.0},
    "yarn_paper β_f=4": {"method": "yarn_paper", "beta_fast": 4.0},
}
PERIODS = {"short": (4, 32), "long": (128, 256)}


class InductionLM(nn.Module):
    """Two pre-norm attention layers with one head of width d that share one rotary embedding; no feed-forward blocks.

    vocab: V; logn: None or "train", as in :class:`RopeAttention`. ``stretch`` changes a trained model.
    """

    def __init__(self, vocab: int, d: int, logn: str | None = None):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.rope = RotaryEmbedding(d)
        self.layers = nn.ModuleList(
            RopeAttention(d, 1, rope=self.rope, logn=logn, train_len=TRAIN_LEN) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, T) → logits of the next token, (B, T, V)."""
        x = self.embed(ids)
        for layer, norm in zip(self.layers, self.norms[:2], strict=True):
            x = x + layer(norm(x))
        return self.head(self.norms[2](x))

    def stretch(self, scale: float, *, method: str, logn: str | None, **options) -> None:
        """Stretch the frequencies by `method` and choose the log n scale of the logits."""
        self.rope.set_scaling(method, 1.0 if method == "none" else scale, train_len=TRAIN_LEN, **options)
        for layer in self.layers:
            layer.logn = logn


def periodic(generator: torch.Generator, n: int, length: int, low: int, high: int, vocab: int):
    """n texts of `length` + 1 random tokens that repeat with a period uniform on low..high: ids, periods (n, 1)."""
    period = torch.randint(low, high + 1, (n, 1), generator=generator)
    block = torch.randint(vocab, (n, high), generator=generator)
    return block.gather(1, torch.arange(length + 1) % period), period


def train(seed: int, parameters: dict, device: torch.device) -> InductionLM:
    """A model trained on texts of 64 tokens with periods 4 to 32."""
    p = parameters
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = InductionLM(p["vocab"], p["d"], p["logn"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=p["rate"], weight_decay=0.01)
    if p["schedule"] == "cosine":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, p["rate"], total_steps=p["steps"], pct_start=0.1)
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    for _ in range(p["steps"]):
        ids = periodic(generator, 32, TRAIN_LEN, *PERIODS["short"], p["vocab"])[0].to(device)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: InductionLM, ids: Tensor, period: Tensor) -> float:
    """Share of right next tokens after the first period."""
    guess = model(ids[:, :-1]).argmax(-1)
    known = torch.arange(1, ids.shape[1], device=ids.device) >= period
    return (((guess == ids[:, 1:]) & known).sum() / known.sum()).item()


def _run(parameters, seeds, device, checkpoint):
    p, runs = parameters, []
    for seed in seeds:
        model = train(seed, p, device)
        generator = torch.Generator().manual_seed(10_000 + seed)
        length, tests = p["scale"] * TRAIN_LEN, {}
        for name, span in PERIODS.items():
            tests[name] = [x.to(device) for x in periodic(generator, p["texts"], length, *span, p["vocab"])]
        model.stretch(1.0, method="none", logn=p["logn"])
        seen = periodic(generator, p["texts"], TRAIN_LEN, *PERIODS["short"], p["vocab"])
        run = {"trained": accuracy(model, *(x.to(device) for x in seen))}
        for name, options in STRETCHES.items():
            for suffix, logn in (("", p["logn"]), (" + log n", "posthoc")):
                if suffix and p["logn"]:
                    continue  # it was trained with its own
                model.stretch(p["scale"], logn=logn, **({"method": name} | options))
                run[name + suffix] = {kind: accuracy(model, *test) for kind, test in tests.items()}
        runs.append(run)
    return runs


def _units(smoke):
    base = {"vocab": 32, "d": 64, "rate": 0.003, "steps": 800, "schedule": "cosine", "logn": None}
    base |= {"scale": 8, "texts": 256}
    if smoke:
        base |= {"steps": 5, "texts": 4}
    units = {"cosine": base}
    if not smoke:
        units |= {"constant": base | {"schedule": "constant"}, "cosine, trained with log n": base | {"logn": "train"}}
    return units


def _conclude(units):
    summary = {}
    for unit, result in units.items():
        runs = result["runs"]

        def by_seed(name, kind, runs=runs):
            return [run[name][kind] for run in runs]

        names = [name for name in runs[0] if name != "trained"]
        rows = {name: {kind: interval(by_seed(name, kind)) for kind in PERIODS} for name in names}
        pairs = {"ntk_fixed − none": ("ntk_fixed", "none"), "ntk_fixed − pi": ("ntk_fixed", "pi"),
                 "ntk_fixed − ntk_old": ("ntk_fixed", "ntk_old"),
                 "ntk_mixed b=0.625 − ntk_fixed": ("ntk_mixed b=0.625", "ntk_fixed"),
                 "ntk_mixed b=0.875 − ntk_fixed": ("ntk_mixed b=0.875", "ntk_fixed"),
                 "yarn_paper β_f=8 − ntk_fixed": ("yarn_paper β_f=8", "ntk_fixed")}  # fmt: skip
        if "ntk_fixed + log n" in rows:
            pairs |= {f"gain of log n, {name}": (f"{name} + log n", name) for name in STRETCHES}
        differences = {
            label: {kind: paired_difference(by_seed(a, kind), by_seed(b, kind)) for kind in PERIODS}
            for label, (a, b) in pairs.items()
        }
        trained = interval([run["trained"] for run in runs])
        summary[unit] = {"trained": trained, "rows": rows, "differences": differences}
    return summary


INDUCTION = Experiment(
    title="Copying at 8 times the trained length: every stretch of RoPE, with and without log n, no fine-tuning",
    units=_units,
    run=_run,
    conclude=_conclude,
)
