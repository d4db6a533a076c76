"""LoRALinear beside the frozen layer alone and beside peft, forward and backward, in one run; prints ratios.

python -m benchmarks.optimization.bench_lora_plus [--device cuda] [--shape b n m r] [--repeats 15]

The backward pass includes the gradient of the input, as in the middle of a model. Aim: compiled, at most 1.10 times the
frozen layer, and no slower than peft. On a GPU in bfloat16, eager and compiled; on a CPU in float32, eager.

The limit beside each title is what the thin products must move if launched beside the dense ones, at the rate of a
copy: x is read, y read and written; ∂y and x are read, ∂x read and written: b(4n + 3m) numbers.
"""

import argparse
import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.timing import header, seconds
from kexue_utils.optimization.lora_plus import LoRALinear, factored_flops


def layers(n, m, r, dtype, factors, device):
    """{name: module} on one frozen weight."""
    base = nn.Linear(n, m, bias=False, dtype=dtype, device=device)
    base.requires_grad_(False)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False)
    peft = peft.base_model.model[0]
    ours = LoRALinear.wrap(copy.deepcopy(base), r, 2 * r, dtype=factors)
    for module in (ours, peft):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(factors)
                nn.init.normal_(parameter, std=0.02)
    return {"frozen": base, "peft": peft, "ours": ours}


def step(module, x, grad, autocast):
    trained = [p for p in module.parameters() if p.requires_grad]

    def run():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = module(x)
        torch.autograd.grad(y, [x, *trained], grad)

    return run


def compare(title, shape, dtype, factors, device, repeats, compiled):
    b, n, m, r = shape
    x = torch.randn(b, n, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(b, m, dtype=dtype, device=device)
    functions = {}
    for name, module in layers(n, m, r, dtype, factors, device).items():
        module = torch.compile(module, fullgraph=name == "ours") if compiled else module
        functions[name] = step(module, x, grad, autocast=factors != dtype)
    still = x.detach()
    times = seconds(functions | {"copy of x": lambda: still.clone()}, device, repeats)
    moved = times.pop("copy of x") * (4 * n + 3 * m) / (2 * n)  # a copy reads and writes n numbers a row
    print(f"\n{title}; limit {1 + moved / times['frozen']:.2f}")
    for name, time in times.items():
        ratios = "" if name == "frozen" else f"{time / times['frozen']:7.3f} of the frozen layer"
        ratios += f"{times['peft'] / time:7.2f}x as fast as peft" if name == "ours" else ""
        print(f"  {name:<8}{time * 1e3:9.3f} ms{ratios}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("b", "n", "m", "r"))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    device, gpu = arguments.device, arguments.device == "cuda"
    shape = b, n, m, r = tuple(arguments.shape or ((8192, 4096, 4096, 8) if gpu else (1024, 1024, 1024, 8)))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    header(device, ("torch", "peft"), 1)
    extra = factored_flops(b, n, m, r) / (4 * b * n * m)
    print(f"b={b}, n={n}, m={m}, r={r}: the factors add {extra:.2%} of the frozen layer's operations")
    dtype = torch.bfloat16 if gpu else torch.float32
    name = str(dtype)[6:]
    for compiled in (False, True) if gpu else (False,):
        how = "compiled" if compiled else "eager"
        compare(f"{how}, all in {name}", shape, dtype, dtype, device, arguments.repeats, compiled)
        if gpu:
            torch.compiler.reset()
            title = f"{how}, factors in float32 under autocast"
            compare(title, shape, dtype, torch.float32, device, arguments.repeats, compiled)


if __name__ == "__main__":
    main()
