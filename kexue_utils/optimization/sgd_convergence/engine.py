"""Projected SGD on many independent runs at once, with an exact account of the slack in its bound.

    θ_{t+1} = Π_Θ(θ_t − η_t g_t)

Source: https://kexue.fm/archives/9902
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .bounds import core_bound
from .domains import Domain, moved
from .problems import Batch, ConvexProblem

BLOCK, CHUNK = 256, 64  # runs and steps that are drawn together, always in full
GPU_BLOCK = 2**14  # the same on a GPU, where small blocks cost more to start than to draw
UNROLL = 8  # steps of one compiled function, a divisor of CHUNK: θ goes through memory once for all of them
RECORDS = ("loss", "average_loss", "dist", "gnorm", "theta", "grad")


@dataclass
class SlackLedger:
    """Where the core bound is lost, per run, as averages over the steps: bound = regret + slacks   (sgd-ledger)

    With a_t = ‖θ_t − θ*‖² and θ̃_{t+1} = θ_t − η_t g_t, T times them are

    - regret      Σ [L_t(θ_t) − L_t(θ*)]
    - convexity   Σ [⟨g_t, θ_t − θ*⟩ − (L_t(θ_t) − L_t(θ*))]
    - projection  Σ (‖θ̃_{t+1} − θ*‖² − ‖θ_{t+1} − θ*‖²)/(2η_t)
    - diameter    (D² − a_1)/(2η_1) + Σ_{t≥2} (1/(2η_t) − 1/(2η_{t−1}))(D² − a_t)
    - distance    a_{T+1}/(2η_T)
    - gradient    Σ (η_t/2)(G² − ‖g_t‖²)
    """

    regret: Tensor
    convexity: Tensor
    projection: Tensor
    diameter: Tensor
    distance: Tensor
    gradient: Tensor

    @property
    def slacks(self) -> Tensor:
        """The five slacks, (5, B), in the order above."""
        return torch.stack([getattr(self, field.name) for field in fields(self)[1:]])

    @property
    def bound(self) -> Tensor:
        """Regret and slacks together, (B,): equal to ``core_bound`` up to rounding."""
        return self.regret + self.slacks.sum(0)


@dataclass
class RunResult:
    """What B runs of T steps end with.

    online_loss: (1/T) Σ L(x_t, θ_t), (B,); comparator_loss: the same of the comparator, or None without one;
    average: θ̄ = (1/T) Σ θ_t, (B, d); last: θ_T; final: θ_{T+1}; records: name → (number kept, B, …);
    kept: the t of the records; ledger: a :class:`SlackLedger`, or None
    """

    online_loss: Tensor
    comparator_loss: Tensor | None
    average: Tensor
    last: Tensor
    final: Tensor
    records: dict[str, Tensor]
    kept: range
    ledger: SlackLedger | None


def _chunks(problem: ConvexProblem, B: int, T: int, seed: int, first: int, like: Tensor) -> Iterator[Batch]:
    """Batches of up to CHUNK steps for runs first, …, first+B−1, each block of runs from a generator of its own."""
    size = BLOCK if like.device.type == "cpu" else GPU_BLOCK
    blocks = range(first // size, (first + B - 1) // size + 1)
    sources = [torch.Generator(like.device) for _ in blocks]
    for block, source in zip(blocks, sources, strict=True):
        source.manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0] >> 1))
    begin = first - blocks[0] * size
    for start in range(0, T, CHUNK):
        steps, keep = range(start, start + CHUNK), min(CHUNK, T - start)
        parts = [problem.sample(size, source, steps, like.dtype) for source in sources]
        columns = zip(*parts, strict=True)
        yield tuple(torch.cat(column, 1)[:keep, begin : begin + B] for column in columns)


def draw(problem: ConvexProblem, B: int, T: int, *, seed: int = 0, first: int = 0, dtype=torch.float64, device="cpu"):
    """The data that ``run_sgd`` draws with the same arguments: a batch with leading axes (T, B)."""
    like = torch.empty(0, dtype=dtype, device=device)
    chunks = _chunks(moved(problem, like), B, T, seed, first, like)
    return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


def sgd_step(problem: ConvexProblem, domain: Domain, theta: Tensor, batch: Batch, eta: Tensor):
    """One step: L(x, θ), g, θ − ηg and θ' = Π_Θ(θ − ηg), for θ (B, d)   (sgd-step)"""
    loss, grad = problem.loss_and_grad(theta, batch)
    target = torch.addcmul(theta, grad, eta, value=-1)
    return loss, grad, target, domain.project(target)


