"""Against the code of transformers and rotary-embedding-torch: ids of documents, sections, axial rotation."""

from types import MethodType, SimpleNamespace

import pytest
import rotary_embedding_torch
import torch
from transformers.models.glm4v import configuration_glm4v, modeling_glm4v
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl
from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl
from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

from kexue_utils.position.rope_base_beta import rope_inv_freq
from kexue_utils.position.rope_multimodal import (
    PATCH,
    Image,
    Text,
    Video,
    axial_frequencies,
    frequency_partition,
    layout,
    order_preserved,
    pad_layouts,
    rope_nd,
)
from tests.tolerances import assert_close

QWEN2 = (modeling_qwen2_vl.Qwen2VLModel, configuration_qwen2_vl.Qwen2VLConfig)
QWEN2_5 = (modeling_qwen2_5_vl.Qwen2_5_VLModel, configuration_qwen2_5_vl.Qwen2_5_VLConfig)
QWEN3 = (modeling_qwen3_vl.Qwen3VLModel, configuration_qwen3_vl.Qwen3VLConfig)
GLM4 = (modeling_glm4v.Glm4vModel, configuration_glm4v.Glm4vConfig)


def without_weights(model):
    """The model's own methods for ids on its default configuration, and nothing else."""
    cls, config = model
    bare = SimpleNamespace(config=config())
    bare.config.vision_config.tokens_per_second = 2
    for name in ("get_vision_position_ids", "get_rope_index"):
        setattr(bare, name, MethodType(getattr(cls, name), bare))
    return bare


def rope_index(model, documents, layouts, **options):
    """position_ids (B, A, T) and deltas by the model's own code, for documents padded on the right."""
    bare, T = without_weights(model), max(len(found.kind) for found in layouts)
    ids, types, mask = (torch.zeros(len(documents), T, dtype=torch.int64) for _ in range(3))
    grids = {Image: [], Video: []}
    merge = bare.config.vision_config.spatial_merge_size
    for b, (document, found) in enumerate(zip(documents, layouts, strict=True)):
        mask[b, : len(found.kind)] = 1
        for segment, (lo, hi) in zip(document, found.spans, strict=True):
            types[b, lo:hi] = {Text: 0, Image: 1, Video: 2}[type(segment)]
            if not isinstance(segment, Text):
                t, h, w = (1,) * (3 - len(segment.shape)) + segment.shape
                grids[type(segment)].append([t, h * merge, w * merge])
    image, video = (torch.tensor(found) if found else None for found in grids.values())
    options |= {"image_grid_thw": image, "video_grid_thw": video, "attention_mask": mask}
    positions, deltas = bare.get_rope_index(ids, types, **options)
    return positions.transpose(0, 1).to(torch.float64), deltas.flatten().tolist()


def random_document(rng, videos):
    """Texts and one to four images (and videos)."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))  # noqa: E731
    document = [Text(draw(0, 6))]
    for _ in range(draw(1, 4)):
        if videos and draw(0, 1):
            document.append(Video(draw(1, 12), draw(1, 5), draw(1, 5)))
        else:
            document.append(Image(draw(1, 12), draw(1, 12)))
        document.append(Text(draw(0, 6)))
    return document


@pytest.mark.parametrize("model", [QWEN2, QWEN2_5, QWEN3, GLM4])
def test_ids_of_documents_with_images(model):
    rng = torch.Generator().manual_seed(0)
    for _ in range(10):
        documents = [random_document(rng, videos=False) for _ in range(5)]
        layouts = [layout(document, "mrope", start=0) for document in documents]
        theirs, deltas = rope_index(model, documents, layouts)
        assert torch.equal(pad_layouts(layouts)[0], theirs)  # the zeros of padding, too
        assert [found.next - len(found.kind) for found in layouts] == deltas
        for document, found in zip(documents, layouts, strict=True):
            assert torch.equal(layout(document, "mrope_hw", start=0).positions, found.positions)


def test_the_measured_example():
    found = layout([Text(3), Image(3, 5), Text(1)], "mrope", start=0)  # the fourth text token opens the image
    t, h, w = found.positions[:, found.kind == PATCH]
    assert t.unique().tolist() == [4] and h.unique().tolist() == [4, 5, 6] and w.unique().tolist() == [4, 5, 6, 7, 8]
    assert found.positions[:, 19].tolist() == [9, 9, 9]
    before_the_close = layout([Text(4), Image(3, 5)], "mrope", start=0, separators=False)
    assert before_the_close.next == 9 and before_the_close.next - len(before_the_close.kind) == -10


@pytest.mark.parametrize("model", [QWEN2, QWEN2_5])
def test_ids_of_documents_with_videos(model):
    rng = torch.Generator().manual_seed(1)
    seconds = [0.25, 0.5, 1.0, 1.5, 2 / 24, 2 / 30]
    overtaken = 0
    for round in range(50):
        document = random_document(rng, videos=True)
        options = {}
        if model is QWEN2_5:
            second = seconds[round % len(seconds)]
            document = [Video(*s.shape, step=2 * second) if isinstance(s, Video) else s for s in document]
            options = {"second_per_grid_ts": [second] * len(document)}
        found = layout(document, "mrope_hw", start=0)
        theirs, deltas = rope_index(model, [document], [found], **options)
        assert torch.equal(found.positions, theirs[0])
        # the two rules for the text after a video differ if and only if the video is longer than high and wide
        by_all_axes = layout(document, "mrope", start=0)
        longer = any(int((s.t - 1) * s.step) + 1 > max(s.h, s.w) for s in document if isinstance(s, Video))
        assert torch.equal(by_all_axes.positions, found.positions) is not longer
        assert order_preserved(by_all_axes) and order_preserved(found) is not longer
        overtaken += longer
        # what transformers adds to the ids of generated tokens goes by the largest id, not by the text's next one
        assert deltas == [found.positions.max().item() + 1 - len(found.kind)]
    assert 10 < overtaken < 40


@pytest.mark.parametrize("model", [QWEN3, GLM4])
def test_frames_apart_are_images(model):
    """These models see every frame of a video between texts."""
    found = layout([Text(2), Image(2, 3), Text(4), Image(2, 3), Text(3), Image(4, 1), Text(1)], "mrope", start=0)
    bare = without_weights(model)
    merge = bare.config.vision_config.spatial_merge_size
    types = 2 * (found.kind == PATCH).long()[None]
    grid = torch.tensor([[2, 2 * merge, 3 * merge], [1, 4 * merge, merge]])
    theirs, _ = bare.get_rope_index(types, types, video_grid_thw=grid)
    assert torch.equal(theirs[:, 0].to(torch.float64), found.positions)


def rotary(module, name, config, **parameters):
    """The rotary embedding of a model with heads of 128 features."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | parameters
    return getattr(module, name)(
        config(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters)
    )


