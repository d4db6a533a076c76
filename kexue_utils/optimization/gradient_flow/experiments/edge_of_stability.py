"""Recorded run: how long full-batch gradient descent stays near its flow, and what it does when it can't.

Two small networks on scikit-learn's digits, squared error, float64. Along the flow the largest curvature λ grows; a
step size with 2/α above it all the way follows the flow to O(α), one with 2/α below it leaves the flow and hovers where
λ is about 2/α.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_utils.optimization.gradient_flow.euclidean import gd_path
from kexue_utils.training.intervals import interval
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment

# (inputs, outputs) of each layer; a convolution's inputs are the 3 × 3 neighbours of every channel.
LAYERS = {"mlp": ((64, 32), (32, 10)), "cnn": ((9, 8), (72, 16), (64, 10))}


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8), every pixel centred over all of them and scaled to a common variance of 1, and one-hot
    classes (1797, 10), float64. ModuleNotFoundError without scikit-learn.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).double()
    images = images - images.mean(0)
    return images / images.std(), F.one_hot(torch.from_numpy(data.target), 10).double()


def start(net: str, seed: int) -> Tensor:
    """The parameters of a seed in one vector, (P,): weights of small variance, biases 0."""
    generator, pieces = torch.Generator().manual_seed(seed), []
    for number, (inputs, outputs) in enumerate(LAYERS[net]):
        gain = 0.5 if number < len(LAYERS[net]) - 1 else 0.3
        weights = torch.randn(inputs * outputs, generator=generator, dtype=torch.float64)
        pieces += [weights * gain / inputs**0.5, torch.zeros(outputs, dtype=torch.float64)]
    return torch.cat(pieces)


def layers(theta: Tensor, shapes):
    """(weights (S, inputs, outputs), biases (S, 1, outputs)) of each layer of theta (S, P)."""
    for inputs, outputs in shapes:
        weights, biases, theta = theta.split([inputs * outputs, outputs, theta.shape[1] - (inputs + 1) * outputs], 1)
        yield weights.unflatten(1, (inputs, outputs)), biases[:, None]


def _neighbours(x):
    """(S, n, h, w, c) → (S, n·h·w, 9c), zeros beyond the border."""
    h, w = x.shape[2:4]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1).flatten(1, 3)


def _halved(x):
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))


def outputs(net: str, theta: Tensor, images: Tensor) -> Tensor:
    """(S, n, 10) of S networks with parameters theta (S, P); images: (n, 8, 8)."""
    *hidden, (weights, biases) = layers(theta, LAYERS[net])
    x = images.expand(len(theta), *images.shape)
    if net == "mlp":
        x = x.flatten(2)
        for W, b in hidden:
            x = torch.baddbmm(b, x, W).tanh()
    else:
        x = x[..., None]
        for W, b in hidden:
            x = _halved(torch.baddbmm(b, _neighbours(x), W).tanh().unflatten(1, x.shape[1:4]))
        x = x.flatten(2)
    return torch.baddbmm(biases, x, weights)


class Loss:
    """f(θ) = ½ mean |net(x) − one-hot|², for S networks at once: theta (S, P) → (S,)."""

    def __init__(self, net: str, images: Tensor, classes: Tensor):
        self.net, self.images, self.classes = net, images, classes

    def __call__(self, theta: Tensor) -> Tensor:
        return (outputs(self.net, theta, self.images) - self.classes).square().sum(-1).mean(-1) / 2

    def grad(self, theta: Tensor, create_graph: bool = False) -> Tensor:
        """∇f, (S, P)."""
        with torch.enable_grad():
            theta = theta if create_graph else theta.detach().requires_grad_()
            return torch.autograd.grad(self(theta).sum(), theta, create_graph=create_graph)[0]


def sharpness(loss: Loss, theta: Tensor, iterations: int) -> list[float]:
    """Largest eigenvalue of the Hessian of each network, by Lanczos with full reorthogonalisation; nan if f is not
    finite there.
    """
    theta = theta.detach().requires_grad_()
    gradient = loss.grad(theta, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(theta.shape, generator=generator, dtype=theta.dtype).to(theta.device)
    basis, diagonal, beside = [v / v.norm(dim=1, keepdim=True)], [], []
    for _ in range(iterations):
        w = torch.autograd.grad(gradient, theta, basis[-1], retain_graph=True)[0]
        diagonal.append((w * basis[-1]).sum(1))
        Q = torch.stack(basis, 2)
        for _ in range(2):
            w = w - (Q @ (Q.mT @ w[..., None]))[..., 0]
        beside.append(w.norm(dim=1))
        basis.append(w / beside[-1][:, None])
    T = torch.diag_embed(torch.stack(diagonal, 1))
    for offset in (1, -1):
        T = T + torch.diag_embed(torch.stack(beside[:-1], 1), offset)
    good = T.isfinite().flatten(1).all(1)
    largest = torch.linalg.eigvalsh(torch.where(good[:, None, None], T, 0)).amax(1)
    return torch.where(good, largest, torch.nan).tolist()


def rk4(grad, x: Tensor, step: float, steps: int) -> Tensor:
    """The flow dx/dt = −∇f(x) after `steps` steps of the classical Runge–Kutta method of order 4."""
    for _ in range(steps):
        k1 = grad(x)
        k2 = grad(x - step / 2 * k1)
        k3 = grad(x - step / 2 * k2)
        k4 = grad(x - step * k3)
        x = x - step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    images, classes = (part[: p["images"]].to(device) for part in digits())
    loss = Loss(p["net"], images, classes)
    theta = torch.stack([start(p["net"], seed) for seed in seeds]).to(device)
    times = [p["spacing"] * k for k in range(p["points"] + 1)]

    def followed(move, description):
        """[θ at every time] and its curves by seed."""
        x, path = theta, [theta]
        for _ in progress(p["points"], description):
            x = move(x)
            path.append(x)
        curves = {"loss": torch.stack([loss(x).detach() for x in path], 1).tolist()}
        curves["sharpness"] = np.array([sharpness(loss, x, p["iterations"]) for x in path]).T.tolist()
        return path, curves

    def flow(step):
        return lambda x: rk4(loss.grad, x, step, round(p["spacing"] / step))

    path, curves = followed(flow(p["rk4"]), f"{p['net']}, flow")
    coarse = rk4(loss.grad, theta, 2 * p["rk4"], round(times[-1] / p["rk4"] / 2))
    error = (coarse - path[-1]).norm(dim=1).tolist()  # about 15 times that of the finer path
    found = {}
    for lr in p["lr"]:
        steps = round(p["spacing"] / lr)
        gd, found[lr] = followed(lambda x, lr=lr, n=steps: gd_path(loss.grad, x, lr, n)[-1], f"{p['net']}, step {lr}")
        found[lr]["distance"] = torch.stack(
            [(x - y).norm(dim=1) for x, y in zip(gd, path, strict=True)], 1
        ).tolist()  # fmt: skip
    return [
        {
            "t": times,
            "flow": {key: values[s] for key, values in curves.items()},
            "reference error": error[s],
            "gd": {str(lr): {key: values[s] for key, values in one.items()} for lr, one in found.items()},
        }
        for s in range(len(seeds))
    ]


def _units(smoke):
    base = {"net": "mlp", "images": 1000, "lr": [3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16, 1 / 32], "spacing": 6.0,
            "points": 40, "rk4": 1 / 8, "iterations": 20}  # fmt: skip
    if smoke:
        base |= {"images": 100, "lr": [1 / 4, 1 / 8, 1 / 16], "points": 2, "spacing": 1.0, "iterations": 5}
    return {"MLP 64-32-10": base, "CNN": base | {"net": "cnn", "rk4": base["rk4"] / 2}}  # a sharper network


def _conclude(units):
    rows = {}
    for name, unit in units.items():
        runs, rates = unit["runs"], unit["parameters"]["lr"]
        curvature = interval([max(run["flow"]["sharpness"]) for run in runs])
        row = {"largest sharpness of the flow": curvature, "steps": {}}
        row["reference error"] = max(run["reference error"] for run in runs)
        smallest = min(rates)
        for lr in rates:
            ends = [run["gd"][str(lr)] for run in runs]
            last = -max(1, unit["parameters"]["points"] // 4)
            per_rate = [run["gd"][str(smallest)]["distance"][-1] / smallest for run in runs]
            step = {"stable on the flow": 2 / lr > curvature["high"], "2/lr": 2 / lr}
            if any(end["distance"][-1] is None for end in ends):
                step["diverged"] = sum(end["distance"][-1] is None for end in ends)
            else:
                step["distance"] = interval([end["distance"][-1] for end in ends])
                # over what the smallest step promises, were the distance proportional to the step
                step["over the line"] = interval(
                    [end["distance"][-1] / (lr * c) for end, c in zip(ends, per_rate, strict=True)]
                )  # fmt: skip
                step["sharpness lr/2"] = interval([float(np.mean(end["sharpness"][last:])) * lr / 2 for end in ends])
            row["steps"][str(lr)] = step
        # an order is fitted where hλ is small, half the way to the edge
        fitted = [lr for lr in rates if 1 / lr > curvature["high"]]
        row["steps in the fit"] = fitted
        if len(fitted) > 1:
            slopes = [
                float(np.polyfit(np.log(fitted), np.log([run["gd"][str(lr)]["distance"][-1] for lr in fitted]), 1)[0])
                for run in runs
            ]
            row["slope"] = interval(slopes)
            row["reproduced: first order below the edge"] = 0.9 < row["slope"]["low"] and row["slope"]["high"] < 1.1
        beyond = [row["steps"][str(lr)] for lr in rates if not row["steps"][str(lr)]["stable on the flow"]]
        if beyond:
            row["reproduced: leaves the flow beyond the edge"] = all(
                "diverged" in step or step["over the line"]["low"] > 1.3 for step in beyond
            )
            row["reproduced: sharpness hovers at 2/lr"] = all(
                "diverged" not in step and 0.9 < step["sharpness lr/2"]["low"] and step["sharpness lr/2"]["high"] < 1.2
                for step in beyond
            )
        rows[name] = row
    return rows


EDGE = Experiment(
    title="Gradient descent beside its flow on two small networks: first order, until the curvature passes 2/α",
    units=_units,
    run=_run,
    conclude=_conclude,
)
