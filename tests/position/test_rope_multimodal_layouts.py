"""Layouts: against definitions token by token in fractions; the scales and offsets; videos, padding, sizes, errors."""

import itertools
import warnings
from fractions import Fraction
from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue_utils.position.rope_multimodal import (
    PATCH,
    SCHEMES,
    SEPARATOR,
    TEXT,
    Image,
    Text,
    Video,
    layout,
    pad_layouts,
    tie_scales,
    tv_offsets,
    unified_offsets,
)

SIZES = list(itertools.product(range(1, 13), repeat=2))
texts = st.builds(Text, st.integers(0, 5))
images = st.builds(Image, st.integers(1, 12), st.integers(1, 12))
videos = st.builds(
    Video, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0, 2.5])
)
documents = st.lists(texts | images, max_size=6)


def reference(segments, scheme, start, separators):
    """Positions and kinds by the definitions, one token after the other; the next id."""
    axes, positions, kinds, L = SCHEMES[scheme].axes, [], [], Fraction(start - 1)
    column = 0  # of the last token of an open row of text, on the page

    def say(n, kind):
        nonlocal L, column
        for _ in range(n):
            if scheme == "page":
                L, column = L + (column == 0), column + 1
                positions.append((L, column))
            else:
                L += 1
                positions.append((L,) * axes)
            kinds.append(kind)

    for segment in segments:
        if isinstance(segment, Text):
            say(segment.n, TEXT)
            continue
        say(int(separators), SEPARATOR)
        t, h, w = (1,) * (3 - len(segment.shape)) + segment.shape
        N, found = t * h * w, []
        for f, i, j in itertools.product(range(1, t + 1), range(1, h + 1), range(1, w + 1)):
            if scheme == "flatten":
                p, K = (((f - 1) * h + i - 1) * w + j,), N + 1
            elif scheme == "page":
                p, K = (i, j - L), h + 1
            elif scheme == "naive2d":
                p, K = (i, j), max(h, w) + 1
            elif scheme.startswith("tie"):
                K = {"tie": (h + 1) * (w + 1), "tie_frac": N + 1}.get(scheme)
                K = K or (h + 1) * (w + 1) // gcd(h + 1, w + 1)
                p = Fraction(i * K, h + 1), Fraction(j * K, w + 1)
            elif scheme.startswith("tv"):
                step = Fraction(getattr(segment, "step", 1))
                beta_t, K = (N + 1 - (t + 1) * step) / 2, N + 1
                p = (beta_t + f * step, Fraction(N - h, 2) + i, Fraction(N - w, 2) + j)[-axes:]
            else:
                time = int((f - 1) * getattr(segment, "step", 1)) + 1
                last = int((t - 1) * getattr(segment, "step", 1)) + 1
                p, K = (time, i, j), max(h, w, last if scheme == "mrope" else 0) + 1
            found.append(tuple(L + x for x in p))
        positions += found
        kinds += [PATCH] * N
        L, column = L + K - 1, 0
        say(int(separators), SEPARATOR)
    rows = torch.tensor([[float(x) for x in p] for p in positions], dtype=torch.float64).reshape(-1, axes).T
    return rows, kinds, float(L + 1)


@pytest.mark.filterwarnings("ignore:images without a separator")
@pytest.mark.parametrize("scheme", SCHEMES)
@given(segments=documents, start=st.integers(-3, 1000), separators=st.booleans())
def test_every_token_is_where_the_definition_puts_it(scheme, segments, start, separators):
    found = layout(segments, scheme, start=start, separators=separators)
    positions, kinds, following = reference(segments, scheme, start, separators)
    assert torch.equal(found.positions, positions) and found.positions.dtype == torch.float64
    assert found.kind.tolist() == kinds and found.kind.dtype == torch.int8
    assert found.next == following


