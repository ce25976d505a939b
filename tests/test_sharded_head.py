"""Protects heads whose clones lie over ranks: four processes over gloo, compared with one process that has them all.

- Five clones on four ranks (two, two, one and none), on three and on two: weights, states, switch, statistics and
  predictions of five steps, clipped, accumulated, by SGD and Adam; the switch is bit-equal on all ranks.
- Every option of the losses, of classifiers and regressors: loss, gradients and statistics of one batch.
- Clones dead on one rank, on all, for one sample; targets that do not count.
- Under fully_shard on the other dimension of a mesh; behind activations that are cut along the
  sequence; optimizers made before; checkpoints, collapse, criteria; ranks with other batches are refused.
"""

import copy
import math
import warnings

import pytest
import torch
from sharded_harness import assert_close, batch, made, model, run, states, train, weights, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import alrao_fast as alrao
from alrao_fast.distributed import ClassesParallel, ClonesParallel
from alrao_fast.nn.merging import merged_losses, shares_of_mass

STYLES = {"clones": ClonesParallel, "classes": ClassesParallel}


def parallel(net, mesh, style="clones"):
    parallelize_module(net, mesh, {"head": STYLES[style]()})
    return net


def result(net, opt):
    x, _ = batch(50)
    found = {
        "weights": weights(net),
        "states": states(net, opt),
        "logw": net.head.switch.logw.clone(),
        **{key: value for key, value in net.clone_metrics().items() if key != "count"},
        "clone_lr": net.head.clone_lr.clone(),
    }
    with torch.no_grad():
        found["prediction"] = net.eval()(x)
    net.train()
    return found


def clipped(net):
    return lambda: alrao.clip_grad_norm_(net, 1.0)


SIZES = [(2, "clones"), (3, "clones"), (4, "clones"), (3, "classes"), (4, "classes")]


def five_steps(rank):
    found = {}
    for size, style in SIZES:
        # What is left over is a mesh of its own.
        meshes = [DeviceMesh("cpu", list(r)) for r in (range(size), range(size, 4)) if r]
        mesh = meshes[rank >= size]
        net = parallel(model(group=mesh.get_group()), mesh, style)
        opt = made("momentum", net, seed=1)
        train(net, opt, after_backward=clipped(net))
        found[f"{style} {size}"] = result(net, opt)
    return found


def classifier(
    x=(6, 7, 8), targets=None, options=None, dead=(), dtype=torch.float32, classes=10, **call
):
    """A head, its features and the arguments of one call; `dead` clones have an infinite weight."""
    torch.manual_seed(3)
    weights = (
        torch.rand(classes) + 0.5 if options is not None and options.pop("weighted", 0) else None
    )
    head = alrao.ClassifierClones(
        8, classes, 5, class_weight=weights, dtype=dtype, **(options or {})
    )
    with torch.no_grad():
        head.weight[list(dead), 3, 2] = float("inf")
        head.switch.update(torch.tensor([0.3, -0.2, 0.8, 0.1, 0.0]))
    x = torch.randn(x, dtype=dtype, requires_grad=True)
    y = torch.randint(classes, x.shape[:-1])
    if targets == "probabilities":
        y = torch.rand(*y.shape, classes)
        y[0, 1] = 0
    elif targets == "ignored":
        y[1:4, 2] = -100
    elif targets == "none":
        y[:] = -100
    if call.get("sample_weight"):
        call["sample_weight"] = torch.rand(y.shape).where(torch.rand(y.shape) < 0.8, 0)
    return head, x, y, call


def regressor(**options):
    head, x, _, call = classifier(**options)
    regression = alrao.RegressorClones(8, 3, 5, sigma2=0.7)
    with torch.no_grad():
        regression.weight[:] = (
            head.weight[:, :3] if not options.get("dead") else head.weight[:, 1:4]
        )
    regression.switch.load_state_dict(head.switch.state_dict())
    return regression, x, torch.randn(*x.shape[:-1], 3), call


