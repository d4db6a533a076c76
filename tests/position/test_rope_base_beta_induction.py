"""The copying experiment: its texts repeat, its measure counts what it says, its model learns."""

import torch

from kexue_utils.position.rope_base_beta.experiments.induction import InductionLM, accuracy, periodic, train


def test_texts_repeat_with_their_period():
    ids, period = periodic(torch.Generator().manual_seed(0), 20, 40, 3, 9, vocab=11)
    assert ids.shape == (20, 41) and period.min() >= 3 and period.max() <= 9 and ids.max() < 11
    for text, p in zip(ids, period[:, 0].tolist(), strict=True):
        assert torch.equal(text[p:], text[:-p])


def test_accuracy_counts_targets_after_the_first_period_only():
    class Copier(torch.nn.Module):
        def forward(self, ids):  # always the token of three steps before the target
            return torch.nn.functional.one_hot(ids.roll(2, 1), 8).double()

    generator = torch.Generator().manual_seed(0)
    assert accuracy(Copier(), *periodic(generator, 16, 30, 3, 3, vocab=8)) == 1.0
    assert accuracy(Copier(), *periodic(generator, 64, 30, 7, 7, vocab=8)) < 0.3


def test_a_short_training_learns_and_stretching_changes_nothing_but_frequencies():
    parameters = {"vocab": 8, "d": 32, "rate": 0.01, "steps": 150, "schedule": "cosine", "logn": None}
    first, again = train(0, parameters, torch.device("cpu")), train(0, parameters, torch.device("cpu"))
    ids, period = periodic(torch.Generator().manual_seed(1), 32, 64, 4, 8, vocab=8)
    before = accuracy(first, ids, period)
    assert before == accuracy(again, ids, period) and before > 0.2  # chance is 1/8
    untrained = InductionLM(8, 32)
    assert accuracy(untrained, ids, period) < before
    weights = {name: p.clone() for name, p in first.state_dict().items()}
    first.stretch(8.0, method="ntk_mixed", logn="posthoc", b=0.5)
    assert accuracy(first, ids, period) != before
    assert all(torch.equal(p, weights[name]) for name, p in first.state_dict().items())
    first.stretch(8.0, method="none", logn=None)
    assert accuracy(first, ids, period) == before
