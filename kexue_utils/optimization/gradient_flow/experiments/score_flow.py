"""Recorded run: particles without noise, pushed by a learned score, beside Langevin's.

The flow of KL(q‖p) moves particles with ∇log p − ∇log q_t. Noise stands for the second term in Langevin's equation;
here a small network learns it from the particles themselves, anew at every step. In d dimensions, towards a Gaussian
(where q_t is known at all times) and a mixture of four.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from kexue_utils.optimization.gradient_flow.gaussian import GaussianTarget
from kexue_utils.optimization.gradient_flow.langevin import langevin
from kexue_utils.optimization.gradient_flow.transport import w2_1d
from kexue_utils.training.intervals import interval, t_interval
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import Experiment

START = 0.5  # variance of the Gaussian in which all begin
WEIGHTS, RADIUS, WIDTH = (0.4, 0.3, 0.2, 0.1), math.sqrt(2), math.sqrt(0.5)  # of the mixture


def _frame(d):
    """A rotation, the same at every seed."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


class Gaussian:
    """N(0, Σ*), eigenvalues of Σ* from ½ to 2 along turned axes; the start has mean 1 along each of these."""

    def __init__(self, d: int):
        Q, powers = _frame(d), torch.linspace(-1, 1, d, dtype=torch.float64)
        self.exact = GaussianTarget((Q * 2**powers) @ Q.T)
        self.m0, self.S0 = Q.sum(1), START * torch.eye(d, dtype=torch.float64)

    def score(self, x: Tensor) -> Tensor:
        """∇log p."""
        return -x @ self.exact.A.to(x)

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of q_t."""
        return self.exact.ou_marginal(self.m0, self.S0, t)

    def draw(self, n: int, t: float, generator: torch.Generator) -> Tensor:
        """n draws of q_t, (n, d) float64."""
        m, S = self.moments(t)
        z = torch.randn(n, len(m), generator=generator, dtype=torch.float64, device=generator.device)
        return m.to(z) + z @ torch.linalg.cholesky(S).to(z).T


class Mixture:
    """Four Gaussians of variance ½ at distance √2 from 0, along four of the turned axes; the start has mean 0."""

    def __init__(self, d: int):
        self.centres = RADIUS * _frame(d)[:, :4].T
        self.m0, self.S0 = torch.zeros(d, dtype=torch.float64), START * torch.eye(d, dtype=torch.float64)

    def score(self, x: Tensor) -> Tensor:
        """∇log p; all centres are as far from 0, so that −|x−c|²/2s² is x·c/s² and a term without c."""
        share = (x @ (self.centres / WIDTH**2).T.to(x) + torch.tensor(WEIGHTS).log().to(x)).softmax(-1)
        return (share @ self.centres.to(x) - x) / WIDTH**2

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of p, where q_t is at the end."""
        w = torch.tensor(WEIGHTS, dtype=torch.float64)
        m = w @ self.centres
        spread = (self.centres - m).T @ (w[:, None] * (self.centres - m))
        return m, spread + WIDTH**2 * torch.eye(len(m), dtype=torch.float64)

    def draw(self, n: int, t: float, generator: torch.Generator) -> Tensor:
        """n draws of p, (n, d) float64; of q_0 for t = 0."""
        device = generator.device
        z = torch.randn(n, len(self.m0), generator=generator, dtype=torch.float64, device=device)
        if t == 0:
            return START**0.5 * z
        which = torch.multinomial(torch.tensor(WEIGHTS, device=device), n, replacement=True, generator=generator)
        return self.centres.to(z)[which] + WIDTH * z


TARGETS = {"gaussian": Gaussian, "mixture": Mixture}


class Scores(nn.Module):
    """s(x) = Bx + b + a network of two hidden layers, for R sets of particles at once: (R, n, d) → (R, n, d)."""

    def __init__(self, sets: int, d: int, width: int):
        super().__init__()
        sizes = [(d, width), (width, width), (width, d)]
        self.weights = nn.ParameterList(torch.randn(sets, i, o) / i**0.5 for i, o in sizes)
        self.biases = nn.ParameterList(torch.zeros(sets, 1, o) for _, o in sizes)
        self.linear = nn.Parameter(-torch.eye(d).expand(sets, d, d) / START)
        with torch.no_grad():
            self.weights[-1].mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for W, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = nn.functional.silu(torch.baddbmm(b, h, W))
        return torch.baddbmm(self.biases[-1], h, self.weights[-1]) + x @ self.linear


