"""Solvers of gradient flows side by side with numpy, scipy, POT and fplanck.

python -m benchmarks.optimization.bench_gradient_flow [--device cuda] [--repeats 7]

"ratio" is the time of the peer over ours, "limit" the time of the row that nothing can beat over ours. With --device
cuda only what runs there is measured, with the most memory that a call takes: particles, also with several steps fused
to one kernel, and the entropic step; the grid and quantile solvers are scipy's factorisations on the CPU.
"""

import argparse
import warnings

import numpy as np
import torch
from scipy.constants import k as boltzmann
from scipy.linalg import solve_banded
from scipy.optimize import minimize
from scipy.special import ndtri
from scipy.stats import norm

from benchmarks.timing import header, seconds
from kexue_utils.optimization.gradient_flow import (
    FokkerPlanck,
    QuantileJKO1D,
    entropic_jko_step,
    langevin,
    w2_1d,
)
from kexue_utils.optimization.gradient_flow.experiments.langevin_bias import POTENTIALS, advance


def compare(title, functions, peers, device="cpu", repeats=7, work=None, limit=None):
    """Print a row for each function. peers: {ours: peer}; work: units that one call does, for a rate; limit: the row
    that the others are measured against.
    """
    times = seconds(functions, device, repeats)
    print(f"\n{title}")
    for name, time in times.items():
        rate = f"{work / time:10.2e}/s" if work else " " * 12
        memory = f"{peak(functions[name]) / 2**20:8.0f} MiB" if device == "cuda" else ""
        share = f"{times[limit] / time:6.2f} of the limit" if limit else ""
        ratio = f"{times[peers[name]] / time:10.2f}x {peers[name]}" if name in peers else ""
        print(f"  {name:<34}{time * 1e3:12.3f} ms {rate}{memory} {share}{ratio}".rstrip(), flush=True)


