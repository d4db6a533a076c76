import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue_utils.attention.naive_bayes_attention import (
    combine_log_probs,
    conditionals_by_enumeration,
    dirac_limit_coefficient,
    exact_nb_world,
    in_context_posterior,
    kl_divergence,
    log_normalize,
    pool_objective,
    posterior_by_enumeration,
    softmax_laplacian,
    strict_naive_bayes,
)
from tests.tolerances import TOLERANCES, assert_close

INF = math.inf


def experts(seed, *shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).log_softmax(-1).to(dtype)


def every_history(V, t):
    histories = list(itertools.product(range(V), repeat=t - 1))
    return torch.tensor(histories, dtype=torch.long).reshape(len(histories), t - 1)


def gather(log_cond, histories):
    return log_cond[torch.arange(len(log_cond)), histories]


seeds = st.integers(0, 2**32 - 1)
steady = settings(derandomize=True, deadline=None, max_examples=30)


@steady
@given(seed=seeds, V=st.integers(2, 5), t=st.integers(1, 5))
def test_strict_naive_bayes_is_the_posterior_of_its_world(seed, V, t):
    joint = exact_nb_world(V, t, seed).log_joint()
    log_prior, log_cond = conditionals_by_enumeration(joint)
    exact = posterior_by_enumeration(joint).reshape(-1, V)
    pooled = strict_naive_bayes(gather(log_cond, every_history(V, t)), log_prior)
    assert_close(pooled.exp(), exact.exp())


def test_reference_world_of_the_chapter():
    joint = exact_nb_world(5, 4, 0).log_joint()
    log_prior, log_cond = conditionals_by_enumeration(joint)
    exact = posterior_by_enumeration(joint).reshape(-1, 5)
    pairs = gather(log_cond, every_history(5, 4))
    history = joint.logsumexp(-1).exp().reshape(-1)
    assert ((strict_naive_bayes(pairs, log_prior).exp() - exact.exp()).abs().max()) < 1e-14
    one_too_many = combine_log_probs(
        pairs, log_prior, weights=torch.ones(3, dtype=torch.float64), beta=3.0, normalize_weights=False
    )
    assert (one_too_many.exp() - exact.exp()).abs().max().item() == pytest.approx(0.81, abs=0.005)
    loss = (history * kl_divergence(exact, combine_log_probs(pairs))).sum()
    assert loss.item() == pytest.approx(0.180, abs=0.0005)


def test_joint_and_conditionals_sum_to_one():
    joint = exact_nb_world(3, 4, 1).log_joint()
    log_prior, log_cond = conditionals_by_enumeration(joint)
    one = torch.ones((), dtype=torch.float64)
    assert_close(joint.exp().sum(), one)
    assert_close(log_prior.exp().sum(), one)
    assert_close(log_cond.exp().sum(-1), one.expand(3, 3))


def test_worlds_are_those_of_their_seed():
    a, b, c = exact_nb_world(4, 3, 5), exact_nb_world(4, 3, 5), exact_nb_world(4, 3, 6)
    assert torch.equal(a.log_prior, b.log_prior) and torch.equal(a.log_likelihood, b.log_likelihood)
    assert not torch.equal(a.log_prior, c.log_prior)