def _several(problem, domain, theta, batch, eta, comparator, sums):
    """len(eta) steps in a row: θ after and before the last, and the sums of losses, of θ_t, of comparator losses."""
    online, total, reference = sums
    for t in range(len(eta)):
        step, last = tuple(part[t] for part in batch), theta
        loss, _, _, theta = sgd_step(problem, domain, theta, step, eta[t])
        online, total = online + loss, total + last
        if comparator is not None:
            reference = reference + problem.loss(comparator, step)
    return theta, last, (online, total, reference)


class _Account:
    """Sums of the slack ledger while the runs go on."""

    def __init__(self, problem: ConvexProblem, domain: Domain, comparator: Tensor):
        self.G, self.D, self.comparator = problem.G, domain.diameter, comparator
        self.sums = comparator.new_zeros(5, len(comparator))
        self.inverse, self.distance = 0.0, None

    def add(self, eta, regret, theta, grad, target, after):
        inverse = 1 / eta
        before, ahead, arrived = (((point - self.comparator) ** 2).sum(-1) for point in (theta, target, after))
        self.sums += torch.stack(
            [
                regret,
                (grad * (theta - self.comparator)).sum(-1) - regret,
                (ahead - arrived) * inverse / 2,
                (self.D**2 - before) * (inverse - self.inverse) / 2,
                (self.G**2 - (grad * grad).sum(-1)) * eta / 2,
            ]
        )
        self.inverse, self.distance = inverse, arrived * inverse / 2

    def ledger(self, T: int) -> SlackLedger:
        regret, convexity, projection, diameter, gradient = self.sums / T
        return SlackLedger(regret, convexity, projection, diameter, self.distance / T, gradient)


def _require(problem, domain, eta, theta0, comparator, ledger, record, stride, data):
    if eta.ndim != 1 or not len(eta):
        raise ValueError(f"eta must be a schedule of shape (T,), got shape {tuple(eta.shape)}")
    bad = (~((eta >= 0) & torch.isfinite(eta))).nonzero()
    if len(bad):
        raise ValueError(f"steps must be finite and not negative, got eta={eta[bad[0, 0]]:g} at t={int(bad[0, 0]) + 1}")
    if len(eta) > problem.T:
        raise ValueError(f"eta must have at most the {problem.T} steps of the problem, got {len(eta)}")
    for name, value in (("theta0", theta0), ("comparator", comparator)):
        if value is None:
            continue
        if value.shape != (len(theta0), problem.d):
            raise ValueError(f"{name} must have shape (B, {problem.d}), got {tuple(value.shape)}")
        exact = value.to(torch.float64)
        outside = (~moved(domain, exact).contains(exact, 1e-6)).nonzero()
        if len(outside):
            run = int(outside[0, 0])
            raise ValueError(f"{name} must lie in the domain, got {value[run].tolist()} in run {run}")
    if not set(record) <= set(RECORDS) or stride < 1:
        raise ValueError(f"record must be among {RECORDS} and stride >= 1, got {tuple(record)} and {stride}")
    if comparator is None and (ledger or "dist" in record):
        raise ValueError("comparator must be given for the ledger and for the record 'dist'")
    if ledger and not core_bound(eta, domain.diameter, problem.G) < math.inf:  # raises for other hypotheses
        raise ValueError("domain must be bounded for the ledger")
    if data is not None:
        shapes = [tuple(part.shape) for part in data]
        if any(shape[:2] != (len(eta), len(theta0)) for shape in shapes):
            raise ValueError(f"data must have leading axes (T, B) = ({len(eta)}, {len(theta0)}), got shapes {shapes}")
        problem.check(data)


