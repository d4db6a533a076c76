"""The recorded language-model runs: smoke sizes, and stacks of models against one model at a time."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.tiger.experiments import grids, hidden, rules, runs, stack, verdicts, widths
from kexue_utils.optimization.tiger.groups import tiger_param_groups
from kexue_utils.training.recorder import record
from kexue_utils.training.registry import EXPERIMENTS

CPU = torch.device("cpu")
SMALL = runs.GPT | runs.SMOKE | {"rule": "Tiger", "betas": [0.965], "lr_scale": "rms"}
RATES = [0.03, 0.004]


@pytest.mark.parametrize("name", sorted(name for name, where in EXPERIMENTS.items() if "tiger.experiments" in where))
def test_the_smoke_size_of_every_experiment_runs(name, tmp_path):
    found = json.loads(record(name, smoke=True, out=tmp_path).read_text("utf-8"))
    assert found["summary"] and all(None not in unit["runs"] for unit in found["units"].values())


class Plain(nn.Module):
    """The same model with torch's own layers, one copy of it."""

    def __init__(self, p, parameters):
        super().__init__()
        d, layers = p["d_model"], range(p["layers"])
        self.heads = p["heads"]
        self.embed, self.places = nn.Embedding(256, d), nn.Embedding(p["L"], d)
        sizes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        self.linear = nn.ModuleDict(
            {f"{name} {i}": nn.Linear(*s, bias=False) for name, s in sizes.items() for i in layers}
        )
        self.linear["head"] = nn.Linear(d, 256, bias=False)
        names = ["norm"] + [f"norm {n} {i}" for n in (1, 2) for i in layers]
        self.norms = nn.ModuleDict({name: nn.LayerNorm(d, bias=False) for name in names})
        self.double()
        with torch.no_grad():
            for name, q in parameters.items():
                self.of(name).copy_(q.mT if name in self.linear else q)

    def of(self, name):
        modules = {"embed": self.embed, "places": self.places, **self.linear, **self.norms}
        return modules[name].weight

    def forward(self, ids):
        x = self.embed(ids[:, :-1]) + self.places.weight
        B, L, d = x.shape
        mask = torch.ones(L, L).triu(1).bool()
        for i in range(sum(name.startswith("qkv") for name in self.linear)):
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in self.linear[f"qkv {i}"](self.norms[f"norm 1 {i}"](x)).chunk(3, -1)
            )
            weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask, -torch.inf).softmax(-1)
            x = x + self.linear[f"out {i}"]((weights @ v).transpose(1, 2).reshape(B, L, d))
            x = x + self.linear[f"down {i}"](F.gelu(self.linear[f"up {i}"](self.norms[f"norm 2 {i}"](x))))
        return F.cross_entropy(self.linear["head"](self.norms["norm"](x)).mT, ids[:, 1:], reduction="none")


def copies(p):
    """A float64 stack of two seeds at two rates with livelier weights, and each copy as a plain model."""
    parameters = stack.stacked(p, [3, 4], len(RATES), CPU, torch.float64)
    with torch.no_grad():
        for name, q in parameters.items():
            if stack.kind(name) != "gain":
                q.mul_(4)
    return parameters, [Plain(p, {name: q[i] for name, q in parameters.items()}) for i in range(4)]


def batches(p, steps):
    return torch.randint(256, (steps, 4, p["batch"], p["L"] + 1), generator=torch.Generator().manual_seed(0))


