"""Width sweeps: planted optima are found with their slopes, and edges, divergence and bad grids are never silent."""

import numpy as np
import pytest
import torch

from kexue_utils.optimization.lora_plus import SweepResult, draw_toy, soft_argmin, train_grid, width_sweep

WIDTHS = [32, 64, 128, 256]
ETAS = 2.0 ** np.arange(-10, 3)


def planted(slope_A=-1.0, slope_B=0.25, noise=0.0, curvature=0.2, at=32):
    """A bowl in log₂ η whose minimum is at slope·log₂(n/32) from the middle, shifted per seed by noise."""

    def losses(width, etas_A, etas_B, seeds):
        grids = []
        for seed in seeds:
            rng = np.random.default_rng([seed, width])
            centre = np.log2(width / at) * np.array([slope_A, slope_B]) + [-3, -4] + noise * rng.normal(size=2)
            a, b = np.log2(etas_A)[:, None] - centre[0], np.log2(etas_B) - centre[1]
            grids.append(np.exp(curvature * (a**2 + b**2 + 0.5 * a * b)))
        return np.array(grids)

    return losses


def test_a_planted_optimum_and_its_slopes_are_found():
    result = width_sweep(planted(), WIDTHS, ETAS, ETAS, [0, 1])
    for width, found in result.optimum().items():
        octaves = np.log2(width / 32)
        assert np.log2(found["eta_A"]) == pytest.approx(-3 - octaves, abs=0.02)
        assert np.log2(found["eta_B"]) == pytest.approx(-4 + 0.25 * octaves, abs=0.02)
        assert found["ratio"] == pytest.approx(found["eta_B"] / found["eta_A"])
    for quantity, expected in (("eta_A", -1), ("eta_B", 0.25), ("ratio", 1.25)):
        found = result.slope_ci()[quantity]
        assert found.slope == pytest.approx(expected, abs=0.02) and found.high - found.low < 1e-9  # no noise
        assert found.edge == 0


def test_intervals_cover_the_slope_as_often_as_they_say():
    covered, widths = [], []
    for trial in range(40):
        seeds = range(100 * trial, 100 * trial + 16)
        found = width_sweep(planted(noise=1.0), WIDTHS, ETAS, ETAS, seeds).slope_ci(draws=300)["ratio"]
        covered.append(found.low <= 1.25 <= found.high)
        widths.append(found.high - found.low)
    assert 32 <= sum(covered) <= 40  # 95 % of 40 is 38, bootstrap of 16 seeds is a little narrow
    x = np.log2(WIDTHS) - np.log2(WIDTHS).mean()
    expected = 2 * 1.96 * np.sqrt(2 / 16 / (x**2).sum())
    assert np.mean(widths) == pytest.approx(expected, rel=0.25)


def test_resampling_is_over_seeds_and_not_over_cells():
    result = width_sweep(planted(noise=1.0), WIDTHS, ETAS, ETAS, range(8))
    doubled = width_sweep(
        lambda w, a, b, s: np.repeat(planted(noise=1.0)(w, a, b, s), 4, 0), WIDTHS, ETAS, ETAS, range(8)
    )
    narrow, wide = (r.slope_ci()["eta_A"] for r in (doubled, result))
    assert narrow.slope == pytest.approx(wide.slope)
    usual, short = (result.slope_ci(level=level, draws=4000)["eta_A"] for level in (0.95, 0.6827))
    assert (usual.high - usual.low) / (short.high - short.low) == pytest.approx(1.96, rel=0.1)  # as for a normal law
    assert (narrow.high - narrow.low) == pytest.approx((wide.high - wide.low) / 2, rel=0.2)


def shared(width, etas_A, etas_B, seeds):
    """Bowls whose centres a seed moves by as much at every width."""
    return np.concatenate([planted(noise=1.0)(32, etas_A * width / 32, etas_B, [seed]) for seed in seeds])


