"""Gaussian targets: each closed form against an independent route, and the numbers that the chapter quotes."""

import pytest
import torch
from scipy.integrate import solve_ivp

from kexue_utils.optimization.gradient_flow import GaussianTarget, bures_w2
from tests.tolerances import assert_close

T1 = GaussianTarget(cov=[[2.0]])
M1, S1 = torch.tensor([1.5], dtype=torch.float64), torch.tensor([[0.09]], dtype=torch.float64)


def spd(rng, *batch, d=3):
    """Random, with eigenvalues above 0.2; no two commute."""
    root = torch.randn(*batch, d, d, generator=rng, dtype=torch.float64)
    return root @ root.mT + 0.2 * torch.eye(d, dtype=torch.float64)


def case(seed, *batch, d=3):
    """A target, and mean and covariance of a start."""
    rng = torch.Generator().manual_seed(seed)
    mean, m = (torch.randn(*batch, d, generator=rng, dtype=torch.float64) for _ in range(2))
    return GaussianTarget(spd(rng, *batch, d=d), mean), m, spd(rng, *batch, d=d)


def repeat(step, m, S, n, *args):
    for _ in range(n):
        m, S = step(m, S, *args)
    return m, S


# the flow


def test_flow_solves_its_equations():
    """dm/dt = −A(m−μ), dΣ/dt = −AΣ − ΣA + 2I, integrated by scipy."""
    target, m, S = case(0)
    A, mean = target.A.numpy(), target.mean.numpy()

    def rhs(t, y):
        cov = y[3:].reshape(3, 3)
        return [*(-A @ (y[:3] - mean)), *(-A @ cov - cov @ A + 2 * torch.eye(3).numpy()).ravel()]

    start = [*m.tolist(), *S.flatten().tolist()]
    ts = torch.tensor([0.3, 2.0], dtype=torch.float64)
    solved = torch.from_numpy(solve_ivp(rhs, (0, 2), start, "DOP853", ts, rtol=1e-12, atol=1e-13).y.T)
    m_t, S_t = target.ou_marginal(m, S, ts)
    torch.testing.assert_close(torch.cat((m_t, S_t.flatten(1)), 1), solved, rtol=1e-10, atol=1e-10)  # scipy's own error


def test_flow_of_one_dimension():
    m, S = T1.ou_marginal(M1, S1, 1.0)
    decay = torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    assert_close(m, M1 * decay)
    assert_close(S, 2 + (S1 - 2) * decay**2)


def test_flow_is_a_semigroup():
    target, m, S = case(1, 4)
    assert_close(torch.cat([x.flatten() for x in target.ou_marginal(*target.ou_marginal(m, S, 0.4), 0.7)]),
                 torch.cat([x.flatten() for x in target.ou_marginal(m, S, 1.1)]), scale=10)  # fmt: skip


def test_kl_falls_at_the_rate_of_the_fisher_information():
    target, m, S = case(2)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    marginal = target.ou_marginal(m, S, t)
    (rate,) = torch.autograd.grad(target.kl(*marginal), t)
    assert_close(-rate, target.fisher_information(*marginal).detach(), scale=100)  # chain of two inverses


def test_kl_is_that_of_torch():
    target, m, S = case(3, 5)
    normal = torch.distributions.MultivariateNormal
    expected = torch.distributions.kl_divergence(normal(m, S), normal(target.mean, target.cov))
    assert_close(target.kl(m, S), expected, scale=10)


def test_log_sobolev_talagrand_and_exponential_decay():
    """With λ the least eigenvalue of A; the shifted target attains all three."""
    target, m, S = case(4, 200)
    lam = torch.linalg.eigvalsh(target.A).min(-1).values
    kl, later = target.kl(m, S), target.kl(*target.ou_marginal(m, S, 0.8))
    assert (kl <= target.fisher_information(m, S) / (2 * lam)).all()
    assert (bures_w2(m, S, target.mean, target.cov) <= 2 / lam * kl).all()
    assert (later <= torch.exp(-2 * lam * 0.8) * kl).all()

    shifted = T1.kl(M1, T1.cov)
    assert_close(T1.fisher_information(M1, T1.cov), 2 * 0.5 * shifted)
    assert_close(bures_w2(M1, T1.cov, T1.mean, T1.cov), 2 / 0.5 * shifted)
    ratio = T1.kl(*T1.ou_marginal(M1, T1.cov, 3.0)) / shifted
    assert_close(ratio, torch.exp(torch.tensor(-3.0, dtype=torch.float64)))


