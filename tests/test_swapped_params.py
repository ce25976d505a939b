"""Protects training on where modules are converted by swapping their parameters
(`torch.__future__.set_swap_module_params_on_conversion`): torch refuses a parameter on which C++ has a handle.
"""

import pytest
import torch
from checkpoint_harness import build, generator, train
from torch import nn

from alrao_fast.optim import AlraoAdam, AlraoMuon, AlraoSGD


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", [AlraoSGD, AlraoAdam, AlraoMuon])
def test_parameters_that_are_swapped(kind, swapping):
    """`net.double()` after a step, with the module's parameters swapped: the numbers of training without it."""
    model, plain = build(), build()
    trained = [(m, kind(m, (1e-5, 0.1), generator=generator(0))) for m in (model, plain)]
    torch.__future__.set_swap_module_params_on_conversion(False)
    train(*trained[1], range(2))
    plain.double().float()
    train(*trained[1], range(2, 4))
    # A plan from before, and a group's that has no gradient any more, must not stay in the way.
    train(*trained[0], range(1))
    torch.__future__.set_swap_module_params_on_conversion(True)
    train(*trained[0], range(1, 2))
    before = next(model.parameters())
    model.double()
    assert next(model.parameters()) is before and before.dtype == torch.float64
    model.float()
    train(*trained[0], range(2, 4))
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


def test_a_plan_is_let_go_where_parameters_are_swapped(swapping):
    torch.__future__.set_swap_module_params_on_conversion(False)
    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    optimizer = AlraoSGD([{"params": first}, {"params": second}])
    for params in (optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"]):
        for param in params:
            param.grad = torch.ones_like(param)
    optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    second.zero_grad()
    optimizer.step()
    # The second group had no gradient in this step, its plan must be gone all the same.
    nn.ModuleList([first, second]).double()
    assert first.weight.dtype == second.weight.dtype == torch.float64