def test_an_impossible_history_has_no_posterior():
    joint = torch.tensor([[0.25, 0.75], [0.0, 0.0]], dtype=torch.float64).log()
    assert torch.equal(posterior_by_enumeration(joint)[1], torch.full((2,), -INF, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_any_float_dtype_and_batch(dtype):
    log_cond, log_prior = experts(0, 2, 3, 4, 7), experts(1, 7)
    weights = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = combine_log_probs(log_cond.to(dtype), log_prior.to(dtype), weights=weights.to(dtype), beta=0.5)
    assert low.dtype == dtype and low.shape == (2, 3, 7)
    assert_close(low.double(), combine_log_probs(log_cond, log_prior, weights=weights, beta=0.5), dtype)
    strict = strict_naive_bayes(log_cond.to(dtype), log_prior.to(dtype))
    assert strict.dtype == dtype
    # A sum of four rounded log-probabilities carries four times the rounding.
    assert_close(strict.double(), strict_naive_bayes(log_cond, log_prior), dtype, scale=4)


def test_the_widest_dtype_wins():
    log_cond, log_prior = experts(0, 4, 7), experts(1, 7)
    assert combine_log_probs(log_cond.float(), log_prior, beta=1.0).dtype == torch.float64


@steady
@given(seed=seeds, J=st.integers(1, 6), V=st.integers(2, 6), beta=st.floats(-2, 5))
def test_combine_log_probs_is_its_formula(seed, J, V, beta):
    log_cond, log_prior = experts(seed, J, V), experts(seed + 1, V)
    w = experts(seed + 2, J).exp() * 3
    a = w / w.sum()
    pool = sum(a[j] * log_cond[j] for j in range(J))
    ruled = (1 + beta) * pool - beta * log_prior
    assert_close(combine_log_probs(log_cond, log_prior, weights=w, beta=beta, normalize=False), ruled)
    assert_close(combine_log_probs(log_cond, log_prior, weights=w, beta=beta).exp(), ruled.softmax(-1))
    as_given = sum(w[j] * log_cond[j] for j in range(J)) - beta * log_prior
    got = combine_log_probs(log_cond, log_prior, weights=w, beta=beta, normalize_weights=False, normalize=False)
    assert_close(got, as_given)


@steady
@given(seed=seeds, J=st.integers(1, 6), V=st.integers(2, 6))
def test_strict_naive_bayes_is_the_mean_pool_with_beta_one_less_than_the_experts(seed, J, V):
    log_cond, log_prior = experts(seed, J, V), experts(seed + 1, V)
    assert_close(strict_naive_bayes(log_cond, log_prior), combine_log_probs(log_cond, log_prior, beta=J - 1))


def test_experts_on_another_dimension():
    log_cond = experts(0, 2, 3, 4, 7)
    assert torch.equal(combine_log_probs(log_cond, dim=1), combine_log_probs(log_cond.transpose(1, 2)))
    assert torch.equal(combine_log_probs(log_cond, dim=-3), combine_log_probs(log_cond, dim=1))


@pytest.mark.parametrize("normalize_weights", [True, False])
def test_no_expert_leaves_the_prior(normalize_weights):
    none, log_prior = torch.zeros(2, 0, 5, dtype=torch.float64), experts(1, 5)
    got = combine_log_probs(none, log_prior, beta=2.0, normalize_weights=normalize_weights)
    assert_close(got, log_prior.expand(2, 5))
    assert_close(strict_naive_bayes(none, log_prior), log_prior.expand(2, 5))


def test_weight_zero_silences_a_veto():
    log_cond = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_close(combine_log_probs(log_cond, weights=weights), log_cond[1])
    vetoed = combine_log_probs(log_cond, weights=torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert vetoed[2] == -INF and vetoed[:2].isfinite().all()


@pytest.mark.parametrize("beta", [-1.0, 0.0, 2.0])
def test_what_the_prior_excludes_stays_excluded(beta):
    log_prior = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    pooled = combine_log_probs(experts(0, 2, 3), log_prior, beta=beta)
    assert pooled[2] == -INF and pooled[:2].isfinite().all()


def test_a_negative_weight_does_not_revive_an_impossible_candidate():
    log_cond = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    weights = torch.tensor([-0.5, 1.5], dtype=torch.float64)
    assert combine_log_probs(log_cond, weights=weights, allow_negative=True)[2] == -INF


def test_contradicting_vetoes_leave_nothing():
    log_cond = torch.eye(2, dtype=torch.float64).log().requires_grad_()
    pooled = combine_log_probs(log_cond)
    assert torch.equal(pooled, torch.full((2,), -INF, dtype=torch.float64))
    pooled.masked_fill(pooled.isneginf(), 0.0).sum().backward()
    assert log_cond.grad.isfinite().all()


def test_gradients_are_finite_beside_minus_infinity_and_right_for_zero_weights():
    log_cond = (
        torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3]], dtype=torch.float64).log().requires_grad_()
    )
    log_prior = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64).log().requires_grad_()
    weights = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).requires_grad_()
    beta = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    combine_log_probs(log_cond, log_prior, weights=weights, beta=beta, normalize_weights=False)[0].backward()
    for leaf in (log_cond, log_prior, weights, beta):
        assert leaf.grad.isfinite().all()
    # An expert that may speak has a gradient at weight 0: that is how it gets a weight.
    p = combine_log_probs(log_cond, log_prior, weights=weights, beta=beta, normalize_weights=False).exp()
    assert_close(weights.grad[1], (log_cond[1, 0] - (p * log_cond[1]).sum()).detach())


@pytest.mark.parametrize("normalize_weights", [True, False])
def test_gradcheck(normalize_weights):
    log_cond, log_prior = experts(0, 2, 3, 4).requires_grad_(), experts(1, 4).requires_grad_()
    weights = experts(2, 2, 3).exp().requires_grad_()
    beta = torch.tensor(0.3, dtype=torch.float64).requires_grad_()

    def pooled(log_cond, log_prior, weights, beta):
        return combine_log_probs(log_cond, log_prior, weights=weights, beta=beta, normalize_weights=normalize_weights)

    assert torch.autograd.gradcheck(pooled, (log_cond, log_prior, weights, beta))
    assert torch.autograd.gradcheck(strict_naive_bayes, (log_cond, log_prior))
    assert torch.autograd.gradcheck(kl_divergence, (log_cond, log_prior))
    assert torch.autograd.gradcheck(pool_objective, (log_prior, log_cond, weights))


