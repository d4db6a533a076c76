"""LoRALinear: nothing changes at the start, the product is never formed, merging is exact where it says so."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kexue_utils.optimization.lora_plus import LoRALinear, factored_flops, lora_forward
from tests.tolerances import TOLERANCES, assert_close


def trained(n=12, m=10, r=3, dtype=torch.float64, seed=0, **options):
    """An adapter whose factors have both moved."""
    torch.manual_seed(seed)
    layer = LoRALinear.wrap(nn.Linear(n, m, dtype=dtype), r, **options)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(0.5 * torch.randn_like(factor))
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["A", "B", "both", "peft"])
def test_a_new_adapter_changes_nothing(init, dtype):
    torch.manual_seed(0)
    base = nn.Linear(12, 10, dtype=dtype)
    x, weight = torch.randn(2, 5, 12, dtype=dtype), base.weight.clone()
    before, bias = base(x), base.bias.clone()
    layer = LoRALinear.wrap(base, 3, alpha=6, init=init)
    if init == "both":
        # W₀ − sA₀B₀ was rounded once
        assert_close(layer(x), before, scale=4)
        assert_close(layer.shifted(layer.product(layer.lora_A, layer.lora_B)), weight, scale=2)
    else:
        assert torch.equal(layer(x), before) and torch.equal(base.weight, weight)
    assert torch.equal(base.bias, bias) and layer(x).dtype == dtype
    assert not base.weight.requires_grad and base.bias.requires_grad
    assert not layer.delta_weight().any()
    expected = dtype if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.delta_weight().dtype == expected


def test_factors_are_drawn_as_they_say():
    torch.manual_seed(0)
    base = nn.Linear(400, 300)
    A, B, both, peft = (LoRALinear.wrap(copy.deepcopy(base), 16, init=init) for init in ("A", "B", "both", "peft"))
    for layer in (A, both):
        assert layer.lora_A.var().item() == pytest.approx(1 / 400, rel=0.1)
    for layer in (B, both):
        assert layer.lora_B.var().item() == pytest.approx(1 / 16, rel=0.1)
    assert not A.lora_B.any() and not B.lora_A.any() and not peft.lora_B.any()
    assert peft.lora_A.abs().max() <= 400**-0.5 and peft.lora_A.var().item() == pytest.approx(1 / 1200, rel=0.1)
    assert torch.equal(both.start_A, both.lora_A) and torch.equal(both.start_B, both.lora_B)


def test_only_the_factor_with_a_partner_gets_a_gradient_at_first():
    x = torch.randn(4, 12, dtype=torch.float64)
    for init, moves, rests in (("A", "lora_B", "lora_A"), ("B", "lora_A", "lora_B")):
        layer = LoRALinear.wrap(nn.Linear(12, 10, dtype=torch.float64), 3, init=init)
        layer(x).square().sum().backward()
        assert getattr(layer, moves).grad.abs().min() > 0 and not getattr(layer, rests).grad.any()


@pytest.mark.parametrize("rslora, expected", [(False, 2.0), (True, 8 / 2)])
def test_scale(rslora, expected):
    layer = trained(r=4, alpha=8, rslora=rslora)
    assert layer.scaling == expected and LoRALinear.wrap(nn.Linear(12, 10), 4, rslora=True).scaling == 1
    x = torch.randn(5, 12, dtype=torch.float64)
    W0, A, B = layer.base.weight.T, layer.lora_A.T, layer.lora_B.T
    assert_close(layer(x), lora_forward(x, W0, A, expected * B) + layer.base.bias)
    assert_close(layer.delta_weight(), expected * (A @ B).T)


def test_training_forward_never_forms_the_product():
    b, n, m, r = 6, 40, 30, 4
    layer = trained(n, m, r, torch.float32, alpha=2)
    x = torch.randn(b, n, requires_grad=True)

    def counted(module):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        return counter.get_total_flops()

    assert counted(layer) - counted(layer.base) == factored_flops(b, n, m, r)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [False, True])
def test_merge_and_unmerge(dtype, exact):
    layer = trained(dtype=dtype, alpha=1)
    x, weight, bias = torch.randn(5, 12, dtype=dtype), layer.base.weight.clone(), layer.base.bias.clone()
    apart, parameter = layer(x), layer.base.weight
    layer.merge(exact)
    assert layer.merged and layer.base.weight is parameter and torch.equal(layer.base.bias, bias)
    assert torch.equal(layer.base.weight, (weight.to(layer.delta_weight().dtype) + layer.delta_weight()).to(dtype))
    assert torch.equal(layer(x), layer.base(x))  # the adapter is not added again
    assert_close(layer(x), apart, scale=4)
    merged = layer.base.weight.clone()
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    assert torch.equal(layer.base.weight, merged)
    layer.unmerge()
    if exact:
        assert torch.equal(layer.base.weight, weight)
    else:
        ulp = torch.finfo(dtype).eps * torch.maximum(weight.abs(), merged.abs()).float()
        assert ((layer.base.weight - weight).abs().float() <= 2 * ulp).all()
    with pytest.warns(UserWarning, match="not merged"):
        layer.unmerge()


def test_merging_is_not_done_in_the_precision_of_autocast():
    layer, other = trained(dtype=torch.float32), trained(dtype=torch.float32)
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert torch.equal(layer.base.weight, other.base.weight)


def test_a_weight_that_would_overflow_is_left_alone():
    layer = trained(dtype=torch.float16)
    weight = layer.base.weight.clone()
    with torch.no_grad():
        layer.lora_A.fill_(1e4)
        layer.lora_B.fill_(1e4)
    with pytest.raises(ValueError, match="must be finite in torch.float16"):
        layer.merge(exact=True)
    assert torch.equal(layer.base.weight, weight) and not layer.merged


def test_start_is_subtracted_and_kept():
    layer = trained(init="both", alpha=6)
    start = layer.scaling * layer.start_B @ layer.start_A
    assert_close(layer.delta_weight(), layer.scaling * layer.lora_B @ layer.lora_A - start)
    assert {"start_A", "start_B"} < layer.state_dict().keys()
    x = torch.randn(5, 12, dtype=torch.float64)
    original = layer.base.weight + start
    assert_close(layer(x), x @ (original + layer.delta_weight()).T + layer.base.bias)
    again = LoRALinear.wrap(nn.Linear(12, 10, dtype=torch.float64), 3, alpha=6, init="both")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_dropout_hides_inputs_from_the_adapter_only_and_only_in_training():
    plain, layer = trained(), trained(dropout=0.5)
    x = torch.randn(2000, 12, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), plain(x))
    difference = layer.train()(x) - layer.base(x)
    expected = layer.eval()(x) - layer.base(x)
    assert not torch.allclose(difference, expected) and (difference - expected).mean(0).abs().max() < 0.3
    layer.merge()
    assert torch.equal(layer.train()(x), layer.base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_base_with_float32_factors(dtype):
    reference = trained(16, 8, dtype=torch.float32)
    layer = copy.deepcopy(reference)
    layer.base.to(torch.bfloat16)
    x = torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(dtype))
    y.float().square().sum().backward()
    reference(x).square().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    for name in ("lora_A", "lora_B"):
        found, expected = (getattr(module, name).grad for module in (layer, reference))
        assert (found - expected).norm() < TOLERANCES[torch.bfloat16]["rtol"] * expected.norm()


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (2, 3, 4, 12)])
def test_any_leading_shape(shape):
    layer = trained()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 10) and x.grad.shape == shape and layer.lora_A.grad.shape == (3, 12)
    assert_close(y, layer.base(x) + x @ layer.delta_weight().T)


def test_gradcheck_in_every_argument():
    layer = trained(5, 4, 2, alpha=3)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, x)

    arguments = x, layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    assert torch.autograd.gradcheck(function, arguments) and torch.autograd.gradgradcheck(function, arguments)


def test_copies_and_files_are_independent():
    for merged in (False, True):
        layer = trained(init="both")
        if merged:
            layer.merge(exact=True)
        x = torch.randn(5, 12, dtype=torch.float64)
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)
        before = layer(x)
        with torch.no_grad():
            layer.lora_A.zero_()
            layer.base.weight.zero_()
        for other in copies:
            assert torch.equal(other(x), before) and other.merged == merged
            if merged:
                other.unmerge()
                assert_close(other(x), before)


def test_checkpointing_gives_the_same_gradients():
    layer, again = trained(), trained()
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(x).square().sum().backward()
    checkpoint(again, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, again.lora_A.grad) and torch.equal(layer.lora_B.grad, again.lora_B.grad)


def test_compiles_in_one_graph_merged_and_not():
    torch.compiler.reset()
    layer = trained(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12)
    compiled(x).sum().backward()
    found = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert_close(found, layer.lora_A.grad)
    layer.merge()
    assert_close(compiled(x), layer.base(x))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"r": 0}, ValueError, r"r must be an integer between 1 and min\(n, m\) = 10, got 0"),
        ({"r": 11}, ValueError, r"min\(n, m\) = 10, got 11"),
        ({"r": 2.0}, ValueError, "got 2.0"),
        ({"r": 2, "init": "C"}, ValueError, "init must be one of A, B, both, peft, got 'C'"),
        ({"r": 2, "alpha": 0}, ValueError, "alpha must be finite and not zero, got 0"),
        ({"r": 2, "alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"r": 2, "dropout": 1.0, "init": "both"}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"r": 2, "dtype": torch.int8}, TypeError, "dtype must be a floating-point one, got torch.int8"),
    ],
)
def test_bad_arguments_are_named_and_the_base_is_untouched(options, error, message):
    base = nn.Linear(12, 10)
    weight = base.weight.clone()
    with pytest.raises(error, match=message):
        LoRALinear.wrap(base, **options)
    assert torch.equal(base.weight, weight) and base.weight.requires_grad


def test_a_base_of_another_kind_and_factors_of_another_shape_are_refused():
    with pytest.raises(TypeError, match="base must be an nn.Linear, got Embedding"):
        LoRALinear.wrap(nn.Embedding(4, 4), 2)
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        LoRALinear.wrap(nn.MultiheadAttention(8, 2).out_proj, 2)
    base = nn.Linear(12, 10)
    with pytest.raises(ValueError, match=r"must be \(r, 12\) and \(10, r\) with r > 0, got \(12, 3\) and"):
        LoRALinear(base, torch.zeros(12, 3), torch.zeros(10, 3))
    with pytest.raises(ValueError, match=r"with r > 0, got \(0, 12\) and \(10, 0\)"):
        LoRALinear(base, torch.zeros(0, 12), torch.zeros(10, 0))
    with pytest.raises(ValueError, match="scaling must be finite, got nan"):
        LoRALinear(base, torch.zeros(3, 12), torch.zeros(10, 3), float("nan"))
    assert base.weight.requires_grad


def test_repr_says_what_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = trained(alpha=6)
        layer.merge()
    assert "r=3, scaling=2, dropout=0, merged=True" in repr(layer)
