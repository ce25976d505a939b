"""Protects heads over ranks together with what else torch does over ranks: four processes, compared with one.

- Under fully_shard on the other dimension of a mesh, and on the same; optimizers made before.
- Behind activations that are cut along the sequence.
- Checkpoints that are loaded by other ranks, with the head cut otherwise.
- Under autocast, and inside activation checkpoints.
- What gathers the clones: outputs, criteria, likelihoods, collapse; and the bytes that a step and a prediction move.
"""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_harness import assert_close, batch, made, model, run, train, whole
from sharded_head_harness import STYLES, classifier, clipped, close, parallel, result
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import alrao_fast as alrao
from alrao_fast.distributed import ClassesParallel, ClonesParallel

# One start of the processes for all tests.
pytestmark = pytest.mark.xdist_group("sharded_head_engines")


def two_dimensions(rank):
    """Batches over one dimension, clones over the other; the backbone sharded over the first, or over both."""
    found = {}
    for kind in ("sum", "late", "columns", "classes"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        net = model()
        net.head.evidence = "sum" if kind == "sum" else "mean"
        opt = made("adam", net, seed=1 + rank) if kind == "late" else None
        parallel(net, mesh["cp"], "classes" if kind == "classes" else "clones")
        # By rows, of which each clone is one, or by columns.
        placement = (lambda p: Shard(p.dim() - 1)) if kind == "columns" else None
        fully_shard(net.backbone, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"], shard_placement_fn=placement)
        opt = opt or made("adam", net, seed=1 + rank)
        train(net, opt, part=(mesh["dp"].get_local_rank(), 2), after_backward=clipped(net))
        found[kind] = result(net, opt)
    return found


def same_dimension(rank):
    """The backbone sharded over the ranks that have the clones, which all see the same batch."""
    mesh = init_device_mesh("cpu", (4,))
    net = parallel(model(), mesh)
    fully_shard(net.backbone, mesh=mesh)
    opt = made("adam", net, seed=1 + rank)
    train(net, opt, after_backward=clipped(net))
    return result(net, opt)


def sequence(rank):
    """Features that are cut along the sequence, in a plain tensor and in a DTensor."""
    mesh = init_device_mesh("cpu", (4,))
    head, x, y, _ = classifier(x=(3, 8, 8))
    own = x.detach().chunk(4, 1)[rank].clone().requires_grad_()
    found = {}
    for kind in ("plain", "DTensor", "classes"):
        layout = Shard(1) if kind != "DTensor" else None
        style = (ClassesParallel if kind == "classes" else ClonesParallel)(input_layouts=layout)
        net = parallelize_module(copy.deepcopy(head), mesh, style)
        features = own if kind != "DTensor" else DTensor.from_local(own, mesh, [Shard(1)])
        found[kind] = {"prediction": net.eval()(features).detach()}
        loss = net.train()(features, y)
        (found[kind]["dx"],) = torch.autograd.grad(loss, own)
        found[kind]["loss"] = loss.detach()
    return found


def methods(rank):
    """What needs all clones, on three ranks and one that has them all."""
    meshes = [DeviceMesh("cpu", list(r)) for r in (range(3), range(3, 4))]
    mesh, found = meshes[rank == 3], {}
    for style in STYLES:
        net = parallel(model(group=mesh.get_group()), mesh, style)
        opt = made("momentum", net, seed=1)
        train(net, opt, range(2))
        found[style] = called(net)
    return found


def called(net):
    x, y = batch(3)
    features = net.backbone(x).detach().requires_grad_()
    head, found = net.head, {}
    net.eval()
    found["outputs"] = head.clone_outputs(features)
    found["log_likelihood"], found["entropy"] = head.log_likelihood(features, y)
    found["criterion"] = head.clone_loss(features, lambda out: out.square().mean(-1))
    found["mixture"] = alrao.MixtureLoss(net)(net(x), y)
    for name in list(found):
        gradients = torch.autograd.grad(
            found[name].sum(),
            [features, head.weight],
            retain_graph=True,
            allow_unused=name == "mixture",
        )
        found |= {f"{name} {k}": whole(g) for k, g in enumerate(gradients) if g is not None}
    found |= {name: net.collapse(name)(x) for name in ("best", "mixture")}
    net.train()
    found["observed"] = alrao.MixtureLoss(net)(net(x), y)
    found["observed logw"] = head.switch.logw
    found["finite"] = head.finite_clones()
    found["lr"] = torch.tensor(net.suggested_lr())
    torch.manual_seed(11)
    head.reset_parameters()
    found |= {"reset weight": head.weight.detach(), "reset bias": head.bias.detach()}
    return {name: whole(value) for name, value in found.items()}


def checkpointed(rank):
    """Saved after two steps by four ranks, loaded by two pairs that cut the head otherwise."""
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    four, found = init_device_mesh("cpu", (4,)), {}
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"]
    for style, other in (("clones", "classes"), ("classes", "clones")):
        net = parallel(model(), four, style)
        opt = made("adam", net, seed=1)
        train(net, opt, range(2))
        own = dict(zip(("net", "opt"), get_state_dict(net, opt), strict=True))
        dcp.save(own, checkpoint_id=f"{folder[0]}/{style}")
        whole_state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
        net = parallel(model(seed=7), pair, other)
        opt = made("adam", net, seed=9)
        own = dict(zip(("net", "opt"), get_state_dict(net, opt), strict=True))
        dcp.load(own, checkpoint_id=f"{folder[0]}/{style}")
        set_state_dict(net, opt, model_state_dict=own["net"], optim_state_dict=own["opt"])
        train(net, opt, range(2, 5))
        found[style] = result(net, opt) | {"saved": whole_state}
    return found


def contexts(rank):
    """Gradients under autocast, and from inside an activation checkpoint, whose forward runs twice."""
    mesh = init_device_mesh("cpu", (4,))
    return {style: within(parallel(model(), mesh, style)) for style in STYLES}


def within(net):
    x, y = batch(0)
    x.requires_grad_()
    found = {}
    for name in ("autocast", "reentrant", "hooks"):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            if name == "autocast":
                loss = net.head(net.backbone(x).float(), y)
            else:
                loss = checkpoint(lambda x: net(x, targets=y), x, use_reentrant=name == "reentrant")
        loss.backward()
        found |= {f"{name} {key}": whole(p.grad) for key, p in net.named_parameters()}
        net.zero_grad()
    return found


class Bytes(TorchDispatchMode):
    """The bytes that each collective is called with."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.name().split("::")[1]
        if (
            func.namespace in ("c10d", "_c10d_functional")
            and "wait" not in kind
            and "wrap" not in kind
        ):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            what = "gather" if "gather" in kind else kind.strip("_").replace("_", "")
            self.found.append((what, min(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def moved(rank):
    found = {}
    for style in STYLES:
        net = parallel(model(), init_device_mesh("cpu", (4,)), style)
        opt = made("momentum", net)
        x, y = batch(0)
        # The first step compares the rates, and the batches.
        train(net, opt, range(1))
        with Bytes() as forward:
            loss = net(x, targets=y)
        with Bytes() as backward:
            loss.backward()
        with torch.no_grad(), Bytes() as prediction:
            net.eval()(x)
        found[style] = forward.found, backward.found, prediction.found
    return found


@pytest.fixture(scope="module")
def ranks():
    return run([two_dimensions, same_dimension, sequence, methods, checkpointed, contexts, moved])


@pytest.mark.parametrize("kind", ["sum", "late", "columns", "classes"])
def test_two_dimensions(ranks, kind):
    net = model()
    net.head.evidence = "sum" if kind == "sum" else "mean"
    opt = made("adam", net, seed=1)
    train(net, opt, after_backward=clipped(net))
    for own in ranks:
        close(own["two_dimensions"][kind], result(net, opt))
        assert torch.equal(
            own["two_dimensions"][kind]["logw"], ranks[0]["two_dimensions"][kind]["logw"]
        )


def test_same_dimension(ranks):
    net = model()
    opt = made("adam", net, seed=1)
    train(net, opt, after_backward=clipped(net))
    for own in ranks:
        close(own["same_dimension"], result(net, opt))


def test_checkpointed(ranks):
    net = model()
    opt = made("adam", net, seed=1)
    train(net, opt, range(2))
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, opt, range(2, 5))
    expected = result(net, opt)
    for own in ranks:
        for found in own["checkpointed"].values():
            # The running statistics are not saved.
            close(found, expected, metrics=("logw", "clone_lr", "prediction"))
    for found in ranks[0]["checkpointed"].values():
        assert_close(found["saved"], saved)


def test_sequence(ranks):
    head, x, y, _ = classifier(x=(3, 8, 8))
    prediction = head.eval()(x).detach()
    loss = head.train()(x, y)
    (dx,) = torch.autograd.grad(loss, x)
    for rank, own in enumerate(ranks):
        for found in own["sequence"].values():
            torch.testing.assert_close(found["prediction"], prediction, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
            expected = dx.chunk(4, 1)[rank]
            torch.testing.assert_close(found["dx"], expected, rtol=1e-6, atol=1e-6)


def test_methods(ranks):
    net = model()
    opt = made("momentum", net, seed=1)
    train(net, opt, range(2))
    expected = called(net)
    for own in ranks:
        for found in own["methods"].values():
            assert_close(found, expected)


def test_contexts(ranks):
    expected = within(model())
    for own in ranks:
        for found in own["contexts"].values():
            assert_close(found, expected)


def test_moved(ranks):
    """What docs/distributed.md says, of B = 16 samples, N = 5, C = 10, D = 24 and 4 ranks."""
    switch = ("gather", 24 * 5 + 32)
    features = ("allreduce", 4 * 16 * 24)
    per_clone = ("allreduce", 4 * 16 * 5)
    for own in ranks:
        forward, backward, prediction = own["moved"]["clones"]
        # Two clones are the largest part, three classes below.
        assert forward == [("gather", 8 * 16 + 24 * 2), switch]
        assert backward == [features]
        assert prediction == [("gather", 8 * 16), *[("allreduce", 4 * 16 * 10)] * 2]
        forward, backward, prediction = own["moved"]["classes"]
        assert forward == [per_clone, ("allreduce", 3 * 4 * 16 * 5), ("gather", 24 * 5), switch]
        assert backward == [features]
        assert prediction == [*[per_clone] * 3, ("gather", 4 * 16 * 3)]
