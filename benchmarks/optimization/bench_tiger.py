"""Tiger side by side with AdamW and momentum SGD on the shapes of GPT-2 (124 M), in one run; prints ratios and limits.

python -m benchmarks.optimization.bench_tiger [--device cuda] [--repeats 15] [--variants]

"limit" is the bytes that a step must move (words of theta, g, m, read and written) over the measured rate of a copy.
--variants: the order of the fused kernel's passes and the size of its blocks, on CUDA.
"""

import argparse
import itertools

import torch

from benchmarks.timing import header, seconds
from kexue_utils.optimization.tiger import Tiger, fused, tiger_param_groups


def gpt2(width=768, layers=12, tokens=50257, context=1024):
    """Shapes of GPT-2's parameters."""
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
             (4 * width, width), (4 * width,), (width, 4 * width), (width,)]  # fmt: skip
    return [(tokens, width), (context, width), *layer * layers, (width,), (width,)]


def parameters(shapes, device, dtype):
    torch.manual_seed(0)
    found = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def state_bytes(optimizer, n):
    """Bytes of optimizer state per parameter."""
    return sum(x.nbytes for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)) / n


def measure(title, shapes, device, dtype, repeats, compiled=False):
    params = parameters(shapes, device, dtype)
    n, word = sum(p.numel() for p in params), dtype.itemsize
    flat = torch.zeros(n, device=device, dtype=dtype)
    options = {
        "AdamW": (torch.optim.AdamW, {"fused": True} if device == "cuda" else {"foreach": True}, 7),
        "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "fused": True}, 5),
        "Tiger loop": (Tiger, {"foreach": False, "fused": False}, 7),
        "Tiger foreach": (Tiger, {"foreach": True}, 7),
    }
    if device == "cuda":
        options |= {
            "Tiger fused, none, no guard": (Tiger, {"lr_scale": "none", "nan_policy": "off"}, 5),
            "Tiger fused, none": (Tiger, {"lr_scale": "none"}, 6),
            "Tiger fused, rms, no guard": (Tiger, {"nan_policy": "off"}, 6),
            "Tiger fused, rms": (Tiger, {}, 7),
            "Tiger fused, rows, no guard": (Tiger, {"lr_scale": "row_rms", "nan_policy": "off"}, 6),
            "Tiger fused, within a cycle, no guard": (Tiger, {"nan_policy": "off", "accumulation_steps": 1 << 40}, 3),
        }
    functions, optimizers = {"copy": flat.clone}, {}
    for name, (kind, given, _) in options.items():
        wanted = params if "rows" not in name else [p for p in params if p.ndim > 1]
        optimizers[name] = kind(wanted, lr=1e-5 if kind is Tiger else 1e-6, **given)
        functions[name] = optimizers[name].step
    for lr_scale, words in (("none", 5), ("rms", 6)) if compiled else ():
        name, lr = f"Tiger compiled, {lr_scale}, no guard", torch.tensor(1e-5, device=device)
        optimizers[name] = Tiger(params, lr=lr, lr_scale=lr_scale, capturable=True, nan_policy="off")
        functions[name] = torch.compile(optimizers[name].step)
        options[name] = (None, None, words)
    times = seconds(functions, device, repeats)
    rate = 2 * n * word / times["copy"]
    print(f"\n{title}: {n / 1e6:.1f} M parameters in {len(params)} tensors, {str(dtype)[6:]}; ", end="")
    print(f"copy {rate / 1e9:.0f} GB/s")
    print(f"  {'':<40}{'ms':>9}{'limit':>9}{'share':>7}{'AdamW/':>8}{'B/param':>9}")
    for name, (_, _, words) in options.items():
        limit = words * n * word / rate
        print(f"  {name:<40}{times[name] * 1e3:9.3f}{limit * 1e3:9.3f}{limit / times[name]:7.0%}"
              f"{times['AdamW'] / times[name]:7.2f}x{state_bytes(optimizers[name], n):9.2f}", flush=True)  # fmt: skip


def by_kind(repeats):
    """The groups that people use: every rule in one step."""
    model = torch.nn.Module()
    for i, shape in enumerate(gpt2()):
        module = torch.nn.Embedding(1, 1) if i < 2 else torch.nn.Linear(1, 1)
        module.weight = torch.nn.Parameter(0.02 * torch.randn(shape, device="cuda"))
        module.bias = None
        model.add_module(str(i), module)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    tiger = Tiger(tiger_param_groups(model, 1e-5))
    adam = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    times = seconds({"AdamW": adam.step, "Tiger": tiger.step}, "cuda", repeats)
    print(f"\ntiger_param_groups ({len(tiger.param_groups)} groups): {times['Tiger'] * 1e3:.3f} ms, AdamW/ "
          f"{times['AdamW'] / times['Tiger']:.2f}x")  # fmt: skip


def replayed(repeats):
    """The same step from a CUDA graph: the kernels without the host."""
    params = parameters(gpt2(), "cuda", torch.float32)
    functions, kept = {}, []  # a graph reads what its optimizer owns
    for lr_scale, policy in itertools.product(("none", "rms"), ("off", "shrink")):
        optimizer = Tiger(params, lr=1e-5, lr_scale=lr_scale, nan_policy=policy, capturable=True)
        kept.append(optimizer)
        for _ in range(3):
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        functions[f"{lr_scale}, {policy}"] = graph.replay
    for name, time in seconds(functions, "cuda", repeats).items():
        print(f"  graph: {name:<33}{time * 1e3:9.3f} ms", flush=True)


def variants(repeats):
    """The fused kernel with other blocks and in the other order."""
    params = parameters(gpt2(), "cuda", torch.float32)
    default, launch = (fused.BLOCK, fused.WARPS), fused._Bucket.launch
    print("\nvariants (block, warps, order): none without guard, rms without guard, rms with guard, ms")
    for (block, warps), reverse in itertools.product(
        ((1024, 4), (1024, 8), (2048, 8), (4096, 8), (4096, 16)), (True, False)
    ):
        fused.BLOCK, fused.WARPS = block, warps
        fused._Bucket.launch = lambda *given, reverse=reverse: launch(*given, reverse=reverse)
        functions = {
            given: Tiger(params, lr=1e-5, lr_scale=given[0], nan_policy=given[1]).step
            for given in (("none", "off"), ("rms", "off"), ("rms", "shrink"))
        }
        times = seconds(functions, "cuda", repeats)
        print(f"  {block:5d} {warps:3d} {'backward' if reverse else 'forward':<9}", end="")
        print("".join(f"{time * 1e3:8.3f}" for time in times.values()), flush=True)
    (fused.BLOCK, fused.WARPS), fused._Bucket.launch = default, launch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--variants", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cuda = arguments.device == "cuda"
    repeats = arguments.repeats or (5 if cuda else 3)
    header(arguments.device, ("torch", "triton") if cuda else ("torch",), threads=1)
    print("AdamW/: time of AdamW over this one's; B/param: optimizer state")
    if cuda:
        measure("GPT-2", gpt2(), "cuda", torch.float32, repeats, compiled=True)
        replayed(repeats)
        by_kind(repeats)
        measure("GPT-2", gpt2(), "cuda", torch.bfloat16, repeats)
        measure("500 small tensors", [(64, 32)] * 500, "cuda", torch.float32, repeats)
        if arguments.variants:
            variants(repeats)
    else:
        measure("a small GPT", gpt2(256, 4, 8192, 256), "cpu", torch.float32, repeats)
        measure("500 small tensors", [(64, 32)] * 500, "cpu", torch.float32, repeats)
