"""What layouts do: the predicates against the definitions and on random documents, the table of wishes, bandwidth."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue_utils.position.rope_base_beta import RopeAttention, RotaryEmbedding
from kexue_utils.position.rope_multimodal import (
    PATCH,
    ROWS_AND_COLUMNS,
    SCHEMES,
    Desiderata,
    Image,
    Text,
    Video,
    check_compatibility,
    check_equivalence,
    check_symmetry,
    collision_free,
    desiderata,
    grid_bandwidth,
    layout,
    neighbour_spacing,
    order_preserved,
)
from tests.tolerances import assert_close

SIZES = list(itertools.product(range(1, 13), repeat=2))
SYMMETRIC = ["flatten", "tie", "tie_min", "tie_frac", "tv", "tv3"]
DIAGONAL = [name for name in SCHEMES if name != "page"]
images = st.builds(Image, st.integers(1, 12), st.integers(1, 12))
documents = st.lists(st.builds(Text, st.integers(0, 4)) | images, max_size=6).map(lambda s: [*s, Image(2, 3)])


@pytest.mark.parametrize("scheme", SYMMETRIC)
@given(segments=documents)
def test_symmetric_schemes_are_so_in_every_document(scheme, segments):
    found = check_symmetry(layout(segments, scheme))
    assert found.corner and found.central
    assert len(found.left) == sum(isinstance(segment, Image) for segment in segments)
    assert_close(found.left, found.right)


@pytest.mark.parametrize("scheme", ["naive2d", "mrope", "mrope_hw"])
@given(segments=documents.filter(lambda segments: any(isinstance(s, Image) for s in segments)))
def test_the_naive_layouts_are_symmetric_only_for_squares(scheme, segments):
    shapes = [segment.shape for segment in segments if isinstance(segment, Image)]
    rows_and_columns = check_symmetry(layout(segments, scheme), axes=ROWS_AND_COLUMNS)
    assert rows_and_columns.corner is rows_and_columns.central is all(h == w for h, w in shapes)
    if scheme == "mrope":  # in time, an image is next to the text before and max(h, w) from the text after
        everywhere = check_symmetry(layout(segments, scheme))
        assert everywhere.corner is all(shape == (1, 1) for shape in shapes)
        assert everywhere.right[:, 0].tolist() == [max(shape) for shape in shapes]
        assert (everywhere.left == 1).all()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 3), (3, 2), (5, 5), (4, 7)])
def test_gaps_and_worth_by_hand(h, w):
    document, N = [Text(1), Image(h, w), Text(1)], h * w
    expected = {
        "flatten": ([1], [1], N),
        "naive2d": ([1, 1], [max(h, w) + 1 - h, max(h, w) + 1 - w], max(h, w)),
        "tie": ([w + 1, h + 1], [w + 1, h + 1], N + h + w),
        "tie_frac": ([(N + 1) / (h + 1), (N + 1) / (w + 1)], [(N + 1) / (h + 1), (N + 1) / (w + 1)], N),
        "tv": ([(N - h) / 2 + 1, (N - w) / 2 + 1], [(N - h) / 2 + 1, (N - w) / 2 + 1], N),
        "mrope": ([1, 1, 1], [max(h, w), max(h, w) + 1 - h, max(h, w) + 1 - w], max(h, w)),
    }
    for scheme, (left, right, worth) in expected.items():
        found, symmetry = layout(document, scheme), check_symmetry(layout(document, scheme))
        assert_close(symmetry.left, torch.tensor([left], dtype=torch.float64))
        assert_close(symmetry.right, torch.tensor([right], dtype=torch.float64))
        assert symmetry.corner is all(a == b for a, b in zip(left, right, strict=True))
        assert check_equivalence(found) == (worth == N, (worth,), (N,))


def test_corners_can_agree_where_the_rest_does_not():
    found = layout([Text(1), Image(2, 2), Text(1)], "tie")
    found.positions[0, 3] += 1  # an inner patch
    assert check_symmetry(found)[:2] == (True, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["tie", "tie_frac", "tv"])
def test_rounding_is_no_asymmetry_but_a_step_is(scheme, dtype):
    document = [Text(2), Image(6, 9), Text(2)] if dtype == torch.bfloat16 else [Text(2), Image(1000, 999), Text(2)]
    found = layout(document, scheme, dtype=dtype)
    assert check_symmetry(found)[:2] == (True, True)
    late = found.positions.clone()
    late[:, found.spans[1][1] :] += 3
    assert check_symmetry(replace(found, positions=late))[:2] == (False, False)


def test_the_page_has_no_worth_and_its_own_gaps():
    found = layout([Text(4), Image(3, 7), Text(1)], "page", separators=False)
    symmetry = check_symmetry(found)
    assert symmetry.left.tolist() == [[1, -3]] and symmetry.right.tolist() == [[1, -6]] and not symmetry.corner
    assert check_equivalence(found) == (None, (None,), (21,))


@pytest.mark.filterwarnings("ignore:images without a separator")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_images_between_texts_count(scheme):
    segments = [Image(2, 3), Text(1), Image(3, 3), Image(1, 2), Text(2), Image(2, 1), Text(1), Image(2, 2)]
    found = layout(segments, scheme, separators=False)
    assert check_equivalence(found).patches == (2,) and len(check_symmetry(found).left) == 1
    for check in (check_symmetry, check_equivalence):
        with pytest.raises(ValueError, match="layout must have an image or a video between two text tokens"):
            check(layout([Text(2), Image(2, 3)], scheme, separators=False))


@pytest.mark.parametrize("scheme", ["tie", "tie_frac", "tv"])
def test_without_separators_neighbours_of_different_shapes_are_not_symmetric(scheme):
    pair = [Text(1), Image(2, 3), Image(4, 2), Text(1)]
    assert check_symmetry(layout(pair, scheme)).corner
    with pytest.warns(UserWarning):
        apart = layout(pair, scheme, separators=False)
    (_, hi), (lo, _) = apart.spans[1:3]
    into, out = apart.positions[:, lo] - apart.positions[:, hi - 1], check_symmetry(layout(pair, scheme)).left.sum(0)
    assert_close(into, out - 1)  # neither image's own gap, s_A or s_B


@given(t=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5), step=st.sampled_from([0.25, 0.5, 1.0, 1.5]))
def test_videos_in_tv_are_symmetric_and_worth_their_patches_on_all_three_axes(t, h, w, step):
    if step * (t - 1) >= t * h * w + 1:
        return
    found = layout([Text(2), Video(t, h, w, step), Text(2)], "tv")
    assert check_symmetry(found)[:2] == (True, True)
    assert check_equivalence(found) == (True, (t * h * w,), (t * h * w,))
    assert collision_free(found) and order_preserved(found)
    assert [s is None for s in neighbour_spacing(found)[0]] == [n == 1 for n in (t, h, w)]
    if t > 1:
        assert neighbour_spacing(found)[0].time.tolist() == [step, 0, 0]


def test_compatibility():
    for scheme in DIAGONAL:
        assert check_compatibility(scheme) == (True, True, True)
    assert check_compatibility("page") == (False, False, False)
    # one token a row is diagonal once: the page fails for text, not for a token
    assert check_compatibility("page", [Text(1)]) == (True, True, True)


@pytest.mark.parametrize("scheme", DIAGONAL)
@given(segments=documents)
def test_text_stays_on_the_diagonal(scheme, segments):
    assert check_compatibility(scheme, segments).holds


@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 3), (3, 2), (5, 4)])
def test_spacing_by_hand(h, w):
    N = h * w
    expected = {
        "flatten": ([w], [1]),
        "page": ([1, 0], [0, 1]),
        "naive2d": ([1, 0], [0, 1]),
        "tie": ([w + 1, 0], [0, h + 1]),
        "tie_frac": ([(N + 1) / (h + 1), 0], [0, (N + 1) / (w + 1)]),
        "tv": ([1, 0], [0, 1]),
        "mrope": ([0, 1, 0], [0, 0, 1]),
    }
    for scheme, (vertical, horizontal) in expected.items():
        (found,) = neighbour_spacing(layout([Text(1), Image(h, w)], scheme))
        assert found.time is None
        assert_close(found.vertical, torch.tensor(vertical, dtype=torch.float64))
        assert_close(found.horizontal, torch.tensor(horizontal, dtype=torch.float64))


def test_spacing_of_lines_and_videos():
    column, row, video = neighbour_spacing(layout([Image(3, 1), Image(1, 3), Text(1), Video(2, 3, 4)], "flatten"))
    assert column.horizontal is row.vertical is None
    assert column.vertical.tolist() == row.horizontal.tolist() == [1]
    assert [step.tolist() for step in video] == [[12], [4], [1]]
    assert neighbour_spacing(layout([Video(3, 1, 2, 2.5)], "mrope"))[0].time.tolist() == [2, 0, 0]
    assert neighbour_spacing(layout([Text(3)], "tie")) == ()


@pytest.mark.parametrize("scheme", SCHEMES)
@given(segments=documents)
def test_no_collisions_and_the_order_of_reading(scheme, segments):
    found = layout(segments, scheme)
    assert collision_free(found)
    assert order_preserved(found) is (scheme != "page")
    if scheme != "page":  # by the definition: what precedes a patch in another segment is below it on every axis
        owner = torch.zeros(len(found.kind), dtype=torch.int64)
        for i, (lo, hi) in enumerate(found.spans):
            owner[lo:hi] = i + 1
        p = found.positions[:, :60]
        for m in (found.kind[:60] == PATCH).nonzero().flatten().tolist():
            earlier = (torch.arange(len(p[0])) < m) & (owner[: len(p[0])] != owner[m])
            assert (p[:, earlier] < p[:, m : m + 1]).all()


def test_collisions_and_disorder_are_seen():
    found = layout([Text(2), Image(2, 3), Text(2)], "tv")
    found.positions[:, 5] = found.positions[:, 0]
    assert not collision_free(found) and not order_preserved(found)
    late = layout([Text(2), Image(5, 5), Text(2)], "tv")
    late.positions[:, -3:] = late.positions[:, :1] + torch.arange(6.0, 9.0, dtype=torch.float64)  # K of M-RoPE
    assert not order_preserved(late)
    late.positions[:, -3:] = late.positions.amax() + torch.arange(3)  # level with the last patch
    assert not order_preserved(late)
    late.positions[:, -3:] += 0.5
    assert order_preserved(late)
    assert order_preserved(layout([Text(2)], "page")) and order_preserved(layout([], "tie"))


def test_text_after_a_long_video_reuses_its_ids_where_only_height_and_width_count():
    document = [Text(2), Video(12, 2, 3), Text(2)]
    assert order_preserved(layout(document, "mrope")) and not order_preserved(layout(document, "mrope_hw"))
    assert layout(document, "mrope").next == 4 + 12 + 3 and layout(document, "mrope_hw").next == 4 + 3 + 3
    reused = layout([Text(1), Video(4, 1, 1), Text(9)], "mrope_hw", separators=False)
    assert set(reused.positions[0, 5:].tolist()) & set(reused.positions[0, 1:5].tolist())


def test_the_table_of_wishes():
    yes, no = True, False
    table = {  # compatible, symmetric, equivalent, integer, isotropic, shape-independent, collision-free, ordered
        "flatten": (yes, yes, yes, yes, no, no, yes, yes),
        "page": (no, no, None, yes, yes, yes, yes, no),
        "naive2d": (yes, no, no, yes, yes, yes, yes, yes),
        "tie": (yes, yes, no, yes, no, no, yes, yes),
        "tie_min": (yes, yes, no, yes, no, no, yes, yes),
        "tie_frac": (yes, yes, yes, no, no, no, yes, yes),
        "tv": (yes, yes, yes, no, yes, yes, yes, yes),
        "tv3": (yes, yes, yes, no, yes, yes, yes, yes),
        "mrope": (yes, no, no, yes, yes, yes, yes, yes),
        "mrope_hw": (yes, no, no, yes, yes, yes, yes, yes),
    }
    assert {scheme: tuple(desiderata(scheme, SIZES)) for scheme in SCHEMES} == table
    # on squares alone, more wishes come true
    squares = [(n, n) for n in range(1, 8)]
    assert desiderata("mrope", squares) == Desiderata(yes, yes, no, yes, yes, yes, yes, yes)
    assert desiderata("tie", squares) == Desiderata(yes, yes, no, yes, yes, no, yes, yes)
    assert desiderata("tv", [(3, 3), (5, 1)]).integer and not desiderata("tv", [(2, 2), (2, 3)]).integer
    assert desiderata("tie", [(2, 3)]).shape_independent
    with pytest.raises(ValueError, match=r"sizes must have one with h, w >= 2, got \[\(1, 3\)\]"):
        desiderata("tie", [(1, 3)])


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 2), (1, 5), (5, 1), (2, 2), (2, 3), (2, 5), (3, 3), (3, 4), (4, 4)])
def test_bandwidth(h, w):
    assert grid_bandwidth(h, w) == (min(h, w) if h * w > 1 else 0)


@pytest.mark.parametrize(("h", "w"), [(1, 4), (2, 2), (2, 3), (3, 2), (2, 4)])
def test_bandwidth_over_all_orders(h, w):
    cells = list(itertools.product(range(h), range(w)))
    edges = [(a, b) for a, b in itertools.combinations(cells, 2) if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    least = min(
        max(abs(rank[a] - rank[b]) for a, b in edges)
        for rank in (dict(zip(cells, order, strict=True)) for order in itertools.permutations(range(h * w)))
    )
    assert grid_bandwidth(h, w) == least


def test_bandwidth_of_nothing():
    with pytest.raises(ValueError, match="grid needs h>=1 and w>=1, got h=0, w=2"):
        grid_bandwidth(0, 2)


def test_a_causal_mask_tells_the_order_to_two_layers_but_not_to_one():
    torch.manual_seed(0)
    layers = [RopeAttention(16, 2, rope=RotaryEmbedding(8)).double() for _ in range(2)]
    for layer in layers:
        layer.rope.inv_freq = torch.zeros(4)  # no positions
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    shuffled = x[:, [*torch.randperm(8).tolist(), 8]]
    one, two = layers[0], lambda x: layers[1](x + layers[0](x))
    assert_close(one(shuffled)[:, -1], one(x)[:, -1])
    assert (two(shuffled)[:, -1] - two(x)[:, -1]).abs().max() > 1e-3
