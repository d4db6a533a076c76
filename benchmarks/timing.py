"""What the benchmarks share: a line that says where and when, functions timed in turn, a table of their ratios."""

import argparse
import platform
import re
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


def header(device, packages, threads=None):
    """Print machine, versions and date. threads: how many of the CPU are used."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        named = re.search(r"model name\s*: (.*)", info.read_text("utf-8") if info.exists() else "")
        machine = f"{named[1] if named else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    print(f"{machine}; {date.today().isoformat()}")
    print("; ".join(f"{name} {version(name)}" for name in packages))


def seconds(functions, device, repeats):
    """Least time of each function; they take turns, so that a busy machine is busy for all of them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    inner = 20 if device == "cuda" else 1
    best = dict.fromkeys(functions, float("inf"))
    for round in range(repeats + 2):  # two to warm up
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            for _ in range(inner):
                function()
            wait()
            if round > 1:
                best[name] = min(best[name], (time.perf_counter() - start) / inner)
    return best


def table(title, times, copy, pairs):
    """times: {name: seconds}; copy: the name that others are multiples of; pairs: (name, its peer or None)."""
    print(f"\n{title}")
    for name, peer in pairs:
        ratio = f"{times[peer] / times[name]:6.2f}x" if peer else ""
        row = f"  {name:<40}{times[name] * 1e3:9.3f} ms {times[name] / times[copy]:7.2f} copies {ratio}"
        print(row.rstrip(), flush=True)


def shapes(description, cuda, cpu):
    """Command line of a benchmark of (B, H, T, d): the arguments, with `shapes` given or the device's own."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "H", "T", "d"))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    own = cuda if arguments.device == "cuda" else cpu
    arguments.shapes = [tuple(arguments.shape)] if arguments.shape else own
    torch.set_num_threads(1)
    return arguments
