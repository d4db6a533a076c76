import math

import numpy as np
import pytest
import torch
from sklearn.naive_bayes import CategoricalNB, MultinomialNB

from kexue_utils.attention.naive_bayes_attention import NGramNaiveBayes, log_normalize, strict_naive_bayes
from kexue_utils.attention.naive_bayes_attention import ngram as module
from tests.tolerances import assert_close


def markov_text(n, V, seed):
    """A text with memory: the next token is mostly a fixed function of the last two."""
    g = np.random.default_rng(seed)
    rule = np.random.default_rng(0).integers(V, size=(V, V))
    ids, noise, choice = [0, 1], g.integers(V, size=n), g.random(n)
    for i in range(n - 2):
        ids.append(int(rule[ids[-2], ids[-1]] if choice[i] < 0.6 else noise[i]))
    return torch.tensor(ids)


def windows(ids, W):
    return ids.unfold(0, W, 1)[:-1], ids[W:]


@pytest.fixture
def text():
    return markov_text(4000, 7, 1)


@pytest.mark.parametrize("lag_specific", [True, False])
def test_tables_are_the_counted_pairs(text, lag_specific):
    W, V, alpha = 3, 7, 0.25
    model = NGramNaiveBayes(W, alpha, lag_specific, dtype=torch.float64).fit(text, V)
    counts = np.zeros((W, V, V))
    for t in range(W, len(text)):
        for lag in range(1, W + 1):
            counts[lag - 1, text[t - lag], text[t]] += 1
    counts = (counts if lag_specific else counts.sum(0, keepdims=True)) + alpha
    pairs = torch.from_numpy(counts / counts.sum((1, 2), keepdims=True))
    assert_close(model.log_pairs.exp(), pairs)
    for lag in range(len(pairs)):
        assert_close(model.log_prior.exp(), pairs[lag].sum(0))
    context = torch.tensor([2, 5, 4])  # x_{t−3}, x_{t−2}, x_{t−1}
    for position, lag in ((0, 3), (1, 2), (2, 1)):
        table = pairs[(lag - 1) % len(pairs)]
        expected = table[context[position]] / table[context[position]].sum()
        assert_close(model.log_cond(context)[position].exp(), expected)


def test_counting_in_chunks_changes_nothing(text, monkeypatch):
    contexts = windows(text, 4)[0]
    whole = NGramNaiveBayes(4).fit(text, 7)
    loss, log_p, learned = whole.cross_entropy(text), whole.predict_log_proba(contexts), whole.fit_weights(text).weights
    monkeypatch.setattr(module, "_CHUNK", 97)
    monkeypatch.setattr(module, "_TRAINING_CHUNK", 5000)
    parts = NGramNaiveBayes(4).fit(text, 7)
    assert torch.equal(whole.log_pairs, parts.log_pairs)
    assert torch.equal(log_p, parts.predict_log_proba(contexts))
    assert_close(parts.cross_entropy(text), loss, torch.float32)
    # Two runs of L-BFGS in float32 stop at points that differ by more than rounding.
    assert_close(parts.fit_weights(text).weights, learned, scale=100)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(text, dtype):
    model = NGramNaiveBayes(2).fit(text.to(dtype), 200)
    assert torch.equal(model.log_pairs, NGramNaiveBayes(2).fit(text, 200).log_pairs)
    assert model.predict_log_proba(text[:2].to(dtype)).shape == (200,)


