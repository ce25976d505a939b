"""Protects heads whose clones, or classes, lie over ranks: four processes over gloo, compared with one that has all.

- Five clones on four ranks (two, two, one and none), on three and on two, and ten classes: weights, states, switch,
  statistics and predictions of five steps, clipped and accumulated; the switch is bit-equal on all ranks.
- Every option of the losses, of classifiers and regressors: loss, gradients and statistics of one batch.
- Clones dead on one rank, on all, for one sample; targets that do not count; ties of the largest logit.
- Ranks with other batches, and what is no head, are refused.
"""

import copy
import math
import warnings

import pytest
import torch
from sharded_harness import assert_close, batch, made, model, run, train, whole
from sharded_head_harness import STYLES, classifier, clipped, close, parallel, result
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import alrao_fast as alrao
from alrao_fast.distributed import ClassesParallel, ClonesParallel
from alrao_fast.nn.merging import merged_losses, shares_of_mass

# One start of the processes for all tests.
pytestmark = pytest.mark.xdist_group("sharded_head")

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
    "dead for some samples": (classifier, {"large": True}),
    "all dead": (classifier, {"dead": (0, 1, 2, 3, 4)}),
    "regression": (regressor, {}),
    "regression, dead": (regressor, {"dead": (1, 4)}),
    "regression, all dead": (regressor, {"dead": (0, 1, 2, 3, 4)}),
    "regression, weights": (regressor, {"sample_weight": True}),
    "float64": (classifier, {"dtype": torch.float64}),
    "bfloat16": (classifier, {"dtype": torch.bfloat16}),
    "ties": (classifier, {"flat": True}),
    "few classes": (classifier, {"classes": 5}),
}


def one_batch(name, mesh=None, style=ClonesParallel):
    """What a call of `CASES` makes."""
    make, options = CASES[name]
    head, x, y, call = make(**copy.deepcopy(options))
    if mesh is not None:
        head = parallelize_module(head, mesh, style())
    predictions = head.eval()(x)
    # Where all are dead there is no gradient, where they are huge it is rounded.
    ordinary = (predictions.abs() < 1e3).all(-1, keepdim=True)
    (predictions.where(ordinary, 0).square().sum() / 400).backward()
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
        with pytest.raises(
            ValueError, match="expected the same batch and the same backbone"
        ) as error:
            head(x * (1 + rank) if other == "values" else x, y)
        messages.append(str(error.value))
    two = init_device_mesh("cpu", (2, 2))
    for call, expected in (
        (lambda: parallelize_module(nn.Linear(3, 2), mesh, ClonesParallel()), TypeError),
        (lambda: ClonesParallel()._apply(classifier()[0], two), ValueError),
        (lambda: parallelize_module(head, mesh, ClonesParallel()), ValueError),
        (lambda: parallelize_module(regressor()[0], mesh, ClassesParallel()), TypeError),
    ):
        with pytest.raises(expected, match=r"Cl.*Parallel: ") as error:
            call()
        messages.append(str(error.value))
    # Between the forwards fully_shard has cut the clones once more.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    net = parallel(model(), mesh["cp"])
    fully_shard(net, mesh=mesh["dp"])
    with pytest.raises(RuntimeError, match=r"weight: got placements .*register_fsdp_forward"):
        net.head.clone_outputs(torch.zeros(3, 24))
    return messages


@pytest.fixture(scope="module")
def ranks():
    return run([five_steps, batches, accumulated, refused])


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


def test_accumulated(ranks):
    net = model()
    expected = accumulate(net, made("momentum", net, seed=1))
    for own in ranks:
        close(own["accumulated"], expected)


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
