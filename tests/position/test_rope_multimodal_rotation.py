"""Rotation by several coordinates: bit by bit RoPE-1D on the diagonal, group laws, gradients, shapes, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue_utils.position.rope_base_beta import LAYOUTS, apply_rope, rope_inv_freq, rotate
from kexue_utils.position.rope_multimodal import (
    PATCH,
    SCHEMES,
    Image,
    Text,
    axial_frequencies,
    frequency_partition,
    layout,
    pad_layouts,
    rope_nd,
    rope_nd_tables,
)
from tests.tolerances import assert_close

THETA = rope_inv_freq(64)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def axial(dim, axes, **options):
    return axial_frequencies(rope_inv_freq(dim), frequency_partition(dim, axes, **options), axes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["interleaved", "chunked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_diagonal_it_is_rope_1d_bit_by_bit(dtype, axes, how, layout):
    x, frequencies = normal(0, 2, 3, 50, 64, dtype=dtype), axial(64, axes, how=how)
    for n in (torch.arange(50), torch.linspace(-3e4, 1e5, 50, dtype=torch.float64)):
        y = rope_nd(x, n.expand(axes, -1), frequencies, layout=layout)
        assert y.dtype == dtype and torch.equal(y, apply_rope(x, n, THETA, layout=layout))
        assert torch.equal(rope_nd(x, n.expand(2, axes, -1), frequencies, layout=layout), y)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(n=st.integers(1, 30), start=st.integers(-5, 10**6))
def test_pure_text_is_rope_1d_bit_by_bit_unless_it_is_a_page(scheme, n, start):
    found = layout([Text(n)], scheme, start=start)
    x, ids = normal(0, n, 64, dtype=torch.float32), torch.arange(start, start + n)
    same = torch.equal(rope_nd(x, found.positions, axial(64, len(found.positions))), apply_rope(x, ids, THETA))
    assert same is (scheme != "page" or n == 1 == start)


def test_frequencies_that_are_shared_by_the_axes_are_not_compatible():
    shared = axial_frequencies(rope_inv_freq(32).repeat(2), frequency_partition(64, 2, how="chunked"), 2)
    x, n = normal(0, 9, 64), torch.arange(9)
    assert (rope_nd(x, n.expand(2, -1), shared) - apply_rope(x, n, THETA)).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_plane(layout):
    frequencies, x, p = normal(0, 2, 4), normal(1, 5, 10), normal(2, 2, 5)
    y = rope_nd(x, p, frequencies, layout=layout)
    planes = [(j, j + 4) for j in range(4)] if layout == "half" else [(2 * j, 2 * j + 1) for j in range(4)]
    for j, (a, b) in enumerate(planes):
        turned = torch.complex(x[:, a], x[:, b]) * torch.exp(1j * (frequencies[:, j] @ p))
        assert_close(torch.complex(y[:, a], y[:, b]), turned, torch.float64)
    assert torch.equal(y[:, 8:], x[:, 8:])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("mixed", [False, True])
@given(data=st.data())
def test_scores_depend_on_the_difference_of_positions(axes, mixed, data):
    frequencies = normal(3, axes, 32) if mixed else axial(64, axes)
    p, q, c = (
        torch.tensor(data.draw(st.lists(st.floats(-100, 100), min_size=axes, max_size=axes)), dtype=torch.float64)
        for _ in range(3)
    )
    x, y = normal(0, 1, 64), normal(1, 1, 64)
    score = (rope_nd(x, p[:, None], frequencies) * rope_nd(y, q[:, None], frequencies)).sum()
    # angles of some hundred radians, 64 products
    assert_close(
        score, (rope_nd(x, (p + c)[:, None], frequencies) * rope_nd(y, (q + c)[:, None], frequencies)).sum(), scale=100
    )
    assert_close(score, (x * rope_nd(y, (q - p)[:, None], frequencies)).sum(), scale=100)


def test_it_is_the_exponential_of_commuting_matrices():
    frequencies, p = normal(0, 2, 3), normal(1, 2)
    generators = torch.zeros(2, 6, 6, dtype=torch.float64)
    for j in range(3):
        generators[:, 2 * j + 1, 2 * j] = frequencies[:, j]
        generators[:, 2 * j, 2 * j + 1] = -frequencies[:, j]
    x = normal(2, 1, 6)
    expected = torch.linalg.matrix_exp(p[0] * generators[0] + p[1] * generators[1]) @ x[0]
    assert_close(rope_nd(x, p[:, None], frequencies, layout="interleaved")[0], expected)


def test_batches_and_heads():
    documents = [[Text(3), Image(2, 4)], [Image(3, 2), Text(1)], [Text(2)]]
    layouts = [layout(document, "tv") for document in documents]
    positions, mask = pad_layouts(layouts)
    frequencies, x = axial(16, 2), normal(0, 3, 5, positions.shape[-1], 16)
    y = rope_nd(x, positions, frequencies)
    for b, found in enumerate(layouts):
        T = len(found.kind)
        assert torch.equal(y[b, :, :T], rope_nd(x[b, :, :T], found.positions, frequencies))
    assert torch.equal(y.transpose(1, 2)[~mask], x.transpose(1, 2)[~mask])  # padding does not turn
    assert torch.equal(y[:, 0], rope_nd(x[:, 0], positions, frequencies))


def test_tables_serve_several_layers():
    positions, frequencies = layout([Text(2), Image(2, 2)], "tie").positions, axial(64, 2)
    x = normal(0, 2, 3, positions.shape[1], 64, dtype=torch.bfloat16)
    for name in LAYOUTS:
        cos, sin = rope_nd_tables(positions, frequencies, layout=name, dtype=x.dtype)
        assert cos.shape == (positions.shape[1], 64) and sin.shape == (positions.shape[1], 32)
        assert torch.equal(rotate(x, cos, sin, layout=name), rope_nd(x, positions, frequencies, layout=name))
        twice = rope_nd_tables(positions, frequencies, layout=name, factor=2.0)
        for table, doubled in zip(rope_nd_tables(positions, frequencies, layout=name), twice, strict=True):
            assert table.dtype == torch.float64 and torch.equal(2 * table, doubled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_out_positions_are_exact_in_low_precision(dtype):
    p = torch.tensor([[100_000.5, 70_001.25], [1.0, 99_999.0]], dtype=torch.float64)
    x = normal(0, 2, 64, dtype=dtype)
    exact = rope_nd(x.double(), p, axial(64, 2))
    assert_close(rope_nd(x, p, axial(64, 2)), exact, dtype, scale=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    x, p, frequencies = normal(0, 2, 3, 10), normal(1, 2, 3), normal(2, 2, 4)
    for tensor in (x, p, frequencies):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: rope_nd(*a, layout=layout), (x, p, frequencies))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph(layout):
    positions, frequencies = normal(1, 2, 3, 5), axial(64, 3)
    compiled = torch.compile(rope_nd, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float64, torch.bfloat16):
        x = normal(0, 2, 3, 5, 72, dtype=dtype).requires_grad_()
        y, z = (f(x, positions, frequencies, layout=layout) for f in (rope_nd, compiled))
        assert z.dtype == dtype
        assert_close(z, y)
        weight = normal(1, *y.shape, dtype=dtype)
        assert_close(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, z)))


def test_partitions():
    assert frequency_partition(12, 2).tolist() == [0, 1, 0, 1, 0, 1]
    assert frequency_partition(14, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert frequency_partition(14, 3, how="chunked").tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert frequency_partition(8, 1).tolist() == [0, 0, 0, 0]
    assert frequency_partition(2, 3).tolist() == [0]
    assert frequency_partition(12, 3, sections=[1, 3, 2]).tolist() == [0, 1, 2, 1, 2, 1]
    assert frequency_partition(12, 3, how="chunked", sections=(0, 4, 2)).tolist() == [1, 1, 1, 1, 2, 2]


@given(sections=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
def test_partitions_have_their_sections_and_take_turns(sections):
    dim, axes = 2 * sum(sections), len(sections)
    chunked, interleaved = (
        frequency_partition(dim, axes, how=how, sections=sections) for how in ("chunked", "interleaved")
    )
    for found in (chunked, interleaved):
        assert found.dtype == torch.int64 and found.bincount(minlength=axes).tolist() == sections
    assert torch.equal(chunked, chunked.sort().values)
    left, expected = list(sections), []
    while any(left):
        expected += [axis for axis in range(axes) if left[axis]]
        left = [max(0, n - 1) for n in left]
    assert interleaved.tolist() == expected


def test_axial_frequencies():
    theta = torch.tensor([8.0, 4.0, 2.0], dtype=torch.float32)
    found = axial_frequencies(theta, torch.tensor([1, 0, 1]), 3)
    assert found.tolist() == [[0, 4, 0], [8, 0, 2], [0, 0, 0]] and found.dtype == torch.float32
    assert torch.equal(axial(64, 3).sum(0), THETA)
    elsewhere = axial_frequencies(theta.to("meta"), frequency_partition(6, 2), 2)  # the partition stays on the CPU
    assert elsewhere.device.type == "meta" and elsewhere.shape == (2, 3)


def test_on_the_page_half_of_the_features_don_t_know_where_in_the_text_they_are():
    found = layout([Text(9)], "page")
    x, frequencies = torch.ones(9, 64, dtype=torch.float64), axial(64, 2)
    y = rope_nd(x, found.positions, frequencies).unflatten(1, (2, 32))
    rows = frequency_partition(64, 2) == 0
    assert (y[:, :, rows] == y[:1, :, rows]).all()
    assert (y[1:, :, ~rows] != y[:1, :, ~rows]).all()


def test_patches_of_one_image_have_codes_of_their_own():
    found = layout([Image(64, 64)], "naive2d")
    patches = found.positions[:, found.kind == PATCH]
    codes = rope_nd(torch.ones(4096, 64, dtype=torch.float64), patches, axial(64, 2))
    assert torch.pdist(codes).min() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frequency_partition(7, 2), "dim must be a positive multiple of 2, got 7"),
        (lambda: frequency_partition(0, 2), "dim must be a positive multiple of 2, got 0"),
        (lambda: frequency_partition(8, 0), "axes must be at least 1, got 0"),
        (lambda: frequency_partition(8, 2, how="random"), "how must be 'interleaved' or 'chunked', got 'random'"),
        (
            lambda: frequency_partition(128, 3, sections=[16, 24, 23]),
            r"sum dim/2 = 64, got \[16, 24, 23\] with the sum 63",
        ),
        (lambda: frequency_partition(8, 3, sections=[2, 2]), r"sections must be 3 numbers .* got \[2, 2\]"),
        (lambda: frequency_partition(8, 2, sections=[5, -1]), r"sections must be 2 numbers >= 0 .* got \[5, -1\]"),
        (lambda: axial_frequencies(torch.ones(3), torch.zeros(4), 2), r"shape \(D,\), got \(3,\) and \(4,\)"),
        (lambda: axial_frequencies(torch.ones(1, 3), torch.zeros(1, 3), 2), r"shape \(D,\), got \(1, 3\)"),
        (lambda: axial_frequencies(torch.ones(3), torch.tensor([0, 1, 2]), 2), r"must be in 0..1, got \[0, 1, 2\]"),
        (lambda: rope_nd(torch.ones(5, 8), torch.ones(3, 5), torch.ones(2, 4)), r"same A, got \(3, 5\) and \(2, 4\)"),
        (lambda: rope_nd(torch.ones(5, 8), torch.ones(5), torch.ones(2, 4)), r"\(B, A, T\) .* got \(5,\)"),
        (lambda: rope_nd(torch.ones(5, 8), torch.ones(1, 1, 2, 5), torch.ones(2, 4)), "must have the same A, got"),
        (
            lambda: rope_nd(torch.ones(5, 8), torch.ones(4, 5), torch.ones(4)),
            r"must have the same A, got .* and \(4,\)",
        ),
        (lambda: rope_nd(torch.ones(4, 8), torch.ones(2, 5), torch.ones(2, 4)), r"x \(4, 8\), got \(5,\)"),
        (lambda: rope_nd(torch.ones(5, 6), torch.ones(2, 5), torch.ones(2, 4)), "= 8 features, got 6"),
        (lambda: rope_nd(torch.ones(5, 8), torch.ones(2, 5), torch.ones(2, 4), layout="rows"), "layout must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
