"""Recorded run: a byte-level language model trained on windows of L bytes reads up to 8 L, without any fine-tuning.

The comparison of https://kexue.fm/archives/9706 on other text and another model: the source of Python's standard
library, a pre-norm transformer. Every stretch, with log n in training, afterwards, or not at all.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_utils.position.rope_base_beta import RopeAttention, RotaryEmbedding
from kexue_utils.training.corpora import pydoc_topics, split_files, standard_library
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.loop import fit
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.transformer import Transformer, autocast, decayed

SCALES = (2, 4, 8)
B_SWEEP = (0.25, 0.5, 0.625, 0.75, 0.875)
STRETCHES = {name: {"method": name} for name in ("none", "pi", "ntk_old", "ntk", "ntk_fixed", "yarn", "yarn_paper")}
STRETCHES |= {f"ntk_mixed b={b:g}": {"method": "ntk_mixed", "b": b} for b in B_SWEEP}
METRICS = ("all", "last")
TEXTS = ("ordinary", "repeated")
SCALED = ", trained with log n"


class ByteLM(Transformer):
    """A transformer over bytes whose layers share one rotary embedding; ``stretch`` changes a trained model."""

    def __init__(self, parameters: dict):
        p = parameters
        rope = RotaryEmbedding(p["d_model"] // p["heads"])
        super().__init__(
            256, p["d_model"], p["layers"],
            lambda: RopeAttention(p["d_model"], p["heads"], rope=rope, logn=p["logn"], train_len=p["L"]),
        )  # fmt: skip
        self.rope, self.train_len = rope, p["L"]

    def stretch(self, scale: float, *, method: str, logn: str | None, **options) -> None:
        """Stretch the frequencies by `method` and choose the log n scale of the logits."""
        self.rope.set_scaling(method, 1.0 if method == "none" else scale, train_len=self.train_len, **options)
        for block in self.blocks:
            block.attention.logn = logn


def corpus(name: str):
    """({split: files}, provenance) of the bytes that `name` stands for; no file is in two splits."""
    if name == "help topics":  # the same on every Python, for the smoke size
        data = pydoc_topics().encode()
        texts = {f"{i}": data[i : i + 8192] for i in range(0, len(data), 8192)}
        return dict(zip(("train", "validation", "test"), split_files(texts, 0.1), strict=True)), {"name": name}
    texts, provenance = standard_library()
    return dict(zip(("train", "validation", "test"), split_files(texts, 0.1), strict=True)), provenance


def documents(files: dict, length: int, count: int, per_file: int = 16) -> Tensor:
    """(count, length) bytes: `per_file` windows of a file at most, dealt round by round, so that no file dominates."""
    windows = [
        text[i * length : (i + 1) * length]
        for i in range(per_file)
        for _, text in sorted(files.items())
        if len(text) >= (i + 1) * length
    ]
    if len(windows) < count:
        raise ValueError(f"count = {count}: the files have only {len(windows)} windows of {length} bytes")
    return torch.from_numpy(np.frombuffer(b"".join(windows[:count]), np.uint8).reshape(count, length).astype(np.int64))


def windows(data: Tensor, step: int, parameters: dict, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one training step, (batch, L) each; a share `periodic` of the rows repeats its start."""
    p = parameters
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    n, L = p["batch"], p["L"]
    start = torch.randint(len(data) - L, (n, 1), generator=generator)
    period = torch.randint(L // 16, L // 2 + 1, (n, 1), generator=generator)
    period[round(p["periodic"] * n) :] = L + 1
    place = start + torch.arange(L + 1) % period
    ids = data[place.to(data.device)].long()
    return ids[:, :-1], ids[:, 1:]


def train(seed: int, parameters: dict, data: Tensor, validation: Tensor, checkpoint=None):
    """(model, curve): rows [step, training loss, loss on the first L bytes of each validation text], nats per byte."""
    p, L = parameters, parameters["L"]
    torch.manual_seed(seed)
    model = ByteLM(p).to(data.device)

    def loss(model, ids, targets):
        return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())

    def held_out():
        return read(model, validation[:, : L + 1])["loss"]

    optimizer = torch.optim.AdamW(
        decayed(model, 0.1), lr=p["rate"], betas=(0.9, 0.95), fused=data.device.type == "cuda"
    )
    curve = fit(model, loss, lambda step: windows(data, step, p, seed), p["steps"], optimizer,
                evaluate=held_out, checkpoint=checkpoint, description=f"seed {seed}")  # fmt: skip
    return model, curve


