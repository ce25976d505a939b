"""Protects a step on DTensors whose gradients are given, on four processes over gloo, compared with one process.

- Every kind of placement, rows, columns, replicas and both dimensions of a mesh, with plain parameters among them.
- bfloat16: with master weights and rounded to nearest bit for bit as one process; stochastic rounding is the same in
  every run, on replicas and for the first part that of one process, and has other bits for every other part.
- Gradients placed otherwise than their parameter, partial sums among them, count as what they stand for; one that is no
  DTensor is refused.
- GradScaler: what is not finite on one rank stops the step on all; clip_grad_norm_ has the norms of the whole.
- Modules that are converted, or materialised from meta, after the optimizer was made, are followed.
"""

import pytest
import torch
from sharded_harness import assert_close, give, made, model, run, states, steps, train, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import alrao_fast as alrao

# Of gradients without an observation.
pytestmark = [
    pytest.mark.xdist_group("sharded_step"),
    pytest.mark.filterwarnings("ignore:.*without any observation"),
]
ROWS, REPLICAS = (Shard(0),), (Replicate(),)
PLACEMENTS = {
    "rows": ((4,), lambda name, p: ROWS),
    "last": ((4,), lambda name, p: (Shard(p.dim() - 1),)),
    "replicas": ((4,), lambda name, p: REPLICAS),
    "two dimensions": ((2, 2), lambda name, p: (Shard(0), Shard(p.dim() - 1))),
    "among plain ones": ((4,), lambda name, p: ROWS if name.endswith("weight") else None),
}
LOW = {
    "masters": ("momentum", {"master_weights": True}),
    "masters of adam": ("adam", {"master_weights": True}),
    "nearest": ("momentum", {"rounding": "nearest"}),
    "stochastic": ("momentum", {}),
    "stochastic adam": ("adam", {}),
}


def distribute(net, mesh, placements_of):
    for path, module in net.named_modules():
        for name, p in module.named_parameters(recurse=False):
            placements = placements_of(f"{path}.{name}", p)
            if placements is not None:
                placed = distribute_tensor(p.detach(), mesh, placements)
                setattr(module, name, nn.Parameter(placed))


def result(net, opt):
    return {"weights": weights(net), "states": states(net, opt)}


def placements(rank):
    found = {}
    for name, (shape, placements_of) in PLACEMENTS.items():
        mesh = init_device_mesh("cpu", shape)
        for kind in ("momentum", "amsgrad"):
            net = model()
            distribute(net, mesh, placements_of)
            opt = made(kind, net, seed=1 + rank)
            steps(net, opt)
            found[f"{name}, {kind}"] = result(net, opt)
    return found


def low_precision(rank):
    found = {}
    for name in ("rows", "replicas"):
        shape, placements_of = PLACEMENTS[name]
        mesh = init_device_mesh("cpu", shape)
        for low, (kind, options) in LOW.items():
            runs = []
            for _ in range(2 if low == "stochastic" else 1):
                net = model(torch.bfloat16)
                distribute(net, mesh, placements_of)
                opt = made(kind, net, seed=1 + rank, **options)
                steps(net, opt)
                runs.append(result(net, opt))
            found[f"{name}, {low}"] = runs[0]
            if len(runs) > 1:
                found[f"{name}, again"] = runs[1]
    return found


def bits_of_parts(rank):
    """Equal parts with equal gradients and one rate, from whose rounding alone they differ."""
    mesh = init_device_mesh("cpu", (4,))
    layer = nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    distribute(layer, mesh, lambda name, p: ROWS)
    opt = alrao.AlraoSGD(layer, sampler=alrao.Constant(1e-3))
    layer.weight.grad = torch.ones_like(layer.weight)
    opt.step()
    return layer.weight.full_tensor().detach().float()


