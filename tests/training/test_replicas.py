import pytest
import torch
from torch import nn

from kexue_utils.training.recorder import Checkpoint
from kexue_utils.training.replicas import Replicas, cosine, train


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x, y):
        return (self.layer(x).squeeze(-1) - y) ** 2


def batch(step, seeds=(0, 1)):
    g = [torch.Generator().manual_seed(1000 * step + seed) for seed in seeds]
    x = torch.stack([torch.randn(8, 3, generator=h) for h in g])
    return x, x.sum(-1)


def fit(steps=30, checkpoint=None, until=None, seeds=(0, 1), rates=(0.01, 0.1)):
    replicas = Replicas(Line, list(seeds), list(rates), "cpu")

    def interrupted(step):
        if step == until:
            raise KeyboardInterrupt
        return batch(step, seeds)

    def evaluate():
        return replicas.losses(*batch(-1 % 10**6, seeds)).mean(1)

    curve = train(replicas, interrupted, steps, evaluate=evaluate, points=3, checkpoint=checkpoint, every=10)
    return replicas, curve


def test_the_stack_trains_every_copy_as_torchs_adam_trains_one():
    replicas, curve = fit()
    assert [step for step, _ in curve] == [10, 20, 30] and torch.tensor(curve[-1][1]).shape == (2, 2)
    for r, rate in enumerate((0.01, 0.1)):
        for s in (0, 1):
            torch.manual_seed(s)
            model = Line()
            adam = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
            for step in range(30):
                adam.param_groups[0]["lr"] = rate * cosine(step, 30)
                adam.zero_grad()
                x, y = batch(step)
                model(x[s], y[s]).mean().backward()
                adam.step()
            torch.testing.assert_close(replicas.parameters["layer.weight"][2 * r + s], model.layer.weight)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=checkpoint, until=25)
    assert checkpoint.load()["step"] == 20
    resumed, curve = fit(checkpoint=checkpoint)
    whole, expected = fit()
    assert curve == expected
    torch.testing.assert_close(resumed.parameters, whole.parameters, rtol=0, atol=0)


def test_losses_of_chosen_replicas_are_theirs():
    replicas, _ = fit(steps=2)
    x, y = batch(0)
    every = replicas.losses(x, y)
    torch.testing.assert_close(replicas.losses_of(torch.tensor([1, 3]), x[1], y[1]), every[[1, 3]])


def test_the_schedule_rises_and_falls_to_zero():
    shares = [cosine(step, 100) for step in range(100)]
    assert shares[4] == pytest.approx(1, abs=1e-3) == max(shares) and shares[0] == 0.2 and shares[-1] == 0


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"seeds = \[\], rates = \[0.1\]"):
        Replicas(Line, [], [0.1], "cpu")