CASES = {
    "plain": (classifier, {}),
    "ignored": (classifier, {"targets": "ignored"}),
    "nothing counts": (classifier, {"targets": "none"}),
    "no samples": (classifier, {"x": (0, 8)}),
    "options": (
        classifier,
        {
            "targets": "ignored",
            "options": {
                "label_smoothing": 0.1,
                "z_loss": 1e-2,
                "logit_softcap": 2.0,
                "weighted": True,
                "evidence": "sum",
                "memory_budget": 1000,
            },
        },
    ),
    "probabilities": (classifier, {"targets": "probabilities", "options": {"weighted": True}}),
    "sum": (classifier, {"targets": "ignored", "reduction": "sum"}),
    "items": (classifier, {"targets": "ignored", "num_items_in_batch": 17}),
    "weights": (classifier, {"targets": "ignored", "sample_weight": True}),
    "one by one": (classifier, {"sample_weight": True, "reduction": "none"}),
    "no bias": (classifier, {"options": {"bias": False}}),
    "dead here": (classifier, {"dead": (0, 1)}),
    "dead there": (classifier, {"dead": (1, 4)}),
    "all dead": (classifier, {"dead": (0, 1, 2, 3, 4)}),
    "regression": (regressor, {}),
    "regression, dead": (regressor, {"dead": (1, 4)}),
    "regression, all dead": (regressor, {"dead": (0, 1, 2, 3, 4)}),
    "regression, weights": (regressor, {"sample_weight": True}),
    "float64": (classifier, {"dtype": torch.float64}),
    "bfloat16": (classifier, {"dtype": torch.bfloat16}),
    "few classes": (classifier, {"classes": 5}),
}


def one_batch(name, mesh=None, style=ClonesParallel):
    """What a call of `CASES` makes."""
    make, options = CASES[name]
    head, x, y, call = make(**copy.deepcopy(options))
    if mesh is not None:
        head = parallelize_module(head, mesh, style())
    predictions = head.eval()(x)
    # Where all are dead there is no gradient.
    (predictions.where(predictions.isfinite(), 0).square().sum() / 400).backward()
    found = {
        f"d{key} of prediction": whole(p.grad).clone()
        for key, p in {"x": x, **dict(head.named_parameters())}.items()
    }
    for p in (x, *head.parameters()):
        p.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        loss = head.train()(x, y, **call)
    factors = torch.linspace(0.5, 1.5, max(loss.numel(), 1)).view(loss.shape)
    (factors * loss).sum().backward()
    return found | {
        "prediction": predictions.detach(),
        "loss": loss.detach(),
        "logw": head.switch.logw.clone(),
        **head.clone_metrics(),
        **{
            f"d{key}": whole(p.grad).clone()
            for key, p in {"x": x, **dict(head.named_parameters())}.items()
        },
    }


def batches(rank):
    mesh = DeviceMesh("cpu", range(4))
    return {
        key: {name: one_batch(name, mesh, style) for name, case in CASES.items() if can(key, case)}
        for key, style in STYLES.items()
    }


def can(style, case):
    return style == "clones" or case[0] is classifier


