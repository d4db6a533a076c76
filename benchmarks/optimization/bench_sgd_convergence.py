"""Many runs of SGD side by side with torch.optim and scikit-learn, one run each, in one go; prints ratios.

python -m benchmarks.optimization.bench_sgd_convergence [--device cuda] [--runs 1 1024 4096] [--repeats 2]

Logistic loss in 16 dimensions on a ball, η_t = α/√t. A run-step is one update of one parameter vector.
"""

import argparse

import torch
from sklearn.linear_model import SGDClassifier

from benchmarks.timing import header, seconds
from kexue_utils.optimization.sgd_convergence import (
    Ball,
    Hinge,
    LeastAbsolute,
    Logistic,
    constant,
    draw,
    hindsight_optimum,
    inv_sqrt,
    run_sgd,
    worst_sign_sequence,
)

d, ALPHA = 16, 0.7
LAUNCH_BOUND = 10**5  # fewer runs than this don't fill a GPU
PLANTED = torch.full((d,), 0.4, dtype=torch.float64)


def torch_optim(x, y, eta):
    """One run as a training loop writes it."""
    theta = torch.zeros(d, requires_grad=True, device=x.device)
    optimizer = torch.optim.SGD([theta], lr=1.0)
    for row, label, step in zip(x, y, eta.tolist(), strict=True):
        optimizer.param_groups[0]["lr"] = step
        optimizer.zero_grad()
        torch.nn.functional.softplus(-label * (row @ theta)).backward()
        optimizer.step()


def rates(device, runs, repeats):
    """Run-steps/s of peers and of `run_sgd`, also as a share of what reading x and θ and writing θ would allow."""
    problem, ball, T = Logistic(PLANTED), Ball(2.0), 128 if device == "cuda" else 256
    options, eta = {"dtype": torch.float32, "device": device}, inv_sqrt(T, ALPHA)
    x, y = (part[:, 0].contiguous() for part in draw(problem, 1, T, **options))
    functions = {"torch.optim.SGD, one run": (lambda: torch_optim(x, y, eta), T)}
    if device == "cpu":
        many = 100_000
        features, labels = (part[:, 0].numpy() for part in draw(problem, 1, many, **options))
        peer = SGDClassifier(loss="log_loss", penalty=None, learning_rate="invscaling", eta0=ALPHA, power_t=0.5,
                             shuffle=False, fit_intercept=False, max_iter=1, tol=None)  # fmt: skip
        functions["SGDClassifier, one run"] = (lambda: peer.fit(features, labels), many)
    for B in runs:
        data, theta = draw(problem, B, T, **options), torch.zeros(B, d, device=device)
        for name, more in {
            "drawing its data": {},
            "drawing its data, compiled": {"compile": True},
            "data given": {"data": data},
            "data given, compiled": {"data": data, "compile": True},
        }.items():
            more = more | options
            functions[f"run_sgd, B={B}, {name}"] = (
                lambda theta=theta, more=more: run_sgd(problem, ball, eta, theta, **more),
                B * T,
            )
    big = torch.zeros(2**26 if device == "cuda" else 2**22, device=device)
    times = seconds(
        {"copy": big.clone} | {name: function for name, (function, _) in functions.items()}, device, repeats
    )
    limit = 2 * big.nbytes / times.pop("copy") / (3 * d * big.itemsize)
    each = {name: time / functions[name][1] for name, time in times.items()}
    peers = [name for name in each if "one run" in name]
    print(f"\nfloat32, d={d}, T={T}: run-steps/s, share of the bandwidth limit, and times each of {', '.join(peers)}")
    print(f"  {'reading x, θ and writing θ as fast as a copy':<48}{limit:10.3g}")
    few = [name for name in each if name in peers or functions[name][1] < T * LAUNCH_BOUND]
    for title, names in (("few runs: bound by launches", few), ("many runs", [n for n in each if n not in few])):
        if device == "cuda":
            print(f" {title}")
        for name in names:
            ratios = "".join(f"{each[peer] / each[name]:11.3g}x" for peer in peers)
            print(f"  {name:<48}{1 / each[name]:10.3g}{1 / each[name] / limit:8.2%}{ratios}", flush=True)


def solvers(repeats):
    """Times that the page promises: optima in hindsight and enumerations."""
    functions = {}
    for problem in (Logistic(PLANTED[:8]), Hinge(PLANTED[:8]), LeastAbsolute(PLANTED[:8])):
        data = draw(problem, 1000, 300)
        functions[f"hindsight_optimum, 1000 {type(problem).__name__}, T=300"] = lambda problem=problem, data=data: (
            hindsight_optimum(problem, data, Ball(2.0))
        )
    eta = constant(18, 18**-0.5)
    functions["worst_sign_sequence, 3 x 2^18 paths"] = lambda: worst_sign_sequence(eta, 1.0, 1.0)
    print()
    for name, time in seconds(functions, "cpu", repeats).items():
        print(f"  {name:<50}{time:8.3f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header(
        arguments.device, ("torch",) if arguments.device == "cuda" else ("torch", "scikit-learn", "scipy"), threads=1
    )
    runs = arguments.runs or ([1024, 2**14, 2**17, 2**20] if arguments.device == "cuda" else [1, 1024, 4096])
    rates(arguments.device, runs, arguments.repeats)
    if arguments.device == "cpu":
        solvers(arguments.repeats)
