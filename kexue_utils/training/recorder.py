"""Run an experiment, resume it, record it in one JSON file, and tell when its sources have changed since."""

import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path

import torch
import torch.distributed

from kexue_utils.ledger.digest import digest
from kexue_utils.training.registry import EXPERIMENTS, experiment
from kexue_utils.training.sources import sources

SCHEMA = 1
RECORDED = Path(__file__).resolve().parents[1] / "recorded"


@dataclass(frozen=True)
class Experiment:
    """What the recorder needs to know; all results are plain JSON.

    title:     one line for the list of experiments.
    units:     smoke → {unit name: its parameters}; a unit is what one device works on at a time.
    run:       (parameters, seeds, device, checkpoint) → one dict per seed, in the order of `seeds`.
    conclude:  {unit name: {"parameters", "runs"}} → summary; computed from the record alone, so that it can be redone.
    stacked:   a unit trains all its seeds side by side; if not, each seed is a job of its own, with its own checkpoint.
    """

    title: str
    units: Callable[[bool], dict]
    run: Callable[..., list]
    conclude: Callable[[dict], dict]
    stacked: bool = True


class Checkpoint:
    """One file with the state of an unfinished unit: tensors and plain values only."""

    def __init__(self, path):
        self.path = Path(path)

    def load(self, device="cpu"):
        """The state last saved, or None; nothing but tensors and plain values is ever unpickled."""
        if not self.path.exists():
            return None
        return torch.load(self.path, map_location=device, weights_only=True)

    def save(self, state):
        """Replace the state in one step, so that an interruption leaves the old one or the new one."""
        fresh = self.path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self.path)


