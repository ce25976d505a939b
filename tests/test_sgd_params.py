"""What AlraoSGD takes as `params`. Protects, on every backend:

- a model, modules, tensors, named tensors, groups; shared vectors across groups; clone rates and `clone_lr`;
- frozen parameters, gradients that come and go, empty and scalar parameters;
- the table of rates that describe_rates prints.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from sgd_harness import assert_same, backward, generator, net
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.optim import (
    AlraoSGD,
    Constant,
    Fraction,
    LogUniform,
    PerWeight,
    describe_rates,
)

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")


def test_draws_do_not_depend_on_the_groups():
    def rates(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5), nn.Linear(5, 2))
        optimizer = make(model)
        return [optimizer.state[p]["rate"] for p in model.parameters()]

    g = generator
    whole = rates(lambda m: AlraoSGD(m, generator=g()))
    assert torch.equal(whole[0], whole[1]) and whole[0] is whole[1]
    makers = [
        lambda m: AlraoSGD(m.parameters(), model=m, generator=g()),
        lambda m: AlraoSGD(m.named_parameters(), model=m, generator=g()),
        lambda m: AlraoSGD([m[0], m[1], m[2]], generator=g()),
        lambda m: AlraoSGD([{"params": m[2]}, {"params": [m[0], m[1]]}], model=m, generator=g()),
        lambda m: AlraoSGD(
            [
                {"params": [p for p in m.parameters() if p.dim() == 1], "weight_decay": 0.0},
                {"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.1},
            ],
            model=m,
            generator=g(),
        ),
    ]
    for make in makers:
        for a, b in zip(whole, rates(make)):
            assert torch.equal(a, b)


def test_named_parameters_keep_their_names():
    model = nn.Linear(2, 3)
    optimizer = AlraoSGD(model.named_parameters(), model=model)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_bare_tensors_warn():
    model = nn.Embedding(5, 3)
    with pytest.warns(UserWarning, match="1 bare tensors.*pass the module itself, or model=") as w:
        optimizer = AlraoSGD(model.parameters())
    assert w[0].filename == __file__
    assert optimizer.state[model.weight]["rate"].shape == (5,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AlraoSGD(model.parameters(), model=model)
    assert optimizer.state[model.weight]["rate"].shape == (3,)
    with pytest.warns(UserWarning, match="bare") as w:
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(4, 2))})
    assert w[0].filename == __file__


def layer():
    return nn.Linear(3, 4)


SMALL = {
    "option": lambda: AlraoSGD(layer(), (1e-4, 1.0), lr=5e-5),
    "tensor": lambda: AlraoSGD(layer(), (1e-4, 1.0), lr=torch.tensor(5e-5)),
    "sampler": lambda: AlraoSGD(layer(), lr=5e-5, sampler=LogUniform(1e-4, 1.0)),
    "group": lambda: AlraoSGD([{"params": layer(), "lr": 5e-5}], (1e-4, 1.0)),
    "groups": lambda: AlraoSGD([{"params": layer(), "lr": 5e-5} for _ in range(2)], (1e-4, 1.0)),
    "added": lambda: AlraoSGD(layer(), (1e-4, 1.0)).add_param_group(
        {"params": layer(), "lr": 5e-5}
    ),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_multiplier_that_looks_like_a_learning_rate_warns(make):
    message = (
        r"lr: got 5e-05, the multiplier of all learning rates, which leaves 5e-09 to 5e-05 of \("
    )
    with pytest.warns(UserWarning, match=message) as record:
        make()
    assert [w.filename for w in record] == [__file__]


def test_no_other_multiplier_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lr in (0.0, 0.1, 1.0):
            AlraoSGD(layer(), (1e-4, 1.0), lr=lr)
        # One rate, or rates that are as large with it.
        AlraoSGD(layer(), lr=1e-4, sampler=Constant(1.0))
        AlraoSGD([{"params": layer(), "sampler": Constant(1.0)}], lr=1e-3)
        AlraoSGD(layer(), (1e-2, 1e4), lr=1e-3)
        AlraoSGD([{"params": layer(), "lr_range": (1.0, 1e3)}], lr=1e-3)
        AlraoSGD([{"params": layer(), "lr": 1.0}], lr=1e-3)


def test_group_options():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    optimizer = AlraoSGD(
        [
            {"params": model[0], "sampler": Constant(0.5)},
            {"params": model[1], "lr_range": (3.0, 4.0), "lr": 0.1},
            {"params": model[2].weight},
        ],
        (1e-3, 1e-2),
        model=model,
    )
    rates = [optimizer.state[layer.weight]["rate"] for layer in model]
    assert rates[0].tolist() == [0.5] * 3
    assert bool(((rates[1] >= 3) & (rates[1] <= 4)).all())
    assert bool(((rates[2] >= 1e-3) & (rates[2] <= 1e-2)).all())
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1, 1.0]
    assert "sampler" not in optimizer.param_groups[0]
    # The bias comes later and shares its weight's rates.
    optimizer.add_param_group({"params": [model[2].bias], "momentum": 0.5})
    assert optimizer.state[model[2].bias]["rate"] is rates[2]
    assert optimizer.param_groups[-1]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": "model"}, ValueError, "more than one parameter group"),
        ({"params": "new", "momentum": -1.0}, ValueError, "momentum: got -1.0, expected"),
        ({"params": "new", "lr_range": (1, 0)}, ValueError, "expected 0 < lo <= hi"),
        ({"params": "new", "sampler": lambda n, g: torch.ones(1)}, ValueError, "returned"),
        ({"params": "new", "sampler": 3}, TypeError, "sampler: got 3, expected"),
        ({"params": {1, 2}}, TypeError, "expected an ordered collection"),
        ({"params": [3]}, TypeError, "can only optimize Tensors"),
        ({}, KeyError, "params"),
        ([], TypeError, "param_group: got a list, expected a dict"),
    ],
)
def test_group_that_cannot_be_added(group, error, message):
    model, new = nn.Linear(2, 3), nn.Linear(4, 5)
    optimizer = AlraoSGD(model)
    if isinstance(group, dict) and "params" in group:
        chosen = {"model": model, "new": new}
        params = group["params"]
        group = {
            **group,
            "params": chosen.get(params, params) if isinstance(params, str) else params,
        }
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1 and set(optimizer.state) == set(model.parameters())
    assert optimizer.layout_of(model.weight).vector.length == 3
    optimizer.add_param_group({"params": new})
    assert optimizer.state[new.weight]["rate"] is optimizer.state[new.bias]["rate"]


def test_clones(backend, device):
    model = AlraoModel(nn.Linear(3, 4), ClassifierClones(4, 2, num_clones=5)).to(device)
    optimizer = AlraoSGD(model, (1e-4, 1.0), momentum=0.5, momentum_rule="authors")
    expected = LogUniform(1e-4, 1.0).clone_rates(5)
    for p in (model.head.weight, model.head.bias):
        assert torch.equal(optimizer.state[p]["rate"].cpu(), expected)
    assert torch.equal(model.head.clone_lr.cpu(), expected)
    assert [g["momentum_rule"] for g in optimizer.param_groups] == ["authors", "torch"]
    assert optimizer.param_groups[1]["params"] == [model.head.weight, model.head.bias]
    model.head.weight.data.zero_()
    model.head.weight.grad = torch.full_like(model.head.weight, -1.0)
    optimizer.step()
    assert torch.equal(
        model.head.weight.detach().cpu(), expected.view(5, 1, 1).expand(model.head.weight.shape)
    )
    # PerWeight and other samplers leave the clones one rate each.
    for sampler, rates in (
        (PerWeight(1e-4, 1.0), expected),
        (Fraction(0.5, 0.1), torch.full((5,), 0.1)),
        (lambda n, g: torch.ones(n), expected),
    ):
        AlraoSGD(model, (1e-4, 1.0), sampler=sampler)
        assert torch.equal(model.head.clone_lr.cpu(), rates)


def test_only_clones_under_the_authors_rule():
    model = AlraoModel(nn.Linear(3, 4), ClassifierClones(4, 2))
    groups = [{"params": model.head}, {"params": model.backbone}]
    optimizer = AlraoSGD(groups, momentum=0.9, momentum_rule="authors")
    assert [g["momentum_rule"] for g in optimizer.param_groups] == ["torch", "authors"]


def test_frozen_parameters(backend, device):
    model = net(device)
    model[0].requires_grad_(False)
    optimizer = AlraoSGD(model, generator=generator(), momentum=0.9)
    before = model[0].weight.detach().clone()
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert optimizer.state[model[0].weight]["rate"].shape == (4,)
    assert int(optimizer.state[model[4].weight]["step"]) == 3
    model[0].requires_grad_(True)
    backward(model)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert int(optimizer.state[model[0].weight]["step"]) == 1
    assert int(optimizer.state[model[4].weight]["step"]) == 4


def test_gradients_that_come_and_go(backend, device):
    """Against a run in which each parameter has an optimizer of its own."""

    def run(groups_of):
        model = net(device)
        optimizers = [
            AlraoSGD(params, model=model, momentum=0.9, sampler=Constant(0.1))
            for params in groups_of(model)
        ]
        for step in range(8):
            backward(model, step)
            for k, p in enumerate(model.parameters()):
                # As many gradients in steps 2 and 3, but not the same ones.
                if step and (k + step) % 3 == 0:
                    p.grad = None
            for optimizer in optimizers:
                optimizer.step()
        return model

    assert_same(run(lambda m: [list(m.parameters())]), run(lambda m: [[p] for p in m.parameters()]))


def test_no_gradient_at_all():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AlraoSGD(model, momentum=0.9)
    optimizer.step()
    assert int(optimizer.state[model[0].weight]["step"]) == 0
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before))


def test_empty_and_scalar_parameters(backend, device):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar = nn.Parameter(torch.zeros(()))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.linear = nn.Linear(0, 2)

    model = Odd().to(device)
    optimizer = AlraoSGD(model, momentum=0.9, sampler=Constant(0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(model.scalar.detach()) == -0.5


def test_describe_rates(capsys):
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    model = AlraoModel(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), Extra()), ClassifierClones(3, 2, 4)
    )
    model.backbone[0].requires_grad_(False)
    rows = describe_rates(model, details=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) + 2 == 7
    assert [r.parameter for r in rows] == [n for n, _ in model.named_parameters()]
    conv, bias, extra, clones, _ = rows
    assert (conv.rule, conv.features, conv.inner, conv.trainable) == ("built-in", 3, 8, False)
    assert conv.vector == bias.vector and bias.inner == 1
    assert (extra.rule, extra.shape, extra.features) == ("default", (), 1)
    assert (clones.kind, clones.features, clones.inner) == ("clone", 4, 6)
    assert conv.lr_min is None and conv.group is None
    rows = describe_rates(AlraoSGD(model, (1e-3, 1.0), sampler=PerWeight(1e-3, 1.0)))
    assert rows[0].kind == "weight" and rows[0].features == 24
    assert rows[3].lr_min == pytest.approx(1e-3) and rows[3].lr_max == 1.0
    assert rows[0].group == 0
    with pytest.raises(
        TypeError, match=r"expected a torch\.nn\.Module, AlraoSGD, AlraoAdam or AlraoMuon"
    ):
        describe_rates(3)
