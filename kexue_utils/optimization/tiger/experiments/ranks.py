"""Recorded run: the same training in one process and on two ranks, in three ways, compared coordinate by coordinate.

Every unit starts a process group of its own, so that its ranks work together: NCCL on GPUs, gloo on a CPU.
"""

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kexue_utils.optimization.tiger.groups import tiger_param_groups
from kexue_utils.optimization.tiger.optimizer import Tiger
from kexue_utils.position.rope_base_beta import RopeAttention, RotaryEmbedding
from kexue_utils.training.corpora import deal_blocks, pydoc_topics
from kexue_utils.training.intervals import interval
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.transformer import Transformer

ONE, DDP, MOMENTUM, FSDP = MODES = "one process", "DDP", "momentum once a step", "FSDP2"
COUNTED = range(2, 4)  # steps in which exchanges are counted: the first ones also set up
DISAGREE = 1e-4  # share of the coordinates
SAME = 1e-15  # of weights of size 1 at most, in float64
WORD = {"float32": 4, "float64": 8}


class Exchanges(TorchDispatchMode):
    """Counts what this process hands to collectives: calls and bytes of the largest buffer of each."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            buffers = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args]
            self.calls += 1
            self.bytes += max(buffers)
        return function(*args, **(kwargs or {}))


def new_model(p: dict, seed: int, device: torch.device) -> Transformer:
    """A causal transformer over bytes with rotary positions, the same on every rank."""
    torch.manual_seed(seed)
    rope = RotaryEmbedding(p["d_model"] // p["heads"])
    model = Transformer(256, p["d_model"], p["layers"], lambda: RopeAttention(p["d_model"], p["heads"], rope=rope))
    return model.to(device, getattr(torch, p["dtype"]))


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats a byte, ids (B, T + 1)."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def texts(p: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """(bytes to learn, held-out windows (windows, T + 1)) of the help topics, of which no paragraph comes twice."""
    topics = "\n\n".join(dict.fromkeys(pydoc_topics().split("\n\n"))).encode()
    train, held_out, _ = deal_blocks(topics, 0, 12)
    train, held_out = (torch.from_numpy(np.array(x, dtype=np.uint8)).to(device) for x in (train, held_out))
    return train, held_out[: p["windows"] * (p["T"] + 1)].view(p["windows"], -1).long()


def micro_batch(data: Tensor, p: dict, seed: int, t: int, rank: int) -> Tensor:
    """(batch, T + 1) bytes: what this rank sees as micro-batch t."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + t) * p["ranks"] + rank)
    starts = torch.randint(len(data) - p["T"], (p["batch"], 1), generator=generator)
    return data[(starts + torch.arange(p["T"] + 1)).to(data.device)].long()


