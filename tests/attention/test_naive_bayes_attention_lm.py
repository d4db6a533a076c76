import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue_utils.attention.naive_bayes_attention import (
    AttentionPool,
    SkipGramAttentionLM,
    additive_scores,
    combine_log_probs,
)
from tests.tolerances import TOLERANCES, assert_close

V, D = 11, 8


def model_and_ids(seed=0, dtype=torch.float64, B=2, T=6, **options):
    torch.manual_seed(seed)
    model = SkipGramAttentionLM(V, options.pop("d", D), **options).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)  # far from uniform, and biases that are not 0
    return model, torch.randint(V, (B, T))


VARIANTS = [
    dict(n_heads=H, residual=residual, bias=bias, lag_values=L)
    for H, residual, bias, L in itertools.product((1, 4), (False, True), (False, True), (0, 3))
] + [
    dict(qk="additive", n_heads=2, residual=True),
    dict(qk="additive", lag_values=3, lag_scores=2),
    dict(lag_scores=3, n_heads=2),
    dict(window=2, n_heads=2, residual=True),
    dict(window=3, lag_scores=3, lag_values=3, residual=True, bias=True),
    dict(lag_values=20, n_heads=2),
]


def naive_bayes_log_probs(model, ids):
    weights, log_cond, bias = model.as_naive_bayes(ids)
    pooled = combine_log_probs(log_cond, weights=weights, normalize_weights=False, normalize=False)
    return (pooled if bias is None else pooled + bias).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_as_naive_bayes_reproduces_the_model(options, dtype):
    model, ids = model_and_ids(dtype=dtype, **options)
    assert_close(naive_bayes_log_probs(model, ids), model(ids).log_softmax(-1))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    T=st.integers(1, 7),
    options=st.sampled_from(VARIANTS),
)
def test_as_naive_bayes_is_a_pool_of_distributions(seed, T, options):
    model, ids = model_and_ids(seed, T=T, **options)
    weights, log_cond, _ = model.as_naive_bayes(ids)
    H, R = options.get("n_heads", 1), options.get("residual", False)
    E = H * T + R
    assert weights.shape == (2, T, E) and log_cond.shape == (2, T, E, V)
    assert_close(log_cond.exp().sum(-1), torch.ones(2, T, E, dtype=torch.float64))
    per_head = weights[..., : H * T].unflatten(-1, (H, T))
    assert_close(per_head.sum(-1), torch.ones(2, T, H, dtype=torch.float64))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert (per_head.transpose(2, 3)[:, future] == 0).all()
    assert_close(naive_bayes_log_probs(model, ids), model(ids).log_softmax(-1))


def test_one_layer_written_out():
    """The read-out of one head, position by position, from the definitions."""
    model, ids = model_and_ids(residual=True, bias=True)
    layer, w, b = model.layers[0], model.w.weight, model.w.bias
    for row, i in itertools.product(range(2), range(6)):
        x = ids[row]
        scores = torch.stack([layer.q.weight[x[i]] @ layer.k.weight[x[j]] for j in range(i + 1)])
        a = scores.exp() / scores.exp().sum()
        h = layer.u.weight[x[i]] + sum(a[j] * layer.v.weight[x[j]] for j in range(i + 1))
        assert_close(model(ids)[row, i], w @ h + b)


def test_lags_written_out():
    L, S, W = 3, 2, 4
    model, ids = model_and_ids(lag_values=L, lag_scores=S, window=W)
    layer = model.layers[0]
    v = layer.v.weight.view(V, L, D)
    for row, i in itertools.product(range(2), range(6)):
        x, seen = ids[row], range(max(0, i - W + 1), i + 1)
        lag = {j: i + 1 - j for j in seen}
        scores = torch.stack(
            [layer.q.weight[x[i]] @ layer.k.weight[x[j]] + layer.lag_bias[0, min(lag[j], S) - 1] for j in seen]
        )
        a = scores.softmax(0)
        h = sum(a[n] * v[x[j], min(lag[j], L) - 1] for n, j in enumerate(seen))
        assert_close(model(ids)[row, i], model.w.weight @ h)


def test_scaled_dot_product_attention_of_torch():
    model, ids = model_and_ids()
    layer = model.layers[0]
    read = F.scaled_dot_product_attention(layer.q(ids), layer.k(ids), layer.v(ids), is_causal=True, scale=1.0)
    assert_close(model(ids), F.linear(read, model.w.weight))


