"""Two processes: averaging the momentum, DistributedDataParallel and fully sharded parameters against one process."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kexue_utils.optimization import Tiger
from kexue_utils.optimization.tiger import tiger_param_groups
from kexue_utils.optimization.tiger.distributed import average_momentum
from tests.tolerances import assert_close

RANKS = 2


class Model(torch.nn.Module):
    """Seven and one rows over two ranks: unequal shards, and an empty one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.out = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)
        self.double()

    def forward(self, ids):
        return self.out(self.inner(self.words(ids)).tanh())


def loss(model, t, rank, factor=1.0):
    ids = torch.randint(7, (6,), generator=torch.Generator().manual_seed(10 * t + rank))
    return factor * (model(ids).squeeze() - ids).square().mean()


def reference(steps, k, nan=None, **options):
    """One process that averages the ranks' gradients; nan: (t, rank) whose gradient counts as zero."""
    model = Model()
    optimizer = Tiger(tiger_param_groups(model, 1e-2), accumulation_steps=k, **options)
    for t in range(steps):
        optimizer.zero_grad()
        for rank in range(RANKS):
            if (t, rank) != nan:
                (loss(model, t, rank) / RANKS).backward()
        optimizer.step()
    return model


def averaged_momentum(rank):
    for k, steps, hooked, nan in ((3, 6, False, None), (3, 6, True, (1, 1)), (1, 3, False, (1, 0))):
        model = Model()
        optimizer = Tiger(tiger_param_groups(model, 1e-2), accumulation_steps=k, nan_policy="skip")
        if hooked:
            optimizer.install_backward_hooks(model)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as exchange:
            for t in range(steps):
                optimizer.zero_grad()
                loss(model, t, rank, float("nan") if (t, rank) == nan else 1.0).backward()
                if t % k == k - 1:
                    optimizer.allreduce_momentum()
                optimizer.step()
        assert exchange.call_count == 2 * (steps // k)  # one for all flags, one for all moments
        for p, q in zip(model.parameters(), reference(steps, k, nan).parameters(), strict=True):
            assert_close(p.detach(), q.detach())


def gradients_on_one_rank_only(rank):
    """An expert of which rank 1 sees nothing in a cycle, and one that nobody sees."""
    params = [torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(3)]
    optimizer = Tiger(params, 1e-2, accumulation_steps=2, nan_policy="skip")
    m = torch.zeros(3, dtype=torch.float64)
    for cycle in range(3):
        g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (-1) ** cycle
        for _ in range(2):
            params[0].grad = g if rank == 0 else None
            params[1].grad = None
            params[2].grad = g if cycle == 0 else None
            if optimizer.param_groups[0]["micro_step"] == 1:
                optimizer.allreduce_momentum()
            optimizer.step()
        m = 0.965 * m + 0.035 * g / 2
        assert_close(optimizer.state[params[0]]["m"], m)
        if cycle == 0:
            once = params[2].detach().clone(), optimizer.state[params[2]]["m"].clone()
    assert torch.equal(params[1], torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(params[2], once[0]) and torch.equal(optimizer.state[params[2]]["m"], once[1])


def errors(rank):
    model = Model()
    for options, message in (
        ({"accumulation_steps": 2}, "cycle's end"),
        ({"nan_policy": "shrink"}, "nan_policy 'skip' or 'off', got 'shrink'"),
    ):
        optimizer = Tiger(model.parameters(), **({"nan_policy": "off"} | options))
        with pytest.raises(RuntimeError, match=message):
            optimizer.allreduce_momentum()
    wrapped = DistributedDataParallel(Model())
    with pytest.raises(RuntimeError, match="bare module"):
        Tiger(wrapped.parameters()).install_backward_hooks(wrapped)


def data_parallel(rank):
    for k in (1, 3):
        model = DistributedDataParallel(Model())
        optimizer = Tiger(tiger_param_groups(model.module, 1e-2), accumulation_steps=k)
        for t in range(6):
            optimizer.zero_grad()
            loss(model, t, rank).backward()
            optimizer.step()
        for p, q in zip(model.module.parameters(), reference(6, k).parameters(), strict=True):
            assert_close(p.detach(), q.detach())


def fully_sharded(rank):
    mesh = init_device_mesh("cpu", (RANKS,))
    for foreach in (False, True):
        for k in (1, 2):
            model, plain = Model(), Model()
            fully_shard(model, mesh=mesh)
            options = {"accumulation_steps": k, "foreach": foreach}
            optimizer = Tiger(tiger_param_groups(model, 1e-2), **options)
            single = Tiger(tiger_param_groups(plain, 1e-2), **options)
            for t in range(4):
                optimizer.zero_grad(), single.zero_grad()
                loss(model, t, rank).backward()
                sum(loss(plain, t, r) / RANKS for r in range(RANKS)).backward()
                if t == 2:  # an entry that one rank holds: the others must know
                    plain.inner.weight.grad[6, 0] = float("nan")
                    local = model.inner.weight.grad.to_local()
                    if rank == 1:
                        local[-1, 0] = float("nan")
                optimizer.step(), single.step()
                for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                    assert_close(p.full_tensor().detach(), q.detach())
                if t == 0:
                    saved = copy.deepcopy(optimizer.state_dict())
                    optimizer = Tiger(tiger_param_groups(model, 1e-2), **options)
                    optimizer.load_state_dict(saved)
            assert optimizer.state[model.inner.weight]["m"].placements == model.inner.weight.placements
    with pytest.raises(RuntimeError, match="sharded"):
        optimizer.install_backward_hooks(model)
    with pytest.raises(RuntimeError, match="sharded"):
        Tiger(model.parameters(), nan_policy="off").allreduce_momentum()
    with pytest.raises(ValueError, match="lazy_rows needs unsharded"):
        Tiger([model.words.weight], lazy_rows=True)


def split_columns(rank):
    """Rows that are split over the ranks still have one RMS each."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    generator = torch.Generator().manual_seed(0)
    whole, g = (torch.randn(3, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    p, q = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)])), torch.nn.Parameter(whole.clone())
    p.grad, q.grad = distribute_tensor(g, mesh, [Shard(1)]), g.clone()
    for x in (p, q):
        Tiger([x], 1e-2, lr_scale="row_rms").step()
    assert_close(p.full_tensor().detach(), q.detach())


def worker(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for check in (averaged_momentum, gradients_on_one_rank_only, errors, data_parallel, fully_sharded, split_columns):
        check(rank)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(worker, (tmp_path / "store",), nprocs=RANKS)


def test_moments_without_gradients_stay_to_the_last_bit():
    """0.1·3/3 is not 0.1: what no rank has a gradient of is not averaged."""

    def exchange(x, op=dist.ReduceOp.SUM, group=None):
        if op == dist.ReduceOp.SUM:
            x *= 3

    states = [
        {"m": torch.full((2,), 0.1, dtype=torch.float64), "pending": torch.tensor(pending)} for pending in (True, False)
    ]
    with mock.patch.object(dist, "all_reduce", exchange), mock.patch.object(dist, "get_world_size", lambda group: 3):
        average_momentum(states, [0.9, 0.9])
    assert torch.equal(states[0]["m"], torch.full((2,), 0.1, dtype=torch.float64))
    assert not torch.equal(states[1]["m"], states[0]["m"])
    assert_close(states[1]["m"], states[0]["m"])
    average_momentum([], [])


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        Tiger(Model().parameters()).allreduce_momentum()