@pytest.mark.filterwarnings("ignore:images without a separator")
@pytest.mark.parametrize("scheme", ["flatten", "tv", "mrope", "mrope_hw"])
@given(segments=st.lists(texts | images | videos, max_size=4), separators=st.booleans())
def test_videos_are_where_the_definition_puts_them(scheme, segments, separators):
    found_videos = [segment for segment in segments if isinstance(segment, Video)]
    fits = all(0 < s.step and (s.t - 1) * s.step < s.t * s.h * s.w + 1 for s in found_videos)
    if scheme == "tv" and not fits:
        with pytest.raises(ValueError, match="gammas"):
            layout(segments, scheme, separators=separators)
        return
    found = layout(segments, scheme, separators=separators)
    assert found.scheme == ("tv3" if scheme == "tv" and found_videos else scheme)
    positions, kinds, following = reference(segments, found.scheme, 1, separators)
    assert torch.equal(found.positions, positions) and found.kind.tolist() == kinds and found.next == following


@given(segments=documents, separators=st.booleans())
def test_spans_hold_the_tokens_of_their_segments(segments, separators):
    found = layout(segments, "mrope", separators=separators)
    assert found.segments == tuple(segments) and found.scheme == "mrope"
    covered = torch.full_like(found.kind, SEPARATOR)
    for segment, (lo, hi) in zip(segments, found.spans, strict=True):
        assert hi - lo == torch.Size(segment.shape).numel()
        covered[lo:hi] = TEXT if isinstance(segment, Text) else PATCH
    assert torch.equal(covered, found.kind)
    assert list(found.spans) == sorted(found.spans)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(segments=documents, n=st.integers(0, 6), a=st.integers(0, 6), where=st.integers(0, 6))
def test_splitting_a_text_changes_nothing(scheme, segments, n, a, where):
    whole = layout([*segments[:where], Text(n), *segments[where:]], scheme)
    split = layout([*segments[:where], Text(min(a, n)), Text(n - min(a, n)), *segments[where:]], scheme)
    assert torch.equal(whole.positions, split.positions) and torch.equal(whole.kind, split.kind)
    assert whole.next == split.next


@pytest.mark.parametrize("scheme", SCHEMES)
@given(segments=documents, more=documents)
def test_a_document_goes_on_at_next(scheme, segments, more):
    if scheme == "page":  # there, text goes on in the row that is open
        more = [Image(1, 1), *more]
    one, all_ = layout(segments, scheme), layout([*segments, *more], scheme)
    T = len(one.kind)
    assert torch.equal(all_.positions[:, :T], one.positions)
    if scheme == "page":
        return
    rest = layout(more, scheme, start=int(one.next))
    assert torch.equal(all_.positions[:, T:], rest.positions) and all_.next == rest.next


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens(scheme):
    found = layout([], scheme, start=7)
    assert found.positions.shape == (SCHEMES[scheme].axes, 0) and found.kind.shape == (0,)
    assert found.next == 7 and found.spans == ()


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_scales_of_tie_solve_their_equation(h, w):
    for form in ("integer", "minimal", "fractional"):
        s, t, span = tie_scales(h, w, form=form)
        assert (h + 1) * s == (w + 1) * t == span
    assert tie_scales(h, w) == tie_scales(h, w, form="integer") == (w + 1, h + 1, (w + 1) * (h + 1))
    assert tie_scales(h, w, form="fractional")[2] - 1 == w * h  # an image is worth wh tokens
    s, t, span = tie_scales(h, w, form="minimal")
    least = next(s for s in itertools.count(1) if (h + 1) * s % (w + 1) == 0)
    assert s == least and t.denominator == 1