@torch.no_grad()
def read(model: ByteLM, ids: Tensor, size: int = 16) -> dict:
    """What the model makes of texts ids (n, T + 1): right next bytes of every text, over all T places and over the last
    L, {"all", "last": lists of n counts}, and the mean losses in nats per byte, {"loss", "last loss"}.
    """
    hits, losses, L = [], [], model.train_len
    for part in ids.split(size):
        with autocast(ids.device):
            logits = model(part[:, :-1])
        targets = part[:, 1:]
        hits.append(logits.argmax(-1) == targets)
        losses.append(F.cross_entropy(logits.float().mT, targets, reduction="none"))
    hits, losses = torch.cat(hits), torch.cat(losses)
    return {"all": hits.sum(1).tolist(), "last": hits[:, -L:].sum(1).tolist(),
            "loss": losses.mean().item(), "last loss": losses[:, -L:].mean().item()}  # fmt: skip


def shares(counts: dict, length: int, last: int) -> dict:
    """The same with accuracies over all texts in place of counts."""
    return counts | {
        "all": sum(counts["all"]) / (len(counts["all"]) * length),
        "last": sum(counts["last"]) / (len(counts["last"]) * last),
    }


def variants(logn: str | None) -> dict:
    """{name: options of `ByteLM.stretch`}: a model without log n is also read with it, added afterwards."""
    named = {name: options | {"logn": logn} for name, options in STRETCHES.items()}
    if logn is None:
        named |= {f"{name} + log n": options | {"logn": "posthoc"} for name, options in STRETCHES.items()}
    return named


def evaluate(model: ByteLM, parameters: dict, test: Tensor, validation: Tensor) -> dict:
    """Accuracies and losses of every variant at L, 2 L, 4 L and 8 L; counts per document at the longest."""
    p, L = parameters, parameters["L"]
    model.stretch(1.0, method="none", logn=p["logn"])
    run = {"trained": shares(read(model, test[:, : L + 1]), L, L), "lengths": {}, "documents": {}, "validation": {}}
    run["places"] = {"all": max(p["scales"]) * L, "last": L}  # what a document's counts are out of
    for k in p["scales"]:
        texts = {"ordinary": test[:, : k * L + 1], "repeated": test[:, torch.arange(k * L + 1) % L]}
        rows = {}
        for name, options in variants(p["logn"]).items():
            model.stretch(k, **options)
            counts = {kind: read(model, text) for kind, text in texts.items()}
            rows[name] = {kind: shares(count, k * L, L) for kind, count in counts.items()}
            if k == max(p["scales"]):
                run["documents"][name] = {kind: {m: count[m] for m in METRICS} for kind, count in counts.items()}
                if options["method"] == "ntk_mixed":
                    run["validation"][name] = shares(read(model, validation[:, : k * L + 1]), k * L, L)
        run["lengths"][str(k)] = rows
    return run


