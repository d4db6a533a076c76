"""W₂ on a line and between Gaussians: against linear programming and POT."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import ndtri

from kexue_utils.optimization.gradient_flow import bures_w2, w2_1d
from tests.tolerances import assert_close


def samples(seed, n, m):
    """x, y and weights of both, some of them 0."""
    rng = np.random.default_rng(seed)
    x, y, a, b = rng.normal(size=n), 2 * rng.normal(size=m), rng.random(n), rng.random(m)
    a[: n // 4] = 0
    return tuple(map(torch.from_numpy, (x, y, a / a.sum(), b / b.sum())))


def by_linear_programming(x, y, a, b):
    """The definition: the cheapest plan with marginals a and b."""
    x, y, a, b = (tensor.numpy() if torch.is_tensor(tensor) else tensor for tensor in (x, y, a, b))
    n, m = len(x), len(y)
    cost = (x[:, None] - y) ** 2
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    solved = linprog(cost.flatten(), A_eq=np.vstack((rows, columns)), b_eq=np.concatenate((a, b)), method="highs")
    return solved.fun


@pytest.mark.parametrize("n, m", [(12, 12), (12, 7), (1, 5)])
def test_weighted_is_the_cheapest_plan(n, m):
    for seed in range(3):
        x, y, a, b = samples(seed, n, m)
        assert w2_1d(x, y, a, b).item() == pytest.approx(by_linear_programming(x, y, a, b), abs=1e-10)


def test_equal_weights_are_the_cheapest_plan():
    x, y, _, _ = samples(0, 12, 12)
    equal = np.full(12, 1 / 12)
    expected = by_linear_programming(x, y, equal, equal)
    assert w2_1d(x, y).item() == pytest.approx(expected, abs=1e-10)
    assert (x - y).square().mean() > expected + 0.1  # unsorted


@pytest.mark.parametrize("n, m", [(1000, 1000), (1000, 333)])
def test_against_pot(n, m):
    for seed in range(5):
        x, y, a, b = samples(seed, n, m)
        assert w2_1d(x, y).item() == pytest.approx(ot.emd2_1d(x.numpy(), y.numpy()), abs=1e-10)
        weighted = ot.emd2_1d(x.numpy(), y.numpy(), a.numpy(), b.numpy())
        assert w2_1d(x, y, a, b).item() == pytest.approx(weighted, abs=1e-10)
        assert w2_1d(x, y, a).item() == pytest.approx(ot.emd2_1d(x.numpy(), y.numpy(), a.numpy()), abs=1e-10)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_properties(seed, n, m):
    """Symmetric, 0 for copies, blind to splitting a sample, W₂²(x + s, y) = W₂² + 2s(x̄ − ȳ) + s²."""
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, generator=rng, dtype=torch.float64) for k in (n, m))
    a, b = (torch.rand(k, generator=rng, dtype=torch.float64) + 0.01 for k in (n, m))
    found = w2_1d(x, y, a, b)
    assert_close(w2_1d(y, x, b, a), found, scale=10)
    assert_close(w2_1d(x, x.flip(0), a, a.flip(0)), torch.zeros((), dtype=torch.float64), scale=10)
    split = w2_1d(torch.cat((x, x)), y, torch.cat((0.3 * a, 0.7 * a)), b)
    assert_close(split, found, scale=10)
    gap = (a @ x) / a.sum() - (b @ y) / b.sum()
    assert_close(w2_1d(x + 2, y, a, b), found + 4 * gap + 4, scale=10)
    assert_close(w2_1d(x.repeat(m), y.repeat(n)), w2_1d(x, y), scale=10)


def test_batches():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 20, generator=rng), torch.randn(3, 11, generator=rng)
    a = torch.rand(2, 3, 20, generator=rng)
    for found, weights in ((w2_1d(x, y), None), (w2_1d(x, y, a), a)):
        assert found.shape == (2, 3) and found.dtype == torch.float32
        for i, j in np.ndindex(2, 3):
            assert_close(found[i, j], w2_1d(x[i, j], y[j], None if weights is None else weights[i, j]))
    assert_close(w2_1d(x, x[..., :1].expand(2, 3, 20)), (x - x[..., :1]).square().mean(-1))


def test_half_precision():
    """Sorted by torch, as numpy does not know the type."""
    x, y, a, b = (tensor[:32].to(torch.bfloat16) for tensor in samples(4, 40, 40))
    wide = [tensor.double() for tensor in (x, y, a, b)]
    assert_close(w2_1d(x, y).double(), w2_1d(*wide[:2]), dtype=torch.bfloat16)
    assert_close(w2_1d(x, y, a, b).double(), w2_1d(*wide), dtype=torch.bfloat16, scale=2)  # two sums of 32 weights


def test_gradients():
    x, y, a, b = (tensor[:6] for tensor in samples(3, 8, 8))
    x.requires_grad_()
    assert torch.autograd.gradcheck(w2_1d, (x, y))
    assert torch.autograd.gradcheck(lambda x: w2_1d(x, y, a + 0.1, b), (x,))


def test_samples_of_gaussians_approach_the_closed_form():
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    z = torch.from_numpy(ndtri(u.numpy()))
    expected = bures_w2([1.0], [[0.25]], [-0.5], [[4.0]])
    assert w2_1d(1 + z / 2, -0.5 + 2 * z).item() == pytest.approx(expected.item(), rel=1e-4)
    assert_close(expected, torch.tensor(1.5**2 + 1.5**2, dtype=torch.float64))


def random_covariances(seed, *batch):
    rng = torch.Generator().manual_seed(seed)
    roots = torch.randn(2, *batch, 3, 3, generator=rng, dtype=torch.float64)
    return (*torch.randn(2, *batch, 3, generator=rng, dtype=torch.float64), *(roots @ roots.mT + 0.1 * torch.eye(3)))


def test_bures_against_pot():
    m1, m2, C1, C2 = random_covariances(0, 5)
    for i in range(5):
        expected = ot.gaussian.bures_wasserstein_distance(*(t[i].numpy() for t in (m1, m2, C1, C2)))
        assert bures_w2(m1, C1, m2, C2)[i].sqrt().item() == pytest.approx(float(expected), rel=1e-10)


def test_bures_is_a_metric():
    m1, m2, C1, C2 = random_covariances(1, 50)
    m3, C3 = m2.roll(1, 0), C2.roll(1, 0)
    distance = bures_w2(m1, C1, m2, C2).sqrt()
    assert_close(bures_w2(m2, C2, m1, C1).sqrt(), distance, scale=10)
    assert (distance <= bures_w2(m1, C1, m3, C3).sqrt() + bures_w2(m3, C3, m2, C2).sqrt() + 1e-12).all()
    assert (bures_w2(m1, C1, m1, C1) < 1e-12).all()
    commuting = C1.diagonal(dim1=-2, dim2=-1).sqrt() - C2.diagonal(dim1=-2, dim2=-1).sqrt()
    diagonal = [torch.diag_embed(C.diagonal(dim1=-2, dim2=-1)) for C in (C1, C2)]
    assert_close(bures_w2(m1, diagonal[0], m1, diagonal[1]), commuting.square().sum(-1), scale=10)


def test_monotone_maps_are_optimal():
    """W₂²(q, (id + αv)_# q) = α²∫q|v|² while id + αv increases, and less afterwards."""
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    q = torch.exp(-(x**2) / 2)
    v = torch.sin(2 * x)
    for alpha, equal in ((0.3, True), (0.49, True), (2.0, False)):
        moved = alpha**2 * (q * v**2).sum() / q.sum()
        found = w2_1d(x, x + alpha * v, q, q)
        if equal:
            assert_close(found, moved, scale=10)
        else:
            assert found < 0.8 * moved


def test_rotations_move_nothing_far():
    """x + αJx of N(0, I): the particles move 2α², the law 2(√(1+α²) − 1)²."""
    alpha, eye = 0.3, torch.eye(2, dtype=torch.float64)
    map = eye + alpha * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    found = bures_w2(torch.zeros(2), eye, torch.zeros(2), map @ map.mT)
    assert_close(found, torch.tensor(2 * (math.sqrt(1 + alpha**2) - 1) ** 2, dtype=torch.float64))
    assert found < 2 * alpha**2 / 10


def test_bad_arguments():
    x, none = torch.ones(3), torch.ones(0)
    for call in (lambda: w2_1d(none, x), lambda: w2_1d(x, none), lambda: w2_1d(none, none)):
        with pytest.raises(ValueError, match="x and y must have samples"):
            call()
    with pytest.raises(ValueError, match=r"a must have the shape of its samples, \(3,\), got \(2,\)"):
        w2_1d(x, x, torch.ones(2))
    with pytest.raises(ValueError, match="b must be finite weights that are not negative"):
        w2_1d(x, x, None, torch.tensor([1.0, -0.5, 1.0]))
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a must be finite weights"):
            w2_1d(x, x, torch.full((3,), bad))