@pytest.mark.parametrize("m, rate", [(1.5, 1.0), (0.0, 2.0)])
def test_late_rates_are_those_of_the_first_two_modes(m, rate):
    """A wrong mean decays at 2/σ², a wrong variance alone at 4/σ²."""
    start = torch.tensor([m], dtype=torch.float64)
    kl = T1.kl(*T1.ou_marginal(start, S1, torch.tensor([6.0, 7.0], dtype=torch.float64)))
    assert torch.log(kl[0] / kl[1]).item() == pytest.approx(rate, abs=5e-3)


# JKO


def objective(target, m, S, m0, S0, tau):
    return bures_w2(m, S, m0, S0) / (2 * tau) + target.kl(m, S)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("tau", [1e-3, 0.3, 1.0, 100.0])
def test_jko_step_satisfies_its_equation(d, tau):
    """R S' R = S with R = I + τA − τS'⁻¹ ≻ 0, and (I+τA)(m'−μ) = m−μ."""
    target, m, S = case(d, 20, d=d)
    m_new, S_new = target.jko_step(m, S, tau)
    R = target.eye + tau * target.A - tau * torch.linalg.inv(S_new)
    assert (torch.linalg.eigvalsh((R + R.mT) / 2) > 0).all()
    # relative to tau: R is a difference of terms of that size
    assert_close(R @ S_new @ R / (1 + tau) ** 2, S / (1 + tau) ** 2, scale=1000)
    assert_close(target.mean + ((target.eye + tau * target.A) @ (m_new - target.mean)[..., None])[..., 0], m, scale=100)


@pytest.mark.parametrize("tau", [1e-3, 1.0, 100.0])
def test_jko_step_minimises(tau):
    target, m, S = case(5)
    m_new, S_new = target.jko_step(m, S, tau)
    least = objective(target, m_new, S_new, m, S, tau)
    rng = torch.Generator().manual_seed(0)
    size = 10 ** torch.empty(2000, 1, 1, dtype=torch.float64).uniform_(-4, 0, generator=rng)
    root = target.eye + size * torch.randn(2000, 3, 3, generator=rng, dtype=torch.float64)
    shift = size[:, 0] * torch.randn(2000, 3, generator=rng, dtype=torch.float64)
    others = objective(target, m_new + shift, root @ S_new @ root.mT, m, S, tau)
    assert (others - least).min() >= -1e-13 * (1 + 1 / tau)  # rounding of W₂² near 0
    assert (others > least).double().mean() > 0.99


def test_jko_step_of_one_dimension():
    """The root of (1+τ/σ²)s'² − ss' − τ = 0."""
    tau, s = 0.7, 0.3
    B = 1 + tau / 2
    _, S = T1.jko_step(M1, S1, tau)
    assert S.sqrt().item() == pytest.approx((s + (s * s + 4 * tau * B) ** 0.5) / (2 * B), rel=1e-13)