@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_multihead_attention_of_torch(n_heads):
    model, ids = model_and_ids(n_heads=n_heads)
    layer, embedding = model.layers[0], torch.randn(V, D, dtype=torch.float64)
    peer = nn.MultiheadAttention(D, n_heads, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        w_q, w_k, w_v = peer.in_proj_weight.chunk(3)
        layer.q.weight.copy_(embedding @ w_q.T * (D // n_heads) ** -0.5)  # the peer's 1/√d belongs to q
        layer.k.weight.copy_(embedding @ w_k.T)
        layer.v.weight.copy_(embedding @ w_v.T)
        if n_heads > 1:
            layer.merge.weight.copy_(peer.out_proj.weight)
        else:
            layer.v.weight.copy_(layer.v.weight @ peer.out_proj.weight.T)
    x = embedding[ids]
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    read, weights = peer(x, x, x, attn_mask=mask, average_attn_weights=False)
    assert_close(layer(ids), read)
    assert_close(layer.weights(ids), weights)


@pytest.mark.parametrize("options", VARIANTS + [dict(n_layers=3, n_heads=2, residual=True)], ids=str)
def test_no_row_sees_its_future(options):
    model, ids = model_and_ids(**options)
    changed = ids.clone()
    changed[:, 4:] = (ids[:, 4:] + 1) % V
    assert_close(model(changed)[:, :4], model(ids)[:, :4])
    assert (model(changed)[:, 4] - model(ids)[:, 4]).abs().max() > 1e-3  # and each row sees its last token


def test_order_enters_through_the_last_token_only():
    model, ids = model_and_ids()
    shuffled = ids[:, [3, 0, 4, 1, 2, 5]]
    assert_close(model(shuffled)[:, -1], model(ids)[:, -1])
    moved = ids[:, [5, 1, 2, 3, 4, 0]]
    assert (model(moved)[:, -1] - model(ids)[:, -1]).abs().max() > 1e-3


def test_layers_compose():
    model, ids = model_and_ids(n_layers=2, n_heads=2, residual=True, lag_scores=3)
    z = model.layers[1](model.layers[0](ids))
    assert_close(model(ids), z @ model.w.weight.T)


@pytest.mark.parametrize("call", ["expert_log_probs", "as_naive_bayes"])
def test_deeper_models_have_no_naive_bayes_form(call):
    model, ids = model_and_ids(n_layers=2)
    with pytest.raises(NotImplementedError, match="n_layers=1 only, got n_layers=2"):
        getattr(model, call)(*([ids] if call == "as_naive_bayes" else []))


@pytest.mark.parametrize("options", [dict(), dict(n_heads=2, residual=True, lag_values=3, qk="additive", lag_scores=2)])
def test_gradcheck(options):
    model, ids = model_and_ids(T=4, d=4, **options)
    names, values = zip(*model.named_parameters(), strict=True)

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids[:1],))

    assert torch.autograd.gradcheck(logits, values, fast_mode=True)


def test_gradients_are_finite_and_reach_every_parameter():
    model, ids = model_and_ids(n_heads=2, residual=True, bias=True, lag_values=3, lag_scores=3, window=4)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", [dict(residual=True), dict(n_layers=2, n_heads=2, lag_values=2, lag_scores=3)])
def test_compiled_model_agrees(options):
    model, ids = model_and_ids(dtype=torch.float32, **options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("options", VARIANTS[::5] + [dict(n_layers=2)], ids=str)
def test_autocast(options):
    model, ids = model_and_ids(dtype=torch.float32, **options)
    model.reset_parameters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), model(ids), torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_any_float_dtype(dtype):
    model, ids = model_and_ids(n_heads=2, residual=True, bias=True, lag_values=2)
    model.reset_parameters()
    expected = model(ids)
    assert_close(model.to(dtype)(ids).double(), expected, dtype)


def test_same_seed_same_model():
    (a, ids), (b, _) = model_and_ids(3, n_heads=2), model_and_ids(3, n_heads=2)
    assert torch.equal(a(ids), b(ids))
    torch.manual_seed(1)
    c = SkipGramAttentionLM(V, 64, bias=True)
    assert c.layers[0].v.weight.std().item() == pytest.approx(1 / 8, rel=0.1) and (c.w.bias == 0).all()


def test_additive_scores_written_out():
    torch.manual_seed(0)
    q, k, u = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4), (2, 5, 4), (4,)))
    scores = additive_scores(q, k, u)
    for b, i, j in itertools.product(range(2), range(3), range(5)):
        assert_close(scores[b, i, j], (u * (q[b, i] + k[b, j]).tanh()).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(vocab=0), "vocab must be >= 1, got 0"),
        (dict(d=0), "d must be >= 1, got 0"),
        (dict(n_layers=0), "n_layers must be >= 1, got 0"),
        (dict(n_heads=3), "n_heads must divide d=8, got 3"),
        (dict(lag_values=-1), "lag_values must be >= 0, got -1"),
        (dict(lag_scores=-1), "lag_scores must be >= 0, got -1"),
        (dict(window=0), "window must be >= 1, got 0"),
        (dict(qk="cosine"), "qk must be 'dot' or 'additive', got 'cosine'"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SkipGramAttentionLM(**dict(vocab=V, d=D) | options)


def test_forward_refuses():
    model, ids = model_and_ids()
    with pytest.raises(ValueError, match=r"ids must have shape \(B, T\) with T >= 1, got \(6,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"got \(2, 0\)"):
        model.as_naive_bayes(ids[:, :0])
    with pytest.raises(TypeError, match="ids must be a tensor of integers, got torch.float32"):
        model(ids.float())


def test_state_dict_round_trip():
    (a, ids), (b, _) = model_and_ids(0, n_layers=2, lag_scores=2), model_and_ids(1, n_layers=2, lag_scores=2)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(ids), b(ids))
    assert all(isinstance(layer, AttentionPool) for layer in b.layers)
