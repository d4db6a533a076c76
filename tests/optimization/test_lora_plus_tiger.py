"""The sweep under Tiger: a cell of the stack is the library's optimizer, and planted exponents give the verdicts."""

import math

import pytest
import torch

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.lora_plus import draw_toy
from kexue_utils.optimization.lora_plus.experiments import TIGER, tiger
from kexue_utils.optimization.lora_plus.toy import loss_gradients
from tests.optimization.test_lora_plus_widths import planted

BASE = TIGER.units(False)["linear, A random, RMS rule"] | {"steps": 20, "beta": 0.93}


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize("change", [{}, {"floor": 1e-3}, {"rule": "none"}], ids=str)
def test_a_cell_of_the_stack_is_the_library_s_tiger(init, change):
    p, seeds, n = BASE | change | {"init": init}, [3, 5], 12
    toy = draw_toy("network", n, 7, seeds, init=init)
    etas_A, etas_B = [2.0**-7, 2.0**-5], [2.0**-6, 2.0**-4, 2.0**-3]
    found = tiger.train_grid(toy, etas_A, etas_B, p)
    i, j, s = 1, 2, 1
    alone = draw_toy("network", n, 7, seeds[s : s + 1], init=init)
    A, B = (torch.nn.Parameter(x[0].clone()) for x in (alone.A, alone.B))
    rates = zip((A, B), (etas_A[i], etas_B[j]), tiger.floors(p, n), strict=True)
    groups = [{"params": [x], "lr": lr, "rms_floor": floor} for x, lr, floor in rates]
    optimizer = Tiger(groups, beta=p["beta"], weight_decay=0.0, lr_scale=p["rule"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / p["steps"])
    for _ in range(p["steps"]):
        optimizer.zero_grad()
        W0, factors = alone.base[0], (alone.X[0] @ A) @ B
        y = 2**0.5 * (W0 + factors).relu() @ alone.head[0]
        (y - alone.Y[0]).square().sum().backward()
        optimizer.step()
        schedule.step()
    loss, *_ = loss_gradients(alone, A.detach()[None, :, None], B.detach()[None, None])
    torch.testing.assert_close(found[s, i, j], loss[0, 0], rtol=1e-9, atol=0)
    assert loss[0, 0] < 0.98 and len(set(found.flatten().tolist())) == found.numel()


def test_floors_are_the_scales_of_lecun_or_one_number():
    assert tiger.floors(BASE, 64) == [1 / 8, 1 / 2] and tiger.floors(BASE | {"floor": 1e-3}, 64) == [1e-3, 1e-3]


def test_divergence_is_infinite():
    toy = draw_toy("linear", 8, 8, [0], dtype=torch.float32)
    assert tiger.train_grid(toy, [1e-3, 1e30], [1e-3, 1e30], BASE).isinf().any()


def test_the_laws_are_half_an_exponent_apart_and_every_unit_has_a_start():
    for name, p in TIGER.units(False).items():
        etas_A, etas_B = tiger.first_grids(p)
        assert len(etas_A(64)) == len(etas_B(4096)) == 13 and math.log2(etas_A(64)[1] / etas_A(64)[0]) == 1, name
    assert len(TIGER.units(False)) == 16
    for law in ("n", "√n"):
        assert tiger.LAWS["none"][law][0] - tiger.LAWS["rms"][law][0] == 0.5


@pytest.mark.parametrize(
    "rule, slope, expected",
    [("rms", 0.0, "supports √n"), ("rms", 0.5, "supports n"), ("none", 0.5, "supports √n"), ("none", 1.0, "supports n"),
     ("rms", 1.5, "supports neither")],
)  # fmt: skip
def test_conclusions_find_a_planted_exponent(rule, slope, expected):
    sizes = (64, 256, 1024, 4096)
    unit = {"parameters": BASE | {"rule": rule}, "runs": planted(range(6), sizes, slope=slope)}
    found = TIGER.conclude({"u": unit})["u"]
    assert found["slopes"]["0.3"]["ratio"]["slope"] == pytest.approx(slope, abs=0.06)
    assert found["outcome"] == expected


def test_an_optimum_at_the_edge_is_said():
    runs = planted(range(2))
    for run in runs:
        run["256"]["100 log10 loss"] = run["256"]["100 log10 loss"][4:]
    found = TIGER.conclude({"u": {"parameters": BASE, "runs": runs}})["u"]
    assert found["best cell at an edge"] == [256] and "outcome" not in found
