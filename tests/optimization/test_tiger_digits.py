"""The recorded run on images: the network against torch's convolutions, copies against the library, verdicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.tiger.experiments import digits
from kexue_utils.optimization.tiger.groups import tiger_param_groups
from kexue_utils.training.replicas import cosine

CPU = torch.device("cpu")
SMALL = digits._units(True)["β = 0.9"]


def test_the_images_are_split_three_ways():
    parts = digits.images(CPU)
    assert {part: len(classes) for part, (_, classes) in parts.items()} == {
        "test": 360, "validation": 360, "train": 1077,
    }  # fmt: skip
    pixels = torch.cat([pixels for pixels, _ in parts.values()])
    assert pixels.shape == (1797, 8, 8) and pixels.min() == -1 and pixels.max() == 1
    assert all(classes.unique().tolist() == list(range(10)) for _, classes in parts.values())


def test_the_network_is_made_of_convolutions():
    torch.manual_seed(0)
    net, pixels = digits.Net(6).double(), torch.randn(3, 8, 8, dtype=torch.float64)

    def convolved(x, linear):
        weight = linear.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, padding=1)

    def normed(x, norm):
        return norm(x.movedim(1, -1)).movedim(-1, 1)

    for norm in net.norms:
        norm.weight.data.normal_()
    x = convolved(pixels[:, None], net.stem)
    for i in range(4):
        x = x + F.gelu(convolved(normed(x, net.norms[i]), net.convolutions[i]))
        x = F.avg_pool2d(x, 2) if i == 1 else x
    expected = normed(x, net.norms[4]).mean((2, 3)) @ net.head.weight.T
    torch.testing.assert_close(net(pixels), expected, rtol=1e-10, atol=1e-10)


def test_every_copy_trains_as_alone_with_the_library():
    p, rates = SMALL | {"clip": 0.5}, [0.01, 0.05]
    found = digits.train(p, rates, [3, 4], CPU)
    data = digits.images(CPU)
    pixels, classes = data["train"]
    wide = F.pad(pixels, (1, 1, 1, 1), value=-1.0)
    for r, rate in enumerate(rates):
        for s, seed in enumerate([3, 4]):
            torch.manual_seed(seed)
            net = digits.Net(p["channels"])
            optimizer = Tiger(tiger_param_groups(net, rate, 0.0), lr=rate, beta=p["betas"][0])
            which, shifts = digits.draws(p, seed, len(classes))
            for t in range(p["steps"]):
                batch = [wide[n, i : i + 8, j : j + 8] for n, (i, j) in zip(which[t], shifts[t].tolist(), strict=True)]
                optimizer.zero_grad()
                F.cross_entropy(net(torch.stack(batch)), classes[which[t]]).backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), p["clip"])
                for group in optimizer.param_groups:
                    group["lr"] = rate * cosine(t, p["steps"], p["warm"])
                optimizer.step()
            with torch.no_grad():
                for part in ("validation", "test"):
                    logits, wanted = net(data[part][0]), data[part][1]
                    assert found[part][r][s] == pytest.approx(F.cross_entropy(logits, wanted).item(), rel=1e-4)
                    right = (logits.argmax(-1) == wanted).double().mean().item()
                    assert found[f"{part} accuracy"][r][s] == pytest.approx(right, abs=2 / 360)


def test_a_little_training_classifies():
    p = SMALL | {"channels": 8, "batch": 32, "steps": 80}
    found = digits.train(p, [0.1, 1e-6], [0], CPU)
    learnt, start = (row[0] for row in found["test accuracy"])
    assert learnt > 0.5 and start < 0.3 and found["test"][0][0] < found["test"][1][0] - 0.7


def test_the_tuning_seeds_choose_the_rate_and_others_are_judged(monkeypatch):
    """The judged seeds would do better elsewhere, and a rate that diverges for one tuning seed is not chosen."""

    def train(p, rates, seeds, device, description):
        loss = [[abs(rate - 4) + 0.1 * (rate != 1 and s < 1000) + s / 1e6 for s in seeds] for rate in rates]
        for row, rate in zip(loss, rates, strict=True):
            row[-1] = math.nan if rate == 4 else row[-1]
        return {"validation": loss, "test": loss, "test accuracy": loss}

    monkeypatch.setattr(digits, "train", train)
    found = digits._run(SMALL | {"rates": [1.0, 2.0, 4.0, 5.0]}, [0, 1, 2], CPU, None)
    assert [run["rate"] for run in found] == [5.0] * 3 and len(found[0]["tuning"][0]) == len(digits.TUNING_SEEDS)
    assert [run["test"] for run in found] == pytest.approx([1.1, 1.1 + 1e-6, 1.1 + 2e-6])
    assert not set(digits.TUNING_SEEDS) & set(range(1000))


@pytest.mark.parametrize("horizon", [3.4, 4.2])
def test_planted_losses_give_their_verdict(horizon):
    """The best β planted at 0.905 and at 0.946."""
    units = {}
    for name, p in digits._units(False).items():
        away = 0.1 * (np.log2(1 / (1 - p["betas"][0])) - horizon) ** 2
        losses = [1 + away + s / 1000 for s in range(5)]
        runs = [
            {"validation": loss, "test": loss, "test accuracy": 1 - loss / 10, "rate": p["rates"][2]} for loss in losses
        ]
        runs[0]["tuning"] = [[1 + away + abs(i - 2) / 10 + s / 1000 for s in range(8)] for i in range(len(p["rates"]))]
        units[name] = {"parameters": p, "runs": runs}
    units["β = 0"]["runs"][2] |= {"validation": None, "test": None}
    units["β = 0"]["runs"][3] |= {"validation": 1e9, "test": 1e9}
    found = digits._conclude(units)
    assert all(row["rate inside the grid"] for row in found["betas"].values())
    assert found["best"] == (0.9 if horizon == 3.4 else 0.945) and found["best inside the grid"]
    assert found["betas"][0.0]["tests"][2:4] == pytest.approx([np.log(10)] * 2)
    verdict = found["recommended at most best other"]["verdict"]
    assert verdict == ("contradicted" if horizon == 3.4 else "reproduced")
    assert found["log2 of the best horizon 1/(1 − β)"]["mean"] == pytest.approx(horizon, abs=0.01)
    difference = found["recommended's accuracy − best other's"]["mean"]
    assert np.sign(difference) == (-1 if horizon == 3.4 else 1)


def test_the_interval_of_the_best_horizon_holds_it_and_the_choice_of_rates():
    """200 noisy records of 8 runs at 5 rates with a planted best: about 95 % of the intervals hold it."""
    rng, held, widths = np.random.default_rng(1), [], []
    for _ in range(200):
        tuning = {}
        for h in np.arange(0.0, 7.0):
            by_rate = 0.004 * (np.arange(5) - 2 - 0.3 * np.sin(h)) ** 2
            losses = 1 + 0.008 * (h - 3.4) ** 2 + by_rate[:, None] + 0.005 * rng.standard_normal((5, 8))
            tuning[1 - 2.0**-h] = losses.tolist()
        found = digits.best_horizon(tuning, draws=200)
        held.append(found["low"] < 3.4 < found["high"])
        widths.append(found["high"] - found["low"])
    assert 0.87 < np.mean(held) < 0.99 and 0.2 < np.median(widths) < 0.5
    tuning[0.0][2][3] = None  # a run that diverged
    assert np.isfinite(digits.best_horizon(tuning, draws=10)["high"])
