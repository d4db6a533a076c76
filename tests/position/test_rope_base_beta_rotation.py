"""The rotation: against transformers and rotary-embedding-torch, its group laws, dtypes, shapes and errors."""

import math

import pytest
import rotary_embedding_torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kexue_utils.position.rope_base_beta import (
    LAYOUTS,
    apply_rope,
    mean_kernel,
    mean_kernel_limit,
    rope_inv_freq,
    rope_matrix,
    rope_tables,
    rotate,
)
from tests.tolerances import assert_close

THETA = rope_inv_freq(64)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def to_half(d):
    """Features in interleaved order, listed in the order of the half layout."""
    return torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))


@pytest.mark.parametrize(("method", "ours"), [("default", "none"), ("linear", "pi"), ("yarn", "yarn")])
def test_half_is_the_layout_of_transformers(method, ours):
    L, k = 256, 8.0
    parameters = {"rope_theta": 10000.0, "rope_type": method}
    if method != "default":
        parameters |= {"factor": k}
    if method == "yarn":
        parameters |= {"original_max_position_embeddings": L}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=L, rope_parameters=parameters)
    peer = LlamaRotaryEmbedding(config)
    q, k_ = normal(0, 2, 2, 40, 64, dtype=torch.float32), normal(1, 2, 2, 40, 64, dtype=torch.float32)
    positions = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(2))
    theirs = apply_rotary_pos_emb(q, k_, *peer(q, positions))
    theta = rope_inv_freq(64, method=ours, scale=k, train_len=L)
    cos, sin = rope_tables(positions, theta, dtype=q.dtype, factor=peer.attention_scaling)
    for x, y in zip((q, k_), theirs, strict=True):
        assert_close(rotate(x, cos, sin), y, scale=4)  # float32 angles there: off by up to 60·6e-8 radians


def test_half_agrees_with_transformers_to_rounding_given_the_same_tables():
    config = LlamaConfig(hidden_size=128, num_attention_heads=2)
    q = normal(0, 2, 2, 40, 64, dtype=torch.float32)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(40)[None])
    theirs = apply_rotary_pos_emb(q, q, cos, sin)[0]
    torch.testing.assert_close(rotate(q, cos[0], sin[0, :, :32]), theirs, rtol=0, atol=1e-6)


def test_interleaved_is_the_layout_of_rotary_embedding_torch():
    peer = rotary_embedding_torch.RotaryEmbedding(64)
    x = normal(0, 2, 3, 40, 64, dtype=torch.float32)
    ours = apply_rope(x, torch.arange(40), THETA, layout="interleaved")
    assert_close(ours, peer.rotate_queries_or_keys(x).detach())
    # positions below 3 leave float32 angles no room to drift: then the two agree to rounding
    x = x[:, :, :3]
    ours = apply_rope(x, torch.arange(3), THETA, layout="interleaved")
    torch.testing.assert_close(ours, peer.rotate_queries_or_keys(x).detach(), rtol=0, atol=1e-6)


