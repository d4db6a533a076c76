"""The toy regressions: gradients, cells that don't see each other, and how contributions scale during training."""

import numpy as np
import pytest
import torch

from kexue_utils.optimization.lora_plus import draw_toy, lecun_factors, train_cells, train_grid
from kexue_utils.optimization.lora_plus.cells import OPTIMIZERS
from kexue_utils.optimization.lora_plus.toy import PROBLEMS, loss_gradients, outputs
from tests.tolerances import assert_close

WIDTHS = (64, 128, 256, 512)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_are_those_of_autograd(problem):
    toy = draw_toy(problem, 7, 5, range(3), r=2, b=4)
    A, B = (torch.stack([torch.randn_like(p) for _ in range(2)], 1) for p in (toy.A, toy.B))
    A = A.transpose(1, 2).contiguous().requires_grad_()  # (S, n, C, r)
    B = B.contiguous().requires_grad_()
    loss, G_A, G_B, D = loss_gradients(toy, A.detach(), B.detach())
    Y = torch.einsum("sbn,sncr,scrm->scbm", toy.X, A, B) + (0 if toy.base is None else toy.base[:, None])
    Y.retain_grad()
    fresh = torch.zeros_like(toy.Y) if toy.base is None else outputs(toy, toy.base)
    start = (fresh - toy.Y).square().flatten(1).sum(1)
    expected = (outputs(toy, Y) - toy.Y[:, None]).square().flatten(2).sum(2) / start[:, None]
    expected.sum().backward()
    for found, other in ((loss, expected), (G_A, A.grad), (G_B, B.grad), (D, Y.grad)):
        assert_close(found, other, scale=10)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("init", ["A", "B"])
def test_draws(problem, init):
    toy = draw_toy(problem, 64, 48, [5, 6], init=init)
    zero, other = (toy.B, toy.A) if init == "A" else (toy.A, toy.B)
    assert not zero.any() and other.var().item() == pytest.approx(1 / 64 if init == "A" else 1 / 4, rel=0.3)
    again = draw_toy(problem, 64, 48, [6], init=init)
    for first, second in zip(toy, again, strict=True):
        if first is not None:
            assert_close(first[1:], second)
            assert not torch.equal(first[0], first[1]) or not first.any()
    assert toy.X.square().mean().item() == pytest.approx(1, rel=0.5)
    loss, at = train_cells(toy, torch.ones(1), torch.ones(1), steps=1, observe=[0])
    assert_close(at[0].loss, torch.ones_like(loss))


def test_the_frozen_weight_of_the_network_has_its_law_without_being_drawn():
    toy = draw_toy("network", 40, 2000, [0], b=6)
    expected = toy.X[0] @ toy.X[0].T / 40  # covariance of the columns of XW₀, W₀ ~ N(0, 1/n)
    assert (toy.base[0].cov() - expected).abs().max() < 0.15 * expected.max()
    assert toy.head.square().mean().item() == pytest.approx(1 / 2000, rel=0.15)  # w ~ N(0, 1/m)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cell_alone_gives_what_it_gives_among_others(problem, optimizer):
    options = {"optimizer": optimizer, "steps": 8}
    many, one = (draw_toy(problem, 8, 6, seeds, r=2, b=4, init="B") for seeds in ([3, 4], [4]))
    etas_A, etas_B = (2.0**-6, 2.0**-4), (2.0**-5, 2.0**-2, 2.0**30)
    grid = train_grid(many, etas_A, etas_B, **options)
    assert grid.shape == (2, 2, 3)
    for i, eta_A in enumerate(etas_A):
        for j, eta_B in enumerate(etas_B):
            alone = train_grid(one, [eta_A], [eta_B], **options)
            torch.testing.assert_close(alone[0, 0, 0], grid[1, i, j], rtol=1e-7, atol=1e-12)
    assert (grid > 0).all() and grid[:, :, 2].min() > grid[:, :, 1].max()