def test_joint_resamples_see_what_a_seed_has_in_common_at_all_widths():
    result = width_sweep(shared, WIDTHS, ETAS, ETAS, range(8))
    apart, joint = (result.slope_ci(joint=j)["eta_A"] for j in (False, True))
    assert apart.slope == joint.slope == pytest.approx(-1, abs=0.02)
    assert joint.high - joint.low < 0.02 and apart.high - apart.low > 0.2
    own = width_sweep(planted(noise=1.0), WIDTHS, ETAS, ETAS, range(8))  # where nothing is shared, about the same
    apart, joint = (own.slope_ci(joint=j)["eta_A"] for j in (False, True))
    assert joint.high - joint.low == pytest.approx(apart.high - apart.low, rel=0.5)
    uneven = {w: (ETAS, ETAS, shared(w, ETAS, ETAS, range(k))) for w, k in ((32, 3), (64, 2))}
    with pytest.raises(ValueError, match=r"joint needs as many seeds at every width, got \[3, 2\]"):
        SweepResult(uneven).slope_ci(joint=True)


def test_resamples_at_an_edge_of_any_width_are_counted():
    i, j = np.arange(13)[:, None], np.arange(13)

    def bowls(*centres):
        return ETAS, ETAS, np.stack([np.exp((i - c) ** 2 + (j - 6) ** 2) for c in centres])

    result = SweepResult({32: bowls(6, 6), 64: bowls(0, 4)})  # the first seed alone is at the edge: one draw in four
    for quantity in result.slope_ci().values():
        assert quantity.edge == pytest.approx(0.25, abs=0.05)
    assert SweepResult({32: bowls(6, 6), 64: bowls(2, 4)}).slope_ci()["eta_A"].edge == 0


def test_soft_argmin_is_the_weighted_mean_that_it_says():
    losses = np.full((1, 3, 4), np.inf)
    losses[0, 1, 1], losses[0, 1, 2] = 1.0, np.exp(0.3)
    eta_A, eta_B, edge = soft_argmin(losses, [1, 2, 4], [1, 4, 16, 64], temperature=0.3)
    w = 1 / (1 + np.exp(-1))
    assert eta_A == pytest.approx(2) and np.log2(eta_B) == pytest.approx(2 * w + 4 * (1 - w)) and not edge
    *_, cold, _ = soft_argmin(losses, [1, 2, 4], [1, 4, 16, 64], temperature=0.001)
    assert cold == pytest.approx(4)


def test_an_optimum_at_an_edge_is_refused_and_named():
    result = width_sweep(planted(), WIDTHS, 2.0 ** np.arange(-5, 3), ETAS, [0, 1])
    assert result.at_edge(32) == [] and result.at_edge(256) == ["etas_A low"]
    for function in (result.optimum, result.slope_ci):
        with pytest.raises(
            ValueError, match=r"width 128: the best cell is at the end of the grid \(etas_A low\): extend"
        ):
            function()


def test_grids_are_extended_towards_the_optimum_and_old_cells_are_kept():
    asked = []

    def fn(width, etas_A, etas_B, seeds):
        asked.append((width, len(etas_A), len(etas_B)))
        return planted()(width, etas_A, etas_B, seeds)

    small = 2.0 ** np.arange(-4, 0)
    result = width_sweep(fn, [256], small, small, [0], extend=8)
    whole = width_sweep(planted(), [256], ETAS, ETAS, [0]).grids[256]
    grid = result.grids[256]
    assert result.at_edge(256) == [] and result.optimum()[256]["eta_A"] == pytest.approx(2.0**-6, rel=0.1)
    assert asked[0] == (256, 4, 4) and all(1 in shape[1:] for shape in asked[1:])  # strips of new cells only
    i, j = (np.searchsorted(ETAS, e[0]) for e in (grid.etas_A, grid.etas_B))
    assert np.allclose(grid.losses, whole.losses[:, i : i + len(grid.etas_A), j : j + len(grid.etas_B)])
    with pytest.raises(ValueError, match="extend it"):
        width_sweep(fn, [256], small, small, [0], extend=1).optimum()
    far = width_sweep(planted(), [256], small, small, [0], extend=9, margin=3).grids[256]
    i, j = np.unravel_index(far.losses[0].argmin(), far.losses[0].shape)
    assert 3 <= i < len(far.etas_A) - 3 and 3 <= j < len(far.etas_B) - 3
    for start in (2.0 ** np.arange(-17, -5), 2.0 ** np.arange(0, 12)):  # by three cells at a time, from both sides
        wide = width_sweep(planted(), [32], start, ETAS, [0], extend=8)
        assert wide.optimum()[32]["eta_A"] == pytest.approx(2.0**-3, rel=0.1)
        assert len(wide.grids[32].etas_A) % 3 == 0 and (np.diff(wide.grids[32].etas_A) > 0).all()