def test_jko_is_of_first_order():
    """The errors and orders at T = 1 that the chapter quotes."""
    exact = T1.ou_marginal(M1, S1, 1.0)
    ns = [10, 20, 40, 80, 160]
    errors = [bures_w2(*repeat(T1.jko_step, M1, S1, n, 1 / n), *exact).sqrt().item() for n in ns]
    assert errors == pytest.approx([3.459e-2, 1.798e-2, 9.196e-3, 4.656e-3, 2.343e-3], rel=3e-4)
    orders = torch.tensor(errors).log2().diff().neg()
    torch.testing.assert_close(orders, torch.tensor([0.944, 0.967, 0.982, 0.990]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tau", [1e-3, 1.0, 100.0])
def test_jko_descends(tau):
    """KL' + W₂²/2τ ≤ KL for any F, and KL' + (1/τ + λ/2) W₂² ≤ KL for this convex one."""
    target, m, S = case(6, 100)
    new = target.jko_step(m, S, tau)
    lam = torch.linalg.eigvalsh(target.A).min(-1).values
    drop, moved = target.kl(m, S) - target.kl(*new), bures_w2(*new, m, S)
    assert (drop >= moved / (2 * tau)).all()
    assert (drop >= (1 / tau + lam / 2) * moved - 1e-12).all()


@pytest.mark.parametrize("tau, by", [(1e-3, 1.0e-2), (1.0, 3.0e-2)])
def test_jko_descends_by_no_more_than_that(tau, by):
    """The wrong 2W₂²/τ is violated by what the chapter says."""
    new = T1.jko_step(M1, S1, tau)
    excess = T1.kl(*new) + 2 / tau * bures_w2(*new, M1, S1) - T1.kl(M1, S1)
    assert excess.item() == pytest.approx(by, abs=5e-4)


@pytest.mark.parametrize("n, ratio", [(10, 0.868), (100, 0.982), (1000, 0.998)])
def test_dissipation_of_jko_tends_to_that_of_the_flow(n, ratio):
    """Σ W₂²/τ over the drop of KL, T = 1."""
    m, S, moved = M1, S1, 0.0
    for _ in range(n):
        new = T1.jko_step(m, S, 1 / n)
        moved, (m, S) = moved + bures_w2(*new, m, S) * n, new
    assert (moved / (T1.kl(M1, S1) - T1.kl(m, S))).item() == pytest.approx(ratio, abs=6e-4)


# split steps, Langevin, entropic plans


@pytest.mark.parametrize("h", [0.5, 0.25, 0.125])
def test_forward_backward_has_no_bias_and_ula_has(h):
    _, S = repeat(T1.fb_step, M1, S1, 400, h)
    assert_close(S, T1.cov, scale=10)
    _, S = repeat(T1.ula_step, M1, S1, 400, h)
    assert_close(S, T1.ula_stationary(h), scale=10)
    assert S.item() == pytest.approx(2 / (1 - h / 4), rel=1e-12)


@pytest.mark.parametrize(("h", "variance"), [(2.0, 2.0), (2.5, 10 / 3), (3.0, 6.0)])
def test_forward_backward_has_a_bias_beyond_the_least_variance(h, variance):
    _, S = repeat(T1.fb_step, M1, S1, 400, h)
    assert S.item() == pytest.approx(variance, rel=1e-9)


def test_stationary_covariances_of_three_dimensions():
    target, m, S = case(7)
    h = 0.5 / torch.linalg.eigvalsh(target.A).max().item()
    m_end, S_end = target.fb_step(target.mean, target.cov, h)
    assert_close(torch.cat((m_end[None], S_end)), torch.cat((target.mean[None], target.cov)), scale=10)
    stationary = target.ula_stationary(h)
    m_end, S_end = target.ula_step(target.mean, stationary, h)
    assert_close(torch.cat((m_end[None], S_end)), torch.cat((target.mean[None], stationary)), scale=10)


def test_forward_backward_is_a_forward_step_and_a_jko_step_of_the_entropy():
    """The backward half: a JKO step towards a target so wide that it is flat."""
    target, m, S = case(8)
    h = 0.4
    step = target.eye - h * target.A
    flat = GaussianTarget(1e13 * torch.eye(3))
    _, expected = flat.jko_step(m, step @ S @ step, h)
    assert_close(target.fb_step(m, S, h)[1], expected, scale=10)


def test_noise_of_one_ula_step():
    target, m, S = case(9)
    rng = torch.Generator().manual_seed(1)
    x = m + torch.randn(200_000, 3, generator=rng, dtype=torch.float64) @ torch.linalg.cholesky(S).mT
    x = x - 0.1 * (x - target.mean) @ target.A + 0.2**0.5 * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    m_new, S_new = target.ula_step(m, S, 0.1)
    variances = S_new.diagonal()
    assert ((x.mean(0) - m_new).abs() < 5 * (variances / len(x)).sqrt()).all()
    spread = (variances[:, None] * variances + S_new**2).sqrt() / len(x) ** 0.5
    assert ((x.T.cov() - S_new).abs() < 5 * spread).all()


def test_entropic_step_solves_its_equation():
    tau, eps = 0.3, torch.tensor([1e-4, 0.05, 1.0])
    for value in eps.tolist():
        _, v = T1.entropic_jko_step_1d(1.5, 0.25, tau, value)
        M = 1 + tau / 2 - tau / v
        assert M > 0
        assert v.item() == pytest.approx((0.25 / M**2 + value / (2 * M)).item(), rel=1e-12)


def test_entropic_step_without_entropy_is_jko():
    m, S = T1.jko_step(M1, S1, 0.4)
    m_e, v_e = T1.entropic_jko_step_1d(M1, S1[0], 0.4, 0.0)
    assert_close(m_e, m)
    assert_close(v_e, S[0])


@pytest.mark.parametrize("eps, variance", [(0.2, 3.0083), (0.1, 2.5025), (0.05, 2.2507)])
def test_entropic_bias(eps, variance):
    _, v = repeat(T1.entropic_jko_step_1d, M1, S1[0], 3000, 0.1, eps)
    assert v.item() == pytest.approx(variance, abs=5e-5)
    assert v.item() == pytest.approx(2 * (1 + eps / 0.4), rel=3e-3)


# interface


def test_batches_are_loops():
    target, m, S = case(10, 4)
    for name, argument in [("ou_marginal", 0.3), ("jko_step", 0.3), ("fb_step", 0.1), ("ula_step", 0.1)]:
        batched = getattr(target, name)(m, S, argument)
        for i in range(4):
            single = getattr(GaussianTarget(target.cov[i], target.mean[i]), name)(m[i], S[i], argument)
            for a, b in zip(batched, single, strict=True):
                assert_close(a[i], b, scale=10)


def test_steps_are_differentiable():
    target, m, S = case(11, d=2)

    def step(m, root):
        return target.jko_step(m, root @ root.mT, 0.3)

    root = torch.linalg.cholesky(S).requires_grad_()
    assert torch.autograd.gradcheck(step, (m.requires_grad_(), root))


@pytest.mark.parametrize("cov", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.1], [0.2, 1.0]], [[1.0, 0.0]], [[0.0]], 1.0,
                                 [[float("nan")]]])  # fmt: skip