def matching(score, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Denoising score matching at x ± σε, E|s(x ± σε) ± ε/σ|² less its constant; (R, n, d) → (R,).

    The pair takes 1/σ² out of the variance. Least for s = ∇log of the particles' law blurred by N(0, σ²).
    """
    up, down = score(torch.cat((x + sigma * noise, x - sigma * noise), 1)).chunk(2, 1)
    slope = (noise * (up - down)).sum(-1) / sigma
    return ((up.square() + down.square()).sum(-1) / 2 + slope).mean(1)


def closure(x: Tensor) -> Tensor:
    """The score of the Gaussian with the particles' mean and covariance, at the particles (R, n, d): not learned."""
    centred = x - x.mean(1, keepdim=True)
    S = centred.mT @ centred / x.shape[1]
    return -torch.linalg.solve(S, centred.mT).mT


def gaussian_kl(x: Tensor, m: Tensor, S: Tensor) -> Tensor:
    """KL of the Gaussian fit of the particles from N(m, S), in nats: (R, n, d) → (R,)."""
    x = x.double().cpu()
    centred = x - x.mean(1, keepdim=True)
    return GaussianTarget(S, m).kl(x.mean(1), centred.mT @ centred / x.shape[1])


def sliced_w2(x: Tensor, exact: Tensor, directions: Tensor) -> Tensor:
    """√ of the mean over directions (k, d) of W₂² between projections: (R, n, d) and (N, d) → (R,)."""
    reference = (exact @ directions.T).T
    return torch.stack([w2_1d((one.double() @ directions.T).T, reference).mean().sqrt() for one in x])


def learned(p, target, x, generator):
    """x → the particles a step later, with a score refitted at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
        model = Scores(len(x), x.shape[2], p["width"]).to(x.device)
    adam = torch.optim.Adam(model.parameters(), lr=p["rate"], betas=(0.9, 0.99), fused=x.device.type == "cuda")

    def fit(x, steps):
        for _ in range(steps):
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            adam.zero_grad()
            matching(model, x, noise, p["sigma"]).sum().backward()
            adam.step()

    fit(x, p["first"])

    def score(x):
        fit(x, p["refits"])
        with torch.no_grad():
            return model(x)

    return score


def _run(parameters, seeds, device, checkpoint):
    p = parameters
    target = TARGETS[p["target"]](p["d"])
    n, d, dt = p["particles"], p["d"], p["dt"]
    each, points = p["steps"] // p["points"], p["points"]
    end = dt * each * points
    generators = [torch.Generator(device).manual_seed(1_000_003 * (seed + 1)) for seed in seeds]
    starts = [target.draw(p["replicas"] * n, 0.0, g).view(-1, n, d) for g in generators]
    start = torch.cat(starts).float()
    generator = torch.Generator(device).manual_seed(seeds[0])
    reference = target.draw(p["reference"], end, generator)
    directions = nn.functional.normalize(torch.randn(64, d, generator=generator, dtype=torch.float64, device=device))
    found = {}

    def measured(x, t, speed=None, error=None):
        row = {"second": x.double().square().sum(-1).mean(1), "kl": gaussian_kl(x, *target.moments(t))}
        row |= {} if speed is None else {"speed": speed}
        return row | ({} if error is None else {"score error": error})

    def deterministic(name, score):
        x, curve = start, []
        for step in progress(each * points + 1, f"{p['target']}, {name}"):
            s = score(x)
            v = target.score(x) - s
            if step % each == 0:
                error, t = None, step * dt
                if p["target"] == "gaussian":
                    m, S = (part.to(x) for part in target.moments(t))
                    true = -(x - m) @ torch.linalg.inv(S)
                    error = ((s - true).square().sum((1, 2)) / true.square().sum((1, 2))).sqrt()
                curve.append((t, measured(x, t, v.square().sum(-1).mean(1).sqrt(), error)))
            if step < each * points:
                x = x + dt * v
        found[name] = (x, curve)

    deterministic("learned score", learned(p, target, start, generator))
    if p["target"] == "gaussian":
        deterministic("Gaussian score", closure)
    x, curve = start, [(0.0, measured(start, 0.0))]
    for point in range(1, points + 1):
        flat = langevin(target.score, x.flatten(0, 1), dt, each, generator=generator, thin=each).samples[0]
        x = flat.view_as(start)
        curve.append((point * each * dt, measured(x, point * each * dt)))
    found["Langevin"] = (x, curve)
    x = torch.cat([target.draw(p["replicas"] * n, end, g).view(-1, n, d) for g in generators]).float()
    found["exact draws"] = (x, [(end, measured(x, end))])

    m, S = target.moments(end)
    exact = (S.trace() + m @ m).item()
    runs = [{} for _ in seeds]
    for name, (x, curve) in found.items():
        w2 = sliced_w2(x, reference, directions)
        for s, run in enumerate(runs):
            mine = slice(s * p["replicas"], (s + 1) * p["replicas"])
            run[name] = {
                "excess": (curve[-1][1]["second"][mine] / exact - 1).tolist(),
                "kl": curve[-1][1]["kl"][mine].mean().item(),
                "sliced w2": w2[mine].mean().item(),
                "curve": {
                    key: [[t, row[key][mine].mean().item()] for t, row in curve] for key in curve[0][1]
                },
            }  # fmt: skip
    return [run | {"exact second moment": exact} for run in runs]


def _units(smoke):
    base = {"d": 10, "particles": 4096, "replicas": 8, "dt": 0.01, "steps": 600, "points": 12, "width": 64,
            "sigma": 0.05, "rate": 1e-3, "first": 500, "refits": 32, "reference": 2**16}  # fmt: skip
    if smoke:
        base |= {"d": 4, "particles": 128, "replicas": 2, "dt": 0.05, "steps": 8, "points": 2, "width": 8, "first": 10,
                 "refits": 2, "reference": 1000}  # fmt: skip
    few = [32, 8, 2] if not smoke else [2]
    units = {
        f"{target}, {refits} refits a step": base | {"target": target, "refits": refits}
        for refits in few
        for target in TARGETS
    }
    if not smoke:
        units |= {
            f"{target}, 8 refits, 256 particles": base | {"target": target, "refits": 8, "particles": 256}
            for target in TARGETS
        }
    return units


def _conclude(units):
    rows = {}
    for name, unit in units.items():
        runs, row = unit["runs"], {}
        noisy = [np.var(run["Langevin"]["excess"], ddof=1) for run in runs]
        for method in [key for key in runs[0] if key != "exact second moment"]:
            mine = [run[method] for run in runs]
            ratios = [np.var(one["excess"], ddof=1) / v for one, v in zip(mine, noisy, strict=True)]
            geometric = (math.exp(x) for x in t_interval([math.log(r) for r in ratios]))
            row[method] = {
                "excess of the second moment": interval([float(np.mean(one["excess"])) for one in mine]),
                "kl": interval([one["kl"] for one in mine]),
                "sliced w2": interval([one["sliced w2"] for one in mine]),
                "variance over Langevin's": dict(zip(("mean", "low", "high"), geometric, strict=True)),
            }
        both = [row[method]["excess of the second moment"] for method in ("learned score", "Langevin")]
        row["reproduced: both within 2 %"] = all(-0.02 < one["low"] and one["high"] < 0.02 for one in both)
        row["less variance than Langevin"] = row["learned score"]["variance over Langevin's"]["high"] < 1
        # the exact score is known for the Gaussian; particles of the mixture should come to rest
        key = "score error" if "score error" in runs[0]["learned score"]["curve"] else "speed"
        curves = [[value for _, value in run["learned score"]["curve"][key]] for run in runs]
        first = 0 if key == "score error" else len(curves[0]) // 2
        growth = interval([curve[-1] - curve[first] for curve in curves])
        row[key] = {"first": interval([curve[first] for curve in curves]), "growth": growth}
        row[key]["last"] = interval([curve[-1] for curve in curves])
        row["score error accumulates"] = growth["low"] > 0
        rows[name] = row
    return rows


SCORE = Experiment(
    title="Particles pushed by a learned score, without noise, beside Langevin's: moments, distances, variance",
    units=_units,
    run=_run,
    conclude=_conclude,
)