def _norms(name, theta, comparator, grad):
    return torch.linalg.vector_norm(grad if name == "gnorm" else theta - comparator, dim=-1)


@torch.no_grad()
def run_sgd(
    problem: ConvexProblem,
    domain: Domain,
    eta: Tensor,
    theta0: Tensor,
    *,
    seed: int = 0,
    first: int = 0,
    data: Batch | None = None,
    comparator: Tensor | None = None,
    ledger: bool = False,
    record: Sequence[str] = (),
    stride: int = 1,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> RunResult:
    """B independent runs of projected SGD side by side, T steps one after the other: θ_{t+1} = Π_Θ(θ_t − η_t g_t)

    (sgd-step, sgd-ledger)

    eta: the schedule (T,); zero steps are allowed without a ledger. theta0: θ_1, (B, d), in the domain.
    seed, first: the runs are numbered first, …, first+B−1; run i has the same data in a batch of any size, and the same
    path up to rounding, as runs are drawn in blocks of 256 (2^14 on a GPU), each from a generator seeded by
    (seed, block). A GPU draws other numbers than a CPU.
    data: a batch with leading axes (T, B) to use instead. comparator: θ*, (B, d), in the domain.
    record: any of "loss" L(x_t, θ_t), "average_loss" (its mean up to t), "dist" ‖θ_t − θ*‖, "gnorm", "theta", "grad",
    kept at t = stride, 2·stride, …. Nothing else of size T × B is stored.
    compile: compile the step, or 8 at once where there is neither ledger nor record (for a GPU). Raises ValueError,
    before anything is drawn, for steps that are negative (with a ledger: not positive, or increasing) and for data that
    break the gradient bound.
    """
    _require(problem, domain, eta, theta0, comparator, ledger, record, stride, data)
    theta = theta0.to(device, dtype)
    problem, domain, steps = moved(problem, theta), moved(domain, theta), eta.to(theta)
    T, B = len(eta), len(theta)
    chunks = iter([data]) if data is not None else _chunks(problem, B, T, seed, first, theta)
    length = T if data is not None else CHUNK
    several = torch.compile(_several, dynamic=False) if compile and not (ledger or record) else None
    advance = torch.compile(sgd_step, dynamic=False) if compile and not several else sgd_step
    online, total, reference, account = theta.new_zeros(B), torch.zeros_like(theta), None, None
    if comparator is not None:
        comparator, reference = comparator.to(theta), theta.new_zeros(B)
        account = _Account(problem, domain, comparator) if ledger else None
    records, kept = {name: [] for name in record}, range(stride, T + 1, stride)

    t = 0
    while t < T:
        at = t % length
        if at == 0:
            chunk = next(chunks)
        if several and t + UNROLL <= T:
            batch = tuple(part[at : at + UNROLL].to(theta) for part in chunk)
            sums = online, total, reference
            theta, last, sums = several(problem, domain, theta, batch, steps[t : t + UNROLL], comparator, sums)
            online, total, reference = sums
            t += UNROLL
            continue
        batch = tuple(part[at].to(theta) for part in chunk)
        loss, grad, target, after = advance(problem, domain, theta, batch, steps[t])
        online += loss
        total += theta
        if comparator is not None:
            best = problem.loss(comparator, batch)
            reference += best
            if ledger:
                account.add(steps[t], loss - best, theta, grad, target, after)
        t += 1
        if t in kept:
            seen = {"loss": loss, "average_loss": online / t, "theta": theta, "grad": grad}
            for name, values in records.items():
                values.append(_norms(name, theta, comparator, grad) if name in ("dist", "gnorm") else seen[name])
        last, theta = theta, after
    return RunResult(
        online / T,
        reference / T if comparator is not None else None,
        total / T,
        last,
        theta,
        {name: torch.stack(values) for name, values in records.items()},
        kept,
        account.ledger(T) if ledger else None,
    )
