"""What the benchmarks of positions share: functions timed in turn, and a table of their ratios."""

import time

import torch


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
    print(f"\n{title}")
    for name, peer in pairs:
        ratio = f"{times[peer] / times[name]:6.2f}x" if peer else " " * 7
        print(f"  {name:<44}{times[name] * 1e3:9.3f} ms {times[name] / times[copy]:7.2f} copies  {ratio}", flush=True)
