"""The recorded run with weight decay: the shrink of every rule, the steps of torch and the library, verdicts."""

import pytest
import torch
from torch import nn

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.tiger.experiments import decay, runs, stack, text
from kexue_utils.training.recorder import load
from kexue_utils.training.replicas import cosine

CPU = torch.device("cpu")
FACTORS = [0.5, 1.0, 2.0]


def unit(rule):
    """The parameters of a rule with its real rates at a small size."""
    return decay._units(False)[rule] | runs.SMOKE | {"shrink": 0.03}


def stacked(p):
    """A float64 stack of two seeds at three rates with weights of several sizes, and the peaks."""
    parameters = stack.stacked(p, [0, 1], len(FACTORS), CPU, torch.float64)
    peaks = decay.BEST[p["rule"].split()[0]] * torch.tensor(FACTORS, dtype=torch.float64).repeat_interleave(2)
    return parameters, peaks


def gradients(parameters, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield {name: torch.randn(q.shape, generator=generator, dtype=q.dtype) for name, q in parameters.items()}


def test_rates_are_those_of_the_record():
    recorded = load("tiger_text")["summary"]["source code"]["rules"]
    assert {rule: row["rate"] for rule, row in recorded.items()} == decay.BEST
    assert {rule: p["rates"][2] for rule, p in decay._units(False).items()} == decay.BEST


@pytest.mark.parametrize("rule", decay.BEST)
def test_a_step_with_zero_gradients_shrinks_equally(rule):
    """By p["shrink"] at the peak, at every rate; rows of an embedding under Tiger by that in the mean, gains not."""
    p = unit(rule) | {"warm": 0.0}  # the first step is at the peak
    parameters, peaks = stacked(p)
    before = {name: q.detach().clone() for name, q in parameters.items()}
    decay.DECAYED[p["rule"]](parameters, p).update([torch.zeros_like(q) for q in parameters.values()], peaks)
    for name, q in parameters.items():
        lost = (1 - q.detach() / before[name]).flatten(1)
        if stack.kind(name) == "gain":
            assert (lost == 0).all()
        elif stack.kind(name) == "embedding" and rule == "Tiger":
            assert (lost.std(1) > 1e-4).all()
            torch.testing.assert_close(lost.mean(1), torch.full_like(peaks, 0.03), rtol=1e-9, atol=0)
        else:
            torch.testing.assert_close(lost, torch.full_like(lost, 0.03), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", decay.BEST)
def test_the_shrink_follows_the_schedule_and_tigers_the_rms(rule):
    p = unit(rule)
    parameters, peaks = stacked(p)
    one, theta = decay.DECAYED[p["rule"]](parameters, p), parameters["up 0"]
    start = theta.detach().square().mean((1, 2)).sqrt()
    for t in range(p["steps"]):
        before, share = theta.detach().clone(), cosine(t, p["steps"], p["warm"])
        one.update([torch.zeros_like(q) for q in parameters.values()], peaks * share)
        size = before.square().mean((1, 2)).sqrt() / start if rule == "Tiger" else torch.ones_like(peaks)
        found = (1 - theta.detach() / before).mean((1, 2))
        torch.testing.assert_close(found, 0.03 * share * size, rtol=1e-6, atol=1e-12)
    assert rule != "Tiger" or (size < 0.9).all()


@pytest.mark.parametrize("rule", decay.BEST)
def test_every_copy_moves_as_torch_or_the_library_with_that_decay(rule):
    """Twelve steps of one schedule on random gradients: matrices, embeddings and gains."""
    p = unit(rule)
    parameters, peaks = stacked(p)
    alone = [{name: nn.Parameter(q[i].detach().clone()) for name, q in parameters.items()} for i in range(len(peaks))]

    def peer(i, name, q):
        kind, peak = stack.kind(name), peaks[i].item()
        common = {"lr": peak, "weight_decay": 0.0 if kind == "gain" else p["shrink"] / peak}
        if rule == "Tiger":
            scale = {"gain": "half", "embedding": "row_rms", "matrix": "rms"}[kind]
            rows = q.detach() if kind == "embedding" else q.detach().flatten()
            common["weight_decay"] /= rows.square().mean(-1).sqrt().mean().item()
            return Tiger([q], beta=p["betas"][0], lr_scale=scale, **common)
        if rule == "AdamW":
            return torch.optim.AdamW([q], betas=p["betas"], eps=1e-8, **common)
        return Plain([q], common | {"betas": p["betas"], "rule": rule})

    peers = [{name: peer(i, name, q) for name, q in one.items()} for i, one in enumerate(alone)]
    stackwise = decay.DECAYED[p["rule"]](parameters, p)
    for t, g in enumerate(gradients(parameters, p["steps"])):
        share = cosine(t, p["steps"], p["warm"])
        stackwise.update(list(g.values()), peaks * share)
        for i, one in enumerate(peers):
            for name, optimizer in one.items():
                alone[i][name].grad = g[name][i]
                optimizer.param_groups[0]["lr"] = peaks[i].item() * share
                optimizer.step()
    for i, one in enumerate(alone):
        for name, q in one.items():
            torch.testing.assert_close(parameters[name][i], q, rtol=1e-9, atol=1e-12)


class Plain(torch.optim.Optimizer):
    """Lion and momentum SGD with decoupled decay, by their definitions."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, betas = group["lr"], group["betas"]
            for q in group["params"]:
                m = self.state[q].setdefault("m", torch.zeros_like(q))
                if group["rule"] == "Lion":
                    u = torch.sign(betas[0] * m + (1 - betas[0]) * q.grad)
                    m.copy_(betas[1] * m + (1 - betas[1]) * q.grad)
                else:
                    u = m.copy_(betas[0] * m + q.grad)
                q -= lr * (u + group["weight_decay"] * q)


def test_planted_losses_give_their_verdicts():
    worse, best = {"Tiger": 0.1, "Lion": 0.0, "AdamW": 0.05, "SGDM": 0.3}, {"Tiger": 1.6e-2}
    units = {}
    for rule, p in decay._units(False).items():
        where = best.get(rule, decay.BEST[rule])
        tuning = [
            {"rate": rate, "validation": [1 + abs(i - p["rates"].index(where))] * 2}
            for i, rate in enumerate(p["rates"])
        ]
        losses = [[1.0 + worse[rule] + shift + s / 1000 for shift in (0.1, 0.0, 0.1)] for s in range(5)]
        found = [
            {"rates": [where * f for f in FACTORS], "validation": one, "test": one, "curve": one, "floors": {}}
            for one in losses
        ]
        found[0]["tuning"] = tuning
        units[rule] = {"parameters": p, "runs": found}
    found = decay._conclude(units)
    assert found["order"] == ["Lion", "AdamW", "Tiger", "SGDM"]
    assert {name: link["verdict"] for name, link in found["links"].items()} == {
        "Lion at most Tiger": "reproduced", "Tiger at most AdamW": "contradicted",
    }  # fmt: skip
    rows = found["rules"]
    assert all(row["rate inside the grid"] and row["better than both neighbours"] for row in rows.values())
    assert rows["AdamW"]["weight decay"] == pytest.approx(decay.CUSTOMARY)
    assert rows["Lion"]["weight decay"] * 3.2e-4 == pytest.approx(rows["AdamW"]["weight decay"] * 2e-3)
    assert rows["Tiger"]["weight decay"] * 1.6e-2 * 0.02 == pytest.approx(decay.SHRINK)
    assert found["kept without steps"] == pytest.approx(0.905, abs=0.001)


def test_the_protocol_is_that_of_the_undecayed_run():
    """Besides the rates, the decay and the rule's name."""
    for rule, p in decay._units(False).items():
        theirs = text._units(False)[f"{rule}, source code"]
        assert {k: v for k, v in p.items() if k not in ("rates", "shrink", "rule")} == {
            k: v for k, v in theirs.items() if k not in ("rates", "rule")
        }
