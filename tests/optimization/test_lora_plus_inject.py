"""Adapters in a model: where they go, what is saved, which rate each parameter gets, and training on two processes."""

import re

import pytest
import torch
import torch.distributed as dist
from lion_pytorch import Lion
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kexue_utils.optimization.lora_plus import (
    LoRALinear,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    loraplus_param_groups,
    merge_lora,
)
from tests.tolerances import assert_close


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.fc, self.out = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.out(self.fc(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(11, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.head = nn.Linear(d, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(11).view(1, 11)


def adapted(init="A", seed=0, moved=True, **options):
    """A model in float64 with an adapter of rank 2 on every fc and out, and factors that have moved."""
    torch.manual_seed(seed)
    model = Model().double()
    inject_lora(model, re.compile(r"blocks\.\d\.(fc|out)"), 2, init=init, **options)
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def snapshot(model):
    return {name: p.clone() for name, p in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]


def same(model, before):
    state, trainable = before
    now, flags = snapshot(model)
    return flags == trainable and state.keys() == now.keys() and all(torch.equal(state[k], now[k]) for k in state)


@pytest.mark.parametrize(
    "target, expected",
    [
        ("fc", ["blocks.0.fc", "blocks.1.fc"]),
        ("1.out", ["blocks.1.out"]),
        ("head", ["head"]),
        (re.compile(r".*\.0\..*"), ["blocks.0.fc", "blocks.0.out"]),
        (lambda name, module: module.out_features == 3, ["head"]),
    ],
)
def test_targets(target, expected):
    model = Model()
    before = model(IDS)
    assert inject_lora(model, target, 2) == expected
    assert [name for name, m in model.named_modules() if isinstance(m, LoRALinear)] == expected
    assert torch.equal(model(IDS), before)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{name}.lora_{factor}" for name in expected for factor in "AB"]


def test_a_second_call_keeps_the_first_adapters_trainable_and_modes_as_they_were():
    model = Model().eval()
    inject_lora(model, "fc", 2, dropout=0.5)
    inject_lora(model, "out", 3, freeze=False)
    inject_lora(model, "head", 1)
    assert not any(module.training for module in model.modules())
    assert sum(p.requires_grad for p in model.parameters()) == 10
    unfrozen = Model()
    inject_lora(unfrozen, "fc", 2, freeze=False)
    assert unfrozen.head.weight.requires_grad and not unfrozen.blocks[0].fc.base.weight.requires_grad


def test_a_layer_in_two_places_is_adapted_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["c"] = model["a"]
    assert inject_lora(model, lambda name, module: name != "b", 1) == ["a", "c"]
    assert model["a"] is model["c"] and isinstance(model["a"], LoRALinear) and type(model["b"]) is nn.Linear
    merge_lora(model, unload=True)
    assert model["a"] is model["c"] and type(model["a"]) is nn.Linear


@pytest.mark.parametrize(
    "target, options, message",
    [
        ("fc2", {}, "'fc2' matches no linear layer; there are blocks.0.fc, blocks.0.out, blocks.1.fc"),
        ("embed", {}, "'embed' matches no linear layer"),
        ("1.fc", {}, "module 'blocks.1.fc' already has a LoRA adapter"),
        ("base", {}, "'base' matches no linear layer"),
        (re.compile(".*out|head"), {"r": 4}, r"module 'head': r must be .* = 3, got 4"),
        ("head", {"init": "x", "r": 2}, "module 'head': init must be one of"),
    ],
)
def test_what_cannot_be_injected_is_named_and_the_model_untouched(target, options, message):
    model = Model()
    inject_lora(model, "1.fc", 2)
    model.head.requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, target, **({"r": 2} | options))
    assert same(model, before)
    with pytest.raises(TypeError, match="target must be a string, a compiled pattern or a function, got list"):
        inject_lora(model, ["fc"], 2)
    with pytest.raises(ValueError, match="use LoRALinear.wrap"):
        inject_lora(nn.Linear(3, 3), lambda name, module: True, 2)


def test_attention_whose_output_is_not_called_is_not_a_target():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="'out_proj' matches no linear layer; there are linear1, linear2"):
        inject_lora(model, "out_proj", 2)


@pytest.mark.parametrize("init", ["A", "B", "both", "peft"])
def test_merge_all_and_unload(init):
    model = adapted(init)
    before = model(IDS)
    names = merge_lora(model, exact=True)
    assert len(names) == 4 and all(model.get_submodule(name).merged for name in names)
    assert_close(model(IDS), before, scale=10)
    assert merge_lora(model, unload=True) == names  # those that are merged are not merged again
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert_close(model(IDS), before, scale=10)
    assert model.state_dict().keys() == Model().state_dict().keys()
    with pytest.raises(ValueError, match="model has no adapters"):
        merge_lora(model)


def test_nothing_is_merged_if_one_cannot_be():
    model = adapted()
    with torch.no_grad():
        model.blocks[1].out.lora_A.fill_(torch.inf)
    before = snapshot(model)
    with pytest.raises(ValueError, match="module 'blocks.1.out': the weight with its adapter must be finite"):
        merge_lora(model)
    assert same(model, before) and not model.blocks[0].fc.merged
    layer = LoRALinear.wrap(nn.Linear(3, 3), 1)
    with pytest.raises(ValueError, match="model must not be the adapter itself"):
        merge_lora(layer, unload=True)
    assert not layer.merged


def halves():
    """Two linear layers in 16 bits, both trained."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()


def test_a_start_that_would_overflow_leaves_layer_and_model_alone():
    base = halves()[0]
    weight = base.weight.detach().clone()
    with pytest.raises(ValueError, match="must be finite in torch.float16"):
        LoRALinear.wrap(base, 2, alpha=1e9, init="both")
    assert torch.equal(base.weight, weight) and base.weight.requires_grad
    model = halves()
    model[0].float()  # the first layer can begin there, the second can't
    before = snapshot(model)
    with pytest.raises(ValueError, match="module '1': the weight with its adapter must be finite in torch.float16"):
        inject_lora(model, lambda name, module: True, 2, alpha=1e9, init="both")
    assert same(model, before) and all(type(m) is nn.Linear and m.weight.requires_grad for m in model)
    model = halves()
    inject_lora(model, lambda name, module: True, 2, init="both")
    before, sd = snapshot(model), {name: 2 * p for name, p in lora_state_dict(model).items()}
    sd["1.start_A"] = 1e6 * sd["1.start_A"]
    with pytest.raises(ValueError, match="module '1': the weight with its adapter must be finite"):
        load_lora_state_dict(model, sd)
    assert same(model, before)


def test_a_weight_that_two_modules_have_is_not_changed():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Embedding(4, 4))
    model[1].weight = model[2].weight
    before = snapshot(model)
    with pytest.raises(ValueError, match="module '1': init='both' must not change a weight that another module has"):
        inject_lora(model, lambda name, module: True, 2, init="both")
    assert same(model, before) and type(model[0]) is nn.Linear
    inject_lora(model, lambda name, module: True, 2, init="B")
    before = snapshot(model)
    with pytest.raises(ValueError, match="module '1': its weight must not belong to another module too"):
        merge_lora(model, exact=True)
    assert same(model, before) and not model[0].merged


@pytest.mark.parametrize("init", ["A", "both"])
def test_factors_move_to_another_model_of_the_same_weights(init):
    model, other = adapted(init), adapted(init, moved=False)
    inject = {name: p for name, p in lora_state_dict(model).items()}
    assert all(name.rpartition(".")[2].startswith(("lora_", "start_")) for name in inject)
    assert len(inject) == (16 if init == "both" else 8) and not any(p.requires_grad for p in inject.values())
    with torch.no_grad():  # the same W₀, another start
        for layer in other.modules():
            if isinstance(layer, LoRALinear) and layer.start_A is not None:
                layer.shift_base(layer.product(layer.start_A, layer.start_B))
                layer.start_A.mul_(2)
                layer.shift_base(-layer.product(layer.start_A, layer.start_B))
    assert not torch.allclose(other(IDS), model(IDS))
    assert load_lora_state_dict(other, inject) == ([], [])
    assert_close(other(IDS), model(IDS), scale=10)


def test_a_file_that_does_not_fit_changes_nothing():
    model, both = adapted(), adapted("both")
    before = snapshot(model)
    sd = {name: p + 1 for name, p in lora_state_dict(model).items()}
    first = next(iter(sd))
    for bad, message in (
        (sd | {"x.lora_A": sd[first]}, r"unexpected \['x.lora_A'\]"),
        ({k: v for k, v in sd.items() if k != first}, rf"missing \['{first}'\]"),
        (sd | {first: sd[first][:1]}, rf"{first} must have shape \(2, 8\), got \(1, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(model, bad)
        assert same(model, before)
    model.blocks[0].fc.merge()
    before = snapshot(model)
    with pytest.raises(ValueError, match="module 'blocks.0.fc' is merged"):
        load_lora_state_dict(model, sd)
    assert same(model, before)
    before = snapshot(both)
    with pytest.raises(ValueError, match="module 'blocks.0.fc' started at A0 and B0"):
        load_lora_state_dict(both, sd, strict=False)
    assert same(both, before)
    partial = {first: sd[first]}
    fresh = adapted(moved=False)
    missing, unexpected = load_lora_state_dict(fresh, partial | {"y": sd[first]}, strict=False)
    assert len(missing) == 7 and unexpected == ["y"] and torch.equal(fresh.state_dict()[first], sd[first])


def rates(model, **options):
    groups = loraplus_param_groups(model, 1e-3, 16, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_every_trainable_parameter_has_one_rate():
    model = adapted()
    for parameter in (model.embed.weight, model.head.weight, model.head.bias, model.blocks[0].norm.weight):
        parameter.requires_grad_(True)
    groups = loraplus_param_groups(model, 1e-3, 16, weight_decay=0.1, extra_lr=5e-4)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    found = rates(model, weight_decay=0.1, extra_lr=5e-4)
    expected = {"blocks.0.fc.lora_A": ("lora_A", 1e-3, 0.1), "blocks.1.out.lora_B": ("lora_B", 0.016, 0.1),
                "embed.weight": ("embedding", 1e-6, 0.1), "head.weight": ("extra", 5e-4, 0.1),
                "head.bias": ("lora_B_no_decay", 0.016, 0.0),
                "blocks.0.norm.weight": ("lora_B_no_decay", 0.016, 0.0)}  # fmt: skip
    for name, (group, lr, decay) in expected.items():
        assert (found[name]["name"], found[name]["lr"], found[name]["weight_decay"]) == (group, lr, decay)
    assert rates(model)["head.weight"]["name"] == "lora_A"
    model.scale, model.kernel = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2, 2, 2))
    assert [rates(model)[name]["name"] for name in ("scale", "kernel")] == ["lora_A", "lora_A"]  # not one dimension
    assert [g["name"] for g in loraplus_param_groups(adapted(), 1e-3, 16)] == ["lora_A", "lora_B"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, "ratio must be positive and finite, got 0"),
        ({"ratio": -2}, "ratio must be positive"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"extra_lr": 0.0}, "extra_lr must be positive"),
        ({"embedding_lr": -1}, "embedding_lr must be positive"),
        ({"rms_floor": 0}, "rms_floor must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative, got -0.1"),
    ],
)
def test_bad_rates_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        loraplus_param_groups(adapted(), **({"lr": 1e-3, "ratio": 16} | options))
    with pytest.raises(ValueError, match="no trainable parameters: inject LoRA first"):
        loraplus_param_groups(Model().requires_grad_(False), 1e-3, 16)


class RmsSign(torch.optim.Optimizer):
    """Steps lr·max(RMS(θ), rms_floor)·sign(g), as in Tiger without momentum."""

    def __init__(self, params, lr=1e-3, rms_floor=0.0, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "rms_floor": rms_floor, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.square().mean().sqrt().clamp(min=group["rms_floor"]) * p.grad.sign())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, Lion, RmsSign])
@pytest.mark.parametrize("init", ["A", "B"])
def test_both_factors_move_within_two_steps_and_a_schedule_keeps_the_ratio(optimizer, init):
    model = adapted(init, moved=False)
    groups = loraplus_param_groups(model, 1e-2, 4)
    chosen = optimizer(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (1 + step))
    before = {name: p.clone() for name, p in lora_state_dict(model).items()}
    for step in range(2):
        chosen.zero_grad()
        model(IDS).square().sum().backward()
        chosen.step()
        schedule.step()
        a, b = chosen.param_groups
        assert b["lr"] == pytest.approx(4 * a["lr"]) and a["lr"] == pytest.approx(1e-2 / (2 + step))
    assert all(not torch.equal(p, before[name]) for name, p in lora_state_dict(model).items())


def test_without_a_floor_a_zero_factor_never_moves_under_rms_steps():
    model = adapted(moved=False)
    chosen = RmsSign([group | {"rms_floor": 0.0} for group in loraplus_param_groups(model, 1e-2, 4)])
    for _ in range(3):
        chosen.zero_grad()
        model(IDS).square().sum().backward()
        chosen.step()
    assert not any(p.any() for name, p in lora_state_dict(model).items() if name.endswith("lora_B"))


def process(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = DistributedDataParallel(adapted(seed=rank), find_unused_parameters=False)
    optimizer = torch.optim.SGD(loraplus_param_groups(model, 1e-2, 4))
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS[:, rank::2]).square().sum().backward()
        optimizer.step()
    torch.save(lora_state_dict(model.module), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_same_factors(tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    single = adapted(seed=0)
    optimizer = torch.optim.SGD(loraplus_param_groups(single, 1e-2, 4))
    for _ in range(2):  # the mean over both processes
        optimizer.zero_grad()
        (single(IDS).square().sum() / 2).backward()
        optimizer.step()
    for name, expected in lora_state_dict(single).items():
        assert torch.equal(first[name], second[name])
        assert_close(first[name], expected, scale=10)