def by_hand(toy, eta_A, eta_B, optimizer, steps):
    """One seed and one cell of the linear toy with torch's optimizers and autograd."""
    A, B = (p[0].clone().requires_grad_() for p in (toy.A, toy.B))
    groups = [{"params": [A], "lr": eta_A}, {"params": [B], "lr": eta_B}]
    chosen = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-30) if optimizer == "adam" else torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda t: 1 - t / steps)
    for _ in range(steps):
        chosen.zero_grad()
        ((toy.X[0] @ A @ B - toy.Y[0]).square().sum() / toy.Y[0].square().sum()).backward()
        if optimizer == "sign":
            A.grad.sign_(), B.grad.sign_()
        chosen.step()
        schedule.step()
    return (toy.X[0] @ A @ B - toy.Y[0]).square().sum() / toy.Y[0].square().sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cells_follow_torchs_optimizers(optimizer):
    toy = draw_toy("linear", 8, 6, [1], r=2, b=4)
    eta_A, eta_B = torch.tensor([[0.01], [0.03]], dtype=torch.float64)
    found, _ = train_cells(toy, eta_A, eta_B, optimizer=optimizer, steps=12)
    torch.testing.assert_close(found[0, 0], by_hand(toy, 0.01, 0.03, optimizer, 12).detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_a_millionth_of_the_loss_gives_the_same_path(optimizer, dtype):
    torch.manual_seed(0)
    ends = []
    for scale in (1.0, 1e-6, 1e-12):
        p = torch.ones(5, 3, dtype=dtype)
        cells = OPTIMIZERS[optimizer]([p], [torch.full((5, 1), 0.1, dtype=dtype)])
        for t in range(10):
            gradient = torch.sin(7.0 * torch.arange(15, dtype=dtype).view(5, 3) + t) * 1e-3
            cells.step([gradient * scale])
        ends.append(p)
    assert_close(ends[1], ends[0])
    assert_close(ends[2], ends[0])
    zero = torch.ones(2, dtype=dtype)
    OPTIMIZERS[optimizer]([zero], [torch.ones(2, dtype=dtype)]).step([torch.zeros(2, dtype=dtype)])
    assert torch.equal(zero, torch.ones(2, dtype=dtype))


def test_losses_that_are_not_finite_are_infinite():
    loss, _ = train_cells(
        draw_toy("linear", 8, 6, [0, 1]), *torch.tensor([[1e30, 0.01], [1e30, 0.01]]), optimizer="sgd"
    )
    assert torch.equal(loss.isinf(), torch.tensor([[True, False]] * 2)) and not loss.isnan().any()


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda toy: draw_toy("cubic", 4, 4, [0]), "problem must be one of .* got 'cubic'"),
        (lambda toy: draw_toy("linear", 4, 4, [0], init="both"), "init 'A' or 'B', got .* 'both'"),
        (lambda toy: draw_toy("linear", 4, 0, [0]), "must be positive and seeds not empty, got 4, 0"),
        (lambda toy: draw_toy("linear", 4, 4, []), "seeds not empty"),
        (lambda toy: train_cells(toy, torch.ones(2), torch.ones(3)), r"must both be \(C,\), got \(2,\) and \(3,\)"),
        (lambda toy: train_cells(toy, torch.ones(1), torch.ones(1), optimizer="x"), "adam, sign, sgd, got 'x'"),
        (lambda toy: train_cells(toy, torch.ones(1), torch.ones(1), steps=3, observe=[4]), r"within 0...steps, got 3"),
    ],
)
def test_bad_arguments_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        function(draw_toy("linear", 4, 4, [0]))


def observed(init, c, times, seeds):
    """{t: [log₂ κ, log₂ ratio, log₂ predicted], (widths, seeds) each} for η_A = c/n, η_B = 1/16, constant rates."""
    rows = {t: ([], [], []) for t in times}
    for n in WIDTHS:
        toy = draw_toy("linear", n, n, range(seeds), init=init, dtype=torch.float32)
        _, found = train_cells(
            toy, torch.tensor([c / n]), torch.tensor([1 / 16]), steps=max(times), decay=False, observe=times
        )
        for t in times:
            for row, values in zip(rows[t], found[t], strict=False):
                row.append(values[:, 0].log2().numpy())
    return rows


def slope(values):
    """(slope against log₂ n, standard error)"""
    x, values = np.log2(WIDTHS), np.array(values)
    x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return x @ values.mean(1), np.sqrt(x**2 @ values.var(1, ddof=1) / values.shape[1])


def test_with_B_zero_the_ratio_grows_with_the_width_from_the_first_step_on():
    rows = observed("A", 2, (1, 5), 32)
    for t in (1, 5):
        kappa, ratio, predicted = (slope(values) for values in rows[t])
        assert 0.85 < ratio[0] < 1.15 and ratio[1] < 0.06
        assert abs(kappa[0]) < 0.1 and abs(predicted[0] - ratio[0]) < 0.15
        assert abs(np.mean(rows[t][1]) - np.mean(rows[t][2])) < 1.2  # octaves


def test_with_A_zero_small_first_steps_begin_at_the_root_of_the_width():
    rows = observed("B", 0.02, (1, 5), 24)
    assert 0.25 < slope(rows[1][1])[0] < 0.65 and -0.65 < slope(rows[1][0])[0] < -0.35
    assert 0.8 < slope(rows[5][1])[0] < 1.1
    rows = observed("B", 2, (1, 60), 24)
    assert 0.85 < slope(rows[1][1])[0] < 1.15
    first, last = (np.mean(2.0 ** np.array(rows[t][0]), 1) for t in (1, 60))
    assert (last < 0.6 * first).all()


def test_coherence_of_the_targets_is_that_of_random_ones_before_training():
    for n in (64, 256, 1024):
        toy = draw_toy("linear", n, n, range(16), init="B", dtype=torch.float32)
        _, found = train_cells(toy, torch.ones(1), torch.ones(1), steps=1, observe=[0])
        assert found[0].coherence.mean().item() == pytest.approx((np.pi / 2 / n) ** 0.5, rel=0.25)


def test_runs_in_single_precision_as_in_double():
    single, double = (
        train_grid(draw_toy("network", 32, 24, [0], dtype=dtype), [2.0**-6, 2.0**-5], [2.0**-6], steps=10)
        for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=0)
    assert lecun_factors(2, 2, 1, generator=torch.Generator())[0].dtype == torch.float64