def other_gradients(rank):
    """Each stands for the same gradient."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    for own, name in ((ROWS, "rows"), (REPLICAS, "replicas")):
        for given in ("replicated", "partial", "columns"):

            def place(grad, p, given=given):
                if given == "replicated":
                    return DTensor.from_local(grad, mesh, REPLICAS, run_check=False)
                if given == "partial":
                    return DTensor.from_local(grad / 4, mesh, (Partial(),), run_check=False)
                return distribute_tensor(grad, mesh, (Shard(p.dim() - 1),), src_data_rank=None)

            net = model()
            distribute(net, mesh, lambda name, p, own=own: own)
            opt = made("momentum", net)
            steps(net, opt, place)
            found[f"{name}, {given}"] = result(net, opt)
    return found


def scaler(rank):
    """The third gradient of the last rank is infinite."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    for fused in (None, True):
        net = model()
        distribute(net, mesh, lambda name, p: ROWS if name.endswith("weight") else REPLICAS)
        opt = made("momentum", net, fused=fused)
        grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(4):
            give(net, step)
            for p in net.parameters():
                p.grad.mul_(grad_scaler.get_scale())
            if step == 2 and rank == 3:
                net.head.weight.grad.to_local().fill_(torch.inf)
                net.backbone[0].weight.grad.to_local().fill_(torch.inf)
            # So that it is set up.
            grad_scaler.scale(torch.zeros(()))
            grad_scaler.step(opt)
            grad_scaler.update()
        found[str(fused)] = {**result(net, opt), "scale": grad_scaler.get_scale()}
    return found


def clipped(rank):
    found = {}
    for name, (shape, placements_of) in PLACEMENTS.items():
        mesh = init_device_mesh("cpu", shape)
        for order in (2.0, torch.inf):
            for partial in (False, True) if name == "replicas" else (False,):
                net = model()
                distribute(net, mesh, placements_of)
                give(net, 0)
                if partial:
                    for p in net.parameters():
                        part = p.grad.to_local() / 4
                        p.grad = DTensor.from_local(part, mesh, (Partial(),), run_check=False)
                norms = alrao.grad_norms(net, order)
                norm = alrao.clip_grad_norm_(net, 0.5, order)
                found[f"{name}, {order}, {partial}"] = {
                    "norms": torch.cat([norms.backbone[None], *norms.clones, norm[None]]),
                    "grads": {n: placed_whole(p.grad) for n, p in net.named_parameters()},
                }
    return found


def placed_whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def converted(rank):
    mesh, net = init_device_mesh("cpu", (4,)), model()
    distribute(net, mesh, lambda name, p: ROWS)
    opt = made("momentum", net)
    steps(net, opt, numbers=range(2))
    net.double()
    steps(net, opt, numbers=range(2, 4))
    return result(net, opt)


# Weights that are not there yet have a size of their own by which rates are bounded.
UNBOUNDED = {"momentum": {}, "adam": {"rate_bound": None}}


