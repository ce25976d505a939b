"""Protects training on DTensors: four processes over gloo, compared with one process on the whole batch.

- fully_shard (FSDP2), before and after the optimizer is made and in the middle of a training, with uneven and empty
  shards, along columns; tensor parallelism, alone, where some parameters stay plain, with sequences over ranks, and
  under FSDP on a 2D mesh.
- Rates and rounding seeds are the first rank's on every rank, whatever the ranks' seeds; states are DTensors placed as
  their parameter; momentum, weight decay, maximize and Adam's moments follow the whole.
- Averages are what is evaluated within `averaged()`, and nothing of them stays afterwards, also where modules keep the
  whole weights that a forward has gathered.
- The posterior is bit-equal on all ranks. Optimizers of other parameters on other ranks are an error on every one.
"""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from sharded_harness import (
    CASES,
    STEPS,
    assert_close,
    batch,
    evaluate_between,
    made,
    model,
    run,
    states,
    train,
    weights,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import alrao_fast as alrao
from alrao_fast.distributed import FlatSlice, register_flat_slices
from alrao_fast.optim.states import RATES

# One start of the processes for all tests.
pytestmark = pytest.mark.xdist_group("sharded")


def shard(net, mesh, **options):
    fully_shard(net.backbone, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)


def result(net, opt):
    params = list(net.parameters())
    placed = [
        (value.device_mesh, value.placements) == (p.device_mesh, p.placements)
        for p in params
        if isinstance(p, DTensor)
        for key, value in opt.state[p].items()
        if key not in (*RATES, "step")
    ]
    return {
        "weights": weights(net),
        "states": states(net, opt),
        "posterior": net.head.switch.logw.clone(),
        "clone_lr": net.head.clone_lr.clone(),
        "seeds": [group["rounding_seed"] for group in opt.param_groups],
        "placed": all(placed),
    }


def before(rank):
    """The module is sharded, then the optimizer made, by another seed on every rank."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    for kind in CASES:
        net = model()
        shard(net, mesh)
        opt = made(kind, net, seed=1 + rank)
        train(net, opt, part=(rank, 4))
        found[kind] = result(net, opt)
    return found


def after(rank):
    """The optimizer is made first; its parameters are exchanged in the module, or in the groups, too."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    for kind in ("module", "groups", "trained"):
        alone = dist.new_subgroups(1)[0]
        net = model(group=alone)
        opt = made("momentum", net, seed=1 if kind == "trained" else 1 + rank)
        begun = 0
        if kind == "trained":
            begun = 2
            train(net, opt, range(begun))
        names = {id(p): name for name, p in net.named_parameters()}
        old = [weakref.ref(p) for p in net.parameters()]
        if kind == "groups":
            # As Accelerate does: placeholders, so that the whole parameters can go.
            (group,) = opt.param_groups
            order = [names[id(p)] for p in group["params"]]
            group["params"] = [torch.empty(1) for _ in group["params"]]
        net.head.switch.process_group = None
        shard(net, mesh)
        if kind == "groups":
            now = dict(net.named_parameters())
            group["params"] = [now[name] for name in order]
        train(net, opt, range(begun, STEPS), part=(rank, 4))
        found[kind] = result(net, opt)
        # Nothing is left of what was whole.
        gc.collect()
        found[kind]["freed"] = all(reference() is None for reference in old)
    return found


def columns(rank):
    mesh, net = init_device_mesh("cpu", (4,)), model(hidden=36)
    # The last dimension that four divides.
    last = {
        p: max((d for d in range(p.dim()) if p.size(d) % 4 == 0), default=0)
        for p in net.parameters()
    }
    shard(net, mesh, shard_placement_fn=lambda p: Shard(last[p]))
    opt = made("momentum", net, seed=1 + rank)
    train(net, opt, part=(rank, 4))
    return result(net, opt)


def tensor_parallel(rank):
    """Columns, then rows; the normalisation and the head stay plain."""
    mesh, net = init_device_mesh("cpu", (4,)), model(hidden=36)
    parallelize_module(net.backbone, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    opt = made("momentum", net, seed=1 + rank)
    train(net, opt)
    found = result(net, opt)
    found["plain"] = sum(not isinstance(p, DTensor) for p in net.parameters())
    return found


def tensor_parallel_later(rank):
    """Without a switch, whose ranks would agree by it: the plain parameters' rates are the first rank's, too."""
    mesh, net = init_device_mesh("cpu", (4,)), model(hidden=36).backbone
    opt = made("momentum", net, seed=1 + rank)
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for step in range(STEPS):
        opt.zero_grad()
        net(batch(step)[0]).square().mean().backward()
        opt.step()
    return {"weights": weights(net), "states": states(net, opt)}


def sequences(net, opt):
    """Steps on sequences, clipped; returns the placements of the normalisation's gradient."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        x = torch.randn(4, 8, 16, generator=generator)
        y = torch.randint(10, (4, 8), generator=generator)
        opt.zero_grad()
        net(x, targets=y).backward()
        placed = str(getattr(net.backbone[3].weight.grad, "placements", ""))
        alrao.clip_grad_norm_(net, 0.5)
        opt.step()
    return placed


def sequence_parallel(rank):
    """The normalisation sees a part of each sequence, and its gradient is a partial sum on each rank."""
    mesh, net = init_device_mesh("cpu", (4,)), model(hidden=36)
    plan = {
        "": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        "0": ColwiseParallel(),
        "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(),
    }
    parallelize_module(net.backbone, mesh, plan)
    opt = made("momentum", net, seed=1 + rank)
    return {"placed": sequences(net, opt), "weights": weights(net)}


def both(rank):
    """FSDP over tensor parallelism, whose 34 columns are uneven twice; with replicas instead of shards, too."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    for kind in ("shards", "late"):
        net = model(hidden=34)
        if kind == "late":
            opt = made("adam", net, seed=1 + rank)
        parallelize_module(
            net.backbone, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )
        shard(net, mesh["dp"])
        if kind == "shards":
            opt = made("adam", net, seed=1 + rank)
        train(net, opt, part=(rank // 2, 2))
        found[kind] = result(net, opt)
        found[kind]["here"] = {n: p.to_local().detach().clone() for n, p in net.named_parameters()}
    return found


def replicas_of_shards(rank):
    """HSDP."""
    mesh, net = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), model()
    shard(net, mesh)
    opt = made("adam", net, seed=1 + rank)
    train(net, opt, part=(rank, 4))
    return result(net, opt)


def tools(rank):
    """What else there is to ask of a sharded network; the head is sharded by itself, too."""
    mesh, net = init_device_mesh("cpu", (4,)), model()
    fully_shard(net.head, mesh=mesh)
    register_fsdp_forward_method(net.head, "clone_loss")
    shard(net, mesh)
    opt = made("momentum", net, seed=1 + rank)
    train(net, opt, part=(rank, 4))
    found = {"suggested_lr": net.suggested_lr(), "finite": net.head.finite_clones()}
    rows = alrao.describe_rates(opt, file=None, details=True)
    found["rows"] = [list(row) for row in rows]
    # By one rank, which waits for no other.
    found["metrics"] = alrao.metrics(net, opt) if rank == 0 else {}
    features = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    net.head.eval()
    loss = net.head.clone_loss(features, lambda out: out.square().mean(-1))
    found["clone_loss"] = loss.detach()
    options = StateDictOptions(full_state_dict=True)
    found["full"] = get_model_state_dict(net, options=options)
    return found


def averages(rank):
    """The root keeps whole weights after a forward; other modules by default do not."""
    mesh, found = init_device_mesh("cpu", (4,)), []
    for given in ("model", "backbone", "parameters"):
        net = model()
        shard(net, mesh, **({} if given == "model" else {"reshard_after_forward": False}))
        params = {"model": net, "backbone": net.backbone, "parameters": list(net.parameters())}
        opt = made("adam", params[given], averaging=3.0)
        found.append(evaluate_between(net, opt, part=(rank, 4)))
    return found


def other_parameters(rank):
    """Ranks that give the optimizer vectors of other parameters; in the second case of as many features in all."""
    said = []
    for sizes in ([4 + k for k in range(1 + rank)], [5 + rank, 11 - rank]):
        params = [nn.Parameter(torch.randn(size, 2)) for size in sizes]
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
        slices = [FlatSlice(p) for p in params]
        register_flat_slices(flat, slices, process_group=dist.group.WORLD)
        try:
            alrao.AlraoSGD([flat])
        except ValueError as error:
            said.append(str(error))
    return said


JOBS = (
    averages,
    before,
    after,
    columns,
    tensor_parallel,
    tensor_parallel_later,
    sequence_parallel,
    both,
    replicas_of_shards,
    tools,
    other_parameters,
)


@pytest.fixture(scope="module")
def results():
    return run(JOBS)


def trained(kind, hidden=33):
    net = model(hidden=hidden)
    opt = made(kind, net)
    train(net, opt)
    return result(net, opt)


def check(found, kind, hidden=33):
    """All ranks alike, and as one process."""
    expected = trained(kind, hidden)
    for own in found:
        assert own["placed"]
        for key in ("posterior", "clone_lr"):
            assert torch.equal(own[key], found[0][key]), key
        assert_close({"": own["posterior"]}, {"": expected["posterior"]})
        assert own["seeds"] == expected["seeds"]
        assert_close(own["weights"], expected["weights"])
        assert_close(own["states"], expected["states"])
        for name, value in expected["states"].items():
            if name.endswith((".rate", ".step")):
                assert torch.equal(own["states"][name], value), name


@pytest.mark.parametrize("kind", CASES)
def test_fully_shard(results, kind):
    check([r["before"][kind] for r in results], kind)


def test_averages(results):
    for number, given in enumerate((lambda net: net, lambda net: net.backbone, lambda net: net)):
        net = model()
        expected = evaluate_between(net, made("adam", given(net), averaging=3.0))
        assert (expected["averaged 1"] - expected["own"]).abs().max() > 1e-3
        for r in results:
            assert_close(r["averages"][number], expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["module", "groups", "trained"])
def test_sharded_after_construction(results, kind):
    found = [r["after"][kind] for r in results]
    check(found, "momentum")
    assert all(own["freed"] for own in found)


def test_columns(results):
    check([r["columns"] for r in results], "momentum", 36)


def test_tensor_parallel_with_plain_parameters(results):
    found = [r["tensor_parallel"] for r in results]
    assert {own["plain"] for own in found} == {4}
    check(found, "momentum", 36)


def test_tensor_parallel_after_construction(results):
    net = model(hidden=36).backbone
    opt = made("momentum", net)
    for step in range(STEPS):
        opt.zero_grad()
        net(batch(step)[0]).square().mean().backward()
        opt.step()
    for r in results:
        assert_close(r["tensor_parallel_later"]["weights"], weights(net))
        assert_close(r["tensor_parallel_later"]["states"], states(net, opt))


def test_sequence_parallel(results):
    net = model(hidden=36)
    sequences(net, made("momentum", net))
    for r in results:
        assert "Partial" in r["sequence_parallel"]["placed"]
        assert_close(r["sequence_parallel"]["weights"], weights(net))


@pytest.mark.parametrize("kind", ["shards", "late"])
def test_fsdp_over_tensor_parallel(results, kind):
    check([r["both"][kind] for r in results], "adam", 34)


def test_replicas_of_shards(results):
    check([r["replicas_of_shards"] for r in results], "adam")


def test_ranks_with_other_parameters(results):
    for r in results:
        several, as_many = r["other_parameters"]
        assert "got [1, 2, 3, 4] vectors of learning rates on the ranks" in several
        assert "expected the same parameters on every rank" in as_many


def test_what_a_sharded_network_tells(results):
    found = [r["tools"] for r in results]
    net = model()
    opt = made("momentum", net)
    train(net, opt)
    features = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    net.head.eval()
    loss = net.head.clone_loss(features, lambda out: out.square().mean(-1)).detach()
    rows = alrao.describe_rates(opt, file=None, details=True)
    for own in found:
        assert own["suggested_lr"] == pytest.approx(net.suggested_lr(), rel=1e-6)
        assert own["finite"].tolist() == [True] * 5
        torch.testing.assert_close(own["clone_loss"], loss, rtol=1e-5, atol=0)
        assert [list(row) for row in rows] == own["rows"]
    expected = alrao.metrics(net, opt)
    assert found[0]["metrics"].keys() == expected.keys()
    for name, value in expected.items():
        assert found[0]["metrics"][name] == pytest.approx(value, rel=1e-5), name
    # The way to collapse.
    whole = model(seed=3)
    whole.load_state_dict(found[0]["full"])
    x = torch.randn(4, 16)
    collapsed = whole.collapse("mixture", num_extras=0)
    torch.testing.assert_close(collapsed(x), net.eval()(x), rtol=0, atol=1e-5)
