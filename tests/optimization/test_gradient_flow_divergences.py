"""f-divergences: derivatives, first variations and dissipation, against autograd, sympy and finite differences."""

import pytest
import sympy
import torch

from kexue_utils.optimization.gradient_flow import DIVERGENCES, FokkerPlanck, f_divergence
from tests.tolerances import assert_close

X = torch.linspace(-12, 12, 4801, dtype=torch.float64)
DX = 0.005
R = torch.linspace(0.05, 6, 50, dtype=torch.float64)

# The divergence of p from q as an integrand in p and q, and the two fields, as a textbook has them.
TEXTBOOK = {
    "kl_qp": lambda p, q: q * (q / p).log(),
    "kl_pq": lambda p, q: p * (p / q).log(),
    "chi2_qp": lambda p, q: (q - p) ** 2 / p,
    "chi2_pq": lambda p, q: (p - q) ** 2 / q,
    "hellinger": lambda p, q: (p.sqrt() - q.sqrt()) ** 2,
    "jensen_shannon": lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()) / 2,
}
r = sympy.Symbol("r", positive=True)
TABLE = {  # first variation, gain
    "kl_qp": (-sympy.log(r) + 1, 1 / r),
    "kl_pq": (-r, sympy.Integer(1)),
    "chi2_qp": (2 / r - 1, 2 / r**2),
    "chi2_pq": (1 - r**2, 2 * r),
    "hellinger": (1 - sympy.sqrt(r), 1 / (2 * sympy.sqrt(r))),
    "jensen_shannon": (sympy.log(2 / (1 + r)) / 2, 1 / (2 * (1 + r))),
}


def normal(m, s):
    return torch.exp(-((X - m) ** 2) / (2 * s * s)) / (s * (2 * torch.pi) ** 0.5)


P, Q = normal(0.0, 1.0), normal(0.7, 1.2)  # q has the heavier tails: χ²(p‖q) is finite


def test_registry():
    assert tuple(TEXTBOOK) == tuple(TABLE) == DIVERGENCES
    with pytest.raises(ValueError, match="name must be one of kl_qp, kl_pq, .*, got 'kl'"):
        f_divergence("kl")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_definition(name):
    """q f(p/q) is the textbook's integrand, up to a multiple of p − q; f(1) = 0, f'' > 0."""
    divergence = f_divergence(name)
    assert divergence.name == name
    p, q = (density[X.abs() < 6] for density in (P, Q))
    linear = q - p if name == "chi2_qp" else 0
    assert_close(q * divergence.f(p / q), TEXTBOOK[name](p, q) + linear, scale=10)
    assert divergence.f(torch.ones(1, dtype=torch.float64)) == 0 and (divergence.gain(R) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_derivatives(name):
    r = R.clone().requires_grad_()
    f, df, d2f = f_divergence(name).derivatives(r)
    (first,) = torch.autograd.grad(f.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert_close(df, first, scale=10)
    assert_close(d2f, second, scale=10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_table(name):
    """The fields are those of the table, and v = −∇(δD/δq) by sympy."""
    divergence, (variation, gain) = f_divergence(name), TABLE[name]
    assert sympy.simplify(-sympy.diff(variation, r) - gain) == 0
    values = [[float(expression.subs(r, value)) for value in R.tolist()] for expression in (variation, gain)]
    expected = torch.tensor(values, dtype=torch.float64)
    offset = (divergence.first_variation(R) - expected[0]).mean()  # defined up to a constant
    assert_close(divergence.first_variation(R) - offset, expected[0], scale=10)
    assert_close(divergence.gain(R), expected[1], scale=10)
    slopes = torch.stack((R, -R), -1)
    assert_close(divergence.velocity(R, slopes), expected[1][:, None] * slopes, scale=10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_first_variation(name):
    """d/dε D[q + εη] = ∫ δD/δq η for an η of no mass."""
    divergence = f_divergence(name)
    eta = Q * torch.sin(X)
    eta = eta - Q * (eta.sum() / Q.sum())
    inside = X.abs() < 6

    def value(q):
        return (q * divergence.f(P / q))[inside].sum() * DX

    change = (value(Q + 1e-4 * eta) - value(Q - 1e-4 * eta)) / 2e-4
    expected = (divergence.first_variation(P / Q) * eta)[inside].sum() * DX
    assert change.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_dissipation(name):
    """dD/dt = −∫q|v|² along ∂q/∂t = −∇·(qv), by central differences."""
    divergence = f_divergence(name)
    ratio = P / Q
    slope = ratio * (-X + (X - 0.7) / 1.44)  # r' = r (log p − log q)'
    v = divergence.velocity(ratio, slope[:, None])[:, 0]
    flux = torch.where(X.abs() < 5, 1, 0) * Q * v * torch.exp(-((X / 4) ** 8))  # cut off where χ²(q‖p) grows
    dq = -torch.gradient(flux, spacing=DX)[0]

    def value(q):
        return (q * divergence.f(P / q)).nan_to_num()[X.abs() < 5.5].sum() * DX

    change = (value(Q + 1e-5 * dq) - value(Q - 1e-5 * dq)) / 2e-5
    assert change.item() == pytest.approx(-(flux * v).sum().item() * DX, rel=2e-4)


def test_kl_alone_gives_fokker_planck():
    """q r f''(r)∇r = q∇log r, and −∇·(qv) = ∇·(q∇V) + ∆q: linear in q, and what the grid solver solves."""
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    q, p = torch.exp(-((x - 0.5) ** 2)), torch.exp(-(x**2) / 2)
    slope = p / q * (-x + 2 * (x - 0.5))
    v = f_divergence("kl_qp").velocity(p / q, slope[:, None])[:, 0]
    L = FokkerPlanck([x.numpy()], lambda x: x**2 / 2).generator()
    expected = torch.from_numpy(L @ q.numpy())
    torch.testing.assert_close(-torch.gradient(q * v, spacing=0.01)[0][1:-1], expected[1:-1], rtol=0, atol=1e-3)