def test_diverged_cells_count_and_are_never_dropped():
    def fn(width, etas_A, etas_B, seeds):
        losses = planted(curvature=0.1)(width, etas_A, etas_B, seeds)
        losses[0, 7, 6] = np.nan  # one seed of the best cell of width 32
        losses[:, 8:] = np.inf
        return torch.from_numpy(losses)

    result = width_sweep(fn, [32, 64], ETAS, ETAS, [0, 1, 2])
    assert np.isinf(result.grids[32].losses[0, 7, 6]) and not np.isnan(result.grids[32].losses).any()
    means = np.log(result.grids[32].losses).mean(0)
    assert np.isinf(means[7, 6]) and means.argmin() != 7 * 13 + 6
    assert np.isfinite(result.slope_ci()["eta_B"].low)
    with pytest.raises(ValueError, match="all rates diverged"):
        soft_argmin(np.full((2, 13, 13), np.inf), ETAS, ETAS)


GOOD = np.ones((2, 13, 13))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: SweepResult({32: (ETAS[:2], ETAS, GOOD)}), "etas_A must be at least 3 positive rates"),
        (lambda: SweepResult({32: (ETAS, -ETAS, GOOD)}), "etas_B must be at least 3 positive rates"),
        (lambda: SweepResult({32: (ETAS, ETAS**2 + ETAS, GOOD)}), "etas_B must rise by a constant factor"),
        (lambda: SweepResult({32: (ETAS[::-1], ETAS, GOOD)}), "etas_A must rise by a constant factor"),
        (
            lambda: SweepResult({32: (ETAS, ETAS, GOOD[:, :3])}),
            r"\(seeds, etas_A, etas_B\) = \(2, 13, 13\), got \(2, 3",
        ),
        (lambda: SweepResult({32: (ETAS, ETAS, 0 * GOOD)}), "losses must be positive, got 0"),
        (lambda: SweepResult({}), "grids must be by positive widths"),
        (lambda: SweepResult({32: (ETAS, ETAS, GOOD)}, 0), "temperature must be positive and finite, got 0"),
        (lambda: soft_argmin(GOOD, ETAS, ETAS, np.inf), "temperature must be positive and finite, got inf"),
        (lambda: soft_argmin(GOOD[:0], ETAS, ETAS), "losses must be of at least one seed"),
        (lambda: SweepResult({32: (ETAS, ETAS, GOOD)}).slope_ci(), "at least 2 widths"),
        (lambda: width_sweep(planted(), [32, 64], ETAS, ETAS, [0]).slope_ci(), "at least 2 seeds"),
        (
            lambda: width_sweep(planted(), [32, 64], ETAS, ETAS, [0, 1]).slope_ci(level=2),
            r"level must lie in \(0, 1\), got 2",
        ),
    ],
)
def test_bad_arguments_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_a_sweep_of_the_toy_finds_a_rate_for_A_that_falls_with_the_width():
    result = width_sweep(
        lambda n, a, b, seeds: train_grid(draw_toy("linear", n, n, seeds, dtype=torch.float32), a, b, steps=30),
        [16, 64], lambda n: 2.0 ** np.arange(-6, 2) * 8 / n, 2.0 ** np.arange(-8, 0), range(6), extend=3,
    )  # fmt: skip
    found = result.slope_ci(draws=200)["eta_A"]
    assert found.high < 0 and found.low > -2.5
