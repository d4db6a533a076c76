"""The adapters and parameter groups beside those of peft."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict
from torch import nn

from kexue_utils.optimization.lora_plus import (
    LoRALinear,
    from_peft,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    loraplus_param_groups,
    to_peft,
)
from tests.tolerances import assert_close


def agree(found, expected):
    """To 10⁻⁶ of the largest entry, in float32."""
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.fc, self.norm, self.out = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 5, bias=False)

    def forward(self, ids):
        return self.out(self.norm(self.fc(self.embed(ids)).relu()))


def models(rslora=False):
    """(ours, peft's) on the same weights, alpha 6 and r 3; peft's factors all moved."""
    torch.manual_seed(0)
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    config = LoraConfig(r=3, lora_alpha=6, use_rslora=rslora, target_modules=["fc", "out"])
    theirs = get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    inject_lora(ours, lambda name, module: True, 3, alpha=6, rslora=rslora)
    return ours, theirs


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_gradients_and_merged_weights_are_those_of_peft(rslora):
    ours, theirs = models(rslora)
    load_lora_state_dict(ours, from_peft(theirs.state_dict()))
    ids = torch.arange(13).view(1, 13)
    y, expected = ours(ids), theirs(ids)
    agree(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    peers = dict(theirs.named_parameters())
    for name, gradient in to_peft({name: p.grad for name, p in ours.named_parameters() if p.requires_grad}).items():
        agree(gradient, peers[name].grad)
    for name in ("fc", "out"):
        layer, peer = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert_close(layer.delta_weight(), peer.get_delta_weight("default"))
        layer.merge()
        peer.merge()
        assert_close(layer.base.weight, peer.base_layer.weight)
        assert layer.scaling == peer.scaling["default"]


def test_names_go_to_peft_and_back():
    ours, theirs = models()
    sd = lora_state_dict(ours)
    named = to_peft(sd)
    assert named.keys() == {name for name in theirs.state_dict() if "lora_" in name}
    assert from_peft(named).keys() == sd.keys() and from_peft(theirs.state_dict()).keys() == sd.keys()
    assert from_peft(get_peft_model_state_dict(theirs)).keys() == sd.keys()
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not unexpected and not any("lora_" in name for name in missing)
    ids = torch.arange(13).view(1, 13)
    agree(ours(ids), theirs(ids))
    with pytest.raises(ValueError, match="sd must hold one adapter, got a second entry for 'fc.lora_A'"):
        from_peft(named | to_peft(sd, adapter="other"))
    with pytest.raises(ValueError, match="sd must not have a start"):
        to_peft(lora_state_dict(LoRALinear.wrap(nn.Linear(3, 3), 1, init="both")))


def test_init_peft_draws_the_bits_that_peft_draws():
    torch.manual_seed(3)
    theirs = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(r=4, target_modules=["0"]))
    torch.manual_seed(3)
    base = nn.Linear(16, 8)
    peer = theirs.base_model.model[0]
    for seed in (0, 1):
        torch.manual_seed(seed)
        peer.reset_lora_parameters("default", True)
        torch.manual_seed(seed)
        ours = LoRALinear.wrap(base, 4, init="peft")
        assert torch.equal(ours.lora_A, peer.lora_A["default"].weight)


def rates(groups, model):
    """{name: (lr, weight decay)}"""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_every_parameter_has_the_rate_that_peft_gives_it():
    _, theirs = models()
    for name in ("norm.weight", "norm.bias", "fc.base_layer.bias"):
        theirs.base_model.model.get_parameter(name).requires_grad_(True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.05
    )
    ours = loraplus_param_groups(theirs, 1e-3, 8.0, weight_decay=0.05)
    assert rates(ours, theirs) == rates(optimizer.param_groups, theirs)
    assert len(rates(ours, theirs)) == 7


def test_other_vectors_have_pefts_rate_and_no_decay():
    theirs = get_peft_model(Model(), LoraConfig(r=3, target_modules=["fc"], use_dora=True))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.05
    )
    found = rates(loraplus_param_groups(theirs, 1e-3, 8.0, weight_decay=0.05), theirs)
    expected = rates(optimizer.param_groups, theirs)
    (magnitude,) = (name for name in found if "magnitude" in name)
    assert found.pop(magnitude) == (0.008, 0.0) and expected.pop(magnitude) == (0.008, 0.05)
    assert found == expected


def test_adapters_on_embeddings_have_the_rate_of_embeddings():
    theirs = get_peft_model(Model(), LoraConfig(r=3, target_modules=["fc", "embed"]))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_lr_embedding=1e-5
    )
    found = rates(loraplus_param_groups(theirs, 1e-3, 8.0, embedding_lr=1e-5), theirs)
    assert found == rates(optimizer.param_groups, theirs)
    assert sum(lr == 1e-5 for lr, _ in found.values()) == 2


def test_training_follows_peft_step_by_step():
    ours, theirs = models()
    load_lora_state_dict(ours, from_peft(theirs.state_dict()))
    first = torch.optim.AdamW(loraplus_param_groups(ours, 1e-3, 4.0))
    second = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)
    ids = torch.arange(13).view(1, 13)
    for _ in range(5):
        for model, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
    for name, p in lora_state_dict(ours).items():
        assert_close(p, from_peft(theirs.state_dict())[name])
