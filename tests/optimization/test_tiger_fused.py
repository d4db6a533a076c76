"""The Triton path against the loop. Needs CUDA and Triton, or Triton's interpreter (TRITON_INTERPRET=1) on the CPU."""

import copy

import pytest
import torch

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.tiger import fused

INTERPRETED = fused._INTERPRETED and fused._HAS_TRITON
CUDA = torch.cuda.is_available() and fused._HAS_TRITON
pytestmark = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA and Triton, or TRITON_INTERPRET=1")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
DEVICE = "cuda" if CUDA else "cpu"
BIG = 300 if CUDA else 40  # more than one block
SHAPES = ((BIG, 65), (4,), (3, 2, 6), (BIG * 60,), (2, 3, 5, 5))
DTYPES = [(torch.float32, None), (torch.float64, None), (torch.float16, torch.float32), (torch.float32, torch.float16)]
DTYPES += [(torch.bfloat16, torch.float32), (torch.bfloat16, None)] if CUDA else []  # the interpreter truncates


def make(dtype, scale=1.0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((scale * torch.randn(s, generator=generator)).to(DEVICE, dtype)) for s in shapes]
    if len(params) > 4:  # another order in memory
        params[4] = torch.nn.Parameter(params[4].data.to(memory_format=torch.channels_last))
    return params


def gradients(params, t, bad=True):
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
    if bad and t in (3, 5):
        params[0].grad[0] = float("nan")
        params[1].grad = None
    if bad and t == 4:
        params[2].grad[0, 0, 0] = float("inf")