def from_meta(rank):
    """The optimizer is made of what has no data yet."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    for kind in ("momentum", "adam"):
        net = model(device="meta")
        net.head.to_empty(device="cpu")
        net.head.reset_parameters()
        head = {name: buffer.clone() for name, buffer in net.head.named_buffers()}
        net.head.to("meta")
        fully_shard(net, mesh=mesh)
        opt = made(kind, net, seed=1 + rank, **UNBOUNDED[kind])
        net.to_empty(device="cpu")
        for name, buffer in net.head.named_buffers():
            buffer.copy_(head[name])
        full = {name: p.detach() for name, p in model().named_parameters()}
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(net, full, options=options)
        train(net, opt, part=(rank, 4))
        found[kind] = result(net, opt)
    return found


def refused(rank):
    mesh, net = init_device_mesh("cpu", (4,)), model()
    distribute(net, mesh, lambda name, p: ROWS)
    opt = made("momentum", net)
    give(net, 0)
    other = init_device_mesh("cpu", (2, 2))
    weight = net.backbone[0].weight
    before = weights(net)
    message = ""
    weight.grad = distribute_tensor(torch.ones(weight.shape), other, (Shard(0), Replicate()))
    try:
        opt.step()
    except RuntimeError as error:
        message = str(error)
    return {"message": message, "before": before, "after": weights(net)}


JOBS = (
    placements,
    low_precision,
    bits_of_parts,
    other_gradients,
    scaler,
    clipped,
    converted,
    from_meta,
    refused,
)


@pytest.fixture(scope="module")
def results():
    return run(JOBS)


def alone(kind, dtype=torch.float32, numbers=range(4), **options):
    net = model(dtype)
    opt = made(kind, net, **options)
    steps(net, opt, numbers=numbers)
    return result(net, opt)


def check(found, expected, atol=1e-6):
    for own in found:
        for part in ("weights", "states"):
            assert_close(own[part], expected[part], atol)


@pytest.mark.parametrize("kind", ["momentum", "amsgrad"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(results, placement, kind):
    check([r["placements"][f"{placement}, {kind}"] for r in results], alone(kind))


@pytest.mark.parametrize("low", ["masters", "masters of adam", "nearest"])
@pytest.mark.parametrize("placement", ["rows", "replicas"])
def test_low_precision_is_that_of_one_process(results, placement, low):
    kind, options = LOW[low]
    found = [r["low_precision"][f"{placement}, {low}"] for r in results]
    check(found, alone(kind, torch.bfloat16, **options), atol=0)


@pytest.mark.parametrize("low", ["stochastic", "stochastic adam"])
def test_stochastic_rounding(results, low):
    kind, options = LOW[low]
    expected = alone(kind, torch.bfloat16, **options)
    check([r["low_precision"][f"replicas, {low}"] for r in results], expected, atol=0)
    for r in results:
        rows = r["low_precision"][f"rows, {low}"]
        for name, value in expected["weights"].items():
            first = -(-value.size(0) // 4)
            assert torch.equal(rows["weights"][name][:first], value[:first]), name
            # Four steps, each of which rounds by up to 2^-8.
            torch.testing.assert_close(rows["weights"][name], value, rtol=2**-5, atol=2**-4)
    for placement in ("rows", "replicas") if low == "stochastic" else ():
        for r in results:
            again = r["low_precision"][f"{placement}, again"]
            check([again], r["low_precision"][f"{placement}, {low}"], atol=0)


def test_parts_round_with_bits_of_their_own(results):
    parts = results[0]["bits_of_parts"].view(4, -1)
    rounded = parts != 1
    # 1 - 1e-3 is between 1 - 2^-8 and 1.
    assert 0.15 < rounded.float().mean() < 0.4
    for k in range(4):
        for other in range(k):
            assert (rounded[k] != rounded[other]).float().mean() > 0.2


@pytest.mark.parametrize("given", ["replicated", "partial", "columns"])
@pytest.mark.parametrize("own", ["rows", "replicas"])
def test_gradients_placed_otherwise(results, own, given):
    check([r["other_gradients"][f"{own}, {given}"] for r in results], alone("momentum"))


@pytest.mark.parametrize("fused", ["None", "True"])
def test_grad_scaler(results, fused):
    found = [r["scaler"][fused] for r in results]
    assert {own["scale"] for own in found} == {128.0}
    check(found, alone("momentum", numbers=[0, 1, 3]), atol=1e-5)


@pytest.mark.parametrize("order", [2.0, torch.inf])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_clipping(results, placement, order):
    net = model()
    give(net, 0)
    norms = alrao.grad_norms(net, order)
    norm = alrao.clip_grad_norm_(net, 0.5, order)
    expected = torch.cat([norms.backbone[None], *norms.clones, norm[None]])
    grads = {name: p.grad for name, p in net.named_parameters()}
    for partial in (False, True) if placement == "replicas" else (False,):
        found = [r["clipped"][f"{placement}, {order}, {partial}"] for r in results]
        for own in found:
            assert torch.equal(own["norms"], found[0]["norms"])
            torch.testing.assert_close(
                own["norms"], expected, rtol=1e-6 if partial else 1e-12, atol=0
            )
            assert_close(own["grads"], grads)


def test_converted_after_construction(results):
    net = model()
    opt = made("momentum", net)
    steps(net, opt, numbers=range(2))
    net.double()
    steps(net, opt, numbers=range(2, 4))
    check([r["converted"] for r in results], result(net, opt))


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_materialised_after_construction(results, kind):
    net = model()
    opt = made(kind, net, **UNBOUNDED[kind])
    train(net, opt)
    check([r["from_meta"][kind] for r in results], result(net, opt))


def test_a_gradient_on_another_mesh_is_refused(results):
    for r in results:
        assert (
            "parameter 'backbone.0.weight' has a gradient that is no DTensor of its mesh"
            in (r["refused"]["message"])
        )
        assert_close(r["refused"]["after"], r["refused"]["before"], atol=0)