def two_dimensions(rank):
    """Batches over one dimension, clones over the other; the backbone sharded over the first, or over both."""
    found = {}
    for kind in ("sum", "late", "columns"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        net = model()
        net.head.evidence = "sum" if kind == "sum" else "mean"
        opt = made("adam", net, seed=1 + rank) if kind == "late" else None
        parallel(net, mesh["cp"])
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
    for kind in ("plain", "DTensor"):
        layout = Shard(1) if kind == "plain" else None
        net = parallelize_module(copy.deepcopy(head), mesh, ClonesParallel(input_layouts=layout))
        features = own if kind == "plain" else DTensor.from_local(own, mesh, [Shard(1)])
        found[kind] = {"prediction": net.eval()(features).detach()}
        loss = net.train()(features, y)
        (found[kind]["dx"],) = torch.autograd.grad(loss, own)
        found[kind]["loss"] = loss.detach()
    return found


def methods(rank):
    """What needs all clones, on three ranks and one that has them all."""
    meshes = [DeviceMesh("cpu", list(r)) for r in (range(3), range(3, 4))]
    mesh = meshes[rank == 3]
    net = parallel(model(group=mesh.get_group()), mesh)
    opt = made("momentum", net, seed=1)
    train(net, opt, range(2))
    return called(net)


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
    head.reset_parameters()
    found["reset"] = head.weight.isfinite().all()
    return {name: whole(value) for name, value in found.items()}


def accumulated(rank):
    net = copy.deepcopy(parallel(model(), init_device_mesh("cpu", (4,))))
    opt = made("momentum", net, seed=1)
    return accumulate(net, opt)


def accumulate(net, opt):
    for step in range(2):
        opt.zero_grad()
        for part in range(2):
            x, y = batch(2 * step + part)
            (net(x, targets=y) / 2).backward()
        opt.step()
    return result(net, opt)


def refused(rank):
    """Other batches on every rank; other numbers of samples; what is no head."""
    mesh = init_device_mesh("cpu", (4,))
    messages = []
    for other in ("values", "number"):
        head, x, y, _ = classifier(x=(6 + (rank == 1 and other == "number"), 8))
        head = parallelize_module(head, mesh, ClonesParallel())
        with pytest.raises(ValueError, match="expected the same batch") as error:
            head(x * (1 + rank) if other == "values" else x, y)
        messages.append(str(error.value))
    two = init_device_mesh("cpu", (2, 2))
    for call, expected in (
        (lambda: parallelize_module(nn.Linear(3, 2), mesh, ClonesParallel()), TypeError),
        (lambda: ClonesParallel()._apply(classifier()[0], two), ValueError),
        (lambda: parallelize_module(head, mesh, ClonesParallel()), ValueError),
    ):
        with pytest.raises(expected, match="ClonesParallel: ") as error:
            call()
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def ranks():
    return run(
        [
            five_steps,
            batches,
            two_dimensions,
            same_dimension,
            sequence,
            methods,
            accumulated,
            refused,
        ]
    )


def test_five_steps(ranks):
    net = model()
    opt = made("momentum", net, seed=1)
    train(net, opt, after_backward=clipped(net))
    expected = result(net, opt)
    for own in ranks:
        for found in own["five_steps"].values():
            for name in ("weights", "states"):
                assert_close(found[name], expected[name])
            for name in ("logw", "loss", "accuracy", "clone_lr", "prediction"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    for size, style in SIZES:
        first, *others = [own["five_steps"][f"{style} {size}"] for own in ranks[:size]]
        for other in others:
            assert torch.equal(other["logw"], first["logw"])
            assert torch.equal(other["prediction"], first["prediction"])


@pytest.mark.parametrize(
    ("style", "name"), [(s, name) for s in STYLES for name, case in CASES.items() if can(s, case)]
)
def test_batches(ranks, style, name):
    expected = one_batch(name)
    first = ranks[0]["batches"][style][name]
    for own in ranks:
        found = own["batches"][style][name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # In bfloat16 every rank rounds its part of the sum.
            error = 1e-6
            if value.dtype == torch.bfloat16:
                error = torch.finfo(value.dtype).eps * float(value.abs().max())
            torch.testing.assert_close(
                found[key],
                value,
                equal_nan=True,
                rtol=1e-6,
                atol=error,
                msg=lambda m, key=key: f"{key}: {m}",
            )
            assert torch.equal(found[key].nan_to_num(7), first[key].nan_to_num(7))


def close(found, expected, names=("weights", "states")):
    for name in names:
        assert_close(found[name], expected[name])
    for name in ("logw", "loss", "accuracy", "clone_lr", "prediction"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sum", "late", "columns"])
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


def test_accumulated(ranks):
    net = model()
    expected = accumulate(net, made("momentum", net, seed=1))
    for own in ranks:
        close(own["accumulated"], expected)


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
        found = own["methods"]
        assert_close(found, expected)


def test_refused(ranks):
    values, number, *_ = ranks[2]["refused"]
    assert "got [48, 48, 48, 48] numbers" in values and "got [48, 56, 48, 48] numbers" in number


def test_merging_by_hand():
    """Two clones in one half, one in another; a dead half; nothing alive."""
    a, logp = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.2, 0.4, 0.8]).log()
    halves = torch.stack([-(a + logp)[:2].logsumexp(0), -(a + logp)[2]])
    losses = torch.tensor([[halves[0], 1.5, math.inf], [halves[1], math.inf, math.inf]])
    merged, shares = merged_losses(losses)
    # 0.5 * 0.2 + 0.25 * 0.4 + 0.25 * 0.8 = 0.2 + 0.2
    expected = [-math.log(0.4), 1.5, math.inf]
    torch.testing.assert_close(merged, torch.tensor(expected))
    torch.testing.assert_close(shares, torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 0.0]]))

    mass = torch.tensor([[0.6, 0.3, 0.0], [0.2, 0.0, 0.0]]).log()
    torch.testing.assert_close(
        shares_of_mass(mass).exp(), torch.tensor([[0.75, 1.0, 0.0], [0.25, 0.0, 0.0]])
    )
