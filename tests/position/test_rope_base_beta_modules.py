"""The modules: caches, rescaling, decoding, casting, compiling, log n; and the formulas of dilution."""

import copy
import io
import math
import pickle

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from kexue_utils.position.rope_base_beta import (
    RopeAttention,
    RotaryEmbedding,
    apply_rope,
    attention_factor,
    entropy_preserving_scale,
    frozen_entropy,
    gaussian_entropy,
    logn_scale,
    needle_probability,
    rope_inv_freq,
)
from tests.tolerances import assert_close


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(rope=None, **kwargs):
    torch.manual_seed(0)
    return RopeAttention(32, 4, rope=rope or RotaryEmbedding(8), **kwargs).double()


def test_rotary_embedding_is_apply_rope():
    rope, q, k = RotaryEmbedding(16), normal(0, 2, 4, 7, 16), normal(1, 2, 2, 7, 16)
    for positions in (None, torch.arange(7), torch.arange(7) - 3, torch.arange(14).reshape(2, 7)):
        expected = torch.arange(7) if positions is None else positions
        for x, y in zip((q, k), rope(q, k, positions), strict=True):
            assert torch.equal(y, apply_rope(x, expected, rope_inv_freq(16)))


@pytest.mark.parametrize("method", ["yarn", "yarn_paper", "longrope", "ntk_mixed"])
def test_the_attention_factor_comes_with_the_method(method):
    options = {"train_len": 512, **({"factors": [2.0] * 8} if method == "longrope" else {})}
    rope, x = RotaryEmbedding(16, method=method, scale=8.0, **options), normal(0, 7, 16)
    theta = rope_inv_freq(16, method=method, scale=8.0, **options)
    expected = attention_factor(method, 8.0, 512) * apply_rope(x, torch.arange(7), theta)
    assert_close(rope(x, x)[0], expected)
    rope.set_scaling(method, 8.0, factor=1.0, **options)
    assert_close(rope(x, x)[0], apply_rope(x, torch.arange(7), theta))


def test_set_scaling_invalidates_the_cache():
    rope, x = RotaryEmbedding(16), normal(0, 7, 16)
    before = rope(x, x)[0]
    assert torch.equal(rope(x, x)[0], before)
    rope.set_scaling("pi", 8.0)
    assert_close(rope(x, x)[0], apply_rope(x, torch.arange(7) / 8, rope_inv_freq(16)))
    rope.set_scaling("none")
    assert torch.equal(rope(x, x)[0], before)


def test_the_cache_knows_length_and_dtype():
    rope, x = RotaryEmbedding(16), normal(0, 9, 16)
    double, single, half = torch.float64, torch.float32, torch.bfloat16
    for T, dtype in ((7, double), (9, double), (9, single), (4, half), (7, double)):
        y = rope(x[:T].to(dtype), x[:T].to(dtype))[0]
        assert y.dtype == dtype
        assert torch.equal(y, apply_rope(x[:T].to(dtype), torch.arange(T), rope_inv_freq(16)))


def test_nothing_changes_when_set_scaling_raises():
    rope, x = RotaryEmbedding(16, method="pi", scale=2.0), normal(0, 7, 16)
    before, state = rope(x, x)[0], repr(rope)
    for call in (
        lambda: rope.set_scaling("pi", 0.5),
        lambda: rope.set_scaling("yarn", 2.0),
        lambda: rope.set_scaling("magic", 2.0),
    ):
        with pytest.raises(ValueError, match="scale|train_len|method"):
            call()
        assert torch.equal(rope(x, x)[0], before) and repr(rope) == state