def float64_losses(parameters, ids, p, monkeypatch):
    """Softmax and loss of the stack are in float32 otherwise."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return stack.losses(parameters, ids, p, torch.float64)


def test_a_stack_is_its_models_side_by_side(monkeypatch):
    p = SMALL | {"layers": 2, "d_model": 16, "heads": 2}
    parameters, models = copies(p)
    (ids,) = batches(p, 1)
    found = float64_losses(parameters, ids, p, monkeypatch)
    expected = torch.stack([model(one) for model, one in zip(models, ids, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def peer(p, model, rate):
    """torch's or the library's optimizer of one model; Lion by its definition."""
    if p["rule"] == "Tiger" and p["lr_scale"] == "rms":
        return Tiger(tiger_param_groups(model, rate, 0.0), lr=rate, beta=p["betas"][0])
    if p["rule"] == "Tiger":
        groups = [group | {"lr_scale": "none"} for group in tiger_param_groups(model, rate, 0.0)]
        return Tiger(groups, lr=rate, beta=p["betas"][0])
    if p["rule"] == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=p["betas"], eps=1e-8, weight_decay=0.0)
    if p["rule"] == "SGDM":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=p["betas"][0])
    return Lion(model.parameters(), dict(lr=rate, betas=p["betas"]))


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for q in group["params"]:
                m = self.state[q].setdefault("m", torch.zeros_like(q))
                q -= group["lr"] * torch.sign(first * m + (1 - first) * q.grad)
                m.copy_(second * m + (1 - second) * q.grad)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"lr_scale": "none"},
        {"rule": "Lion", "betas": [0.9, 0.99]},
        {"rule": "AdamW", "betas": [0.9, 0.95]},
        {"rule": "SGDM", "betas": [0.9]},
    ],
    ids=str,
)
def test_every_copy_moves_as_alone(own, monkeypatch):
    """Twenty clipped steps of two seeds at two rates; one gradient is not finite and Tiger rejects it."""
    p = SMALL | own
    bad = 7 if p["rule"] == "Tiger" else None
    parameters, models = copies(p)
    rates = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(2)
    rule, peers = rules.RULES[p["rule"]](parameters, p), []
    for model, rate in zip(models, rates.tolist(), strict=True):
        peers.append(peer(p, model, rate))
    for t, ids in enumerate(batches(p, 20)):
        loss = float64_losses(parameters, ids, p, monkeypatch).flatten(1).mean(1)
        gradients = runs.clipped(torch.autograd.grad(loss.sum(), list(parameters.values())), 0.5)
        if t == bad:
            gradients[list(parameters).index("up 0")][1, 2, 3] = torch.nan
            gradients[list(parameters).index("norm")][2, 1] = torch.inf
        rule.update(gradients, rates)
        for i, (model, one) in enumerate(zip(models, peers, strict=True)):
            one.zero_grad()
            model(ids[i]).mean().backward()
            size = nn.utils.get_total_norm([q.grad for q in model.parameters()])
            for q in model.parameters():
                q.grad *= min(1.0, 0.5 / size)
            if t == bad and i == 1:
                model.of("up 0").grad[3, 2] = torch.nan
            if t == bad and i == 2:
                model.of("norm").grad[1] = torch.inf
            one.step()
    for i, model in enumerate(models):
        for name, q in parameters.items():
            theirs = model.of(name).mT if name in model.linear else model.of(name)
            torch.testing.assert_close(q[i], theirs, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_half_precision_stack_rounds_as_the_library(storage):
    """Parameters, gradients and moments of 16 bits: the stack's step is the library's, and its rounding has no bias."""
    p = SMALL | {"betas": [0.9]}
    dtype = getattr(torch, storage)
    parameters = stack.stacked(p, [0, 1], 1, CPU, dtype)
    single = {
        name: nn.Parameter(q[1].detach().clone()) for name, q in parameters.items() if stack.kind(name) == "matrix"
    }
    rule, alone = rules.Tiger(parameters, p), Tiger(single.values(), lr=0.004, beta=0.9, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = {name: torch.randn(q.shape, generator=generator).to(dtype) for name, q in parameters.items()}
        rule.update(list(gradients.values()), torch.tensor([0.002, 0.004]))
        for name, q in single.items():
            q.grad = gradients[name][1]
        alone.step()
    for name, q in single.items():
        assert q.dtype == dtype and torch.equal(parameters[name][1], q)


def test_stochastic_rounding_moves_by_the_mean_step():
    p = SMALL | {"rounding": "stochastic", "d_model": 64}
    torch.manual_seed(0)
    parameters = stack.stacked(p, [0], 1, CPU, torch.bfloat16)
    before = {name: q.detach().float() for name, q in parameters.items()}
    rules.Tiger(parameters, p).update([torch.ones_like(q) for q in parameters.values()], torch.tensor([1e-4]))
    moved = (before["up 0"] - parameters["up 0"].detach().float()).mean().item()
    size = before["up 0"].square().mean().sqrt().item() * 1e-4
    assert moved == pytest.approx(size, rel=0.1)
    nearest = stack.stacked(p, [0], 1, CPU, torch.bfloat16)
    rules.Tiger(nearest, p | {"rounding": None}).update(
        [torch.ones_like(q) for q in nearest.values()], torch.tensor([1e-4])
    )
    assert abs((before["up 0"] - nearest["up 0"].detach().float()).mean().item() - size) > 0.5 * size


def test_the_filter_of_the_hidden_chain_is_exact():
    """Against the sum over all paths of hidden states, for a short word; and it is what sampling gives."""
    chain = hidden.HiddenMarkov(3)
    word = np.array([[0, 5, 1, 0]], np.uint8)

    def probability(symbols):
        total = chain.prior * chain.emit[:, symbols[0]]
        for v in symbols[1:]:
            total = sum(total[s] * chain.move[s] for s in range(3)) * chain.emit[:, v]
        return total.sum()

    expected = [-np.log(probability(word[0][: t + 1]) / probability(word[0][:t])) for t in range(1, 4)]
    assert np.allclose(chain.filter_losses(word)[0], expected, rtol=1e-12)
    assert np.allclose(chain.prior @ chain.move, chain.prior) and np.allclose(chain.move.sum(1), 1)
    symbols = chain.sample(4000, 40, seed=1)
    assert np.array_equal(symbols, chain.sample(4000, 40, seed=1)) and symbols.shape == (4000, 40)
    marginal = chain.prior @ chain.emit
    counts = np.bincount(symbols.ravel(), minlength=256) / symbols.size
    assert np.abs(counts - marginal).max() < 0.01
    pair = ((symbols[:, :-1] == 0) & (symbols[:, 1:] == 0)).mean()
    assert pair == pytest.approx((chain.prior * chain.emit[:, 0]) @ chain.move @ chain.emit[:, 0], abs=0.01)


def test_a_stack_learns_the_chain_and_never_beats_the_filter():
    p = SMALL | {
        "corpus": "hidden chain", "states": 3, "train_windows": 512, "L": 32, "batch": 16, "steps": 60, "d_model": 32,
        "windows": 64,
    }  # fmt: skip
    found = runs.data(p, CPU)
    learnt = runs.train(p, [0.03, 1e-6], [0, 1], found, CPU)
    best, start = learnt["test"]
    assert (best < start - 0.5).all() and (best > found.floors["test"]).all()
    assert (learnt["finite"] == 1).all() and (learnt["moved"][0] > 0.99).all()


def test_the_grid_of_rates_grows_until_the_best_is_inside(monkeypatch):
    def train(p, rates, seeds, found, device, description):
        losses = torch.tensor([[(np.log2(r) - 5.2) ** 2 + s if r < 200 else torch.nan for s in (-9, 9)] for r in rates])
        return {"validation": losses, "test": losses, "finite": losses}

    monkeypatch.setattr(runs, "train", train)
    tried = runs.tune({"rates": [1.0, 2.0, 4.0]}, [0, 1], None, CPU, "")
    assert [one["rate"] for one in tried] == [2.0**k for k in range(7)] and min(tried, key=runs.mean_loss)["rate"] == 32
    down = runs.tune({"rates": [128.0, 256.0, 512.0]}, [0, 1], None, CPU, "")
    assert min(down, key=runs.mean_loss)["rate"] == 32 and len(down) == 7


def test_verdicts():
    noise = np.array([1.0, -1.0, 0.5, -0.5, 0.0]) * 1e-3
    base = 1.5 + noise

    def pair(gap, spread=1.0):
        return (base + gap + spread * noise[::-1]).tolist(), base.tolist()

    def verdict(**pairs):
        return {name: one["verdict"] for name, one in verdicts.at_most(pairs).items()}

    assert verdict(a=pair(-0.1), b=pair(0.1)) == {"a": "reproduced", "b": "contradicted"}
    assert verdict(a=pair(0.005), b=pair(0.011)) == {"a": "reproduced", "b": "contradicted"}
    assert verdict(a=pair(0.005, 20), b=pair(0.011, 20)) == {"a": "undecided", "b": "undecided"}
    assert verdicts.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    # Alone it would pass, in a family it doesn't.
    one = pair(0.0095 - 0.0026, 1.0)
    p = verdicts.at_most({"a": one})["a"]["p below margin"]
    assert verdicts.at_most({"a": one, "b": one})["a"]["p below margin"] == pytest.approx(2 * p)


def test_the_best_rate_of_every_run_is_the_vertex_of_its_parabola():
    x = [0.0, 1.0, 2.0, 3.5]
    planted = [1.2, 0.9, 1.4]
    losses = [[0.3 * (a - best) ** 2 + best for best in planted] for a in x]
    assert verdicts.best_of_each(x, losses) == pytest.approx(planted)
    assert verdicts.best_of_each(x[1:], losses[1:]) is None and verdicts.best_of_each(x[:2], losses[:2]) is None
    assert verdicts.vertex([0.0, 1.0, 2.0], [3.0, 1.0, 0.0]) == 2.0  # its vertex lies beyond
    assert verdicts.vertex([0.0, 1.0, 2.0], [1.0, 1.5, 1.5]) == 0.0  # concave


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(0.0, "reproduced"), (-0.5, "contradicted"), (-0.25, "undecided"), (None, None)]
)
def test_a_planted_dependence_on_the_width_is_found(exponent, verdict):
    units = {}
    for name, p in widths._units(False).items():
        rates, width = p["rates"], p["d_model"]
        best = np.log2(rates[3]) if exponent is None else np.log2(2e-3 * (width / 128) ** exponent)
        best = 99.0 if exponent is None and width == 256 else best
        rates = rates if exponent is None else [2.0**k for k in range(-14, -5)]
        losses = [[(np.log2(rate) - best - 0.03 * s) ** 2 for rate in rates] for s in (-1, 2, 0, 1, -2)]
        units[name] = {"parameters": p, "runs": [{"rates": rates, "validation": one, "test": one} for one in losses]}
    found = widths._conclude(units)["Lion"]
    if exponent is None:
        assert found["slope"] is None
        return
    assert found["slope"]["mean"] == pytest.approx(exponent, abs=1e-6)
    assert found["falls with the width"] == (exponent < 0)
    if exponent != -0.25:
        assert found["stays the same"] == verdict


def recorded(units, losses):
    """Units as a record has them, of losses(parameters, rate) + s/1000 for seed s."""
    found = {}
    for name, p in units.items():
        column = [losses(p, rate) for rate in p["rates"]]
        jitter = [[value + s / 1000 for value in column] for s in range(5)]
        runs = [{"validation": one, "test": one, "moved": [0.5] * len(one)} for one in jitter]
        found[name] = {"parameters": p, "runs": runs}
    return found


def test_the_best_beta_is_found_and_compared_with_the_recommended_one():
    def losses(p, rate):
        horizon = np.log2(1 / (1 - p["betas"][0]))
        return 1 + 0.2 * np.log2(rate / 0.01) ** 2 + 0.05 * (horizon - 3.4) ** 2

    found = grids._conclude_betas(recorded(grids._beta_units(False), losses))
    assert found["best"] == 0.9 and found["best other"] == 0.9 and found["best inside the grid"]
    assert found["recommended at most best other"]["verdict"] == "contradicted"
    assert found["log2 of the best horizon 1/(1 − β)"]["mean"] == pytest.approx(3.4, abs=0.2)
    assert all(row["rate"] == 0.008 and row["rate inside the grid"] for row in found["betas"].values())


def test_longer_runs_are_compared_each_at_its_best_rate():
    def losses(p, rate):
        worse = {"Tiger": 0.1, "Lion": 0.0, "AdamW": 0.05}[p["rule"]] - 0.12 * (p["betas"] == [0.8])
        return 1 + worse + 0.2 * np.log2(rate / p["rates"][1]) ** 2

    found = grids._conclude_longer(recorded(grids._longer_units(False), losses))
    assert found["order"] == ["Tiger, β = 0.8", "Lion", "AdamW", "Tiger"]
    verdict = {name: link["verdict"] for name, link in found["links"].items()}
    assert verdict == {
        "Lion at most Tiger": "reproduced", "Tiger at most AdamW": "contradicted",
        "Tiger with β = 0.8 at most AdamW": "reproduced",
    }  # fmt: skip
    assert all(row["rate inside the grid"] for row in found["rules"].values())
    assert found["tokens a run"] == 4000 * 32 * 256


def test_what_16_bits_cost_is_compared_at_three_rates():
    def losses(p, rate):
        nearest = p["storage"] != "float32" and "rounding" not in p
        return 1 + 0.2 * np.log2(rate / (0.03 if nearest else 0.008)) ** 2 + 0.02 * nearest

    found = grids._conclude_half(recorded(grids._half_units(False), losses))
    rows = found["float16"]["gaps"]
    assert rows["each at its own best rate"]["mean"] == pytest.approx(0.02 + 0.2 * np.log2(0.032 / 0.03) ** 2)
    assert rows["at the best rate of float32"]["mean"] == pytest.approx(0.02 + 0.2 * np.log2(0.008 / 0.03) ** 2)
    assert all(one["verdict"] == "contradicted" for one in rows.values())
    free = found["bfloat16, rounded at random"]["gaps"]
    assert all(one["verdict"] == "reproduced" for one in free.values())
    assert "gaps" not in found["float16, stored in float32"] and len(found["bfloat16"]["gap at every rate"]) == 6