def test_the_examples_of_the_errata():
    assert tie_scales(3, 7) == (8, 4, 32) and tie_scales(3, 7, form="minimal") == (2, 1, 8)
    assert tie_scales(15, 15, form="minimal")[2] == 16 and tie_scales(15, 16, form="minimal")[2] == 272
    assert tie_scales(32, 32)[2] == 1089 and tie_scales(32, 32, form="fractional")[2] == 1025


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    gamma=st.fractions("1/9", 3, max_denominator=9),
    N=st.integers(1, 200),
)
def test_offsets_leave_the_same_gap_on_both_sides(sizes, gamma, N):
    fits = all((n - 1) * gamma < N + 1 for n in sizes)
    if not fits:
        with pytest.raises(ValueError, match=f"N \\+ 1 = {N + 1} for n = "):
            unified_offsets(sizes, [gamma] * len(sizes), N)
        return
    for n, beta in zip(sizes, unified_offsets(sizes, [gamma] * len(sizes), N), strict=True):
        assert beta + gamma == N + 1 - (beta + n * gamma) > 0


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_tie_and_tv_are_cases_of_one_family(h, w):
    assert tv_offsets(h, w) == (Fraction(w * h - h, 2), Fraction(w * h - w, 2))
    assert tv_offsets(h, w) == tv_offsets(1, h, w)[1:]
    for form in ("integer", "minimal", "fractional"):
        s, t, span = tie_scales(h, w, form=form)
        assert unified_offsets((h, w), (s, t), span - 1) == (0, 0)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_video_of_one_frame_is_an_image(h, w):
    around = Text(3), Text(2)
    image = layout([around[0], Image(h, w), around[1]], "tv")
    video = layout([around[0], Video(1, h, w), around[1]], "tv")
    assert video.scheme == "tv3" and torch.equal(video.positions[1:], image.positions) and video.next == image.next
    for scheme in ("tv3", "mrope", "mrope_hw", "flatten"):
        as_image, as_video = (layout([Text(3), s, Text(2)], scheme) for s in (Image(h, w), Video(1, h, w)))
        assert torch.equal(as_image.positions, as_video.positions)


def test_a_frame_more_moves_the_frames_before_it_in_tv_but_not_in_mrope():
    for scheme, moves in (("tv", True), ("mrope", False)):
        short, long = (layout([Text(2), Video(t, 2, 3)], scheme) for t in (2, 3))
        assert torch.equal(short.positions[:, 3:15], long.positions[:, 3:15]) is not moves


@pytest.mark.parametrize("n", range(1, 13))
def test_minimal_tie_is_the_naive_layout_of_squares_and_only_of_them(n):
    for w in range(1, 13):
        tie_min, naive = (layout([Text(2), Image(n, w), Text(2)], scheme) for scheme in ("tie_min", "naive2d"))
        assert torch.equal(tie_min.positions, naive.positions) is (n == w)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_grids_are_exact(scheme):
    h, w, start = 256, 255, 1_000_000
    found = layout([Text(1), Image(h, w), Text(1)], scheme, start=start)
    patches = found.positions[:, 2:-2]
    positions = reference([Text(1), Image(h, w), Text(1)], scheme, start, True)[0]
    assert torch.equal(patches, positions[:, 2:-2])
    if scheme == "tie_frac":  # nearest to the fraction, not just near it
        exact = [start + 1 + Fraction(i * (h * w + 1), h + 1) for i in range(1, h + 1)]
        assert patches[0, ::w].tolist() == [float(x) for x in exact]


@pytest.mark.parametrize("scheme", SCHEMES)
@given(documents=st.lists(documents, min_size=1, max_size=4))
def test_padding(scheme, documents):
    layouts = [layout(segments, scheme) for segments in documents]
    positions, mask = pad_layouts(layouts)
    T = max(len(found.kind) for found in layouts)
    assert positions.shape == (len(layouts), SCHEMES[scheme].axes, T) and mask.shape == (len(layouts), T)
    assert mask.dtype == torch.bool and positions.dtype == torch.float64
    for found, p, m in zip(layouts, positions, mask, strict=True):
        n = len(found.kind)
        assert torch.equal(p[:, :n], found.positions) and not p[:, n:].any()
        assert m[:n].all() and not m[n:].any()


