"""What the tests of sharded training share: a model, its data, optimizers, and a start of processes over gloo."""

import multiprocessing
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from alrao_fast import AlraoAdam, AlraoModel, AlraoMuon, AlraoSGD, ClassifierClones

WORLD = 4
STEPS = 5
# What takes seconds to import, once for all starts: the ranks are forked from a process that has it.
multiprocessing.set_forkserver_preload(
    [
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch._dynamo",
        "alrao_fast.distributed",
        "pytest",
    ]
)
CASES = {
    "momentum": (AlraoSGD, {"lr_range": (1e-5, 1.0), "momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov": (AlraoSGD, {"lr_range": (1e-4, 0.3), "momentum": 0.9, "nesterov": True}),
    "maximize": (AlraoSGD, {"lr_range": (1e-5, 1e-2), "maximize": True}),
    # Its first steps are nearly as long for tiny gradients as for large ones.
    "adam": (AlraoAdam, {"lr_range": (1e-4, 1e-2), "eps": 1e-3}),
    "muon": (AlraoMuon, {"lr_range": (1e-4, 1e-2), "eps": 1e-3}),
    "amsgrad": (
        AlraoAdam,
        {
            "lr_range": (1e-4, 1e-2),
            "eps": 1e-3,
            "amsgrad": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
    ),
}


def made(kind="momentum", net=None, seed=1, **options):
    """An optimizer of `CASES` for a network."""
    optimizer, own = CASES[kind]
    generator = torch.Generator().manual_seed(seed)
    return optimizer(net, generator=generator, **{**own, **options})


def model(dtype=torch.float32, group=None, hidden=33, seed=0, device="cpu"):
    """A classifier; over four ranks no layer but the last is even, and two of the clones' shards are empty."""
    torch.manual_seed(seed)
    with torch.device(device):
        backbone = nn.Sequential(
            nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 24), nn.LayerNorm(24)
        )
        return AlraoModel(backbone, ClassifierClones(24, 10, 5, process_group=group)).to(dtype)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 16, generator=generator)
    return x, torch.randint(10, (16,), generator=generator)


def train(net, opt, steps=range(STEPS), part=(0, 1), after_backward=lambda: None):
    """Steps on this part of each batch, `(number, of)`."""
    for step in steps:
        own = slice(part[0] * 16 // part[1], (part[0] + 1) * 16 // part[1])
        x, y = batch(step)
        opt.zero_grad()
        net(x[own], targets=y[own]).backward()
        after_backward()
        opt.step()


@torch.no_grad()
def evaluated(net):
    net.eval()
    out = net(batch(-1)[0])
    net.train()
    return out


def evaluate_between(net, opt, part=(0, 1)):
    """The network's outputs with and without averages, also between steps: no evaluation has a backward, after which
    FSDP would let go of whole weights."""
    found = {}
    for step in range(2):
        train(net, opt, range(step, step + 1), part)
        if step:
            found["own before"] = evaluated(net)
        with opt.averaged():
            found[f"averaged {step}"] = evaluated(net)
        if step:
            found["own"] = evaluated(net)
    with opt.averaged():
        found["averaged again"] = evaluated(net)
    train(net, opt, range(2, 3), part)
    found["after a step"] = evaluated(net)
    return found


def gradient(name, p, step):
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    return torch.randn(p.shape, generator=generator).to(p.dtype)


def placed_like(grad, p):
    if not hasattr(p, "placements"):
        return grad
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)


def give(net, step, place=placed_like):
    for name, p in net.named_parameters():
        p.grad = place(gradient(name, p, step), p)


def steps(net, opt, place=placed_like, numbers=range(4)):
    for step in numbers:
        give(net, step, place)
        opt.step()


@torch.no_grad()
def whole(tensor):
    """A copy of all entries, on every rank."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def weights(net):
    return {name: whole(p) for name, p in net.named_parameters()}


def states(net, opt):
    return {
        f"{name}.{key}": whole(value)
        for name, p in net.named_parameters()
        for key, value in opt.state[p].items()
    }


def assert_close(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def _work(rank, world, folder, jobs, shared):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    torch.save({job.__name__: job(rank, *shared) for job in jobs}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(work, arguments, world=WORLD):
    """Call `work(rank, *arguments)` in so many processes, and wait for them."""
    mp.start_processes(work, arguments, world, start_method="forkserver")


def run(jobs, *shared, world=WORLD):
    """What `job(rank, *shared)` returned on each rank, by the job's name: one start of the processes for all."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with tempfile.TemporaryDirectory() as folder:
        start(_work, (world, folder, jobs, shared), world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