def weights(model: nn.Module) -> Tensor:
    """All parameters, whole, in one vector."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([x.detach().flatten() for x in whole])


def train(mode: str, p: dict, seed: int, rank: int, data: Tensor, held_out: Tensor, mesh) -> dict:
    """{first, last: weights after the first and the last step, loss: held out, calls, bytes: a step's exchanges}."""
    model, k = new_model(p, seed, data.device), p["k"]
    inner = model
    if mode == FSDP:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mode == DDP:
        model = DistributedDataParallel(model, device_ids=[data.device] if data.is_cuda else None)
    groups = tiger_param_groups(inner, p["rate"], 0.0)
    optimizer = Tiger(groups, accumulation_steps=k, nan_policy="skip")
    if mode == MOMENTUM:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is clipped here
            optimizer.install_backward_hooks(model)

    def step(number):
        for group in optimizer.param_groups:
            group["lr"] = p["rate"] * (1 - number / p["steps"])
        for t in range(number * k, (number + 1) * k):
            seen = range(p["ranks"]) if mode == ONE else [rank]
            optimizer.zero_grad()
            mean_loss(model, torch.cat([micro_batch(data, p, seed, t, r) for r in seen])).backward()
            if mode == MOMENTUM and t % k == k - 1:
                optimizer.allreduce_momentum()
            optimizer.step()

    found = {"calls": 0.0, "bytes": 0.0}
    for number in range(p["steps"]):
        if number in COUNTED:
            with Exchanges() as exchanges:
                step(number)
            found["calls"] += exchanges.calls / len(COUNTED)
            found["bytes"] += exchanges.bytes / len(COUNTED)
        else:
            step(number)
        if number == 0:
            found["first"] = weights(inner)
    with torch.no_grad():
        losses = [mean_loss(model, part).double() * len(part) for part in held_out.split(64)]
    return found | {"last": weights(inner), "loss": sum(losses).item() / len(held_out)}


def compare(found: dict, single: dict, start: Tensor) -> dict:
    """How far a way of training is from one process after the first step and after the last."""
    signs = [(x["first"] - start).sign() for x in (found, single)]
    apart = (found["last"] - single["last"]).norm() / (single["last"] - start).norm()
    return {
        "loss": found["loss"], "loss over one process": found["loss"] - single["loss"],  # a record keeps 6 digits
        "calls": found["calls"], "bytes": found["bytes"],
        "signs that differ": (signs[0] != signs[1]).double().mean().item(),
        "largest difference after step 1": (found["first"] - single["first"]).abs().max().item(),
        "distance at the end": apart.item(),
    }  # fmt: skip


def _worker(rank, p, seeds, kind, folder):
    """One rank; rank 0 leaves what it found in the folder."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    where = f"file://{folder}/store"
    options = {"device_id": device} if kind == "cuda" else {}
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=p["ranks"], **options)
    try:
        mesh, runs = init_device_mesh(kind, (p["ranks"],)), []
        data, held_out = texts(p, device)
        for i in progress(len(seeds), p["dtype"] if rank == 0 else None):
            seed = seeds[i]
            start = weights(new_model(p, seed, device))
            results = {mode: train(mode, p, seed, rank, data, held_out, mesh) for mode in MODES}
            runs.append({mode: compare(results[mode], results[ONE], start) for mode in MODES})
        if rank == 0:
            Path(folder, "runs.json").write_text(json.dumps({"parameters": len(start), "runs": runs}), "utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    if device.type == "cuda" and torch.cuda.device_count() < p["ranks"]:
        raise ValueError(f"device = 'cuda': {p['ranks']} GPUs are needed, torch sees {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (p, seeds, device.type, folder), nprocs=p["ranks"])
        found = json.loads(Path(folder, "runs.json").read_text("utf-8"))
    return [run | {"parameters": found["parameters"]} for run in found["runs"]]


def _conclude(units):
    summary = {}
    for name, unit in units.items():
        p, runs, rows = unit["parameters"], unit["runs"], {}
        alone = [run[ONE]["loss"] for run in runs]
        deviation = float(np.std(alone, ddof=1))
        for mode in MODES[1:]:
            ways = [run[mode] for run in runs]
            row = {key: max(way[key] for way in ways) for key in
                   ("signs that differ", "largest difference after step 1", "distance at the end")}  # fmt: skip
            loss = max(abs(way["loss over one process"]) for way in ways)
            size = WORD[p["dtype"]] * runs[0]["parameters"]
            row |= {"loss differs by at most": loss, "calls a step": ways[0]["calls"],
                    "words a parameter and step": ways[0]["bytes"] / size}  # fmt: skip
            if p["dtype"] == "float64":
                equal = row["signs that differ"] == 0 and row["largest difference after step 1"] <= SAME
                row["reproduced"] = {"equal after step 1": equal}
            else:
                row["reproduced"] = {"signs at step 1": row["signs that differ"] <= DISAGREE,
                                     "loss within the seeds' standard deviation": loss < deviation}  # fmt: skip
            rows[mode] = row
        momentum, gradients = (rows[mode]["words a parameter and step"] for mode in (MOMENTUM, DDP))
        summary[name] = {
            "loss of one process": interval(alone), "standard deviation over seeds": deviation, "ways": rows,
            "momentum over gradients exchanged": momentum / gradients if gradients else None, "1/k": 1 / p["k"],
        }  # fmt: skip
    return summary


def _units(smoke):
    base = {"ranks": 2, "d_model": 256, "heads": 4, "layers": 2, "T": 64, "batch": 16, "rate": 2e-3, "windows": 256}
    if smoke:
        base |= {"d_model": 32, "heads": 2, "T": 16, "batch": 4, "windows": 8}
        return {"float64, k = 2": base | {"dtype": "float64", "k": 2, "steps": 4}}
    return {
        "float32, k = 2": base | {"dtype": "float32", "k": 2, "steps": 200},
        "float64, k = 4": base | {"dtype": "float64", "k": 4, "steps": 10},
    }


RANKS = Experiment(
    title="Tiger on two ranks, with averaged gradients, averaged momentum and sharded parameters, against one process",
    units=_units,
    run=_run,
    conclude=_conclude,
)
