"""Protects checkpoints of sharded trainings: whoever resumes, on however many processes and however wrapped, ends where
one process without an interruption does (weights and states within 1e-6, bfloat16 with masters bit for bit).

- torch.distributed.checkpoint saved on two processes and loaded on one, three and four, with other modules wrapped;
  nested and flat states.
- A single process' checkpoint: by torch.distributed.checkpoint, by torch.save, broadcast from the first rank.
- A sharded training's full state, loaded by one process.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_harness import assert_close, made, model, run, states, steps, train, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from alrao_fast.optim.states import RATES

pytestmark = [pytest.mark.xdist_group("sharded_checkpoint"), pytest.mark.filterwarnings("ignore")]

BEGUN, STEPS = 3, 5
CASES = {
    "momentum": ("momentum", torch.float32, {"dampening": 0.5}),
    "adam": ("adam", torch.float32, {}),
    # On gradients that are given: a forward in bfloat16 rounds differently on every number of processes.
    "masters": ("momentum", torch.bfloat16, {"master_weights": True}),
}
HOW = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}
FULL = StateDictOptions(full_state_dict=True)


def fresh(case, seed, group=None, wrap=lambda net: None):
    kind, dtype, options = CASES[case]
    net = model(dtype, group, seed=seed)
    wrap(net)
    return net, made(kind, net, seed=10 * seed + 1, **options)


def go_on(case, net, opt, numbers):
    if case == "masters":
        steps(net, opt, numbers=numbers)
    else:
        train(net, opt, numbers)


def result(net, opt):
    return {"weights": weights(net), "states": states(net, opt), "logw": net.head.switch.logw}


def load(net, opt, folder, how, group=None):
    model_state, optim_state = get_state_dict(net, opt, options=how)
    loaded = {"net": model_state, "opt": optim_state}
    dcp.load(loaded, checkpoint_id=folder, process_group=group)
    set_state_dict(
        net, opt, model_state_dict=loaded["net"], optim_state_dict=loaded["opt"], options=how
    )


def save(net, opt, folder, how, group=None):
    model_state, optim_state = get_state_dict(net, opt, options=how)
    dcp.save({"net": model_state, "opt": optim_state}, checkpoint_id=folder, process_group=group)


def meshes():
    return {n: DeviceMesh("cpu", list(range(n))) for n in (2, 3, 4)}


def save_on_two(rank, folder):
    """Wrapped as a whole; every rank has another seed."""
    mesh = meshes()[2]
    for case in CASES if rank < 2 else ():
        net, opt = fresh(case, 0, mesh.get_group(), lambda net: fully_shard(net, mesh=mesh))
        go_on(case, net, opt, range(BEGUN))
        for how, options in HOW.items():
            save(net, opt, f"{folder}/two/{case}/{how}", options, mesh.get_group())
    dist.barrier()


def load_on_more(rank, folder):
    found = {}
    for n, mesh in meshes().items():
        for case in CASES if n > 2 and rank < n else ():
            for how, options in HOW.items():

                def wrap(net, mesh=mesh):
                    for layer in (net.backbone[0], net.backbone[2], net.head):
                        fully_shard(layer, mesh=mesh)
                    fully_shard(net, mesh=mesh)

                net, opt = fresh(case, 1 + rank, mesh.get_group(), wrap)
                load(net, opt, f"{folder}/two/{case}/{how}", options, mesh.get_group())
                go_on(case, net, opt, range(BEGUN, STEPS))
                found[f"{n} {case} {how}"] = result(net, opt)
    return found


def load_of_one(rank, folder):
    """What one process has saved, in three ways."""
    mesh, found = meshes()[4], {}
    for case in CASES:
        saved = torch.load(f"{folder}/one/{case}.pt", weights_only=True)
        for way in ("dcp", "torch.save", "broadcast"):
            net, opt = fresh(case, 1 + rank, wrap=lambda net: fully_shard(net, mesh=mesh))
            load(net, opt, f"{folder}/one/{case}", HOW["nested"])
            if way != "dcp":
                for p in net.parameters():
                    opt.state[p].clear()
            if way == "torch.save":
                opt.load_state_dict(saved["numbered"])
            elif way == "broadcast":
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_optimizer_state_dict(
                    net, opt, saved["named"] if rank == 0 else {}, options=options
                )
            shards = [
                value.placements == p.placements
                for p in net.parameters()
                for key, value in opt.state[p].items()
                if key not in (*RATES, "step")
            ]
            go_on(case, net, opt, range(BEGUN, STEPS))
            found[f"{case} {way}"] = {**result(net, opt), "shards": shards}
    return found


def full_state(rank, folder):
    mesh = meshes()[4]
    for case in CASES:
        net, opt = fresh(case, 0, wrap=lambda net: fully_shard(net, mesh=mesh))
        go_on(case, net, opt, range(BEGUN))
        model_state, optim_state = get_state_dict(net, opt, options=FULL)
        if rank == 0:
            torch.save({"net": model_state, "opt": optim_state}, f"{folder}/full-{case}.pt")


JOBS = (save_on_two, load_on_more, load_of_one, full_state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what one process has saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for case in CASES:
        net, opt = fresh(case, 0)
        go_on(case, net, opt, range(BEGUN))
        save(net, opt, folder / "one" / case, HOW["nested"])
        named = get_optimizer_state_dict(net, opt)
        torch.save({"named": named, "numbered": opt.state_dict()}, folder / "one" / f"{case}.pt")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return run(JOBS, str(folder))


@pytest.fixture(scope="module")
def expected():
    found = {}
    for case in CASES:
        net, opt = fresh(case, 0)
        go_on(case, net, opt, range(STEPS))
        found[case] = result(net, opt)
    return found


def check(found, expected, case):
    atol = 0 if case == "masters" else 1e-6
    for part in ("weights", "states"):
        assert_close(found[part], expected[case][part], atol)
    assert_close({"": found["logw"]}, {"": expected[case]["logw"]})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_to_one(results, folder, expected, case, how):
    net, opt = fresh(case, 1)
    load(net, opt, folder / "two" / case / how, HOW[how])
    go_on(case, net, opt, range(BEGUN, STEPS))
    check(result(net, opt), expected, case)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [3, 4])
def test_two_processes_to_more(results, expected, world, case, how):
    for r in results[:world]:
        check(r["load_on_more"][f"{world} {case} {how}"], expected, case)


@pytest.mark.parametrize("way", ["dcp", "torch.save", "broadcast"])
@pytest.mark.parametrize("case", CASES)
def test_one_process_to_four(results, expected, case, way):
    for r in results:
        found = r["load_of_one"][f"{case} {way}"]
        assert found["shards"] and all(found["shards"])
        check(found, expected, case)


@pytest.mark.parametrize("case", CASES)
def test_full_state_to_one_process(results, folder, expected, case):
    net, opt = fresh(case, 1)
    saved = torch.load(folder / f"full-{case}.pt", weights_only=True)
    set_state_dict(
        net, opt, model_state_dict=saved["net"], optim_state_dict=saved["opt"], options=FULL
    )
    go_on(case, net, opt, range(BEGUN, STEPS))
    check(result(net, opt), expected, case)
