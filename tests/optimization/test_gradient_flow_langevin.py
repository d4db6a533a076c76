"""Langevin sampling: moments against the exact recursions, the transition law of MALA, errors."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kexue_utils.optimization.gradient_flow import GaussianTarget, langevin, log_proposal, w2_1d
from tests.tolerances import assert_close

COV = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
TARGET = GaussianTarget(COV)


def score(x):
    return -x @ TARGET.A.to(x.dtype)


def logp(x):
    return (x * score(x)).sum(-1) / 2


def well(x):
    return -((x**2 - 1) ** 2).sum(-1)


def well_score(x):
    return -4 * x * (x**2 - 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def start(n, m, S, seed=9):
    """n draws of N(m, S)."""
    z = torch.randn(n, len(m), generator=seeded(seed), dtype=torch.float64)
    return torch.tensor(m, dtype=torch.float64) + z @ torch.linalg.cholesky(torch.as_tensor(S, dtype=torch.float64)).mT


def assert_moments(x, m, S):
    """Within 5 standard errors."""
    n, variances = len(x), S.diagonal()
    assert ((x.mean(0) - m).abs() < 5 * (variances / n).sqrt()).all()
    assert ((x.T.cov() - S).abs() < 5 * ((variances[:, None] * variances + S**2) / n).sqrt()).all()


def test_one_step_is_its_formula():
    x = start(100, [0.0, 1.0], torch.eye(2).double())
    noise = torch.empty_like(x).normal_(generator=seeded(3))
    found = langevin(score, x, 0.1, 1, generator=seeded(3))
    torch.testing.assert_close(found.samples[0], x + 0.1 * score(x) + math.sqrt(0.2) * noise, rtol=0, atol=1e-15)
    assert found.acceptance == 1


def test_moments_of_ula_follow_the_exact_recursion():
    m, S = torch.tensor([1.2, -1.0], dtype=torch.float64), torch.diag(torch.tensor([0.15, 0.4], dtype=torch.float64))
    x = langevin(score, start(50_000, m.tolist(), S), 0.1, 30, generator=seeded(), thin=30).samples[0]
    for _ in range(30):
        m, S = TARGET.ula_step(m, S, 0.1)
    assert_moments(x, m, S)


def test_moments_of_small_steps_follow_the_flow():
    """Bias O(h) below 3 standard errors."""
    m, S = [1.2, -1.0], torch.diag(torch.tensor([0.15, 0.4], dtype=torch.float64))
    x = langevin(score, start(20_000, m, S), 0.005, 100, generator=seeded(), thin=100).samples[0]
    m_t, S_t = TARGET.ou_marginal(m, S, 0.5)
    assert (x.mean(0) - m_t).abs().max() < 0.03 and (x.T.cov() - S_t).abs().max() < 0.04


def test_stationary_bias_of_ula_and_none_of_mala():
    """h = 0.5, σ² = 2: 2.2857 against 2."""
    x = start(100_000, [0.0], [[2.0]])
    x = langevin(lambda x: -x / 2, x, 0.5, 40, generator=seeded(), thin=40).samples[0]
    assert_moments(x, torch.zeros(1), torch.tensor([[2 / (1 - 0.125)]], dtype=torch.float64))
    assert (x.var() - 2) > 20 * 2 * math.sqrt(2 / 100_000)
    x = start(100_000, [0.0], [[2.0]])
    run = langevin(lambda x: -x / 2, x, 0.5, 40, "mala", lambda x: -(x**2).sum(-1) / 4, seeded(), 40)
    assert_moments(run.samples[0], torch.zeros(1), torch.tensor([[2.0]], dtype=torch.float64))
    assert 0.8 < run.acceptance < 1


def transition_counts(x, new, edges):
    """How many particles go from cell i to cell j, as a share of all."""
    cells = [np.digitize(z.numpy().ravel(), edges) for z in (x, new)]
    return np.histogram2d(*cells, bins=np.arange(len(edges) + 2))[0] / len(x)


@pytest.mark.parametrize("method, reversible", [("mala", True), ("ula", False)])
def test_detailed_balance(method, reversible):
    """One step from exact draws of a skewed law goes from i to j as often as back; ULA's does not."""
    z = torch.randn(400_000, 1, generator=seeded(1), dtype=torch.float64)
    x = torch.exp(z / 2)  # log-normal

    def log_density(x):
        safe = x.clamp(min=1e-6)
        return torch.where(x > 1e-6, -2 * safe.log() ** 2 - safe.log(), -math.inf)[:, 0]

    def gradient(x):
        return -(4 * x.clamp(min=1e-6).log() + 1) / x.clamp(min=1e-6)

    new = langevin(gradient, x, 0.05, 1, method, log_density, seeded(2)).samples[0]
    counts = transition_counts(x, new, np.array([0.5, 0.75, 1.0, 1.4, 2.0]))
    error = np.sqrt((counts + counts.T + 1e-9) / len(x))
    z_scores = np.abs(counts - counts.T) / error
    assert (z_scores.max() < 5) == reversible


