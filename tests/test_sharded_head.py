"""Protects heads whose clones lie over ranks: four processes over gloo, compared with one process that has them all.

- Five clones on four ranks (two, two, one and none), on three and on two: weights, states, switch, statistics and
  predictions of five steps, clipped, accumulated, by SGD and Adam; the switch is bit-equal on all ranks.
- Every option of the losses, of classifiers and regressors: loss, gradients and statistics of one batch.
- Clones dead on one rank, on all, for one sample; targets that do not count.
- Under fully_shard on the other dimension of a mesh; behind activations that are cut along the
  sequence; optimizers made before; checkpoints, collapse, criteria; ranks with other batches are refused.
"""

import copy
import warnings

import pytest
import torch
from sharded_harness import assert_close, batch, made, model, run, states, train, weights, whole
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

import alrao_fast as alrao
from alrao_fast.distributed import ClonesParallel


def parallel(net, mesh, **options):
    parallelize_module(net, mesh, {"head": ClonesParallel(**options)})
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


def five_steps(rank):
    found = {}
    for size in (2, 3, 4):
        # What is left over is a mesh of its own.
        meshes = [DeviceMesh("cpu", list(r)) for r in (range(size), range(size, 4)) if r]
        mesh = meshes[rank >= size]
        net = parallel(model(group=mesh.get_group()), mesh)
        opt = made("momentum", net, seed=1)
        train(net, opt, after_backward=clipped(net))
        found[str(size)] = result(net, opt)
    return found


def classifier(x=(6, 7, 8), targets=None, options=None, dead=(), dtype=torch.float32, **call):
    """A head, its features and the arguments of one call; `dead` clones have an infinite weight."""
    torch.manual_seed(3)
    weights = torch.rand(10) + 0.5 if options is not None and options.pop("weighted", 0) else None
    head = alrao.ClassifierClones(8, 10, 5, class_weight=weights, dtype=dtype, **(options or {}))
    with torch.no_grad():
        head.weight[list(dead), 3, 2] = float("inf")
        head.switch.update(torch.tensor([0.3, -0.2, 0.8, 0.1, 0.0]))
    x = torch.randn(x, dtype=dtype, requires_grad=True)
    y = torch.randint(10, x.shape[:-1])
    if targets == "probabilities":
        y = torch.rand(*y.shape, 10)
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
    return {name: one_batch(name, mesh) for name in CASES}


@pytest.fixture(scope="module")
def ranks():
    return run([five_steps, batches])


def test_five_steps(ranks):
    net = model()
    opt = made("momentum", net, seed=1)
    train(net, opt, after_backward=clipped(net))
    expected = result(net, opt)
    for own in ranks:
        for size in "234":
            found = own["five_steps"][size]
            for name in ("weights", "states"):
                assert_close(found[name], expected[name])
            for name in ("logw", "loss", "accuracy", "clone_lr", "prediction"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    for size in "234":
        first = ranks[0]["five_steps"][size]
        for own in ranks[1 : int(size)]:
            assert torch.equal(own["five_steps"][size]["logw"], first["logw"])
            assert torch.equal(own["five_steps"][size]["prediction"], first["prediction"])


@pytest.mark.parametrize("name", CASES)
def test_batches(ranks, name):
    expected = one_batch(name)
    for own in ranks:
        found = own["batches"][name]
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
            assert torch.equal(
                found[key].nan_to_num(7), ranks[0]["batches"][name][key].nan_to_num(7)
            )
