"""Two gloo processes on a CPU are one process with the whole batch; what the comparison counts and concludes."""

import pytest
import torch

from kexue_utils.optimization.tiger.experiments import RANKS, ranks

CPU = torch.device("cpu")
(SMALL,) = RANKS.units(True).values()


def test_two_processes_are_one():
    (run,) = ranks._run(SMALL, [3], CPU, None)
    for mode in ranks.MODES:
        assert run[mode]["signs that differ"] == 0 and run[mode]["distance at the end"] < 1e-12
        assert run[mode]["loss"] == pytest.approx(run[ranks.ONE]["loss"], rel=1e-12)
    gradients, momentum = run[ranks.DDP], run[ranks.MOMENTUM]
    size = 8 * run["parameters"]
    assert run[ranks.ONE]["calls"] == 0
    assert gradients["calls"] == SMALL["k"] and gradients["bytes"] == SMALL["k"] * size
    assert momentum["calls"] == 2 and size < momentum["bytes"] < 1.01 * size
    assert run[ranks.FSDP]["calls"] > gradients["calls"]


def test_ranks_and_micro_batches_see_different_bytes_and_nothing_that_is_held_out():
    data, held_out = ranks.texts(SMALL | {"T": 64, "windows": 64}, CPU)
    seen = [ranks.micro_batch(data, SMALL, 0, t, rank) for t in (0, 1) for rank in (0, 1)]
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 4
    assert torch.equal(seen[0], ranks.micro_batch(data, SMALL, 0, 0, 0)) and seen[0].shape == (4, 17)
    text = data.numpy().tobytes()
    assert held_out.shape == (64, 65) and sum(bytes(row.tolist()) in text for row in held_out) <= 2


def test_the_comparison_counts_signs_and_distances():
    start = torch.tensor([1.0, 2.0, 3.0, 4.0])
    one = {"first": start + torch.tensor([1.0, 0.0, 1.0, -1.0]), "last": start + 1, "loss": 1.0}
    other = {"first": start + torch.tensor([1.0, -1.0, 1.0, 1.0]), "last": start + 1.5, "loss": 2.0}
    found = ranks.compare(other | {"calls": 3, "bytes": 5}, one, start)
    assert found["signs that differ"] == 0.5 and found["largest difference after step 1"] == 2
    assert found["loss over one process"] == 1.0
    assert found["distance at the end"] == 0.5 and (found["loss"], found["calls"], found["bytes"]) == (2.0, 3, 5)


def planted(dtype, **changes):
    way = {"loss": 1.0, "calls": 4, "bytes": 1600}
    way |= dict.fromkeys(("loss over one process", "signs that differ", "distance at the end"), 0.0)
    way["largest difference after step 1"] = 0.0
    runs = [{mode: way | {"loss": 1.0 + seed / 100} for mode in ranks.MODES} | {"parameters": 100} for seed in (0, 1)]
    runs[1][ranks.MOMENTUM] |= {"bytes": 400} | changes
    runs[0][ranks.MOMENTUM] |= {"bytes": 400}
    return RANKS.conclude({"u": {"parameters": SMALL | {"dtype": dtype, "k": 4}, "runs": runs}})["u"]


@pytest.mark.parametrize(
    "dtype, changes, expected",
    [
        ("float32", {}, [True, True]),
        ("float32", {"signs that differ": 2e-4}, [False, True]),
        ("float32", {"loss over one process": -0.01}, [True, False]),
        ("float64", {}, [True]),
        ("float64", {"signs that differ": 1e-9}, [False]),
        ("float64", {"largest difference after step 1": 1e-12}, [False]),
    ],
)
def test_verdicts(dtype, changes, expected):
    found = planted(dtype, **changes)
    assert list(found["ways"][ranks.MOMENTUM]["reproduced"].values()) == expected
    assert all(found["ways"][ranks.DDP]["reproduced"].values())
    assert found["momentum over gradients exchanged"] == found["1/k"] == 0.25
    if dtype == "float32":
        assert found["ways"][ranks.DDP]["words a parameter and step"] == 4
    assert found["standard deviation over seeds"] == pytest.approx(0.01 / 2**0.5)


def test_too_few_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 GPUs are needed, torch sees 1"):
        ranks._run(SMALL, [0], torch.device("cuda", 0), None)