def test_acceptance_is_that_of_quadrature():
    """E min(1, ratio) for (x²−1)², h = 0.02, from a point, by integrating over the noise."""
    h, x = 0.02, torch.tensor([[1.4]], dtype=torch.float64)
    noise = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    y = x + h * well_score(x) + math.sqrt(2 * h) * noise
    back = norm.logpdf(x.numpy(), (y + h * well_score(y)).numpy(), math.sqrt(2 * h))[:, 0]
    ahead = norm.logpdf(y.numpy(), (x + h * well_score(x)).numpy(), math.sqrt(2 * h))[:, 0]
    ratio = np.exp((well(y) - well(x)).numpy() + back - ahead)
    expected = (np.minimum(1, ratio) * norm.pdf(noise[:, 0].numpy())).sum() * 16 / 20_000
    run = langevin(well_score, x.expand(100_000, 1), h, 1, "mala", well, seeded())
    assert abs(run.acceptance.item() - expected) < 5 * math.sqrt(expected * (1 - expected) / 100_000)
    assert expected < 0.99


def kernel_residuals(h):
    """|pP − p| in L1 for Metropolis with and without the proposal ratio: (x²−1)² on 241 nodes of [−3, 3]."""
    x = torch.linspace(-3, 3, 241, dtype=torch.float64)[:, None]
    log_p, g = well(x), well_score(x)
    p = log_p.softmax(0)
    log_k = log_proposal(x[:, None], x, g[:, None], h)
    k = log_k.exp() / log_k.exp().sum(1).max()  # the rows of nodes near the ends lose mass: it stays where it is
    for log_ratio in (log_p - log_p[:, None] + log_k.T - log_k, log_p - log_p[:, None]):
        P = k * log_ratio.exp().clamp(max=1)
        P = P - torch.diag(P.diagonal())
        P = P + torch.diag(1 - P.sum(1))
        yield (p @ P - p).abs().sum()


def test_proposal_ratio_makes_the_law_stationary():
    corrected, dropped = kernel_residuals(0.02)
    assert corrected < 1e-14 and dropped.item() == pytest.approx(0.080, abs=5e-3)


def test_proposal_is_a_normal_density():
    x, y, g = (start(4, [0.0, 1.0], torch.eye(2), seed) for seed in range(3))
    density = torch.distributions.Normal(x + 0.3 * g, math.sqrt(0.6)).log_prob(y).sum(-1)
    found = log_proposal(x, y, g, 0.3) - log_proposal(x, x + 0.3 * g, g, 0.3)
    assert_close(found, density + math.log(2 * math.pi * 0.6))


def test_ula_bias_on_a_double_well_is_first_order():
    """W₂ to the exact law, over many steps from an exact start; the bias of h = 0.025 is 0.0255."""
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    p = torch.exp(well(grid[:, None]))
    z = torch.rand(20_000, 1, generator=seeded(), dtype=torch.float64)
    x = grid[torch.searchsorted(p.cumsum(0) / p.sum(), z)]
    samples = langevin(well_score, x, 0.025, 400, generator=seeded(5), thin=20).samples[5:]
    assert w2_1d(samples.flatten(), grid, None, p).sqrt().item() == pytest.approx(0.0255, rel=0.25)
    assert w2_1d(x[:, 0], grid, None, p).sqrt() < 0.02


def test_thinning_and_dtypes():
    x = start(10, [0.0, 0.0], torch.eye(2).double())
    before = x.clone()
    for method in ("ula", "mala"):
        every = langevin(score, x, 0.1, 7, method, logp, seeded())
        third = langevin(score, x, 0.1, 7, method, logp, seeded(), 3)
        assert every.samples.shape == (7, 10, 2) and torch.equal(third.samples, every.samples[[2, 5]])
        assert torch.equal(third.acceptance, every.acceptance) and torch.equal(x, before)
        assert langevin(score, x.float(), 0.1, 2, method, logp, seeded()).samples.dtype == torch.float32


# errors


def test_divergence_names_the_step():
    """(x²−1)² with h = 0.05: the map expands beyond √11 = 3.32."""
    x = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    calls = []

    def counted(x):
        calls.append(bool(torch.isfinite(x).all()))
        return well_score(x)

    with pytest.raises(FloatingPointError, match=r"ula diverges: x is not finite after step (\d+) of 100") as error:
        langevin(counted, x, 0.05, 100, generator=seeded())
    assert f"after step {sum(calls)} of" in str(error.value)
    assert langevin(well_score, x[:1], 0.05, 100, generator=seeded()).samples.isfinite().all()


def test_mala_does_not_diverge():
    x = torch.tensor([[0.0], [4.0], [40.0]], dtype=torch.float64)
    run = langevin(well_score, x, 0.05, 300, "mala", well, seeded())
    assert run.samples.isfinite().all()


def test_a_start_that_is_not_finite():
    x = torch.tensor([[math.nan]], dtype=torch.float64)
    for method in ("ula", "mala"):
        with pytest.raises(FloatingPointError, match="after step 1 of 3"):
            langevin(well_score, x, 0.1, 3, method, well, seeded())


def test_bad_arguments():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="logp is required for method 'mala'"):
        langevin(score, x, 0.1, 1, "mala")
    with pytest.raises(ValueError, match="method must be one of ula, mala, got 'hmc'"):
        langevin(score, x, 0.1, 1, "hmc")
    for h in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="h must be positive"):
            langevin(score, x, h, 1)
    for bad in (x[0], x[None], x.long()):
        with pytest.raises(ValueError, match=r"x must be floating-point particles of shape \(N, d\)"):
            langevin(score, bad, 0.1, 1)
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        langevin(score, x, 0.1, 0)
    with pytest.raises(ValueError, match="thin must be a positive integer, got 0"):
        langevin(score, x, 0.1, 1, thin=0)
    with pytest.raises(ValueError, match="thin must be at most steps = 2, got 3"):
        langevin(score, x, 0.1, 2, thin=3)