def test_partial_rotary_of_rotary_embedding_torch():
    x = normal(0, 2, 3, 10, 96, dtype=torch.float32)
    theirs = rotary_embedding_torch.RotaryEmbedding(64).rotate_queries_or_keys(x).detach()
    assert_close(apply_rope(x, torch.arange(10), THETA, layout="interleaved"), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_matrix_is_the_operator(layout):
    x = normal(0, 5, 64)
    positions = torch.tensor([0.0, 1.0, -3.0, 2.5, 1e4], dtype=torch.float64)
    by_matrix = torch.stack([rope_matrix(n, THETA, layout) @ v for n, v in zip(positions.tolist(), x, strict=True)])
    assert_close(apply_rope(x, positions, THETA, layout=layout), by_matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(m=st.floats(-1e4, 1e4), n=st.floats(-1e4, 1e4))
def test_rotations_form_a_group(layout, m, n):
    R = lambda n: rope_matrix(n, THETA, layout)  # noqa: E731
    # angles up to 2e4 radians are rounded to 4e-12
    assert_close(R(m).T @ R(n), R(n - m), scale=10)
    assert_close(R(m) @ R(n), R(m + n), scale=10)
    assert_close(R(n).T @ R(n), torch.eye(64, dtype=torch.float64))


def test_the_layouts_differ_by_a_permutation():
    x, positions, order = normal(0, 2, 7, 64), torch.arange(7), to_half(64)
    interleaved = apply_rope(x, positions, THETA, layout="interleaved")
    assert torch.equal(apply_rope(x[..., order], positions, THETA), interleaved[..., order])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_the_distance_only(layout):
    q, k, n = normal(0, 200, 64), normal(1, 200, 64), torch.arange(200)

    def scores(c):
        return (apply_rope(q, 3 * n + c, THETA, layout=layout) * apply_rope(k, n + c, THETA, layout=layout)).sum(-1)

    torch.testing.assert_close(scores(1000), scores(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverse_and_partial(layout):
    x, positions = normal(0, 2, 3, 9, 80), torch.arange(9)
    y = apply_rope(x, positions, THETA, layout=layout)
    assert torch.equal(y[..., 64:], x[..., 64:])
    assert torch.equal(y[..., :64], apply_rope(x[..., :64], positions, THETA, layout=layout))
    assert_close(apply_rope(y, positions, THETA, layout=layout, inverse=True), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_of_every_kind(layout):
    x = normal(0, 2, 3, 5, 64)
    rope = lambda x, positions: apply_rope(x, positions, THETA, layout=layout)  # noqa: E731
    by_row = torch.tensor([[0, 1, 2, 3, 4], [-7, 0, 0, 900, 2]])
    expected = torch.stack([rope(x[0], by_row[0]), rope(x[1], by_row[1])])
    assert torch.equal(rope(x, by_row), expected)
    assert torch.equal(rope(x, by_row[:, None]), expected)
    assert torch.equal(rope(x, by_row.to(torch.float64)), expected)
    assert torch.equal(rope(x, by_row.to(torch.int32)), expected)
    assert_close(rope(rope(x, torch.full((5,), 0.5)), torch.full((5,), -0.25)), rope(x, torch.full((5,), 0.25)))
    assert torch.equal(rope(x[0, 0, 0:1], torch.tensor([3])), rope(x[0, 0, 0:1], torch.tensor([3.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_precision_is_right_to_two_units_even_far_out(dtype, layout):
    positions = torch.arange(100_000, 100_512)
    x = normal(0, 512, 64, dtype=dtype)
    y = apply_rope(x, positions, THETA, layout=layout)
    exact = apply_rope(x.double(), positions, THETA, layout=layout)
    order = to_half(64) if layout == "interleaved" else torch.arange(64)
    length = exact[:, order].unflatten(-1, (2, 32)).norm(dim=1, keepdim=True)  # of every pair
    error = (y.double() - exact)[:, order].unflatten(-1, (2, 32)).abs()
    assert y.dtype == dtype
    assert (error / length).max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    x = normal(0, 2, 3, 10).requires_grad_()
    positions, theta = torch.arange(3), rope_inv_freq(8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, theta: apply_rope(x, positions, theta, layout=layout), (x, theta))
    assert torch.autograd.gradgradcheck(lambda x: apply_rope(x, positions, theta.detach(), layout=layout), (x,))


def test_wide_tables_keep_the_dtype_of_x():
    x, positions = normal(0, 3, 64, dtype=torch.bfloat16), torch.arange(3)
    y = rotate(x, *rope_tables(positions, THETA))
    assert torch.equal(y, apply_rope(x.double(), positions, THETA).bfloat16())


def test_inputs_are_left_alone():
    x, positions, theta = normal(0, 3, 64), torch.arange(3), THETA.clone()
    cos, sin = rope_tables(positions, theta)
    before = [t.clone() for t in (x, cos, sin)]
    rotate(x, cos, sin)
    assert all(map(torch.equal, (x, cos, sin, theta), (*before, THETA)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph(layout):
    positions = torch.arange(10).reshape(2, 5)
    rope = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float64, torch.bfloat16):
        x = normal(0, 2, 3, 5, 72, dtype=dtype).requires_grad_()
        y, compiled = (f(x, positions, THETA, layout=layout) for f in (apply_rope, rope))
        assert compiled.dtype == dtype
        assert_close(compiled, y)
        weight = normal(1, *y.shape, dtype=dtype)
        assert_close(*(torch.autograd.grad((z * weight).sum(), x)[0] for z in (compiled, y)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_input(layout):
    x, positions = normal(0, 64, 5, 2).permute(2, 1, 0), torch.arange(5)
    plain = apply_rope(x.contiguous(), positions, THETA, layout=layout)
    assert torch.equal(apply_rope(x, positions, THETA, layout=layout), plain)


@pytest.mark.parametrize(
    ("x", "positions", "kwargs", "error", "message"),
    [
        (torch.zeros(3, 32), torch.arange(3), {}, ValueError, r"2 \* len\(inv_freq\) = 64 features, got 32"),
        (torch.zeros(3, 64, dtype=torch.int64), torch.arange(3), {}, TypeError, "x must be a floating-point .*int64"),
        (torch.zeros(3, 64), torch.arange(4), {}, ValueError, r"positions must .* \(3, 64\), got \(4,\)"),
        (torch.zeros(3, 64), torch.tensor(4), {}, ValueError, r"positions must .*, got \(\)"),
        (torch.zeros(3, 64), torch.zeros(2, 3), {}, ValueError, r"positions must .* \(3, 64\), got \(2, 3\)"),
        (torch.zeros(2, 5, 3, 64), torch.zeros(5, 3), {}, ValueError, r"positions must .*64\), got \(5, 3\)"),
        (torch.zeros(3, 64), torch.arange(3), {"layout": "neox"}, ValueError, "layout must be one of half, .*'neox'"),
    ],
)
def test_bad_input(x, positions, kwargs, error, message):
    with pytest.raises(error, match=message):
        apply_rope(x, positions, THETA, **kwargs)


def test_bad_layouts():
    cos, sin = rope_tables(torch.arange(3), THETA)
    for call in (lambda: rope_matrix(1, THETA, "x"), lambda: rotate(cos, cos, sin, layout="x")):
        with pytest.raises(ValueError, match="layout must be one of half, interleaved, got 'x'"):
            call()


def test_kernel_is_the_mean_score_of_equal_unit_pairs():
    x = normal(0, 64)
    x = x.unflatten(0, (2, 32)) / x.unflatten(0, (2, 32)).norm(dim=0)
    x = x.flatten().expand(9, 64)
    r = torch.arange(9)
    scores = (x * apply_rope(x, r, THETA)).sum(-1) / 32
    assert_close(mean_kernel(r, THETA), scores)
    assert mean_kernel(0, THETA) == 1


@pytest.mark.parametrize(
    ("r", "left", "midpoint", "limit"),
    [
        (1, 0.9662, 0.9743, 0.9740),
        (10, 0.6579, 0.6803, 0.6824),
        (100, 0.5586, 0.3959, 0.4368),
        (512, 0.1854, 0.2535, 0.2601),
    ],
)
def test_kernel_and_its_limit(r, left, midpoint, limit):
    middle = 10000.0 ** (-(torch.arange(32) + 0.5) / 32)
    found = [mean_kernel(r, THETA), mean_kernel(r, middle.double()), mean_kernel_limit(r)]
    assert [x.item() for x in found] == pytest.approx([left, midpoint, limit], abs=5e-5)


def test_kernel_limit_by_quadrature():
    from scipy.integrate import quad

    for r, base in ((0.3, 10000.0), (100.0, 10000.0), (-7.0, 50.0)):
        by_quadrature = quad(lambda t, r=r, base=base: math.cos(r * base**-t), 0, 1, epsabs=1e-13, limit=500)[0]
        assert mean_kernel_limit(r, base).item() == pytest.approx(by_quadrature, abs=1e-10)
    grid = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert mean_kernel_limit(grid).shape == grid.shape


def test_bad_kernels():
    with pytest.raises(ValueError, match="r must not be 0"):
        mean_kernel_limit(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="base must be greater than 1, got 0.5"):
        mean_kernel_limit(1.0, base=0.5)