def _run(parameters, seeds, device, checkpoint):
    p, runs = parameters, []
    files, provenance = corpus(p["corpus"])
    data = torch.from_numpy(np.frombuffer(b"\0".join(files["train"].values()), np.uint8).copy()).to(device)
    length = max(p["scales"]) * p["L"] + 1
    held_out = {"validation": 2 * p["texts"] // 3, "test": p["texts"]}
    validation, test = (documents(files[part], length, count).to(device) for part, count in held_out.items())
    for seed in seeds:
        model, curve = train(seed, p, data, validation, checkpoint)
        runs.append({"corpus": provenance, "curve": curve} | evaluate(model, p, test, validation))
    return runs


def _units(smoke):
    base = {"corpus": "standard library", "d_model": 512, "layers": 8, "heads": 8, "L": 512, "batch": 64, "steps": 2000,
            "rate": 6e-4, "logn": None, "periodic": 0.0, "texts": 96, "scales": list(SCALES)}  # fmt: skip
    if smoke:
        base |= {"corpus": "help topics", "d_model": 32, "layers": 2, "heads": 2, "L": 32, "batch": 8, "steps": 60,
                 "rate": 3e-3, "texts": 4, "scales": [2, 4]}  # fmt: skip
    plain = {"ordinary text": {}, "a quarter periodic": {"periodic": 0.25}}
    if not smoke:
        plain["ordinary text, 4000 steps"] = {"steps": 4000}  # far into overfitting: does anything depend on it?
    return {
        unit + suffix: base | changes | {"logn": logn}
        for unit, changes in plain.items()
        for suffix, logn in (("", None), (SCALED, "train"))
    }


def _claims(plain, scaled):
    """{claim: [(better, worse)]}: each side is (runs, variant, text); a text of None stands for both kinds."""
    mixed, ntk = "ntk_mixed b=0.625", ("ntk_old", "ntk", "ntk_fixed", "ntk_mixed b=0.625")
    return {
        "NTK > none and PI": [((plain, a, None), (plain, b, None)) for a in ntk for b in ("none", "pi")],
        "fixed > old": [((plain, "ntk_fixed", None), (plain, "ntk_old", None))],
        "mixed > fixed": [((plain, mixed, None), (plain, "ntk_fixed", None))],
        "log n in training > plain": [((scaled, a, None), (plain, a, None)) for a in ("ntk_old", "ntk_fixed", mixed)],
        "log n afterwards > plain": [
            ((plain, f"{a} + log n", None), (plain, a, None)) for a in ("ntk_fixed", mixed)
        ],
        "repeated > ordinary": [
            ((plain, a, "repeated"), (plain, a, "ordinary")) for a in ("ntk_old", "ntk_fixed", mixed)
        ],
    }  # fmt: skip


def _difference(better, worse, kind, metric):
    """better − worse in share of right bytes: over seeds (documents averaged) and over documents (seeds averaged)."""
    table = []
    for runs, name, text in (better, worse):
        counts = [run["documents"][name][text or kind][metric] for run in runs]
        table.append(np.array(counts) / runs[0]["places"][metric])
    seeds, texts = (paired_difference(*(t.mean(axis) for t in table)) for axis in (1, 0))
    if min(seeds["low"], texts["low"]) > 0:
        verdict = "reproduced"
    elif max(seeds["high"], texts["high"]) < 0:
        verdict = "the opposite"
    else:
        verdict = "undecided"
    return {"mean": seeds["mean"], "seeds": [seeds["low"], seeds["high"]], "documents": [texts["low"], texts["high"]],
            "verdict": verdict}  # fmt: skip


def _conclude(units):
    summary = {"units": {}, "claims": {}}
    for unit, result in units.items():
        runs = result["runs"]
        rows = {
            k: {
                name: {kind: {m: interval([run["lengths"][k][name][kind][m] for run in runs]) for m in METRICS}
                       for kind in TEXTS}
                for name in runs[0]["lengths"][k]
            }
            for k in runs[0]["lengths"]
        }  # fmt: skip
        chosen = {}
        for suffix in ("", " + log n"):
            sweep = {b: f"ntk_mixed b={b:g}{suffix}" for b in B_SWEEP}
            if all(name in runs[0]["validation"] for name in sweep.values()):
                for metric in METRICS:
                    scores = {b: sum(run["validation"][name][metric] for run in runs) for b, name in sweep.items()}
                    chosen[f"{metric}{suffix}"] = max(scores, key=scores.get)
        trained = interval([run["trained"]["all"] for run in runs])
        summary["units"][unit] = {"trained": trained, "lengths": rows, "b chosen on validation": chosen}
    for unit in units:
        if unit.endswith(SCALED):
            continue
        plain, scaled = units[unit]["runs"], units[unit + SCALED]["runs"]
        summary["claims"][unit] = {
            claim: [
                {"better": better[1], "worse": worse[1], "text": kind, "metric": metric}
                | _difference(better, worse, kind, metric)
                for better, worse in pairs
                for kind in (TEXTS if better[2] is None else [None])
                for metric in METRICS
            ]
            for claim, pairs in _claims(plain, scaled).items()
        }
    return summary


TEXT = Experiment(
    title="A byte-level language model at 2, 4 and 8 times its window: every stretch, with and without log n",
    units=_units,
    run=_run,
    conclude=_conclude,
    stacked=False,
)