def agree(first, second, before, m_before):
    """Equal but for units in the last place, and for signs where m is all but zero."""
    for p, q, old, m_old in zip(first[0], second[0], before, m_before, strict=True):
        if p not in first[1].state:
            assert q not in second[1].state and torch.equal(p, q)
            continue
        m, n = first[1].state[p]["m"], second[1].state[q]["m"]
        ulp = torch.finfo(m.dtype).eps * (m.abs() + m_old.abs() + 1e-3)
        assert bool(((m - n).abs() <= 4 * ulp).all())
        assert torch.equal(first[1].state[p]["pending"], second[1].state[q]["pending"])
        doubtful = m.sign() != n.sign()
        assert not bool((doubtful & (m.abs() > 4 * ulp)).any())
        assert float(doubtful.double().mean()) < 0.01
        ulp = torch.finfo(p.dtype).eps * (p.abs() + old.abs())
        # The step itself differs in its last bits only, so θ is one rounding apart at most.
        assert bool((((p - q).abs() <= ulp + 1e-6 * (p - old).abs()) | doubtful).all())


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("lr_scale", ["rms", "row_rms", "half", "none"])
@pytest.mark.parametrize("dtype, momentum_dtype", DTYPES)
def test_fused_agrees_with_the_loop(dtype, momentum_dtype, lr_scale, k):
    first = make(dtype)
    if lr_scale == "row_rms":
        first[4] = torch.nn.Parameter(first[4].data.contiguous())
    second = copy.deepcopy(first)
    options = {"lr": 1e-2, "lr_scale": lr_scale, "accumulation_steps": k, "momentum_dtype": momentum_dtype}
    loop, triton = Tiger(first, fused=False, foreach=False, **options), Tiger(second, fused=True, **options)
    for t in range(8 if CUDA else k + 1):
        for p, q in zip(first, second, strict=True):  # from the same state, so that one flipped sign stays one
            if p in loop.state:
                triton.state[q]["m"].copy_(loop.state[p]["m"])
            q.data.copy_(p)
        gradients(first, t + 3 * (not CUDA))
        for p, q in zip(first, second, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        before = [p.detach().clone() for p in first]
        m_before = [loop.state[p]["m"].clone() if p in loop.state else torch.zeros_like(p) for p in first]
        loop.step(), triton.step()
        agree((first, loop), (second, triton), before, m_before)


@pytest.mark.parametrize("policy", ["off", "skip", "official", "shrink"])
def test_policies(policy):
    first = make(torch.float64)
    second = copy.deepcopy(first)
    options = {"lr": 1e-2, "nan_policy": policy, "accumulation_steps": 2, "center": 1.0}
    loop, triton = Tiger(first, fused=False, foreach=False, **options), Tiger(second, fused=True, **options)
    for t in range(2, 6):
        gradients(first, t, bad=policy != "off")
        gradients(second, t, bad=policy != "off")
        loop.step(), triton.step()
        for p, q in zip(first, second, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_groups_of_every_kind_in_one_launch():
    first = make(torch.float64)
    second = copy.deepcopy(first)

    def groups(params):
        return [
            {"params": params[:1], "lr_scale": "row_rms", "lr": 3e-3},
            {"params": params[1:2], "lr_scale": "half", "weight_decay": 0.0, "center": 1.0},
            {"params": params[2:3], "beta": 0.9, "sign_power": 0.5, "maximize": True},
            {"params": params[3:], "accumulation_steps": 2, "rms_floor": 2.0},
        ]

    loop = Tiger(groups(first), lr=1e-2, fused=False, foreach=False)
    triton = Tiger(groups(second), lr=1e-2, fused=True)
    for t in range(4):
        gradients(first, t)
        gradients(second, t)
        loop.step(), triton.step()
        for p, q in zip(first, second, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_plan_follows_what_changes():
    """The step keeps addresses from call to call; whatever moves must be seen."""
    first, second = (make(torch.float64, shapes=((6, 5), (4,), (3, 4))) for _ in range(2))
    loop = Tiger(first[:2], lr=1e-2, fused=False, foreach=False)
    triton = Tiger(second[:2], lr=1e-2, fused=True)

    def step(*missing, transposed=False):
        step.t += 1
        for params, optimizer in ((first, loop), (second, triton)):
            gradients(params, step.t, bad=False)
            for i in missing:
                params[i].grad = None
            if transposed:
                params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.step()
        for p, q in zip(first, second, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)

    def both(change):
        change(loop, first)
        change(triton, second)

    step.t = 0
    step(1)  # a parameter that has no state yet
    plan = triton._plan
    step(1)
    assert triton._plan is plan
    step()
    assert triton._plan is not plan
    plan = triton._plan
    step(0)
    step(transposed=True)
    step()
    both(lambda optimizer, params: optimizer.param_groups[0].update(lr=3e-2, beta=0.5, weight_decay=0.3))
    plan = triton._plan
    step()
    assert triton._plan is plan  # values are no new plan
    both(lambda optimizer, params: setattr(params[0], "data", params[0].data.clone()))
    step()
    both(lambda optimizer, params: optimizer.state[params[0]].update(m=-optimizer.state[params[0]]["m"]))
    step()
    both(lambda optimizer, params: optimizer.param_groups[0].update(lr_scale="row_rms"))
    step()
    both(lambda optimizer, params: optimizer.add_param_group({"params": params[2:], "lr_scale": "half"}))
    step()
    both(lambda optimizer, params: [group.update(accumulation_steps=2) for group in optimizer.param_groups])
    step()
    step(1)
    both(lambda optimizer, params: optimizer.load_state_dict(optimizer.state_dict()))
    step()
    both(lambda optimizer, params: optimizer.flush())
    step()
    both(lambda optimizer, params: optimizer.state.clear())
    step()
    both(lambda optimizer, params: [group.update(nan_policy="raise") for group in optimizer.param_groups])
    step()
    second[0].grad = torch.full_like(second[0], float("nan"))
    with pytest.raises(FloatingPointError):
        triton.step()


def test_unaligned_tensors():
    base = make(torch.float32, shapes=((BIG * 140 + 1,),))[0].data
    first, second = torch.nn.Parameter(base[1:].clone()), torch.nn.Parameter(base[1:])
    loop, triton = Tiger([first], lr=1e-2, fused=False), Tiger([second], lr=1e-2, fused=True)
    for t in range(2):
        gradients([first], t, bad=False)
        second.grad = first.grad.clone()
        loop.step(), triton.step()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_is_unbiased():
    dtype = torch.bfloat16 if CUDA else torch.float16
    p = torch.nn.Parameter(torch.full((BIG * 500,), 1.0, device=DEVICE, dtype=dtype))
    p.grad = torch.ones_like(p)
    spacing = torch.finfo(dtype).eps / 2  # below 1
    Tiger([p], lr=spacing / 4, lr_scale="none", weight_decay=0.0, fused=True, stochastic_rounding=True).step()
    down = (p < 1).double().mean().item()
    assert set(p.float().unique().tolist()) == {1.0, 1.0 - spacing}
    assert abs(down - 0.25) < 6 * (0.25 * 0.75 / p.numel()) ** 0.5


def test_two_runs_agree_bit_by_bit_and_rms_is_accurate(monkeypatch):
    n = 10**8 if CUDA else 20_000
    if not CUDA:
        monkeypatch.setattr(fused, "PARTS", 4)  # so that there is more than one round of partial sums
    generator = torch.Generator(DEVICE).manual_seed(0)
    start = torch.rand(n, generator=generator, device=DEVICE)
    start[0] = 0.0  # ends at −η, to the last bit
    ends = []
    for _ in range(2):
        p = torch.nn.Parameter(start.clone())
        p.grad = torch.ones_like(p)
        Tiger([p], lr=1.0, weight_decay=0.0, fused=True).step()
        ends.append(p.detach())
    assert torch.equal(*ends)
    exact = start.double().square().mean().sqrt()
    assert abs(float(-ends[0][0] / exact) - 1) < 2e-7


@needs_cuda
@pytest.mark.parametrize("policy", ["shrink", "skip", "off", "official"])
@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_nothing_waits_for_the_device(path, policy):
    params = make(torch.float32)
    optimizer = Tiger(params, 1e-2, accumulation_steps=2, nan_policy=policy, **path)
    gradients(params, 0, bad=False)
    optimizer.step()  # the first looks for parameters that are all zero
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.flush()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_a_graph_replays_every_micro_batch_of_a_cycle():
    params = make(torch.float32)
    plain = copy.deepcopy(params)
    lr = torch.tensor(1e-2, device=DEVICE)
    graphed = Tiger(params, lr=lr, accumulation_steps=3, capturable=True, fused=True)
    eager = Tiger(plain, lr=1e-2, accumulation_steps=3, fused=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    start = [p.detach().clone() for p in params]
    for _ in range(3):
        graphed.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    with torch.no_grad():
        for p, old in zip(params, start, strict=True):
            p.copy_(old)
            graphed.state[p]["m"].zero_()
            graphed.state[p]["pending"].fill_(True)
        graphed.param_groups[0]["micro_step"].zero_()
    for t in range(7):
        if t == 4:
            lr.fill_(5e-3)
            eager.param_groups[0]["lr"] = 5e-3
        gradients(plain, t, bad=False)
        for p, q in zip(params, plain, strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        eager.step()
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(graphed.state[p]["m"], eager.state[q]["m"])
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@needs_cuda
def test_a_whole_training_step_is_captured():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
    x = torch.randn(32, 64, device="cuda")
    optimizer = Tiger(model.parameters(), lr=1e-2, capturable=True, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    graph.replay()
    first = loss.item()
    for _ in range(30):
        graph.replay()
    run()  # an eager step between, with other addresses, and a new plan: the graph's tables stay
    optimizer._plan = None
    run()
    other = [torch.full((1 << 12,), -1, device="cuda") for _ in range(200)]  # where freed tables would have been
    graph.replay()
    assert bool((torch.stack(other) == -1).all())
    assert loss.item() < 0.9 * first


@pytest.mark.parametrize("hooked", [False, True])
def test_hooks_and_scaler(hooked):
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).to(DEVICE).double()
    second = copy.deepcopy(first)
    one = Tiger(first.parameters(), lr=1e-2, accumulation_steps=2, fused=False)
    two = Tiger(second.parameters(), lr=1e-2, accumulation_steps=2, fused=True)
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=4.0) for _ in range(2)]
    if hooked:
        with pytest.warns(UserWarning, match="norm"):
            two.install_backward_hooks(second)
    for t in range(6):
        x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(t)).to(DEVICE)
        if t == 2:
            x[0, 0] = float("nan")
        for model, optimizer, scaler in zip((first, second), (one, two), scalers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if hooked:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update(4.0)
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            if p in one.state:  # a wrong scale would not change a sign
                torch.testing.assert_close(one.state[p]["m"], two.state[q]["m"], rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in second.parameters()) == hooked


@needs_cuda
def test_compiled_step_agrees():
    params = make(torch.float64)[:4]
    plain = copy.deepcopy(params)
    lr = torch.tensor(1e-2, device=DEVICE, dtype=torch.float64)
    compiled = Tiger(params, lr=lr, accumulation_steps=2, capturable=True)
    eager = Tiger(plain, lr=1e-2, accumulation_steps=2, fused=True)
    # Reordering loops fails in the compiler of torch 2.11: https://github.com/pytorch/pytorch/issues/176591
    options = {"loop_ordering_after_fusion": False} if torch.__version__.startswith("2.11.") else None
    step = torch.compile(compiled.step, options=options)
    for t in range(4):
        gradients(params, t, bad=False)
        gradients(plain, t, bad=False)
        step()
        eager.step()
        for p, q in zip(params, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