def test_dtypes():
    document = [Text(2), Image(3, 4), Text(1)]
    exact = layout(document, "tie")
    for dtype in (torch.float32, torch.int64, torch.int32):
        found = layout(document, "tie", dtype=dtype)
        assert found.positions.dtype == dtype and torch.equal(found.positions.to(torch.float64), exact.positions)
    for scheme, dtype, start in [("tie_frac", torch.int64, 1), ("tie", torch.int8, 120), ("tie", torch.bool, 1)]:
        with pytest.raises(ValueError, match=rf"dtype must be a floating-point type or .* '{scheme}', got {dtype}"):
            layout(document, scheme, start=start, dtype=dtype)
    assert layout([Text(2)], "tie_frac", dtype=torch.int64).positions.tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_neighbours_without_separators_are_warned_of_where_they_cost_symmetry(scheme):
    pair = [Image(2, 3), Text(0), Image(4, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout(pair, scheme)
        layout([Image(2, 3), Text(1), Image(4, 2)], scheme, separators=False)
        if not scheme.startswith(("tie", "tv")):
            layout(pair, scheme, separators=False)
    if scheme.startswith(("tie", "tv")):
        with pytest.warns(UserWarning, match=f"not symmetric in scheme '{scheme}'") as caught:
            layout(pair, scheme, separators=False)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(("form", "s"), [("tie", (4, 3)), ("tie_frac", (Fraction(7, 3), Fraction(7, 4)))])
def test_gaps_between_images(form, s):
    A, B = Image(2, 3), Image(4, 2)
    s_A, s_B = (tie_scales(*image.shape, form="integer" if form == "tie" else "fractional")[:2] for image in (A, B))
    assert s_A == s
    for between, separators, extra in (([], True, 1), ([Text(1)], False, 0), ([], False, -1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = layout([Text(1), A, *between, B], form, separators=separators)
        (_, last), (first, _) = found.spans[1], found.spans[-1]
        gap = found.positions[:, first] - found.positions[:, last - 1]
        assert gap.tolist() == pytest.approx([float(a + b + extra) for a, b in zip(s_A, s_B, strict=True)], rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Image(0, 3), ValueError, "image needs h>=1 and w>=1, got h=0"),
        (lambda: Image(3, -1), ValueError, "image needs h>=1 and w>=1, got h=3, w=-1"),
        (lambda: Image(3, 2.5), ValueError, "image needs .*w=2.5"),
        (lambda: Video(0, 1, 1), ValueError, "video needs t>=1, h>=1 and w>=1, got t=0"),
        (lambda: Video(1, 1, 1, step=-1), ValueError, "video needs 0<=step<inf, got step=-1"),
        (lambda: Video(1, 1, 1, step=float("nan")), ValueError, "video needs 0<=step<inf, got step=nan"),
        (lambda: Video(1, 1, 1, step=float("inf")), ValueError, "video needs 0<=step<inf, got step=inf"),
        (lambda: Text(-1), ValueError, "text needs an integer n>=0, got n=-1"),
        (lambda: Text(1.0), ValueError, "text needs an integer n>=0, got n=1.0"),
        (lambda: layout([Text(1)], "snake"), ValueError, "scheme must be one of flatten, page, .*, got 'snake'"),
        (lambda: layout([3], "tie"), TypeError, "segments must be Text, Image or Video, got int"),
        (lambda: layout([Video(2, 5, 1, step=30)], "tv"), ValueError, r"gammas .* N \+ 1 = 11 for n = 2, got 30"),
        (lambda: layout([Video(2, 5, 1, step=0)], "tv"), ValueError, r"gammas must satisfy 0 < .*, got 0"),
        (lambda: tie_scales(0, 3), ValueError, "image needs h>=1 and w>=1, got h=0, w=3"),
        (lambda: tie_scales(2, -1), ValueError, "image needs h>=1 and w>=1, got h=2, w=-1"),
        (lambda: unified_offsets([0], [1], 5), ValueError, "sizes must be at least 1, got 0"),
        (lambda: tie_scales(2, 3, form="real"), ValueError, "form must be one of integer, .*, got 'real'"),
        (lambda: pad_layouts([]), ValueError, "layouts must be at least one"),
        (
            lambda: pad_layouts([layout([Text(1)], name) for name in ("tv", "flatten")]),
            ValueError,
            r"same number of axes, got axes \[1, 2\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if not SCHEMES[name].video and name != "tv"])
def test_schemes_without_time_refuse_videos(scheme):
    with pytest.raises(ValueError, match=rf"scheme '{scheme}' has no form for videos, got Video\(t=2, h=3, w=4"):
        layout([Text(1), Video(2, 3, 4)], scheme)
