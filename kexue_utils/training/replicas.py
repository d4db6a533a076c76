"""Train many copies of one small model at once: every seed at every learning rate, as one stack of parameters."""

import copy
import math

import torch
from torch.func import functional_call, stack_module_state

from kexue_utils.training.progress import progress


class Replicas:
    """A stack of P = len(rates) · len(seeds) copies of a module, replica r·len(seeds) + s with rate r and seed s.

    make: () → nn.Module whose forward(*batch) returns losses of any shape; called once per seed, on the CPU, after
    `torch.manual_seed(seed)`, so that a seed starts from the same parameters on every device and at every rate.
    """

    def __init__(self, make, seeds, rates, device):
        if not seeds or not rates:
            raise ValueError(f"seeds = {seeds!r}, rates = {rates!r}: at least one of each is needed")
        models = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                models.append(make())
        parameters, buffers = stack_module_state(models * len(rates))
        self.parameters = {k: p.detach().to(device).requires_grad_() for k, p in parameters.items()}
        self.buffers = {k: b.to(device) for k, b in buffers.items()}
        self.seeds, self.rates, self.device = seeds, rates, torch.device(device)
        self._module = copy.deepcopy(models[0]).to("meta")
        self._losses = torch.vmap(lambda p, b, batch: functional_call(self._module, (p, b), batch))

    def losses(self, *batch):
        """Losses of every replica, (P, …); each tensor of the batch is (len(seeds), …), the same for every rate."""
        batch = tuple(x.repeat(len(self.rates), *[1] * (x.ndim - 1)) for x in batch)
        return self._losses(self.parameters, self.buffers, batch)

    def losses_of(self, rows, *batch):
        """Losses (len(rows), …) of the replicas numbered `rows`, all on the same batch."""
        chosen = ({k: p[rows] for k, p in tensors.items()} for tensors in (self.parameters, self.buffers))
        return self._losses(*chosen, tuple(x.expand(len(rows), *x.shape) for x in batch))

    def by_rate(self, values):
        """(len(rates), len(seeds)) nested list of a tensor of one value per replica."""
        return values.double().reshape(len(self.rates), len(self.seeds)).tolist()


class _Adam:
    """Adam with a learning rate per replica; what changes with the step is a tensor, for the CUDA graph."""

    def __init__(self, replicas, betas=(0.9, 0.99), eps=1e-8):
        self.parameters = list(replicas.parameters.values())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.rates = torch.tensor(replicas.rates, device=replicas.device).repeat_interleave(len(replicas.seeds))
        self.scale = torch.zeros(2, device=replicas.device)  # schedule / (1 − β₁ᵗ) and 1 / (1 − β₂ᵗ)
        self.betas, self.eps = betas, eps

    def set(self, step, schedule):
        b1, b2 = self.betas
        self.scale.copy_(torch.tensor([schedule / (1 - b1 ** (step + 1)), 1 / (1 - b2 ** (step + 1))]))

    @torch.no_grad()
    def update(self, gradients):
        b1, b2 = self.betas
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            rate = (self.rates * self.scale[0]).view(-1, *[1] * (p.ndim - 1))
            p.sub_(rate * m / ((v * self.scale[1]).sqrt_().add_(self.eps)))


def cosine(step, steps, warm=0.05):
    """Share of the peak learning rate: a linear rise over the first `warm` of the steps, then half a cosine to 0."""
    rise = max(1.0, warm * steps)
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * max(0.0, step + 1 - rise) / max(1.0, steps - rise))))


def train(replicas, batch, steps, *, evaluate, points=40, checkpoint=None, every=1000, description=None):
    """Minimise every replica's mean loss by Adam; the curve [[step, (rates, seeds) values], …] of `points` points.

    batch: step → tuple of tensors (len(seeds), …) on the replicas' device, a function of the step alone, so that a run
    that goes on after an interruption sees what it would have seen. evaluate: () → one value per replica.
    checkpoint: a `recorder.Checkpoint`, written every `every` steps. On a GPU the step is one CUDA graph.
    """
    adam, start, curve = _Adam(replicas), 0, []
    state = checkpoint.load(replicas.device) if checkpoint else None
    if state:
        start, curve = state["step"], state["curve"]
        with torch.no_grad():
            for mine, saved in zip(adam.parameters + adam.first + adam.second, state["tensors"], strict=True):
                mine.copy_(saved)
    static = batch(start)

    def step_once():
        loss = replicas.losses(*static)
        adam.update(torch.autograd.grad(loss.flatten(1).mean(1).sum(), adam.parameters))

    adam.scale.zero_()
    replay = captured(step_once, adam.first + adam.second) if replicas.device.type == "cuda" else step_once
    thin = max(1, steps // points)
    for step in progress(steps, description, start):
        for buffer, new in zip(static, batch(step), strict=True):
            buffer.copy_(new)
        adam.set(step, cosine(step, steps))
        replay()
        if (step + 1) % thin == 0 or step + 1 == steps:
            with torch.no_grad():
                curve.append([step + 1, replicas.by_rate(evaluate())])
        if checkpoint and (step + 1) % every == 0 and step + 1 < steps:
            tensors = [t.detach().cpu() for t in adam.parameters + adam.first + adam.second]
            checkpoint.save({"step": step + 1, "curve": curve, "tensors": tensors})
    return curve


def captured(step_once, moments):
    """The step as a CUDA graph. Set the learning rate to 0 before; what the warm-up leaves in `moments` is undone."""
    kept = [t.clone() for t in moments]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step_once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_once()
    for moment, old in zip(moments, kept, strict=True):
        moment.copy_(old)
    return graph.replay