def test_bad_covariances(cov):
    with pytest.raises(ValueError, match="covariance must be symmetric positive definite"):
        GaussianTarget(cov)


def test_bad_arguments():
    bad = torch.tensor([[-1.0]], dtype=torch.float64)
    for call in (lambda: T1.kl(M1, bad), lambda: T1.jko_step(M1, bad, 0.1), lambda: T1.ou_marginal(M1, bad, 0.1)):
        with pytest.raises(ValueError, match="S must be symmetric positive definite"):
            call()
    with pytest.raises(ValueError, match="C2 must be symmetric positive definite"):
        bures_w2(M1, S1, M1, bad)
    for step, name in ((T1.jko_step, "tau"), (T1.fb_step, "h"), (T1.ula_step, "h")):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} must be positive"):
                step(M1, S1, value)
    with pytest.raises(ValueError, match="tau must be positive"):
        T1.entropic_jko_step_1d(1.0, 1.0, 0.0, 0.1)
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        T1.entropic_jko_step_1d(1.0, 1.0, 0.1, -1.0)
    with pytest.raises(ValueError, match="v must be positive"):
        T1.entropic_jko_step_1d(1.0, 0.0, 0.1, 0.1)
    with pytest.raises(ValueError, match="one dimension, got 2"):
        GaussianTarget(torch.eye(2)).entropic_jko_step_1d(1.0, 1.0, 0.1, 0.1)


def test_ula_past_its_limit():
    with pytest.raises(ValueError, match=r"less than 2/lambda_max\(A\) = 4, got 4"):
        T1.ula_stationary(4.0)
    with pytest.raises(ValueError, match="h must be positive"):
        T1.ula_stationary(0.0)
    assert T1.ula_stationary(3.999) > 1000