def peak(function):
    """Bytes that a call takes on the GPU beyond what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def centres(low, high, n):
    edges = np.linspace(low, high, n + 1)
    return (edges[1:] + edges[:-1]) / 2


def particles(n, steps, device, repeats):
    """ULA and MALA towards an anisotropic Gaussian in d = 2."""
    A = np.linalg.inv(np.array([[1.0, 0.6], [0.6, 0.8]]))
    matrices = {dtype: torch.from_numpy(A).to(device, dtype) for dtype in (torch.float64, torch.float32)}

    def score(x):
        return x @ -matrices[x.dtype]

    def logp(x):
        return (x * score(x)).sum(-1) / 2

    rng = np.random.default_rng(0)

    def in_numpy():
        x = np.zeros((n, 2))
        for _ in range(steps):
            x = x - 0.01 * (x @ A) + np.sqrt(0.02) * rng.standard_normal(x.shape)
        return x

    zero = torch.zeros(n, 2, device=device)
    functions = {"numpy, float64": in_numpy} if device == "cpu" else {}
    for dtype in matrices:
        for method in ("ula", "mala"):
            x = zero.to(dtype)
            functions[f"{method}, {str(dtype)[6:]}"] = lambda x=x, method=method: langevin(
                score, x, 0.01, steps, method, logp, thin=steps
            )
    peers = dict.fromkeys([name for name in functions if name[0] in "um"], "numpy, float64") if device == "cpu" else {}
    compare(f"Langevin, {n} particles, {steps} steps: particle-steps", functions, peers, device, repeats, n * steps)


def fused(n, steps, device, repeats):
    """Steps on the double well in one kernel, beside the same steps of the library and beside their noise alone."""
    potential, _ = POTENTIALS["double well"]
    x, y, moves, points = *torch.zeros(3, n, device=device), torch.zeros(n, 2, device=device)
    h = torch.tensor(0.01, device=device)

    def score(z):
        return -torch.stack(potential(*z.unbind(1))[1:], 1)

    def logp(z):
        return -potential(*z.unbind(1))[0]

    def noise(x, y):
        for _ in range(steps):
            x, y = x + torch.randn_like(x), y + torch.randn_like(y)
        return x, y

    normals = torch.compile(noise, fullgraph=True, dynamic=False)
    functions = {"two normals a step, fused": lambda: normals(x, y), "copy, once a step": lambda: [
        points.clone() for _ in range(steps)
    ]}  # fmt: skip
    for method in ("ula", "mala"):
        step = advance(method, potential, steps, torch.device("cuda"))  # compiled
        functions[f"{method}, langevin"] = lambda method=method: langevin(
            score, points, 0.01, steps, method, logp, thin=steps
        )
        functions[f"{method}, fused"] = lambda step=step: step(x, y, moves, h)
    peers = {f"{method}, fused": f"{method}, langevin" for method in ("ula", "mala")}
    title = f"Langevin on the double well, float32, {n} particles, {steps} steps: particle-steps"
    compare(title, functions, peers, device, repeats, n * steps, limit="two normals a step, fused")


def implicit_step(n, repeats):
    x = centres(-10, 10, n)
    solver = FokkerPlanck([x], lambda x: x**2 / 4)
    q, L = norm.pdf(x, 1.5, 0.3), solver.generator()
    bands = np.zeros((3, n))
    bands[0, 1:], bands[1], bands[2, :-1] = -0.01 * L.diagonal(1), 1 - 0.01 * L.diagonal(), -0.01 * L.diagonal(-1)
    p = solver.stationary()

    def banded():
        new = solve_banded((1, 1), bands, q)
        return (new * np.log(new / p)).sum() * solver.cell

    functions = {"scipy solve_banded": banded, "ours": lambda: solver.kl(solver.step(q, 0.01))}
    compare(f"1-D implicit step and KL, {n} cells", functions, {"ours": "scipy solve_banded"}, repeats=20 * repeats)


def their_solver(axes, V):
    import fplanck

    setattr(np, "product", np.prod)  # numpy 2 removed the name  # noqa: B010
    h = axes[0][1] - axes[0][0]
    return fplanck.fokker_planck(temperature=1.0, drag=boltzmann, extent=[len(axis) * h for axis in axes], resolution=h,
                                 potential=lambda *x: boltzmann * V(*x))  # fmt: skip


def exponential(n, repeats):
    x = centres(-10, 10, n)
    solver, peer = FokkerPlanck([x], lambda x: x**2 / 4), their_solver([x], lambda x: x**2 / 4)
    q = norm.pdf(x, 1.5, 0.3)
    m, s = 1.5 * np.exp(-0.5), np.sqrt(2 + (0.09 - 2) * np.exp(-1))
    found = {
        "fplanck, expm": lambda: peer.propagate(lambda x: norm.pdf(x, 1.5, 0.3), 1.0) / solver.cell,
        "ours, expm": lambda: solver.step(q, 1.0, "expm"),
        "ours, 100 steps of cn": lambda: solver.evolve(q, 1 / 100, 100, "cn")[-1],
    }
    warnings.simplefilter("ignore")  # cn past the limit of its positivity
    errors = {name: np.abs(run() - norm.pdf(x, m, s)).sum() * solver.cell for name, run in found.items()}
    functions = {f"{name} (L1 {errors[name]:.2e})": run for name, run in found.items()}
    theirs, *ours = functions
    compare(f"1-D, {n} cells, to T = 1", functions, dict.fromkeys(ours, theirs), repeats=repeats)


def two_dimensions(n, repeats):
    x = centres(-5, 5, n)

    def V(x, y):
        return x**2 / 2 + y**2 + 0.5 * x * y

    solver, peer = FokkerPlanck([x, x], V), their_solver([x, x], V)
    q = np.exp(-((x[:, None] - 1) ** 2) - (x + 1) ** 2)

    solved, other = FokkerPlanck([x, x], V), [0.01]

    def factorise():
        other[0] = 0.03 - other[0]  # a new step size, a new factor
        return solver.step(q, other[0])

    functions = {
        "fplanck, build": lambda: their_solver([x, x], V),
        "ours, build": lambda: FokkerPlanck([x, x], V),
        "ours, factorise and solve": factorise,
        "ours, solve": lambda: solved.step(q, 0.01),
        "fplanck, expm to T = 0.5": lambda: peer.propagate(lambda x, y: q, 0.5),
        "ours, expm to T = 0.5": lambda: solver.step(q, 0.5, "expm"),
    }
    peers = {"ours, build": "fplanck, build", "ours, expm to T = 0.5": "fplanck, expm to T = 0.5"}
    compare(f"2-D, {n} x {n} cells", functions, peers, repeats=repeats)


def quantiles(n, repeats):
    jko = QuantileJKO1D(lambda x: (x**2 - 1) ** 2, lambda x: 4 * x * (x**2 - 1), lambda x: 12 * x**2 - 4, n=n)
    start = jko.from_quantile(lambda u: 0.2 + 0.5 * ndtri(u)).X

    def ours():
        jko.X = start
        return jko.step(0.05)

    def generic():
        """L-BFGS on the first node and the logarithms of the gaps, with the gradient."""

        def value_and_gradient(y):
            gaps = np.exp(y[1:])
            X = y[0] + np.concatenate(([0], np.cumsum(gaps)))
            value = jko.w @ ((X - start) ** 2 / 0.1 + jko.V(X)) - jko.du @ (y[1:] - np.log(jko.du))
            slope = jko.w * ((X - start) / 0.05 + jko.dV(X))
            tail = np.cumsum(slope[::-1])[::-1]
            return value, np.concatenate((tail[:1], tail[1:] * gaps - jko.du))

        y = np.concatenate((start[:1], np.log(np.diff(start))))
        options = {"maxiter": 50_000, "maxfun": 10**6, "maxcor": 20, "ftol": 1e-16, "gtol": 1e-10}
        return minimize(value_and_gradient, y, jac=True, method="L-BFGS-B", options=options)

    functions = {"scipy L-BFGS": generic, "ours": ours}
    compare(f"one JKO step in {n} quantiles", functions, {"ours": "scipy L-BFGS"}, repeats=repeats)


def transport(n, repeats):
    import ot

    rng = np.random.default_rng(0)
    arrays = [*rng.normal(size=(2, n)), *rng.random((2, n))]
    for weights in arrays[2:]:
        weights /= weights.sum()
    x, y, a, b = arrays
    tensors = list(map(torch.from_numpy, arrays))
    functions = {
        "two np.sort": lambda: (np.sort(x), np.sort(y)),
        "ot.wasserstein_1d": lambda: ot.wasserstein_1d(x, y, p=2),
        "ot.emd2_1d": lambda: ot.emd2_1d(x, y),
        "w2_1d": lambda: w2_1d(*tensors[:2]),
        "ot.wasserstein_1d, weighted": lambda: ot.wasserstein_1d(x, y, a, b, p=2),
        "ot.emd2_1d, weighted": lambda: ot.emd2_1d(x, y, a, b),
        "w2_1d, weighted": lambda: w2_1d(*tensors),
    }
    peers = {"w2_1d": "ot.emd2_1d", "w2_1d, weighted": "ot.emd2_1d, weighted"}
    compare(f"W2 on a line, {n} samples", functions, peers, repeats=repeats)


def entropic(n, device, repeats):
    """An iteration of the scaling in 2-D: separable, and with the whole kernel of n² x n² entries."""
    x = torch.linspace(-3, 3, n, dtype=torch.float64, device=device)
    q = torch.exp(-((x[:, None] - 1) ** 2) - x**2)
    points = torch.cartesian_prod(x, x)

    def potential(x, y):
        return x**2 + y**4

    def separable():
        return entropic_jko_step(q, [x, x], potential, 0.5, 0.5, tol=1e300, max_iter=1)

    def dense():
        log_K = -torch.cdist(points, points).square() / 0.5
        log_a = q.log().flatten() - torch.logsumexp(log_K, 1)
        return torch.logsumexp(log_K + log_a, 1)

    functions = {"whole kernel": dense, "ours": separable}
    compare(f"one entropic iteration, {n} x {n}", functions, {"ours": "whole kernel"}, device, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    torch.set_num_threads(1)
    header(device, ("torch", "numpy", "scipy", *(("POT", "fplanck") if device == "cpu" else ())), threads=1)
    print("ratio: time of the peer over ours")
    if device == "cuda":
        fused(2**22, 4, device, repeats)
        particles(10**7, 20, device, repeats)
        entropic(64, device, repeats)
    else:
        particles(100_000, 50, device, repeats)
        implicit_step(1600, repeats)
        exponential(400, repeats)
        two_dimensions(96, 3)
        two_dimensions(192, 2)
        quantiles(200, 3)
        for n in (10**5, 10**6):
            transport(n, repeats)
        for n in (24, 48):
            entropic(n, device, repeats)
