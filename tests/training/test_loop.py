import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kexue_utils.training.loop import fit
from kexue_utils.training.recorder import Checkpoint
from kexue_utils.training.replicas import cosine
from kexue_utils.training.transformer import Transformer, decayed


class Mean(nn.Module):
    """Every place sees the mean of all places: an attention without positions, with one linear map."""

    def __init__(self, d_model):
        super().__init__()
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, scale=1.0):
        return self.out(x.mean(1, keepdim=True) * scale).expand_as(x)


def make(seed=0):
    torch.manual_seed(seed)
    return Transformer(7, 16, 2, lambda: Mean(16))


def batch(step):
    ids = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(step))
    return ids, (ids + 1) % 7


def loss(model, ids, targets):
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def run(model, steps=40, until=None, **options):
    def interrupted(step):
        if step == until:
            raise KeyboardInterrupt
        return batch(step)

    optimizer = torch.optim.AdamW(decayed(model, 0.1), lr=0.01)
    return fit(model, loss, interrupted, steps, optimizer, points=4, every=10, **options)


def test_the_loop_learns_and_its_curve_has_the_points_asked_for():
    model = make()
    curve = run(model, evaluate=lambda: float(model.training))
    assert [row[0] for row in curve] == [10, 20, 30, 40] and curve[-1][1] < curve[0][1] / 2
    assert [row[2] for row in curve] == [0.0] * 4  # evaluated in eval mode
    assert not model.training


def test_the_loop_is_adamw_with_clipping_and_a_cosine():
    model, plain = make(), make()
    run(model)
    optimizer = torch.optim.AdamW(decayed(plain, 0.1), lr=0.01)
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * cosine(step, 40)
        optimizer.zero_grad()
        loss(plain, *batch(step)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("until", [10, 17, 33])
def test_an_interrupted_run_ends_where_the_other_one_does(tmp_path, until):
    whole, model, again = make(), make(), make(1)
    curve = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(model, until=until, checkpoint=Checkpoint(tmp_path / "state.pt"))
    assert run(again, checkpoint=Checkpoint(tmp_path / "state.pt")) == curve
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    model = make()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan after step 10"):
        run(model)


def test_a_transformer_adds_attention_and_mlp_and_hands_on_what_it_is_given():
    model = make().double()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    x = model.embed(ids)
    for block in model.blocks:
        x = x + 0.5 * block.attention(block.norms[0](x))
        x = x + block.mlp(block.norms[1](x))
    torch.testing.assert_close(model(ids, 0.5), F.layer_norm(x, (16,), model.norm.weight) @ model.head.weight.T)
    assert Transformer(7, 16, 1, lambda: Mean(16), classes=3)(ids).shape == (2, 3, 3)


def test_maps_that_write_into_the_stream_start_smaller():
    torch.manual_seed(0)
    model = Transformer(50, 256, 8, lambda: Mean(256))
    for block in model.blocks:
        assert block.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
        for written in (block.mlp[2], block.attention.out):
            assert written.weight.std().item() == pytest.approx(0.005, rel=0.05)  # 0.02/√16


def test_matrices_decay_and_gains_do_not():
    model = make()
    matrices, others = decayed(model, 0.1)
    assert matrices["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in others["params"]} == {1}
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))