def _plain(value):
    """JSON values with 6 significant digits; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _write(path, value):
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    text = re.sub(
        r"\[[^\[\]{}\"]+\]", lambda numbers: " ".join(numbers[0].split()), text
    )  # a list of numbers is a line
    fresh = path.with_suffix(".new")
    fresh.write_text(text + "\n", "utf-8")
    os.replace(fresh, path)


def _jobs(units, seeds, workers, stacked):
    """(unit, seeds) for every piece of work; seeds are dealt out too where there are fewer units than workers."""
    blocks = min(len(seeds), -(-workers // len(units))) if stacked else len(seeds)
    return [(unit, seeds[b::blocks]) for unit in units for b in range(blocks)]


def record(name, *, device="cpu", seeds=None, smoke=False, out=None):
    """Run the experiment `name` and write its record; the path of the file, or None in a worker other than the first.

    device: "cpu" or "cuda" (under torchrun every worker takes its own GPU). seeds: how many, 0, 1, …; by default 5, or
    2 for a smoke test. out: the folder, by default the package's own for a full run, the current one for a smoke test.
    A run that was interrupted goes on where it was if sources and parameters are the same.
    """
    seeds = (2 if smoke else 5) if seeds is None else seeds
    if not (isinstance(seeds, int) and seeds >= 2):
        raise ValueError(f"seeds = {seeds!r}: it must be an integer of at least 2, for an interval")
    chosen = experiment(name)
    rank, workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device = 'cuda': torch sees no GPU here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if workers > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))

    units, made_of = chosen.units(smoke), sources(chosen.run)
    out = Path(out) if out is not None else Path.cwd() if smoke else RECORDED
    file = f"{name}.smoke" if smoke else name
    partial = out / f"{file}.{digest(json.dumps([units, made_of, seeds], sort_keys=True))}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(units, list(range(seeds)), workers, chosen.stacked)
    for number, (unit, block) in enumerate(jobs):
        done = partial / f"{number}.json"
        if number % workers != rank or done.exists():
            continue
        begun = time.perf_counter()
        runs = chosen.run(units[unit], block, device, Checkpoint(partial / f"{number}.pt"))
        _write(done, {"runs": _plain(runs), "seconds": time.perf_counter() - begun})
    if workers > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank != 0:
        return None

    results = {unit: {"parameters": _plain(units[unit]), "runs": [None] * seeds, "seconds": 0.0} for unit in units}
    for number, (unit, block) in enumerate(jobs):
        piece = json.loads((partial / f"{number}.json").read_text("utf-8"))
        for seed, run in zip(block, piece["runs"], strict=True):
            results[unit]["runs"][seed] = run
        results[unit]["seconds"] = round(results[unit]["seconds"] + piece["seconds"], 2)
    path = out / f"{file}.json"
    _write(path, {
        "schema": SCHEMA, "digest": results_digest(results), "name": name,
        "title": chosen.title, "smoke": smoke, "seeds": seeds, "units": results,
        "summary": _plain(chosen.conclude(results)), "sources": made_of, "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "workers": workers,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "seconds": round(sum(unit["seconds"] for unit in results.values()), 2),
    } | ({} if smoke else {"small": _small(chosen)}))  # fmt: skip
    shutil.rmtree(partial)
    return path


def results_digest(units):
    """Digest of what the runs gave, so that a number changed by hand is noticed when the record is loaded."""
    return digest(json.dumps({unit: result["runs"] for unit, result in units.items()}, sort_keys=True))


def _small(chosen):
    """What the smoke-size run gives on a CPU with 2 seeds: {unit: runs}, the behaviour that `confirm` compares."""
    units, small = chosen.units(True), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (unit, seeds) in enumerate(_jobs(units, [0, 1], 1, chosen.stacked)):
            checkpoint = Checkpoint(Path(folder) / f"{number}.pt")
            small.setdefault(unit, []).extend(_plain(chosen.run(units[unit], seeds, torch.device("cpu"), checkpoint)))
    return small


def _close(first, second):
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_close(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_close, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-3, abs_tol=1e-4)
    return first == second


def confirm(path):
    """Accept sources that were rewritten without changing what they do: the digests in the record become today's.

    Runs the smoke size on the CPU and compares it, to 10⁻³, with what the recorded sources gave, and draws the
    conclusions from the recorded runs again. ValueError, and the file untouched, if the numbers differ or parameters
    have changed.
    """
    path = Path(path)
    record = json.loads(path.read_text("utf-8"))
    lines = changed(record)
    if not lines:
        return
    other = [line for line in lines if line.startswith("parameters")]
    if other:
        raise ValueError(f"{path.name}: re-run or revert: {'; '.join(other)}")
    chosen = experiment(record["name"])
    small = _small(chosen)
    if not _close(small, record["small"]):
        units = [unit for unit in record["small"] if not _close(small.get(unit), record["small"][unit])]
        raise ValueError(f"{path.name}: re-run or revert, the smoke size gives other numbers in {', '.join(units)}")
    summary = _plain(chosen.conclude(record["units"]))
    accepted = {"sources": sources(chosen.run), "summary": summary, "confirmed": date.today().isoformat()}
    _write(path, record | accepted)


def load(name):
    """The record of the experiment `name`, as its JSON says.

    Raises ValueError for a name that is not registered and FileNotFoundError, with the command that makes it, for a
    record that does not exist.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"name = {name!r}: it must be one of {', '.join(sorted(EXPERIMENTS))}")
    file = files("kexue_utils").joinpath("recorded", f"{name}.json")
    if not file.is_file():
        raise FileNotFoundError(
            f"kexue_utils/recorded/{name}.json is missing: python -m kexue_utils.training run {name} makes it"
        )
    found = json.loads(file.read_text("utf-8"))
    if found["digest"] != results_digest(found["units"]):
        raise ValueError(
            f"kexue_utils/recorded/{name}.json is not what its run wrote: restore it, "
            f"or repeat it with python -m kexue_utils.training run {name}"
        )
    return found


def changed(record):
    """What differs between a record and the code that would repeat it now, one line each; [] if nothing does."""
    now = experiment(record["name"])
    made_of = sources(now.run)
    lines = [
        f"{key}: {'removed' if key not in made_of else 'changed' if key in record['sources'] else 'added'}"
        for key in sorted(made_of.keys() | record["sources"].keys())
        if made_of.get(key) != record["sources"].get(key)
    ]
    units = _plain(now.units(record["smoke"]))
    recorded = {unit: result["parameters"] for unit, result in record["units"].items()}
    parameters = [
        f"parameters of the unit {unit}: changed"
        for unit in sorted(units.keys() | recorded.keys())
        if units.get(unit) != recorded.get(unit)
    ]
    lines += parameters
    if not parameters and _plain(now.conclude(record["units"])) != record["summary"]:
        lines.append("summary: the conclusions drawn from the record are different now")
    return lines