def test_casting_a_model_leaves_the_frequencies_alone():
    model = attention().to(torch.bfloat16)
    assert torch.equal(model.rope.inv_freq, rope_inv_freq(8))
    assert not model.rope.state_dict() and set(model.state_dict()) == {"qkv.weight", "out.weight"}
    assert model(normal(0, 2, 5, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_pickle_and_copies_work_the_same():
    rope, x = RotaryEmbedding(16, layout="interleaved", method="ntk_mixed", scale=8.0, b=0.75), normal(0, 7, 16)
    expected = rope(x, x)[0]
    stored = io.BytesIO(pickle.dumps(rope))
    for again in (pickle.load(stored), copy.deepcopy(rope)):
        assert torch.equal(again(x, x)[0], expected)
    assert repr(rope) == "RotaryEmbedding(16, base=10000, layout='interleaved', method='ntk_mixed', scale=8)"


@pytest.mark.parametrize("logn", [None, "posthoc"])
def test_compiles_to_one_graph(logn):
    model = attention(logn=logn, train_len=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for T in (5, 9):
        x = normal(0, 2, T, 32)
        assert_close(compiled(x), model(x))
    model.rope.set_scaling("pi", 8.0)
    assert_close(compiled(x), model(x))


def test_attention_by_its_definition():
    model, x, L = attention(logn="posthoc", train_len=3), normal(0, 1, 6, 32), 3
    q, k, v = model.qkv(x)[0].unflatten(-1, (3, 4, 8)).unbind(1)
    rows = []
    for n in range(1, 7):
        s = max(1, math.log(n) / math.log(L))
        heads = []
        for h in range(4):
            qn = apply_rope(q[n - 1 : n, h], torch.tensor([n - 1]), rope_inv_freq(8))
            kn = apply_rope(k[:n, h], torch.arange(n), rope_inv_freq(8))
            heads.append((s * qn @ kn.T / math.sqrt(8)).softmax(-1) @ v[:n, h])
        rows.append(torch.cat(heads, -1))
    assert_close(model(x)[0], model.out(torch.cat(rows)))


def test_attention_agrees_with_transformers():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attn_implementation="sdpa")
    peer, model, x = LlamaAttention(config, 0).double(), attention(), normal(0, 2, 6, 32)
    q, k, v = model.qkv.weight.chunk(3)
    o = model.out.weight
    peer.load_state_dict({"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": o})
    tables = LlamaRotaryEmbedding(config)(x, torch.arange(6)[None])
    # float32 angles there
    assert_close(model(x), peer(x, position_embeddings=tables, attention_mask=None)[0], torch.float32)


@pytest.mark.parametrize("logn", [None, "train", "posthoc"])
@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 5], [9, 1]])
def test_decoding_with_a_cache_equals_the_full_forward(logn, pieces):
    model, x = attention(logn=logn, train_len=4), normal(0, 2, 10, 32)
    cache, parts = {}, []
    for piece in x.split(pieces, 1):
        parts.append(model(piece, cache))
    assert_close(torch.cat(parts, 1), model(x))
    assert cache["k"].shape == (2, 4, 10, 8)