EMBEDDINGS = {
    "qwen2": (modeling_qwen2_vl, "Qwen2VLRotaryEmbedding", configuration_qwen2_vl.Qwen2VLTextConfig),
    "qwen2.5": (modeling_qwen2_5_vl, "Qwen2_5_VLRotaryEmbedding", configuration_qwen2_5_vl.Qwen2_5_VLTextConfig),
    "qwen3": (modeling_qwen3_vl, "Qwen3VLTextRotaryEmbedding", configuration_qwen3_vl.Qwen3VLTextConfig),
    "glm4": (modeling_glm4v, "Glm4vTextRotaryEmbedding", configuration_glm4v.Glm4vTextConfig),
}


@pytest.mark.parametrize(
    ("name", "dim", "how", "sections", "layout_", "extra"),
    [
        ("qwen2", 128, "chunked", [16, 24, 24], "half", {}),
        ("qwen2.5", 128, "chunked", [16, 24, 24], "half", {}),
        ("qwen3", 128, "interleaved", [24, 20, 20], "half", {}),
        ("glm4", 64, "chunked", [8, 12, 12], "interleaved", {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotation_of_the_models(name, dim, how, sections, layout_, extra):
    module, cls, config = EMBEDDINGS[name]
    peer = rotary(module, cls, config, mrope_section=sections, **extra)
    positions = pad_layouts([layout([Text(4), Image(3, 5), Text(2)], "mrope", start=0)] * 2)[0]
    q, k = (torch.randn(2, n, positions.shape[-1], 128, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    partition = frequency_partition(dim, 3, how=how, sections=sections)
    theta = rope_inv_freq(dim)
    ours = [rope_nd(x, positions, axial_frequencies(theta, partition, 3), layout=layout_) for x in (q, k)]
    theirs = module.apply_rotary_pos_emb(q, k, *peer(q, positions.transpose(0, 1)))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    # the same with their float32 angles replaced by exact ones: only rounding is left
    angle = positions.transpose(0, 1)[..., None] * theta
    tables = [peer.recomposition_frequencies(f(angle)) for f in (torch.cos, torch.sin)]
    exact = module.apply_rotary_pos_emb(q.double(), k.double(), *tables)
    for x, b in zip((q, k), exact, strict=True):
        a = rope_nd(x.double(), positions, axial_frequencies(theta, partition, 3), layout=layout_)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # the other order is another code
    other = frequency_partition(dim, 3, how="chunked" if how == "interleaved" else "interleaved", sections=sections)
    assert (rope_nd(q, positions, axial_frequencies(theta, other, 3), layout=layout_) - ours[0]).abs().max() > 0.1


def test_axial_rotation_of_rotary_embedding_torch():
    h, w, d = 5, 7, 64
    peer = rotary_embedding_torch.RotaryEmbedding(dim=d // 2, freqs_for="lang")
    x = torch.randn(2, h, w, d, generator=torch.Generator().manual_seed(0))
    theirs = rotary_embedding_torch.apply_rotary_emb(peer.get_axial_freqs(h, w), x).detach()
    # the same spectrum on both axes: not the compatible code
    shared = axial_frequencies(rope_inv_freq(d // 2).repeat(2), frequency_partition(d, 2, how="chunked"), 2)
    grid = torch.cartesian_prod(torch.arange(h), torch.arange(w)).T
    ours = rope_nd(x.flatten(1, 2), grid, shared, layout="interleaved")
    torch.testing.assert_close(ours.unflatten(1, (h, w)), theirs, rtol=0, atol=2e-6)  # float32 angles up to 6
