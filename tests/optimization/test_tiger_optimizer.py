"""The optimizer around the rule: paths that agree, state, errors, hooks, scaler, lazy rows, compilation."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from kexue_utils.optimization import Tiger, tiger
from kexue_utils.optimization.tiger import tiger_param_groups
from tests.tolerances import assert_close

SHAPES = ((6, 5), (4,), (3, 2, 4), ())
DTYPES = [(torch.float32, None), (torch.float64, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)]


def make(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, t, *others):
    generator = torch.Generator().manual_seed(1000 + t)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        for each in (params, *others):
            each[i].grad = g.clone()


def equal(one, other):
    first, second = one.param_groups[0]["params"], other.param_groups[0]["params"]
    return all(
        torch.equal(p, q)
        and torch.equal(one.state[p]["m"], other.state[q]["m"])
        and torch.equal(one.state[p]["pending"], other.state[q]["pending"])
        for p, q in zip(first, second, strict=True)
    )


# Paths.


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("lr_scale", ["rms", "row_rms", "half", "none"])
@pytest.mark.parametrize("dtype, momentum_dtype", DTYPES)
def test_foreach_and_capturable_are_the_loop_bit_by_bit(dtype, momentum_dtype, lr_scale, k):
    shapes = SHAPES[:3] if lr_scale == "row_rms" else SHAPES
    params = [make(dtype, shapes) for _ in range(4)]
    options = {"lr": 1e-2, "lr_scale": lr_scale, "accumulation_steps": k, "momentum_dtype": momentum_dtype}
    loop = Tiger(params[0], foreach=False, **options)
    others = [Tiger(params[1], foreach=True, **options), Tiger(params[2], capturable=True, foreach=False, **options)]
    others.append(Tiger(params[3], lr=torch.tensor(1e-2, dtype=torch.float64), foreach=True, capturable=True,
                        **{name: value for name, value in options.items() if name != "lr"}))  # fmt: skip
    for t in range(9):
        gradients(*params[:1], t, *params[1:])
        if t in (1, 7):
            for each in params:
                each[0].grad.view(-1)[0] = float("nan")
                each[1].grad = None
        for optimizer in (loop, *others):
            optimizer.step()
    assert all(equal(loop, other) for other in others)


@pytest.mark.parametrize("sign_power", [0.0, 0.25, 1.0])
def test_family_and_ascent(sign_power):
    p, q = make(torch.float64, ((5, 3),)) * 2
    p, q = torch.nn.Parameter(p.detach().clone()), torch.nn.Parameter(q.detach().clone())
    start, m = p.detach().clone(), torch.zeros(5, 3, dtype=torch.float64)
    up = Tiger([p], 1e-2, weight_decay=0.0, lr_scale="none", sign_power=sign_power, maximize=True)
    down = Tiger([q], 1e-2, weight_decay=0.0, lr_scale="none", sign_power=sign_power)
    for t in range(3):
        gradients([p], t, [q])
        p.grad[0] = q.grad[0] = 0.0
        m = 0.965 * m + 0.035 * q.grad
        start = start - 1e-2 * m.sign() * torch.where(m == 0, 0.0, m.abs() ** sign_power)
        q.grad = -p.grad.clone() if t == 3 else q.grad
        up.step(), down.step()
    assert_close(q.detach(), start)
    assert_close((p + q).detach(), 2 * make(torch.float64, ((5, 3),))[0].detach())
    assert torch.equal(q[0], make(torch.float64, ((5, 3),))[0][0])
    if sign_power == 1:  # momentum SGD with the average's factor 1 − β
        r = make(torch.float64, ((5, 3),))
        sgd = torch.optim.SGD(r, 1e-2, momentum=0.965, dampening=0.965)
        for t in range(3):
            gradients(r, t)
            r[0].grad[0] = 0.0
            sgd.step()
            if t == 0:  # torch begins with the first gradient itself
                sgd.state[r[0]]["momentum_buffer"].mul_(0.035)
                r[0].data.add_(sgd.state[r[0]]["momentum_buffer"], alpha=1e-2 * (1 / 0.035 - 1))
        assert_close(q.detach(), r[0].detach())


def test_all_bfloat16_stalls_and_stochastic_rounding_does_not():
    ends = []
    for rounding in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.full((4000,), 1.0, dtype=torch.bfloat16))
        optimizer = Tiger([p], 1e-3, weight_decay=0.0, lr_scale="none", stochastic_rounding=rounding)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append(p.float())
    assert torch.equal(ends[0], torch.ones(4000))
    assert abs(ends[1].mean().item() - 0.98) < 1e-3 and ends[1].std() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact(dtype):
    torch.manual_seed(0)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & ((numbers.abs() >= 2.0**-120) | (numbers == 0))].float()
    assert torch.equal(tiger.stochastic_round(numbers, dtype).float(), numbers)
    for x in (0.3, -1.0001, 3e-6 if dtype == torch.float16 else 3e-36):
        drawn = tiger.stochastic_round(torch.full((40_000,), x), dtype).double()
        low, high = drawn.min().item(), drawn.max().item()
        assert low < x < high and len(drawn.unique()) == 2
        assert abs(drawn.mean().item() - x) < 6 * (high - low) / 2 / 200
    assert tiger.stochastic_round(torch.tensor([float("inf")]), dtype).isinf().all()
    assert tiger.stochastic_round(torch.tensor([0.1]), torch.float32) == torch.tensor([0.1])


def test_rms_of_many_numbers():
    x = torch.rand(1000, 20_000)  # the norm of all in one go is 2e-4 off
    exact = x.double().square().mean().sqrt().item()
    assert tiger.rms(x).item() == pytest.approx(exact, rel=2e-7)
    assert tiger.rms(x.bfloat16()).dtype == torch.float32


# State.


def test_one_buffer():
    for dtype, momentum_dtype in DTYPES:
        params = make(dtype)
        optimizer, adam = Tiger(params, momentum_dtype=momentum_dtype), torch.optim.AdamW(make(dtype))
        for each in (optimizer, adam):
            gradients(each.param_groups[0]["params"], 0)
            each.step()
        size = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
        expected = sum(p.numel() * (momentum_dtype or dtype).itemsize + 1 for p in params)
        assert size == expected
        if momentum_dtype is None:
            m_and_v = [s[name] for s in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
            assert 2 * (size - len(params)) == sum(x.nbytes for x in m_and_v)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype, momentum_dtype", DTYPES)
def test_state_dict_in_the_middle_of_a_cycle(dtype, momentum_dtype, capturable):
    params = make(dtype)
    options = {"lr": 1e-2, "accumulation_steps": 3, "momentum_dtype": momentum_dtype}
    optimizer = Tiger(params, capturable=capturable, **options)
    for t in range(5):
        gradients(params, t)
        if t > 2:
            params[1].grad = None
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = Tiger(again, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.param_groups[0]["micro_step"] == 2 and equal(optimizer, loaded)
    for t in range(5, 9):
        gradients(params, t, again)
        optimizer.step(), loaded.step()
    assert equal(optimizer, loaded)


def test_state_dict_of_another_momentum_dtype():
    params, again = make(torch.bfloat16), make(torch.bfloat16)
    wide, narrow = Tiger(params, momentum_dtype=torch.float32), Tiger(again)
    gradients(params, 0)
    wide.step()
    narrow.load_state_dict(wide.state_dict())
    for p, q in zip(params, again, strict=True):
        assert torch.equal(narrow.state[q]["m"], wide.state[p]["m"].bfloat16())
    adam = torch.optim.AdamW(params)
    adam.step()
    with pytest.raises(ValueError, match="m and pending"):
        wide.load_state_dict(adam.state_dict())
    gradients(params, 1)
    wide.step()


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: Tiger(make(shapes=((2, 2), (4,), (3, 2, 4), ())), 7.0),
            r"m of shape \(2, 2\) for a parameter \(6, 5\)",
        ),
        (lambda: torch.optim.AdamW(make(), 7.0), "m and pending"),
        (lambda: torch.optim.SGD(make(), 7.0), "micro_step"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(other, message):
    optimizer, theirs = Tiger(make()), other()
    for each in (optimizer, theirs):
        for p in each.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        each.step()
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(theirs.state_dict())
    assert equal(optimizer, before) and optimizer.param_groups[0]["lr"] == before.param_groups[0]["lr"]


@pytest.mark.parametrize("foreach", [False, True])
def test_a_narrow_momentum_does_not_narrow_the_weights(foreach):
    params = make(torch.float64)
    start = [p.detach().clone() for p in params]
    gradients(params, 0)
    signs = [p.grad.sign() for p in params]
    Tiger(params, 1e-2, weight_decay=0.3, lr_scale="none", momentum_dtype=torch.float32, foreach=foreach).step()
    for p, x, s in zip(params, start, signs, strict=True):
        assert_close(p.detach(), x - 1e-2 * (s + 0.3 * x))


def test_copies_go_on_alone():
    params = make()
    optimizer = Tiger(params, 1e-2, accumulation_steps=2)
    gradients(params, 0)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = copied.param_groups[0]["params"]
        gradients(theirs, 1)
        copied.step()
        assert not torch.equal(theirs[0], params[0])
        assert optimizer.param_groups[0]["micro_step"] == 1


def test_flush_and_changes_of_k():
    params, again = make(torch.float64), make(torch.float64)
    one, two = Tiger(params, 1e-2, accumulation_steps=4), Tiger(again, 1e-2, accumulation_steps=2)
    for t in range(2):
        gradients(params, t, again)
        for p in params:
            p.grad *= 2  # weights 1/4 against 1/2
        one.step(), two.step()
    assert not torch.equal(params[0], again[0])
    one.flush()
    for p, q in zip(params, again, strict=True):
        assert_close(p.detach(), q.detach())
    before = params[0].detach().clone()
    one.flush()  # nothing is open
    assert torch.equal(before, params[0])
    one.param_groups[0]["accumulation_steps"] = 3
    gradients(params, 2)
    one.step()
    one.param_groups[0]["accumulation_steps"] = 4
    kept = copy.deepcopy(one.state_dict())
    with pytest.raises(RuntimeError, match=r"cycle boundary \(micro_step=1 of 3\)"):
        one.step()
    after = one.state_dict()
    assert all(torch.equal(kept["state"][i]["m"], after["state"][i]["m"]) for i in range(4))
    one.param_groups[0]["accumulation_steps"] = 3
    one.flush()
    one.param_groups[0]["accumulation_steps"] = 0
    with pytest.raises(ValueError, match="accumulation_steps must be an integer >= 1, got 0"):
        one.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_flush_when_the_position_is_on_the_device(capturable):
    params = make(torch.float64)
    optimizer = Tiger(params, 1e-2, accumulation_steps=4, capturable=capturable)
    gradients(params, 0)
    optimizer.step()
    start = params[0].detach().clone()
    optimizer.flush()
    assert not torch.equal(start, params[0]) and int(optimizer.param_groups[0]["micro_step"]) == 0
    start = params[0].detach().clone()
    optimizer.flush()
    assert torch.equal(start, params[0])


@pytest.mark.parametrize("elements", [10, 1 << 22])  # a tensor or two, all
def test_buckets_of_any_size_and_kind_are_the_loop(elements, monkeypatch):
    monkeypatch.setitem(tiger.engine.BUCKETS, "cpu", elements)
    kinds = torch.float64, torch.bfloat16, torch.float32
    one, two = ([p for dtype in kinds for p in make(dtype)] for _ in range(2))
    optimizers = [Tiger(x, 1e-2, accumulation_steps=2, foreach=f) for x, f in ((one, True), (two, False))]
    for t in range(4):
        gradients(one, t, two)
        if t == 3:
            one[2].grad.view(-1)[0] = two[2].grad.view(-1)[0] = float("nan")
        for optimizer in optimizers:
            optimizer.step()
    assert equal(*optimizers) and not torch.equal(one[0], make(torch.float64)[0])


def test_flush_takes_the_step_of_the_official_policy_too():
    params = make(torch.float64)
    optimizer = Tiger(params, 1e-2, weight_decay=0.0, lr_scale="none", accumulation_steps=3, nan_policy="official")
    start = params[0].detach().clone()
    gradients(params, 0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.flush()
    assert_close((params[0].detach() - start).abs(), torch.full_like(start, 1e-2))


# Bad input.


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("lr", -1e-3, "lr must be a finite number >= 0, got -0.001"),
        ("lr", float("nan"), "lr"),
        ("lr", torch.tensor(-1.0), "lr"),
        ("beta", 1.0, r"beta must be in \[0, 1\), got 1.0"),
        ("beta", -0.1, "beta"),
        ("beta", True, "beta"),
        ("weight_decay", -1, "weight_decay must be"),
        ("rms_floor", -1, "rms_floor must be"),
        ("accumulation_steps", 0, "accumulation_steps must be an integer >= 1, got 0"),
        ("accumulation_steps", 2.0, "accumulation_steps"),
        ("accumulation_steps", True, "accumulation_steps"),
        ("shrink_ratio", 0.0, r"shrink_ratio must be in \(0, 1\], got 0.0"),
        ("shrink_ratio", 1.1, "shrink_ratio"),
        ("sign_power", 1.5, r"sign_power must be in \[0, 1\]"),
        ("center", float("inf"), "center"),
        ("lr_scale", "RMS", "lr_scale must be one of rms, row_rms, half, none, got 'RMS'"),
        ("nan_policy", "no", "nan_policy must be one of shrink, skip, raise, off, official, got 'no'"),
        ("momentum_dtype", torch.int32, "momentum_dtype must be a floating-point dtype"),
        ("momentum_dtype", "float", "momentum_dtype"),
    ],
)
def test_options_out_of_range(option, value, message):
    with pytest.raises(ValueError, match=message):
        Tiger(make(), **{option: value})
    optimizer = Tiger(make())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make(), option: value})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_do_not_fit():
    with pytest.raises(ValueError, match="foreach and fused must not both be True"):
        Tiger(make(), foreach=True, fused=True)
    with pytest.raises(RuntimeError, match="complex64"):
        Tiger([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="row_rms"):
        Tiger([torch.nn.Parameter(torch.ones(()))], lr_scale="row_rms")
    with pytest.raises(ValueError, match="lazy_rows"):
        Tiger([torch.nn.Parameter(torch.ones(3))], lazy_rows=True)
    if not tiger.optimizer.fused_kernels._INTERPRETED:
        with pytest.raises(RuntimeError, match="fused=True needs Triton, dense CUDA parameters"):
            Tiger(make(), fused=True)


def test_a_step_that_raises_changes_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Embedding(5, 3, sparse=True))
    groups = tiger_param_groups(model, 1e-2)
    optimizer = Tiger(groups, nan_policy="raise")
    model[1](torch.tensor([1])).sum().backward()
    model[0](torch.ones(2, 3)).sum().backward()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="sparse gradients need lazy_rows=True"):
        optimizer.step()
    model[1].weight.grad = None
    model[0].bias.grad[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"the gradient of parameter 0\.bias, shape \(3,\)"):
        optimizer.step()
    assert not optimizer.state and all(torch.equal(start[name], x) for name, x in model.state_dict().items())
    model[0].bias.grad[1] = 1.0
    optimizer.step()
    assert not torch.equal(start["0.bias"], model[0].bias)
    unnamed = Tiger(make(), nan_policy="raise")
    unnamed.param_groups[0]["params"][1].grad = torch.full((4,), float("nan"))
    with pytest.raises(FloatingPointError, match=r"parameter 1 of group 0, shape \(4,\)"):
        unnamed.step()


def test_zero_parameters_do_not_move_without_a_floor():
    zero = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = Tiger([zero])
    zero.grad = torch.ones_like(zero)
    with pytest.warns(UserWarning, match=r"shape \(3, 4\) is all zero"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        assert not zero.any()
        Tiger([zero], lr_scale="half").step()
        for path in ({"foreach": False}, {"foreach": True}):
            others = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
            for other in others:
                other.grad = torch.ones_like(other)
            Tiger(others, 1.0, weight_decay=0.0, rms_floor=1e-3, **path).step()
            assert all(torch.equal(other, torch.full_like(other, -1e-3)) for other in others)


@pytest.mark.parametrize("lr_scale", ["rms", "row_rms"])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_floor_is_a_floor(foreach, lr_scale):
    params = [torch.nn.Parameter(torch.full((2, 3), size, dtype=torch.float64)) for size in (0.1, 0.5)]
    for p in params:
        p.grad = -torch.ones_like(p)
    Tiger(params, 0.5, weight_decay=0.0, rms_floor=0.2, lr_scale=lr_scale, foreach=foreach).step()
    for p, moved in zip(params, (0.2, 0.75), strict=True):  # by half of the floor, by half of itself
        assert_close(p.detach(), torch.full((2, 3), moved, dtype=torch.float64))


def test_parameters_without_elements():
    for path in ({"foreach": False}, {"foreach": True}):
        params = make(shapes=((0, 3), (2, 3), (0,)))
        gradients(params, 0)
        start = params[1].detach().clone()
        Tiger(params, **path).step()
        assert not torch.equal(start, params[1])


# Which rule for which parameter.


class RMSGain(torch.nn.Module):  # named like none of torch's
    def __init__(self):
        super().__init__()
        self.gain, self.bias_table = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 3))


class MyRMSNorm(torch.nn.Module):
    def __init__(self, start):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), start))


def test_groups_by_module():
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(5, 3),
            "bag": torch.nn.EmbeddingBag(4, 3),
            "attention": torch.nn.MultiheadAttention(4, 2),
            "layer_norm": torch.nn.LayerNorm(3),
            "images": torch.nn.LayerNorm((2, 3)),
            "relative_bias": torch.nn.Embedding(4, 2),
            "batch_norm": torch.nn.BatchNorm1d(3),
            "group_norm": torch.nn.GroupNorm(1, 3),
            "rms": torch.nn.RMSNorm(3),
            "own": MyRMSNorm(1.0),
            "one_plus": MyRMSNorm(0.0),
            "other": RMSGain(),
            "head": torch.nn.Linear(3, 5),
        }
    )
    model["head"].weight = model["embedding"].weight
    model["head"].bias.requires_grad = False
    groups = tiger_param_groups(model, 2e-3, 0.05)
    kinds = {name: (g["lr_scale"], g["weight_decay"], g["center"]) for g in groups for name, _ in g["params"]}
    gain, bias = ("half", 0.0, 1.0), ("half", 0.0, 0.0)
    assert kinds == {
        **{f"{name}.weight": ("row_rms", 0.05, 0.0) for name in ("embedding", "bag", "relative_bias")},
        "attention.in_proj_weight": ("rms", 0.05, 0.0),
        "attention.in_proj_bias": bias,
        "attention.out_proj.weight": ("rms", 0.05, 0.0),
        "attention.out_proj.bias": bias,
        **{f"{norm}.weight": gain for norm in ("layer_norm", "images", "batch_norm", "group_norm", "rms", "own")},
        **{f"{norm}.bias": bias for norm in ("layer_norm", "images", "batch_norm", "group_norm")},
        "one_plus.weight": bias,
        **{f"other.{name}": ("rms", 0.05, 0.0) for name in ("gain", "bias_table")},
    }
    assert all(group["lr"] == 2e-3 for group in groups)
    optimizer = Tiger(groups, accumulation_steps=2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(kinds)
    with pytest.raises(ValueError, match="rule must be one of module, official, got 'name'"):
        tiger_param_groups(model, rule="name")
    with pytest.raises(ValueError, match="got none"):
        tiger_param_groups(torch.nn.ReLU())


def test_official_groups_go_by_any_part_of_a_name():
    model = torch.nn.ModuleDict(
        {
            "embeddings": torch.nn.Linear(2, 2, bias=False),
            "gamma_of": torch.nn.Linear(2, 3, bias=False),
            "beta": torch.nn.LayerNorm(3, bias=False),
            "norm": torch.nn.LayerNorm(2),
        }
    )
    groups = tiger_param_groups(model, weight_decay=0.05, rule="official")
    assert {name: (g["lr_scale"], g["weight_decay"], g["center"]) for g in groups for name, _ in g["params"]} == {
        "embeddings.weight": ("row_rms", 0.05, 0.0),
        "gamma_of.weight": ("half", 0.0, 1.0),
        "beta.weight": ("half", 0.0, 0.0),
        "norm.weight": ("rms", 0.05, 0.0),
        "norm.bias": ("half", 0.0, 0.0),
    }


def test_tied_weights_are_an_embedding_whichever_comes_first():
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 5, bias=False), "words": torch.nn.Embedding(5, 3)})
    model["words"].weight = model["head"].weight
    (group,) = tiger_param_groups(model)
    assert group["lr_scale"] == "row_rms" and [name for name, _ in group["params"]] == ["head.weight"]


# Gradients that come otherwise.


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_lazy_rows_are_parameters_of_their_own(k, sparse):
    torch.manual_seed(0)
    whole = torch.nn.Embedding(6, 4, sparse=sparse, dtype=torch.float64)
    rows = [torch.nn.Parameter(row.detach().clone()[None]) for row in whole.weight]
    lazy = Tiger(whole.parameters(), 1e-2, lr_scale="row_rms", accumulation_steps=k, lazy_rows=True)
    single = Tiger(rows, 1e-2, lr_scale="row_rms", accumulation_steps=k)
    for t in range(2 * k + 1):
        ids = torch.tensor([[0, 1, 1], [0, 2, 3], [5, 0, 0]][t % 3])
        v = torch.randn(3, 4, dtype=torch.float64)
        v[:, t % 2] = 0  # a row takes part if any entry does
        whole.weight.grad = None
        (whole(ids) * v).sum().backward()
        g = whole.weight.grad.to_dense()
        for i, row in enumerate(rows):
            row.grad = g[i : i + 1].clone() if i in ids else None
        lazy.step(), single.step()
    assert_close(whole.weight.detach(), torch.cat([row.detach() for row in rows]))
    assert torch.equal(whole.weight[4], rows[4][0])  # never seen, never moved
    assert lazy.state[whole.weight]["pending"].shape == (6, 1)
    again = Tiger(whole.parameters(), lr_scale="row_rms", accumulation_steps=k, lazy_rows=True)
    again.load_state_dict(lazy.state_dict())
    assert equal(lazy, again)


class Tied(torch.nn.Module):
    """A weight used twice, a checkpointed layer, a frozen one."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.words, self.reentrant = torch.nn.Embedding(7, 8), reentrant
        self.inner, self.frozen = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).requires_grad_(False)
        self.head = torch.nn.Linear(8, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = checkpoint(self.inner, self.words(ids), use_reentrant=self.reentrant)
        x = checkpoint(lambda x: self.inner(x).tanh(), self.frozen(x), use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_backward_hooks(k, reentrant):
    torch.manual_seed(0)
    plain = Tied(reentrant).double()
    hooked = copy.deepcopy(plain)
    one, two = (Tiger(tiger_param_groups(m, 1e-2), accumulation_steps=k) for m in (plain, hooked))
    with pytest.warns(UserWarning, match="global norm"):
        two.install_backward_hooks(hooked)
    most = []
    for t in range(2 * k + 1):
        ids = torch.randint(7, (5,), generator=torch.Generator().manual_seed(t))
        for model, optimizer in ((plain, one), (hooked, two)):
            before = model.inner.weight.detach().clone()
            optimizer.zero_grad()
            loss = model(ids).logsumexp(-1).mean() * (float("nan") if t == k else 1.0)
            loss.backward()
            assert torch.equal(before, model.inner.weight)  # θ waits for step()
            most.append(sum(p.grad is not None for p in model.parameters()))
            optimizer.step()
        for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
            assert_close(p.detach(), q.detach())
    assert set(most[::2]) == {3} and set(most[1::2]) == {0}
    with pytest.raises(RuntimeError, match="closure"):
        two.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match="installed already"):
        two.install_backward_hooks(hooked)
    two.remove_backward_hooks()
    hooked(ids).sum().backward()
    assert hooked.inner.weight.grad is not None


@pytest.mark.filterwarnings("ignore:backward hooks free")
def test_a_bad_gradient_is_remembered_through_a_second_backward():
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    optimizer = Tiger(model.parameters(), 1e-2, weight_decay=0.0, lr_scale="none", shrink_ratio=0.5)
    with pytest.warns(UserWarning, match="global norm"):
        optimizer.install_backward_hooks(model)
    start = model.weight.detach().clone()
    for x in (float("nan"), 1.0):  # before one step
        model(torch.full((1, 2), x, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert_close(model.weight.detach(), start / 2 - 1e-2)


def test_hooks_keep_nothing_alive():
    def train():
        model = torch.nn.Linear(3, 2)
        optimizer = Tiger(model.parameters())
        optimizer.install_backward_hooks(model)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return weakref.ref(model.weight), weakref.ref(optimizer)

    gone = train()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_hooks_that_cannot_be():
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="own every parameter"):
        Tiger(model.parameters()).install_backward_hooks(torch.nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="raise"):
        Tiger(model.parameters(), nan_policy="raise").install_backward_hooks(model)
    optimizer = Tiger(model.parameters())
    with pytest.warns(UserWarning):
        optimizer.install_backward_hooks(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    optimizer.found_inf = torch.zeros(1)
    with pytest.raises(RuntimeError, match="GradScaler"):
        optimizer.step()


@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(unscaled):
    """An overflow rejects the micro-batch, for all parameters, but the cycle goes on."""
    first = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)).double()
    second = copy.deepcopy(first)
    one, two = (Tiger(model.parameters(), 1e-2, accumulation_steps=2) for model in (first, second))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for t in range(6):
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        one.zero_grad(), two.zero_grad()
        scaler.scale(first(x).square().sum()).backward()
        second(x).square().sum().backward()
        if t in (1, 2):
            first[0].weight.grad[0, 0] = float("inf")
            two.zero_grad()
        if unscaled:
            scaler.unscale_(one)
        scaler.step(one)
        scaler.update()
        two.step()
        assert one.param_groups[0]["micro_step"] == two.param_groups[0]["micro_step"] == (t + 1) % 2
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert_close(p.detach(), q.detach())
            if p in one.state:  # a wrong scale would not change a sign
                assert_close(one.state[p]["m"], two.state[q]["m"])
    assert scaler.get_scale() == 8 * 2**4 / 2**2


def test_closure_and_scheduler():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = Tiger([p], 0.1, lr_scale="none", weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    scheduler.step()
    optimizer.step(closure)
    assert p.item() == pytest.approx(2.85)


# Compilation.


@pytest.mark.parametrize("k", [1, 3])
def test_compiles_into_one_graph_for_every_rate_and_position(k):
    torch._dynamo.reset()
    params, again = make(), make()
    lr = torch.tensor(1e-2)
    compiled = Tiger(params, lr, accumulation_steps=k, capturable=True)
    eager = Tiger(again, 1e-2, accumulation_steps=k)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(compiled.step, backend=counter)
    for t in range(2 * k + 2):
        gradients(params, t, again)
        if t == 2:
            params[0].grad[0] = again[0].grad[0] = float("nan")
        if t == k:
            lr.fill_(3e-3)
            eager.param_groups[0]["lr"] = 3e-3
        step(), eager.step()
        for p, q in zip(params, again, strict=True):
            assert_close(p.detach(), q.detach())
    assert counter.frame_count == 1
    torch._dynamo.reset()