def test_attention_is_causal():
    model, x = attention(), normal(0, 1, 6, 32)
    y = x.clone()
    y[:, 4:] = 0
    assert_close(model(y)[:, :4], model(x)[:, :4])
    assert not torch.allclose(model(y)[:, 4:], model(x)[:, 4:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RotaryEmbedding(7), "dim must be a positive even integer, got 7"),
        (lambda: RotaryEmbedding(8, layout="gptj"), "layout must be one of half, interleaved, got 'gptj'"),
        (lambda: RopeAttention(30, 4, rope=RotaryEmbedding(8)), "d_model must be a multiple of n_heads, got 30 and 4"),
        (lambda: RopeAttention(32, 4, rope=RotaryEmbedding(16)), "rope must have dim <= d_model / n_heads = 8, got"),
        (lambda: attention(logn="always", train_len=4), "logn must be None, 'train' or 'posthoc', got 'always'"),
        (lambda: attention(logn="train"), "train_len is required for logn 'train'"),
        (lambda: attention(logn="posthoc", train_len=1), "train_len must be greater than 1, got 1"),
        (lambda: needle_probability(0, 2.0), "n must be at least 1, got 0"),
        (lambda: gaussian_entropy(torch.tensor([2.0, math.nan]), 1.0), "n must be at least 1, got nan"),
        (lambda: entropy_preserving_scale(100, 512, 0.0), "sigma must be positive, got 0.0"),
        (lambda: entropy_preserving_scale(100, 0, 1.0), "train_len must be at least 1, got 0"),
        (lambda: entropy_preserving_scale(300, 512, 1.0), r"n must be at least .* = 310\.544, got 300"),
        (lambda: frozen_entropy(1.0), "u must lie between 0 and 1, got 1.0"),
        (lambda: frozen_entropy(torch.tensor([0.5, -0.5])), r"u must lie between 0 and 1, got \[0.5, -0.5\]"),
        (lambda: logn_scale(0, 512), "n_visible must be at least 1, got 0"),
        (lambda: logn_scale(torch.tensor([3, 0.5]), 512), "n_visible must be at least 1, got 0.5"),
        (lambda: logn_scale(4, 1), "train_len must be greater than 1, got 1"),
        (lambda: logn_scale(4, 512, mode="log"), "mode must be 'train' or 'posthoc', got 'log'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("option", [{"dtype": torch.float32}, {"device": "cpu"}])
def test_the_table_has_no_dtype_or_device_of_its_own(option):
    with pytest.raises(TypeError, match="options must not name a dtype or a device"):
        RotaryEmbedding(8, **option)


def test_logn_scale():
    n = torch.tensor([1, 2, 512, 4096])
    expected = torch.tensor([0, 1 / 9, 1, 12 / 9], dtype=torch.float64)
    assert_close(logn_scale(n, 512), expected)
    assert_close(logn_scale(n, 512, mode="posthoc"), expected.clamp(min=1))
    assert logn_scale(512, 512).item() == pytest.approx(1, rel=1e-15)


def test_needle_probability_is_a_softmax():
    for n, c, t in ((5, 2.0, 1.0), (100, 3.0, 1.5), (1, 2.0, 1.0)):
        logits = torch.zeros(n, dtype=torch.float64)
        logits[0] = c * t
        assert_close(needle_probability(n, c, t), logits.softmax(-1)[0])
    n = torch.logspace(2, 300, 4, dtype=torch.float64)
    for c, limit in ((math.log(512) + 1, 1.0), (math.log(512), 0.5), (math.log(512) - 1, 0.0)):
        assert needle_probability(n, c, logn_scale(n, 512))[-1].item() == pytest.approx(limit, abs=1e-9)


def test_entropy_of_gaussian_logits():
    n = 4096
    logits = normal(0, 200, n)
    p = logits.softmax(-1)
    H = -(p * p.log()).sum(-1)
    standard_error = H.std().item() / math.sqrt(200)
    assert H.mean().item() == pytest.approx(gaussian_entropy(n, 1.0).item(), abs=4 * standard_error + 0.02)


def test_entropy_preserving_scale_preserves_it():
    n = torch.tensor([600.0, 4096.0, 1e5])
    t = entropy_preserving_scale(n, 512, 1.5)
    assert_close(gaussian_entropy(n, 1.5 * t), gaussian_entropy(512, 1.5).expand(3))
    assert entropy_preserving_scale(512, 512, 1.5) == 1
    least = 512 * math.exp(-0.5) * (1 + 1e-12)  # equal logits, t = 0
    assert entropy_preserving_scale(least, 512, 1.0).item() < 1e-5


def test_frozen_entropy():
    u = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    # 1/i telescopes: ψ(1) − ψ(1−u) = Σ_i (1/(i−u) − 1/i)
    i = torch.arange(1, 2_000_000, dtype=torch.float64)
    by_series = torch.stack([(1 / (i - x) - 1 / i).sum() for x in u])
    torch.testing.assert_close(frozen_entropy(u), by_series, rtol=0, atol=1e-6)
    assert frozen_entropy(0.5).item() == pytest.approx(2 * math.log(2), rel=1e-14)
