"""The multimodal runs: answers stand where the questions ask, layouts are those of the library, tiny models learn."""

import pytest
import torch

from kexue_utils.position.rope_base_beta import apply_rope, rope_inv_freq
from kexue_utils.position.rope_multimodal import PATCH, Image, Text
from kexue_utils.position.rope_multimodal.experiments import digits, shapes, text
from kexue_utils.position.rope_multimodal.experiments.model import Documents, TableAttention

CPU = torch.device("cpu")
SMALL = shapes._units(True)["tie"]


@pytest.mark.parametrize("scheme", shapes.SCHEMES)
def test_the_answers_are_the_colours_of_the_neighbours(scheme):
    documents = Documents(
        [[Text(2), Image(3, 5), Text(1)], [Text(1), Image(2, 2)]], {**SMALL, "scheme": scheme}, 8, CPU
    )
    rows = torch.tensor([0, 1, 0])
    ids, above, left = shapes.colour(documents, rows, torch.Generator().manual_seed(0))
    grid = ids[2, 3:18].view(3, 5)  # two words and [IMG] before it
    assert torch.equal(above[2, 3:18].view(3, 5)[1:], grid[:-1]) and torch.equal(
        left[2, 3:18].view(3, 5)[:, 1:], grid[:, :-1]
    )
    assert (above[2, 3:8] == -100).all() and (left[2, 3:18:5] == -100).all()
    outside = documents.kind[rows] != PATCH
    assert (above[outside] == -100).all() and (left[outside] == -100).all()
    assert (ids[1, 7:] == shapes.PAD).all() and ids[2, 2] == ids[2, 18] == shapes.IMG
    assert ids[1, 0] >= shapes.COLOURS and ids[outside].min() >= shapes.COLOURS > ids[~outside].max()


def test_no_shape_that_is_tested_as_new_was_trained():
    assert len(shapes.TRAINED) + len(shapes.HELD_OUT) == len(shapes.SIZES) ** 2 and len(shapes.HELD_OUT) == 9
    for name, tested in shapes.TESTS.items():
        assert bool(set(tested) & set(shapes.TRAINED)) == (name == "trained")
    assert {h for h, w in shapes.TRAINED} == {w for h, w in shapes.TRAINED} == set(shapes.SIZES)
    assert not set(digits.TESTS["new width"]) & set(digits.TESTS["trained"])


def test_attention_on_tables_is_attention_on_rotated_queries_and_keys():
    torch.manual_seed(0)
    layer, x = TableAttention(16, 2).double(), torch.randn(2, 6, 16, dtype=torch.float64)
    documents = Documents(
        [[Text(1), Image(1, 1), Text(2)], [Text(1), Image(1, 1)]], {**SMALL, "scheme": "flatten"}, 8, CPU
    )
    cos, sin, mask = documents.where(torch.tensor([0, 1]))
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    q, k = (apply_rope(y, torch.arange(1, 7), rope_inv_freq(8)) for y in (q, k))
    logits = (q @ k.mT / 8**0.5).masked_fill(~mask[:, None, None], -torch.inf)
    expected = layer.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    real = mask[..., None]  # what padding gets is never read
    torch.testing.assert_close(layer(x, cos.double(), sin.double(), mask) * real, expected * real, rtol=1e-5, atol=1e-6)


def test_a_causal_layer_sees_nothing_that_comes_later():
    torch.manual_seed(0)
    layer, x = TableAttention(16, 2, causal=True), torch.randn(1, 6, 16)
    cos, sin = torch.ones(6, 8), torch.zeros(6, 4)
    before = layer(x, cos, sin)
    x[:, 4:] += 1
    assert torch.equal(layer(x, cos, sin)[:, :4], before[:, :4]) and not torch.equal(layer(x, cos, sin), before)


def test_a_small_model_learns_the_neighbours_above_chance():
    p = SMALL | {"scheme": "tv", "d_model": 48, "steps": 400, "batch": 16, "rate": 5e-3, "images": 4}
    model, curve = shapes.train(0, p, CPU)
    found = shapes.accuracy(model, shapes.TRAINED[:4], p, 0, CPU)
    assert curve[-1][1] < curve[0][1] and min(found.values()) > 0.3  # chance is 1/16


def test_a_question_asks_for_a_pixel_of_the_image_that_is_shown():
    p = digits._units(True)["tv"]
    train, test = digits.images()
    assert len(train) + len(test) == 1797 and train.max() == 16
    documents, cut = digits.laid_out([(4, 5), (8, 7)], p, CPU)
    rows = torch.arange(2).repeat(50)
    ids, answers = digits.ask(train, documents, cut, rows, torch.Generator().manual_seed(0))
    for row, (line, answer) in zip(rows.tolist(), zip(ids, answers, strict=True), strict=True):
        (h, w), end = cut[row].tolist(), 2 + cut[row].prod().item()
        grid = line[2:end].view(h, w)
        r, c = line[end + 1] - digits.ROW, line[end + 2] - digits.COLUMN
        assert line[0] == digits.START and line[1] == line[end] == digits.IMG and line[end + 3] == digits.ASK
        assert answer[end + 3] == grid[r, c] * digits.BINS // digits.LEVELS and (answer >= 0).sum() == 1
        assert grid.max() < digits.LEVELS and (line[end + 4 :] == digits.PAD).all()


def test_pure_text_is_read_alike_through_every_layout_but_the_page():
    (run,) = text._run(text._units(True)["help topics"], [0], CPU, None)
    assert {name for name, found in run.items() if not found["identical"]} == {"page"}