def test_compiled_combination_agrees():
    log_cond, log_prior, weights = experts(0, 3, 4, 7), experts(1, 7), experts(2, 3, 4).exp()
    compiled = torch.compile(combine_log_probs, backend="aot_eager", fullgraph=True)
    assert_close(
        compiled(log_cond, log_prior, weights=weights, beta=0.5),
        combine_log_probs(log_cond, log_prior, weights=weights, beta=0.5),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(beta=1.0), "log_prior must be given"),
        (dict(beta=torch.tensor(0.0)), "log_prior must be given"),
        (dict(log_cond=torch.zeros(0, 4)), "log_prior must be given"),
        (dict(log_prior=torch.zeros(5)), r"log_prior must have V=4 .* \(5,\)"),
        (dict(weights=torch.ones(4)), r"weights must have J=3 .* \(4,\)"),
        (dict(weights=torch.tensor([1.0, -0.5, 1.0])), "weights must be >= 0 .* -0.5"),
        (dict(weights=torch.tensor([1.0, -1.0, 0.0]), allow_negative=True), "weights must not sum to 0"),
        (dict(weights=torch.zeros(3)), "weights must not sum to 0"),
        (dict(dim=-1), "dim must be .* got -1"),
        (dict(dim=1), "dim must be .* got 1"),
        (dict(dim=5), "dim must be .* got 5"),
    ],
)
def test_combine_log_probs_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        combine_log_probs(**{"log_cond": torch.zeros(3, 4)} | arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="log_cond must be a floating-point tensor, got torch.int64"):
        combine_log_probs(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="log_prior must be a floating-point tensor, got list"):
        strict_naive_bayes(torch.zeros(3, 4), [0.0])


def test_other_functions_refuse():
    x = torch.zeros(3, 4)
    for call, message in [
        (lambda: strict_naive_bayes(x[0], x[0]), "log_cond must have shape"),
        (lambda: pool_objective(x[0], x, torch.ones(4)), "must agree in V and J"),
        (lambda: in_context_posterior(x[:0]), "t >= 1"),
        (lambda: in_context_posterior(x, torch.zeros(3)), "log_prior must have K=4"),
        (lambda: in_context_posterior(x, head="max"), "head must be 'sum' or 'mean', got 'max'"),
        (lambda: exact_nb_world(1, 3, 0), "V must be >= 2, got 1"),
        (lambda: exact_nb_world(3, 0, 0), "t must be >= 1, got 0"),
        (lambda: posterior_by_enumeration(x), "one size V"),
        (lambda: conditionals_by_enumeration(x), "one size V"),
        (lambda: softmax_laplacian(x, torch.zeros(5, 3)), "must agree in d"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@steady
@given(seed=seeds, J=st.integers(1, 5), V=st.integers(2, 6))
def test_the_log_linear_pool_minimises_its_objective(seed, J, V):
    log_cond, a = experts(seed, J, V), experts(seed + 1, J).exp()
    pool = combine_log_probs(log_cond, weights=a)
    least = -(a[:, None] * log_cond).sum(0).logsumexp(-1)
    assert_close(pool_objective(pool, log_cond, a), least)
    assert (pool_objective(experts(seed + 2, 20, V), log_cond, a) >= least - 1e-12).all()


def test_kl_divergence_at_the_edges():
    p, q = (
        torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log(),
        torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).log(),
    )
    assert kl_divergence(p, p) == 0
    assert kl_divergence(q, p).item() == pytest.approx(math.log(2))
    assert kl_divergence(p, q) == INF


@steady
@given(seed=seeds, t=st.integers(1, 8))
def test_the_sum_head_is_the_exact_class_posterior(seed, t):
    log_prior, emission = experts(seed, 3), experts(seed + 1, 3, 5)
    x = torch.randint(5, (4, t), generator=torch.Generator().manual_seed(seed))
    log_likelihood = emission.T[x]
    exact = strict_naive_bayes(log_normalize(log_likelihood + log_prior), log_prior)
    assert_close(in_context_posterior(log_likelihood, log_prior).exp(), exact.exp())
    tuned = in_context_posterior(log_likelihood, log_prior, head="mean", scale=t)
    assert_close(tuned.exp(), exact.exp())
    uniform = torch.full((3,), -math.log(3), dtype=torch.float64)
    assert_close(in_context_posterior(log_likelihood), in_context_posterior(log_likelihood, uniform))


def test_softmax_laplacian_is_the_trace_of_the_hessian():
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3,), (6, 3)))
    hessian = torch.stack(
        [torch.autograd.functional.hessian(lambda h, y=y: (h @ w.T).softmax(-1)[y], h) for y in range(6)]
    )
    laplacian = hessian.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(softmax_laplacian(h, w), laplacian)
    assert_close(dirac_limit_coefficient(h.expand(2, 3), w), laplacian.abs().sum().expand(2) / 4)
