"""The recorded width sweep: what it would count for which law, windows around the optimum, and its own numbers."""

import math

import numpy as np
import pytest
import torch

from kexue_utils.optimization.lora_plus import draw_toy, train_cells
from kexue_utils.optimization.lora_plus.experiments import WIDTHS, widths

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "interval, expected",
    [
        ((0.8, 1.2), "supports n"),
        ((0.3, 0.9), "supports √n"),
        ((0.4, 1.1), "undecided"),
        ((0.6, 0.9), "supports neither"),
        ((1.5, 2.5), "supports neither"),
    ],
)
def test_outcomes(interval, expected):
    assert widths.outcome(interval, widths.LAWS["sign", "n = m"]) == expected


def test_a_range_of_exponents_is_met_anywhere():
    laws = widths.LAWS["sign", "n = 256"]
    assert widths.outcome((-0.4, -0.2), laws) == widths.outcome((-0.1, 0.3), laws) == "supports n/√m to n"
    assert widths.outcome((-1.2, -0.8), laws) == "supports the post's n^(3/2)/m"
    assert widths.outcome((-1.1, -0.4), laws) == "undecided"


def test_every_unit_has_a_start_and_laws():
    units = WIDTHS.units(False)
    assert len(units) == 22 and len({str(p) for p in units.values()}) == 22
    for p in units.values():
        assert (p["problem"], p["optimizer"], p["init"]) in widths.BEGIN
        assert ("sgd" if p["optimizer"] == "sgd" else "sign", p["shape"]) in widths.LAWS
        etas_A, etas_B = widths.first_grids(p)
        assert len(etas_A(64)) == len(etas_B(4096)) == 13
        n, _ = widths.SHAPES[p["shape"]](4096)
        assert etas_A(4096)[0] == etas_A(64)[0] * (64 / n if p["shape"] != "n = 256" else 1)


def test_a_run_holds_the_losses_of_its_toy_around_the_best_cell():
    p = WIDTHS.units(True)["linear, adam, A random, n = m"]
    runs = widths._run(p, [3, 4], CPU, None)
    for run, seed in zip(runs, (3, 4), strict=True):
        for width in p["widths"]:
            cell = run[str(width)]
            assert np.shape(cell["100 log10 loss"]) == (2 * widths.REACH + 1,) * 2
            i, j = 2, 5
            rates = (2.0 ** (cell[f"log2 first eta_{x}"] + k) for x, k in (("A", i), ("B", j)))
            toy = draw_toy("linear", width, width, [seed], dtype=torch.float32)
            loss, _ = train_cells(toy, *(torch.tensor([x]) for x in rates), steps=p["steps"])
            assert cell["100 log10 loss"][i][j] == pytest.approx(100 * math.log10(loss), abs=1)
    means = sum(np.array(run["16"]["100 log10 loss"]) for run in runs)
    assert means[widths.REACH, widths.REACH] == means.min()


def planted(seeds, sizes=(64, 256), slope=1.0, shift=0):
    """Runs with a bowl at η_A = 2⁻⁴ (64/n)^slope, η_B = 2⁻³; `shift` moves the window of every second seed."""
    found = []
    for seed in seeds:
        run = {}
        for n in sizes:
            begin_A = round(-8 - slope * math.log2(n / 64)) + (shift if seed % 2 else 0)
            a = np.arange(begin_A, begin_A + 9) + 4 + slope * math.log2(n / 64)
            b = np.arange(-7, 2) + 3
            losses = 10 * (a[:, None] ** 2 + b**2) + seed
            run[str(n)] = {"log2 first eta_A": begin_A, "log2 first eta_B": -7,
                           "100 log10 loss": [[round(x) for x in row] for row in losses]}  # fmt: skip
        found.append(run)
    return found


def test_conclusions_find_a_planted_exponent():
    p = WIDTHS.units(False)["linear, adam, A random, n = m"]
    for shift in (0, 1):
        summary = WIDTHS.conclude({"u": {"parameters": p, "runs": planted(range(4), shift=shift)}})["u"]
        for slopes in summary["slopes"].values():
            assert slopes["ratio"]["slope"] == pytest.approx(1, abs=0.05)
        assert summary["outcome"] == "supports n" and summary["slopes"].keys() == {"0.1", "0.3", "1"}
        assert summary["optimum"][64]["eta_A"] == pytest.approx(-4, abs=0.05)
        assert summary["envelope"][64]["1"] == pytest.approx(0.015) and summary["envelope"][64]["3"] > 0.1


def test_windows_that_differ_are_cut_to_what_they_share():
    swept = widths.recorded_sweep(planted(range(4), shift=2), 0.3)
    grid = swept.grids[64]
    assert grid.losses.shape == (4, 7, 9) and grid.etas_A[0] == 2.0**-6
    assert np.allclose(np.log10(grid.losses[:, 2, 4]), np.arange(4) / 100)


def test_an_optimum_at_the_edge_is_said_and_a_diverged_cell_counts():
    p = WIDTHS.units(False)["linear, adam, A random, n = m"]
    runs = planted(range(2))
    for row in runs[0]["64"]["100 log10 loss"]:
        row[:5] = [None] * 5
    swept = widths.recorded_sweep(runs, 0.3)
    assert np.isinf(swept.grids[64].losses[0, :, :5]).all() and swept.optimum()[64]["eta_B"] > 2.0**-3
    for run in runs:
        run["256"]["100 log10 loss"] = run["256"]["100 log10 loss"][4:]
        run["256"]["log2 first eta_A"] += 4
    summary = WIDTHS.conclude({"u": {"parameters": p, "runs": runs}})["u"]
    assert summary["best cell at an edge"] == [256] and "outcome" not in summary