def test_bayes_rule_holds_exactly_between_the_tables(text):
    model = NGramNaiveBayes(3, dtype=torch.float64).fit(text, 9)  # two symbols never occur
    p_j = model.log_pairs.logsumexp(-1, keepdim=True)
    reversed_ = model.log_pairs - model.log_prior  # log p(x_j|x_t)
    assert_close(reversed_.logsumexp(-2), torch.zeros(3, 9, dtype=torch.float64))
    assert_close(log_normalize(model.log_pairs), reversed_ + model.log_prior - p_j)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_categorical_nb_of_scikit_learn(text, alpha):
    W, V = 4, 9  # symbols 7 and 8 are unseen: smoothing alone gives them probability
    contexts, targets = windows(text, W)
    model = NGramNaiveBayes(W, alpha, dtype=torch.float64).fit(text, V)
    # The peer has no class that it has not seen: compared on the seen ones, renormalised.
    seen = targets.unique()
    prior = model.log_prior.exp()[seen]
    peer = CategoricalNB(alpha=alpha, min_categories=V, class_prior=(prior / prior.sum()).numpy())
    peer.fit(contexts.numpy(), targets.numpy())
    unseen_too = torch.cat([contexts, torch.tensor([[7, 8, 0, 1], [8, 8, 8, 8]])])
    ours = log_normalize(model.predict_log_proba(unseen_too)[:, seen])
    np.testing.assert_allclose(ours, peer.predict_log_proba(unseen_too.numpy()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_multinomial_nb_of_scikit_learn(text, alpha):
    W, V = 4, 7
    contexts, targets = windows(text, W)
    model = NGramNaiveBayes(W, alpha, lag_specific=False, dtype=torch.float64).fit(text, V)
    bags = torch.nn.functional.one_hot(contexts, V).sum(1).numpy()
    peer = MultinomialNB(alpha=alpha, class_prior=model.log_prior.exp().numpy()).fit(bags, targets.numpy())
    np.testing.assert_allclose(model.predict_log_proba(contexts), peer.predict_log_proba(bags), rtol=0, atol=1e-10)


@pytest.mark.parametrize("lag_specific", [True, False])
def test_prediction_is_strict_naive_bayes_of_the_experts(text, lag_specific):
    model = NGramNaiveBayes(5, lag_specific=lag_specific, dtype=torch.float64).fit(text, 7)
    contexts = windows(text, 5)[0][:60].view(3, 20, 5)
    assert_close(model.predict_log_proba(contexts), strict_naive_bayes(model.log_cond(contexts), model.log_prior))


def test_prediction_with_other_weights(text):
    model = NGramNaiveBayes(3, dtype=torch.float64).fit(text, 7)
    contexts = windows(text, 3)[0][:50]
    weights = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)  # by lag from 1: the last token first
    scores = sum(weights[lag - 1] * model.log_cond(contexts)[:, 3 - lag] for lag in (1, 2, 3))
    expected = (scores - 0.4 * model.log_prior).log_softmax(-1)
    assert_close(model.predict_log_proba(contexts, weights=weights, beta=0.4), expected)


def test_cross_entropy_is_the_mean_surprise(text):
    model = NGramNaiveBayes(3, dtype=torch.float64).fit(text, 7)
    contexts, targets = windows(text, 3)
    surprise = -model.predict_log_proba(contexts).gather(1, targets[:, None]).mean()
    assert_close(model.cross_entropy(text), surprise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_weights_are_a_minimum_and_beat_strict_naive_bayes(dtype):
    model = NGramNaiveBayes(6, dtype=dtype).fit(markov_text(20000, 7, 1), 7)
    held_out, test = markov_text(8000, 7, 2), markov_text(8000, 7, 3)
    strict = model.cross_entropy(test)
    model.fit_weights(held_out)
    assert model.cross_entropy(test) < strict - 0.02
    weights, beta = model.weights.clone().requires_grad_(), model.beta.clone().requires_grad_()
    contexts, targets = windows(held_out, 6)
    log_p = model.predict_log_proba(contexts, weights=weights, beta=beta)
    torch.nn.functional.nll_loss(log_p, targets).backward()
    slope = max(weights.grad.abs().max().item(), abs(beta.grad.item()))
    assert slope < (1e-5 if dtype == torch.float64 else 1e-3)  # where L-BFGS stops, not where rounding does


def test_learn_beta_false_holds_beta_at_zero(text):
    model = NGramNaiveBayes(3).fit(text, 7).fit_weights(text, learn_beta=False)
    assert model.beta == 0 and not torch.equal(model.weights, torch.ones(3))


def test_learned_total_weight_is_one_plus_beta_where_only_some_lags_inform():
    """Lags that carry nothing still repeat the prior, and β takes it out again."""
    g = np.random.default_rng(0)
    V, n = 5, 40000
    step = g.dirichlet(np.full(V, 0.5), size=V)
    ids, cumulative, u = [0], step.cumsum(-1), g.random(n)
    for i in range(n - 1):
        ids.append(min(int(np.searchsorted(cumulative[ids[-1]], u[i])), V - 1))
    ids = torch.tensor(ids)
    model = NGramNaiveBayes(2, dtype=torch.float64).fit(ids[: n // 2], V).fit_weights(ids[n // 2 :])
    assert abs(model.weights.sum() - 1 - model.beta) < 0.1
    assert abs(model.weights[0] - 1) < 0.1 and abs(model.weights[1]) < 0.1


def test_deterministic():
    text = markov_text(5000, 7, 4)
    a, b = (NGramNaiveBayes(3).fit(text[:4000], 7).fit_weights(text[4000:]) for _ in range(2))
    assert torch.equal(a.weights, b.weights) and torch.equal(a.beta, b.beta)


def test_long_window_of_large_vocabulary_needs_no_window_by_vocabulary_temporary():
    ids = torch.randint(300, (5000,), generator=torch.Generator().manual_seed(0))
    model = NGramNaiveBayes(8).fit(ids, 300)
    log_p = model.predict_log_proba(windows(ids, 8)[0])
    assert log_p.dtype == torch.float32 and log_p.shape == (4992, 300)
    assert_close(log_p.exp().sum(-1), torch.ones(4992))


@pytest.mark.parametrize(
    ("ids", "vocab", "error", "message"),
    [
        (torch.tensor([], dtype=torch.long), 4, ValueError, r"more than window=2 tokens, got \(0,\)"),
        (torch.tensor([0, 1]), 4, ValueError, "more than window=2"),
        (torch.zeros(2, 5, dtype=torch.long), 4, ValueError, "one text"),
        (torch.tensor([0, 1, 4]), 4, ValueError, r"\[0, vocab=4\), got values from 0 to 4"),
        (torch.tensor([0, -1, 3]), 4, ValueError, "got values from -1 to 3"),
        (torch.tensor([0, 1, 2]), 0, ValueError, "vocab must be >= 1, got 0"),
        (torch.tensor([0.0, 1.0, 2.0]), 4, TypeError, "ids must be a tensor of integers, got torch.float32"),
        ([0, 1, 2], 4, TypeError, "got list"),
    ],
)
def test_fit_refuses_and_leaves_the_model_as_it_was(text, ids, vocab, error, message):
    model = NGramNaiveBayes(2).fit(text, 7)
    before = model.log_pairs
    with pytest.raises(error, match=message):
        model.fit(ids, vocab)
    assert model.log_pairs is before


def test_other_refusals(text):
    for call, error, message in [
        (lambda: NGramNaiveBayes(0), ValueError, "window must be >= 1, got 0"),
        (lambda: NGramNaiveBayes(2, 0.0), ValueError, "alpha must be > 0, got 0.0"),
        (lambda: NGramNaiveBayes(2, math.nan), ValueError, "alpha must be > 0, got nan"),
        (lambda: NGramNaiveBayes(2, dtype=torch.int64), TypeError, "dtype must be floating-point"),
        (lambda: NGramNaiveBayes(2).predict_log_proba(text[:2]), ValueError, "fit must be called"),
        (lambda: NGramNaiveBayes(2).cross_entropy(text), ValueError, "fit must be called"),
        (lambda: NGramNaiveBayes(2).fit_weights(text), ValueError, "fit must be called"),
        (lambda: NGramNaiveBayes(2).fit(text, 7).log_cond(text[:3]), ValueError, r"shape \(..., 2\), got \(3,\)"),
        (lambda: NGramNaiveBayes(2).fit(text, 7).log_cond(text[:2].float()), TypeError, "contexts must be"),
        (
            lambda: NGramNaiveBayes(2).fit(text, 7).predict_log_proba(text[:2], weights=torch.ones(3)),
            ValueError,
            r"weights must have shape \(2,\), got \(3,\)",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
