"""What AlraoSGD refuses: invalid options, sparse gradients, lazy and non-dense parameters; the message, and nothing
changed. And where the rates come from: the generator.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sgd_harness import generator
from torch import nn

from alrao_fast.optim import (
    AlraoSGD,
)

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: got -1.0, expected a finite multiplier >= 0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"lr": torch.ones(2)}, r"lr: got a tensor of shape \[2\]"),
        ({"lr_range": (0.0, 1.0)}, r"lr_range\[0\]: got 0.0, expected 0 < lo <= hi"),
        ({"momentum": -0.1}, "momentum: got -0.1, expected a finite number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"nesterov": True}, "nesterov: got True with momentum=0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "no dampening"),
        ({"momentum_rule": "mine"}, "momentum_rule: got 'mine', expected 'torch' or 'authors'"),
        ({"rounding": "up"}, "rounding: got 'up'"),
        ({"rounding": "stochastic", "master_weights": True}, "expected one of the two"),
        ({"foreach": True}, "foreach: got True, expected None or False"),
        ({"differentiable": True}, "differentiable: got True, expected False"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        AlraoSGD(nn.Linear(2, 3), **options)


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ([], {}, ValueError, "params: got none"),
        (torch.zeros(2), {}, TypeError, "params: got a tensor"),
        ([3], {}, TypeError, "can only optimize Tensors"),
        (nn.Linear(2, 3), {"sampler": 1.0}, TypeError, "sampler: got 1.0, expected LogUniform\\("),
        (nn.Linear(2, 3), {"model": 1}, TypeError, "model: got 1, expected a torch.nn.Module"),
        (nn.Linear(2, 3), {"sampler": lambda n, g: -torch.ones(n)}, ValueError, "negative"),
    ],
)
def test_invalid_parameters(params, options, error, message):
    with pytest.raises(error, match=message):
        AlraoSGD(params, **options)


def test_accepted_for_uniformity():
    AlraoSGD(nn.Linear(2, 3), foreach=False, fused=True, capturable=True)


def test_lazy_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(3))
    for params, options in (
        (model, {}),
        (list(model.parameters()), {}),
        (nn.Linear(2, 2), {"model": model}),
    ):
        with pytest.raises(ValueError, match="run one batch through the model first"):
            AlraoSGD(params, **options)


def test_sparse_gradients(backend, device):
    model = nn.Embedding(5, 3, sparse=True, device=device)
    optimizer = AlraoSGD(model)
    before = model.weight.detach().clone()
    model(torch.tensor([1, 2], device=device)).sum().backward()
    message = (
        "'weight' has a gradient of layout torch.sparse_coo: sparse gradients are not supported"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(model.weight, before)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    # After a dense step the update is planned: the message is the same.
    model.weight.grad = None
    model(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_unusable_parameters():
    module = nn.Module()
    module.p = nn.Parameter(torch.zeros(4, 4)[:, :2])
    module.p.grad = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"'p' of shape .4, 2. has strides .4, 1.; expected dense"):
        AlraoSGD(module).step()
    module.p = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    module.p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"'p' has dtype torch.complex64; expected float32"):
        AlraoSGD(module).step()


def test_generator():
    optimizer = AlraoSGD(nn.Linear(2, 3), generator=generator(5))
    again = AlraoSGD(nn.Linear(2, 3), generator=generator(5))
    other = AlraoSGD(nn.Linear(2, 3), generator=generator(6))
    for a, b, c in zip(*(o.state.values() for o in (optimizer, again, other))):
        assert torch.equal(a["rate"], b["rate"]) and not torch.equal(a["rate"], c["rate"])
    seeds = [o.param_groups[0]["rounding_seed"] for o in (optimizer, again, other)]
    assert seeds[0] == seeds[1] != seeds[2]

    class Elsewhere(torch.Generator):
        device = torch.device("meta")

    with pytest.raises(
        ValueError, match=r"generator: got one on meta, expected a torch.Generator on the CPU"
    ):
        AlraoSGD(nn.Linear(2, 3), generator=Elsewhere())
