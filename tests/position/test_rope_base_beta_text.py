"""The language model's run: its documents, its windows, what it counts, and what its conclusions say."""

import pytest
import torch

from kexue_utils.position.rope_base_beta.experiments import text
from kexue_utils.training.recorder import load

SMALL = text._units(True)["ordinary text"]


def test_documents_are_dealt_in_rounds_and_never_overlap():
    files = {"b.py": bytes(range(10)), "a.py": bytes(range(100, 125)), "short.py": b"xy"}
    assert text.documents(files, 5, 4).tolist() == [
        list(range(100, 105)), list(range(5)), list(range(105, 110)), list(range(5, 10)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="count = 8: the files have only 7 windows of 5 bytes"):
        text.documents(files, 5, 8)
    assert len(text.documents(files, 5, 3, per_file=2)) == 3


def test_windows_continue_by_one_byte_and_a_share_of_them_repeats():
    data = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    p = SMALL | {"periodic": 0.25, "batch": 40}
    ids, targets = text.windows(data, 3, p, seed=1)
    assert ids.shape == targets.shape == (40, p["L"]) and torch.equal(ids[:, 1:], targets[:, :-1])
    again = text.windows(data, 3, p, seed=1)[0]
    assert torch.equal(ids, again) and not torch.equal(ids, text.windows(data, 4, p, seed=1)[0])
    repeats = [any(torch.equal(row[s:], row[:-s]) for s in range(2, p["L"] // 2 + 1)) for row in ids]
    assert repeats == [True] * 10 + [False] * 30


def test_reading_counts_right_bytes_over_all_places_and_over_the_last():
    class Same(torch.nn.Module):  # guesses that the next byte is this one
        train_len = 3

        def forward(self, ids):
            return torch.nn.functional.one_hot(ids, 256).float() * 20

    ids = torch.tensor([[1, 1, 1, 1, 2, 2, 3], [5, 6, 7, 8, 8, 8, 8]])
    found = text.read(Same(), ids, size=1)
    assert found["all"] == [4, 3] and found["last"] == [1, 3]
    assert found["loss"] == pytest.approx(20 * 5 / 12, rel=1e-3) and found["last loss"] == pytest.approx(
        20 * 2 / 6, rel=1e-3
    )
    shares = text.shares(found, 6, 3)
    assert shares["all"] == 7 / 12 and shares["last"] == 4 / 6


def test_a_stretch_changes_the_frequencies_and_nothing_else():
    torch.manual_seed(0)
    model = text.ByteLM(SMALL).eval()
    ids = torch.randint(256, (2, 80))
    before = model(ids)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    seen = set()
    for options in text.variants(None).values():
        model.stretch(4, **options)
        seen.add(round(model(ids).double().square().sum().item(), 9))
    assert len(seen) == len(text.variants(None)) == 2 * len(text.STRETCHES)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    model.stretch(1, method="none", logn=None)
    assert torch.equal(model(ids), before)
    assert set(text.variants("train")) == set(text.STRETCHES)


def test_training_lowers_the_loss_on_text_that_was_held_out():
    files, _ = text.corpus("help topics")
    data = torch.frombuffer(bytearray(b"".join(files["train"].values())), dtype=torch.uint8)
    validation = text.documents(files["validation"], 33, 8)
    model, curve = text.train(0, SMALL, data, validation)
    assert curve[-1][2] < curve[0][2] - 1 and curve[-1][0] == SMALL["steps"]
    again, same = text.train(0, SMALL, data, validation)
    assert same == curve


def test_a_difference_is_reproduced_only_if_seeds_and_documents_agree():
    def runs(shift, noise):
        return [
            {"places": {"all": 100}, "documents": {"x": {"ordinary": {"all": [50 + shift + n for n in noise]}}}}
            for _ in range(2)
        ]

    def verdict(a, b):
        return text._difference((a, "x", None), (b, "x", None), "ordinary", "all")["verdict"]

    zero = runs(0, [0, 0, 0])
    assert verdict(runs(5, [0, 1, 0]), zero) == "reproduced" and verdict(zero, runs(5, [0, 1, 0])) == "the opposite"
    assert verdict(runs(1, [-9, 9, 0]), zero) == "undecided"  # the seeds agree, the documents don't
    mixed = runs(9, [0, 0, 1])[:1] + runs(-7, [0, 0, 1])[:1]
    assert verdict(mixed, zero) == "undecided"


def test_the_record_holds_what_the_chapter_needs():
    record = load("rope_text")
    assert set(record["units"]) == set(text._units(False)) and record["seeds"] == 5
    for result in record["units"].values():
        for run in result["runs"]:
            assert run["corpus"]["python"] == "3.12.3" and len(run["corpus"]["sha256"]) == 64
            assert {len(c) for v in run["documents"].values() for t in v.values() for c in t.values()} == {96}
