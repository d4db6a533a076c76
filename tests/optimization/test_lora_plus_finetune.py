"""The fine-tuning experiment: cells side by side are single runs, the search finds a planted optimum, steps count."""

import math

import pytest
import torch

from kexue_utils.optimization.lora_plus import inject_lora, loraplus_param_groups
from kexue_utils.optimization.lora_plus.experiments import FINETUNE, finetune
from kexue_utils.training.replicas import cosine

CPU = torch.device("cpu")
SMALL = finetune._units(True)["d = 16"] | {"pretrain_steps": 5}


@pytest.fixture(scope="module")
def start():
    first, train, validation, test = finetune.corpora(SMALL, CPU)
    return finetune.pretrain(SMALL, first), train, validation, test


def test_cells_side_by_side_are_single_runs(start):
    model, train, validation, test = start
    cells = [(-6, -4, 0), (-8, -3, 0), (-6, -4, 1)]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    curve, tested = finetune.fine_tune(model, cells, SMALL, train, validation, test)
    assert [step for step, _ in curve] == [2, 4, 6] and tested.shape == (3,)
    for i, cell in enumerate(cells):
        alone, tested_alone = finetune.fine_tune(model, [cell], SMALL, train, validation, test)
        torch.testing.assert_close(alone[-1][1][0], curve[-1][1][i], rtol=1e-5, atol=0)
        torch.testing.assert_close(tested_alone[0], tested[i], rtol=1e-5, atol=0)
    assert len(set(tested.tolist())) == 3
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_cell_is_lora_with_two_rates_under_adam(start):
    model, train, validation, _ = start
    (*_, (step, found)), _ = finetune.fine_tune(model, [(-6, -3, 4)], SMALL, train, validation)
    torch.manual_seed(0)
    single = finetune.new_model(SMALL)
    single.load_state_dict(model.state_dict())
    names = inject_lora(single, lambda name, module: name != "head", SMALL["r"])
    assert len(names) == len(list(finetune.adapted_layers(model)))
    factors = finetune.first_factors(model, SMALL["r"], 4)
    with torch.no_grad():
        for name, factor in zip(names, factors, strict=True):
            single.get_submodule(name).lora_A.copy_(factor)
    groups = loraplus_param_groups(single, 2.0**-6, 8.0)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-30)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine(t, SMALL["steps"]))
    for t in range(SMALL["steps"]):
        ids = finetune.windows_at(train, SMALL["batch"], SMALL["T"], 4, t)
        optimizer.zero_grad()
        finetune.cell_losses(single, ids, 1).sum().backward()
        optimizer.step()
        schedule.step()
    expected = finetune.evaluate(single, validation, 1, 4)
    assert step == SMALL["steps"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def planted(best, seen):
    """Losses of a bowl around `best`; every cell may be asked for once only."""

    def train(cells):
        assert not set(cells) & set(seen)
        seen.extend(cells)
        return {c: [1 + (c[0] - best[0]) ** 2 + (c[1] - best[1]) ** 2 + s / 100 for s in (0, 1)] for c in cells}

    return train


@pytest.mark.parametrize("best", [(-11, -6), (-3, 1), (-20, -9), (-9, -9)])
def test_tuning_finds_a_planted_optimum_also_outside_its_first_box(best):
    seen = []
    losses, found, inside = finetune.tune({"corner": [-16, -14], "size": 6}, planted(best, seen))
    assert found["tuned"] == best and all(inside.values()) and len(losses) == len(seen)
    for name, ratio in finetune.RATIOS.items():
        a, b = found[name]
        nearest = min(((x, x + ratio) for x in range(-30, 10)), key=lambda c: math.dist(c, best))
        assert b - a == ratio and math.dist((a, b), best) == pytest.approx(math.dist(nearest, best))


def test_an_optimum_that_runs_away_is_not_called_inside():
    def train(cells):
        return {cell: [2.0 ** -cell[0], math.nan if cell[1] == -10 else 1.0] for cell in cells}

    best, inside = finetune.search({}, tuple, train, [-16, -14], 2, 6)
    assert not inside and best[0] == -16 + 2 * 5 + 3 * 4 and best[1] != -10


def test_steps_to_a_loss_are_read_between_the_points():
    curve = [[10, 3.0], [20, None], [30, 2.0], [40, 1.0]]
    assert finetune.steps_to(curve[2:], 1.5) == 35 and finetune.steps_to(curve[2:], 2.5) == 30
    assert finetune.steps_to([[10, 3.0], [30, 2.0]], 2.5) == 20 and finetune.steps_to(curve, 0.5) is None


def test_no_window_is_in_two_corpora_and_batches_repeat():
    p = SMALL | {"pretrain": "help topics"}
    first, train, validation, test = finetune.corpora(p, CPU)
    text = train.numpy().tobytes()
    assert validation.shape == (8, p["T"] + 1) and test.shape[1] == p["T"] + 1 and len(first) > len(train)
    _, longer, _, windows = finetune.corpora(SMALL | {"T": 128, "held_out": 12}, CPU)
    text_of_run = longer.numpy().tobytes()
    held_out = [bytes(row.tolist()) for row in windows]
    assert len(held_out) > 300 and sum(row in text_of_run for row in held_out) <= 0.01 * len(held_out)
    ids = finetune.windows_at(train, 3, 10, 0, 5)
    assert ids.shape == (3, 11) and torch.equal(ids, finetune.windows_at(train, 3, 10, 0, 5))
    assert not torch.equal(ids, finetune.windows_at(train, 3, 10, 0, 6)) and bytes(ids[0].tolist()) in text


def runs(tuned, one, sixteen, rates=(-9, -5), inside=True):
    curve = [[10, 2.0], [20, 1.5], [30, 1.0]]
    slow = [[10, 2.5], [20, 2.0], [30, 1.5]]
    return [
        {"before": 3.0, "inside": {"tuned": inside}, "judged": {
            "tuned": {"log2 rates": list(rates), "test": t, "curve": curve},
            "ratio 1": {"log2 rates": [-8, -8], "test": o, "curve": slow},
            "ratio 16": {"log2 rates": [-10, -6], "test": s, "curve": slow}}}
        for t, o, s in zip(tuned, one, sixteen, strict=True)
    ]  # fmt: skip


def test_the_verdict_needs_a_gain_at_every_width_and_an_optimum_inside():
    good = runs([1.0, 1.1, 1.2], [1.2, 1.31, 1.39], [1.1, 1.2, 1.31])
    found = FINETUNE.conclude({"d = 1": {"runs": good}})
    row = found["d = 1"]
    assert found["verdict"] == "reproduced" and row["log2 ratio"] == 4
    assert row["gain of tuned over ratio 1"]["mean"] == pytest.approx(0.2)
    assert row["gain of ratio 16 over ratio 1"]["mean"] == pytest.approx(0.0966667)
    assert row["speed-up of tuned over ratio 1"]["mean"] == pytest.approx(1.5)
    none = runs([1.0, 1.1, 1.2], [0.9, 1.3, 1.2], [1.1, 1.2, 1.31])
    for bad in (none, runs([1, 1.1], [2, 2.2], [2, 2], inside=False), runs([1, 1.1], [2, 2.2], [2, 2], rates=(-5, -5))):
        both = FINETUNE.conclude({"d = 1": {"runs": good}, "d = 2": {"runs": bad}})
        assert both["verdict"] == "not reproduced"
