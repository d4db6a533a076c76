"""Recorded run: a language model trained on text with RoPE-1D reads text through multimodal layouts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_utils.position.rope_base_beta import rope_inv_freq, rope_tables
from kexue_utils.position.rope_multimodal.experiments.model import TableAttention, tables
from kexue_utils.position.rope_multimodal.layouts import Text, layout
from kexue_utils.training.corpora import deal_blocks, pydoc_topics
from kexue_utils.training.intervals import interval
from kexue_utils.training.loop import fit
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.transformer import Transformer, autocast, decayed

SCHEMES = ("flatten", "page", "naive2d", "tie", "tie_min", "tie_frac", "tv", "mrope")


def train(seed: int, parameters: dict, data: Tensor, where: tuple) -> Transformer:
    """A causal language model over bytes on windows of L bytes."""
    p, L, device = parameters, parameters["L"], data.device
    torch.manual_seed(seed)
    model = Transformer(
        256, p["d_model"], p["layers"], lambda: TableAttention(p["d_model"], p["heads"], causal=True)
    ).to(device)

    def batch(step):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        start = torch.randint(len(data) - L, (p["batch"], 1), generator=generator)
        ids = data[(start + torch.arange(L + 1)).to(device)].long()
        return ids[:, :-1], ids[:, 1:], *where

    def loss(model, ids, targets, *where):
        return F.cross_entropy(model(ids, *where).flatten(0, 1).float(), targets.flatten())

    optimizer = torch.optim.AdamW(decayed(model, 0.1), lr=p["rate"], fused=device.type == "cuda")
    fit(model, loss, batch, p["steps"], optimizer, description=f"seed {seed}")
    return model


@torch.no_grad()
def _run(parameters, seeds, device, checkpoint):
    p, L, runs = parameters, parameters["L"], []
    data, _, test = (
        torch.from_numpy(part.copy()).to(device) for part in deal_blocks(pydoc_topics().encode(), 0, p["held_out"])
    )
    test = test[: len(test) // (L + 1) * (L + 1)].view(-1, L + 1).long()
    dim = p["d_model"] // p["heads"]

    def moved(found):
        return tuple(table.to(device) for table in found)

    plain = moved(rope_tables(torch.arange(1, L + 1), rope_inv_freq(dim, base=p["base"]), dtype=torch.float32))
    ways = {"1D": plain}
    ways |= {scheme: moved(tables(layout([Text(L)], scheme).positions, dim, p)) for scheme in SCHEMES}
    for seed in seeds:
        with torch.enable_grad():
            model = train(seed, p, data, plain)
        found = {}
        for name, where in ways.items():
            with autocast(device):
                found[name] = torch.cat([model(part[:, :-1], *where) for part in test.split(64)]).float()
        runs.append({
            name: {"loss": F.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten()).item(),
                   "identical": torch.equal(logits, found["1D"])}
            for name, logits in found.items()
        })  # fmt: skip
    return runs


def _units(smoke):
    base = {"base": 10000.0, "partition": "interleaved", "d_model": 256, "layers": 4, "heads": 4, "L": 256, "batch": 64,
            "steps": 1000, "rate": 1e-3, "held_out": 12}  # fmt: skip
    if smoke:
        base |= {"d_model": 32, "layers": 2, "heads": 2, "L": 32, "batch": 4, "steps": 10, "held_out": 1}
    return {"help topics": base}


def _conclude(units):
    runs = units["help topics"]["runs"]
    return {
        scheme: {
            "loss": interval([run[scheme]["loss"] for run in runs]),
            "increase": interval([run[scheme]["loss"] - run["1D"]["loss"] for run in runs]),
            "identical": all(run[scheme]["identical"] for run in runs),
        }
        for scheme in runs[0]
    }


TEXT = Experiment(
    title="A language model trained with RoPE-1D reads text through multimodal layouts",
    units=_units,
    run=_run,
    conclude=_conclude,
    stacked=False,
)
