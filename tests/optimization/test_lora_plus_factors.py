"""Two factors for a matrix: products, gradients, costs and increments against autograd and the full matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kexue_utils.optimization.lora_plus import (
    additive_update,
    factored_flops,
    lecun_factors,
    lora_forward,
    lora_gradients,
    lora_increment,
    materialised_flops,
    projected_gradient,
    rescaled,
)
from tests.tolerances import assert_close


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20)
@given(*[st.integers(1, 7)] * 4, st.integers(0, 1000))
def test_factors_make_the_same_output_and_gradients_as_the_matrix(b, n, m, r, seed):
    X, W0, D = normal(2, b, n, seed=seed), normal(n, m, seed=seed + 1), normal(2, b, m, seed=seed + 2)
    A, B = (normal(2, *shape, seed=seed + 3).requires_grad_() for shape in ((n, r), (r, m)))
    Y = lora_forward(X, W0, A, B)
    assert_close(Y, X @ (W0 + A @ B), scale=10)
    expected = torch.autograd.grad((Y * D).sum(), (A, B))
    G = X.mT @ D
    for found, by_autograd, through_G in zip(lora_gradients(X, D, A, B), expected, (G @ B.mT, A.mT @ G), strict=True):
        assert_close(found, by_autograd, scale=10)
        assert_close(found, through_G, scale=10)


@pytest.mark.parametrize("b, n, m, r", [(64, 96, 80, 4), (5, 12, 40, 3)])
def test_flops_are_those_that_torch_counts(b, n, m, r):
    X, W0 = torch.randn(b, n, requires_grad=True), torch.randn(n, m)
    A, B = torch.randn(n, r, requires_grad=True), torch.randn(r, m, requires_grad=True)

    def counted(forward):
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        return counter.get_total_flops()

    frozen = counted(lambda: X @ W0)
    assert counted(lambda: lora_forward(X, W0, A, B)) - frozen == factored_flops(b, n, m, r)
    assert counted(lambda: X @ (W0 + A @ B)) - frozen == materialised_flops(b, n, m, r)


def test_flops_of_the_factors_win_unless_the_rank_is_large():
    for n in (8, 64, 512):
        for r in (1, 4, 16):
            for b in (1, 10, 1000):
                wins = 6 * r > n and b > 3 * n * r / (6 * r - n)
                assert (materialised_flops(b, n, n, r) < factored_flops(b, n, n, r)) == wins


def test_increment_is_that_of_a_step_on_both_factors():
    A, B, G = normal(3, 7, 2), normal(3, 2, 5, seed=1), normal(3, 7, 5, seed=2)
    eta = 0.3
    after = (A - eta * G @ B.mT) @ (B - eta * A.mT @ G)
    assert_close(lora_increment(A, B, G, eta), after - A @ B, scale=10)


def test_mean_of_random_projections_is_twice_the_gradient():
    G, N = normal(3, 4), 40_000
    samples = projected_gradient(G, normal(N, 3, 1, seed=1), normal(N, 1, 4, seed=2))
    error = (samples.mean(0) - 2 * G).abs() / (samples.std(0) / N**0.5)
    assert error.max() < 5 and (samples.mean(0) - G).abs().min() > 5 * (samples.std(0) / N**0.5).max()


def test_additive_update_has_gradients_of_row_and_column_sums_and_little_rank():
    A, B, G = normal(6, 1).requires_grad_(), normal(1, 4, seed=1).requires_grad_(), normal(6, 4, seed=2)
    W = additive_update(A, B)
    G_A, G_B = torch.autograd.grad((W * G).sum(), (A, B))
    assert_close(G_A, G.sum(1, keepdim=True))
    assert_close(G_B, G.sum(0, keepdim=True))
    assert torch.linalg.matrix_rank(W) == 2
    assert_close(additive_update(A + 3, B - 3), W)
    A, B = normal(6, 2), normal(2, 4)
    eye = torch.eye(2, dtype=torch.float64)
    assert_close(additive_update(A, B), A @ eye.repeat(1, 2) + eye.repeat(3, 1) @ B)
    with pytest.raises(ValueError, match="r must divide n and m, got r=2, n=6, m=5"):
        additive_update(A, normal(2, 5))


def test_lecun_factors_keep_the_variance():
    A, B = lecun_factors(64, 32, 4, generator=torch.Generator().manual_seed(0), batch=(50,))
    X = normal(50, 100, 64)
    assert (X @ A).var().item() == pytest.approx(1, abs=0.1) and (X @ A @ B).var().item() == pytest.approx(1, abs=0.2)
    assert A.shape == (50, 64, 4) and B.shape == (50, 4, 32)


def test_rescaling_by_a_power_of_two_leaves_the_path_of_sign_updates_unchanged():
    X, D = normal(9, 6), normal(9, 5, seed=1)
    A, B = lecun_factors(6, 5, 2, generator=torch.Generator().manual_seed(3))

    def path(A, B, eta_A, eta_B):
        for _ in range(20):
            G_A, G_B = lora_gradients(X, X @ A @ B - D, A, B)
            A, B = A - eta_A * G_A.sign(), B - eta_B * G_B.sign()
        return A @ B

    expected = path(A, B, 0.25, 0.125)
    assert torch.equal(path(*rescaled(A, B, 0.25, 0.125, 4.0)), expected)
    *_, eta_A, eta_B = rescaled(A, B, 0.25, 0.125, 4.0)
    assert eta_B / eta_A == 16 * 0.125 / 0.25
    assert not torch.equal(path(A, B, eta_A, eta_B), expected)
    for c in (0, float("inf")):
        with pytest.raises(ValueError, match=f"c must be positive and finite, got {c}"):
            rescaled(A, B, 1, 1, c)


def test_factors_that_do_not_fit_are_named():
    A, B, X, D = normal(6, 2), normal(3, 4), normal(1, 6), normal(1, 4)
    for function in (
        lambda: lora_forward(X, normal(6, 4), A, B),
        lambda: lora_increment(A, B, A, 1.0),
        lambda: lora_gradients(X, D, A, B),
        lambda: additive_update(A, B),
    ):
        with pytest.raises(
            ValueError, match=r"A and B must be \(..., n, r\) and \(..., r, m\), got \(6, 2\) and \(3, 4"
        ):
            function()
