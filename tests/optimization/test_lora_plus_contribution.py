"""Contributions of the factors: the first-order change, the exact case of one example, and exponents in every size."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kexue_utils.optimization.lora_plus import (
    ContributionMeter,
    LoRALinear,
    coherence,
    coherence_ratio,
    coherent_ratio,
    contribution,
    feature_changes,
    first_order_change,
    incoherent_ratio,
    inject_lora,
    lecun_factors,
    lora_gradients,
    post_ratio,
    sgd_ratio,
    sign_contributions,
    sign_ratio,
    watch_contributions,
)
from tests.tolerances import assert_close

WIDTHS = (64, 128, 256, 512, 1024)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def regime(n, m, r, b, aligned, seeds=32):
    """X, D, A, B of independent draws; aligned: every D is a random combination of the rows of B."""
    g = generator(n + 7 * m + 13 * r)
    A, B = lecun_factors(n, m, r, generator=g, batch=(seeds,))
    X = torch.randn(seeds, b, n, generator=g, dtype=torch.float64)
    D = torch.randn(seeds, b, r if aligned else m, generator=g, dtype=torch.float64)
    return X, D @ B if aligned else D, A, B


def slope(sizes, values):
    """Of log₂ of the geometric mean over seeds."""
    return np.polyfit(np.log2(sizes), [value.log2().mean().item() for value in values], 1)[0]


def test_first_order_change_leaves_a_remainder_of_second_order():
    X, D0, A, B = regime(6, 5, 2, 4, False, seeds=1)
    Y = torch.randn(1, 4, 5, generator=generator(5), dtype=torch.float64)

    def loss(A, B):
        return 0.5 * (X @ A @ B - Y).square().sum((-2, -1))

    G_A, G_B = lora_gradients(X, X @ A @ B - Y, A, B)
    dA, dB = torch.randn_like(A), torch.randn_like(B)
    remainders = []
    for k in range(4, 11):
        eps = 2.0**-k
        exact = loss(A + eps * dA, B + eps * dB) - loss(A, B)
        remainders.append(((exact - first_order_change(G_A, G_B, eps * dA, eps * dB)) / eps**2).item())
    assert abs(remainders[-1] - remainders[-2]) < 0.01 * abs(remainders[-1])
    change = first_order_change(G_A, G_B, -0.1 * G_A.sign(), -0.3 * G_B.sign())
    assert_close(sum(sign_contributions(G_A, G_B, 0.1, 0.3)), change)


def test_ratio_makes_both_contributions_equal():
    X, D, A, B = regime(8, 6, 2, 5, False)
    G_A, G_B = lora_gradients(X, D, A, B)
    by_A, by_B = sign_contributions(G_A, G_B, 1.0, 1.0)
    assert_close(by_A, by_B * sign_ratio(G_A, G_B))
    steps = -G_A, -sgd_ratio(G_A, G_B)[:, None, None] * G_B
    zero = torch.zeros_like(G_A), torch.zeros_like(G_B)
    assert_close(first_order_change(G_A, G_B, steps[0], zero[1]), first_order_change(G_A, G_B, zero[0], steps[1]))


def test_ratio_of_one_example_is_made_of_norms_exactly():
    X, D, A, B = regime(9, 7, 3, 1, False)
    norms = [v.abs().sum((-2, -1)) for v in (X, X @ A, D @ B.mT, D)]
    found = coherence_ratio(X, D, A, B)
    assert_close(found, norms[0] / norms[1] * norms[2] / norms[3])
    assert_close(found, sign_ratio(*lora_gradients(X, D, A, B)))


@pytest.mark.parametrize(
    "varied, sizes, random, aligned",
    [
        ("n = m", WIDTHS, 0.5, 1.0),
        ("n", WIDTHS, 1.0, 1.0),
        ("m", WIDTHS, -0.5, 0.0),
        ("r", (2, 4, 8, 16, 32), -0.5, -1.0),
    ],
)
def test_exponents_of_the_ratio(varied, sizes, random, aligned):
    for b in (1, 16):
        for is_aligned, expected in ((False, random), (True, aligned)):
            values, laws, post = [], [], []
            for size in sizes:
                n, m, r = {"n = m": (size, size, 4), "n": (size, 256, 4), "m": (256, size, 4), "r": (256, 256, size)}[
                    varied
                ]
                values.append(sign_ratio(*lora_gradients(*regime(n, m, r, b, is_aligned))))
                laws.append(torch.tensor(coherent_ratio(n, r) if is_aligned else incoherent_ratio(n, m, r)))
                post.append(torch.tensor(post_ratio(n, m, r)))
            assert slope(sizes, laws) == pytest.approx(expected, abs=1e-6)
            found = slope(sizes, values)
            # an aligned D of few rows is not yet in the limit of many ranks
            assert found == pytest.approx(expected, abs=0.15 if varied == "r" else 0.08)
            if varied in ("n", "m"):  # where the post's (n/m)√(n/r) says 1.5 and −1
                assert abs(found - slope(sizes, post)) > 0.35


def test_coherence_between_nothing_and_all_of_it():
    for m in (64, 1024):
        _, D, _, B = regime(8, m, 4, 16, False)
        assert coherence(B, D).mean().item() == pytest.approx((torch.pi / 2 / m) ** 0.5, rel=0.1)
        _, D, _, B = regime(8, m, 4, 16, True)
        assert 0.4 < coherence(B, D).mean() < 0.8
    _, D, _, B = regime(8, 4096, 1, 1, True)
    assert coherence(B, D).mean().item() == pytest.approx(torch.pi / 2, rel=0.05)
    _, D, _, B = regime(8, 64, 4, 16, False)
    orthogonal = D - D @ torch.linalg.pinv(B) @ B
    assert coherence(B, orthogonal).max() < 1e-12


def test_sgd_exponents_double():
    for is_aligned, expected in ((False, 1.0), (True, 2.0)):
        values = [sgd_ratio(*lora_gradients(*regime(n, n, 4, 1, is_aligned))) for n in WIDTHS]
        assert slope(WIDTHS, values) == pytest.approx(expected, abs=0.08)


def test_feature_changes_scale_as_width_constant_and_width():
    for b, tolerance in ((1, 0.05), (16, 0.08)):
        changes = zip(
            *(feature_changes(*(regime(n, n, 4, b, False)[i] for i in (0, 1, 2, 3))) for n in WIDTHS), strict=True
        )
        for values, expected in zip(changes, (1.0, 0.0, 1.0), strict=True):
            assert slope(WIDTHS, values) == pytest.approx(expected, abs=tolerance)
    X, D, A, B = regime(9, 7, 3, 1, False)
    G_A, _ = lora_gradients(X, D, A, B)
    assert_close(X @ G_A.sign(), X.abs().sum(-1, keepdim=True) * (D @ B.mT).sign())
    X, D, A, B = regime(9, 7, 3, 4, False)  # several examples: means over them too
    G_A, G_B = lora_gradients(X, D, A, B)
    moved = X @ G_A.sign(), X @ A @ G_B.sign(), X @ G_A.sign() @ B
    for found, change in zip(feature_changes(X, D, A, B), moved, strict=True):
        assert_close(found, change.abs().mean((-2, -1)))


def test_batches_of_one_step_add_up():
    X, D, A, B = regime(9, 7, 3, 12, False)
    whole = contribution((A, B), X, D)
    meter = ContributionMeter(A, B)
    for part in (slice(0, 5), slice(5, 12)):
        meter.update(X[:, part], D[:, part])
    for found, expected in zip(meter.result(), whole, strict=True):
        assert_close(found, expected)
    assert_close(whole.coherence, coherence(B, D))
    assert_close(whole.suggested_ratio, whole.l1_A / whole.l1_B)
    averaged = contribution((A[0], B[0]), X[:1], D[:1])  # dimensions that only x has are examples
    assert_close(averaged.l1_A, whole.l1_A[0])


def test_watching_a_model_gives_the_norms_of_its_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    inject_lora(model, lambda name, module: True, 2, alpha=3.0, init="B")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    with watch_contributions(model) as meters:
        for part in x:  # gradients accumulate, and so do the meters
            model(part).square().sum().backward()
    for name in ("0", "2"):
        layer, found = model.get_submodule(name), meters[name].result()
        assert_close(found.l1_A, layer.lora_A.grad.abs().sum())
        assert_close(found.l1_B, layer.lora_B.grad.abs().sum())
        assert 0 < found.coherence < 2
    layer = model.get_submodule("0")
    with watch_contributions(layer) as named:
        layer(x=x).sum().backward()
    assert_close(named[""].result().l1_A, contribution(layer, x, torch.ones(4, 5, 8, dtype=x.dtype)).l1_A)
    before = copy.deepcopy(meters["0"].total)
    model(x).sum().backward()
    assert torch.equal(meters["0"].total, before)  # the hooks are gone
    one = contribution(model[2], torch.randn(5, 8), torch.randn(5, 3))
    assert one.l1_A.dtype == torch.float64 and one.l1_A.shape == ()


def test_what_cannot_be_measured_is_named():
    A, B = lecun_factors(6, 4, 2, generator=generator())
    with pytest.raises(
        ValueError, match=r"x and grad_y must be \(..., b, 6\) and \(..., b, 4\), got \(3, 5\) and \(3, 4\)"
    ):
        contribution((A, B), torch.ones(3, 5), torch.ones(3, 4))
    with pytest.raises(ValueError, match="no batch yet"):
        ContributionMeter(A, B).result()
    with pytest.raises(ValueError, match="no adapters"), watch_contributions(nn.Linear(3, 3)):
        pass
    fresh = contribution(LoRALinear.wrap(nn.Linear(6, 4), 2), torch.randn(3, 6), torch.randn(3, 4))
    assert fresh.suggested_ratio == 0 and fresh.coherence.isnan()  # only B moves in the first step
