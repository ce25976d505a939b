"""What changes behind AlraoSGD's back is noticed, on every backend: memory, strides, dtype, shape, cleared state, and
another backend in the middle of training.
"""

from __future__ import annotations

import pytest
import torch
from sgd_harness import backward, generator, net
from torch import nn

from alrao_fast import backends
from alrao_fast.optim import (
    AlraoSGD,
    PerWeight,
)

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
        lambda m: setattr(m[4].weight, "data", m[4].weight.data.t().contiguous().t()),
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict(
            {k: v.clone() for k, v in m.state_dict().items()}, assign=False
        ),
    ],
    ids=["channels_last", "new memory", "transposed", "loaded", "loaded again"],
)
@pytest.mark.parametrize("sampler", [None, PerWeight(1e-5, 10.0)])
def test_moved_parameters(backend, device, change, sampler):
    still, moved = net(device), net(device)
    optimizers = [
        AlraoSGD(m, momentum=0.9, generator=generator(), sampler=sampler) for m in (still, moved)
    ]
    for step in range(6):
        for model, optimizer in zip((still, moved), optimizers):
            backward(model, step)
            optimizer.step()
        if step in (1, 3):
            change(moved)
    for p, q in zip(still.parameters(), moved.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_changed_dtype(backend, device):
    """Half of the parameters become float64 in the middle: two buckets from then on."""
    still, moved = net(device), net(device)
    optimizers = [AlraoSGD(m, momentum=0.9, generator=generator()) for m in (still, moved)]
    for step in range(5):
        grads = [torch.randn_like(p) for p in still.parameters()]
        for model, optimizer in zip((still, moved), optimizers):
            for p, g in zip(model.parameters(), grads):
                p.grad = g.to(p)
            optimizer.step()
        if step == 1:
            moved.zero_grad()
            moved[4].double()
            moved[0].weight.data = moved[0].weight.data.clone()
        if step == 3:
            moved.zero_grad()
            moved.double()
    for p, q in zip(still.parameters(), moved.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert all(int(optimizers[1].state[p]["step"]) == 5 for p in moved.parameters())


def test_changed_shape():
    model = nn.Linear(3, 4)
    optimizer = AlraoSGD(model, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.weight.grad = None
    model.weight.data = torch.zeros(5, 3)
    model.weight.grad = torch.ones(5, 3)
    with pytest.raises(RuntimeError, match=r"'weight' has shape .5, 3., which its learning rates"):
        optimizer.step()


def test_cleared_state():
    model = net()
    optimizer = AlraoSGD(model, momentum=0.9)
    rate = optimizer.state[model[0].weight]["rate"].clone()
    backward(model)
    optimizer.step()
    optimizer.state.clear()
    backward(model)
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["rate"], rate) and int(state["step"]) == 1


def test_backend_changes_in_the_middle():
    one, two = net(), net()
    optimizers = [AlraoSGD(m, momentum=0.9, generator=generator()) for m in (one, two)]
    optimizers.append(AlraoSGD(net(), momentum=0.9, generator=generator(), fused=False))
    for step in range(4):
        backward(one, step)
        optimizers[0].step()
        backward(two, step)
        with backends.use_backend("reference" if step % 2 else "auto"):
            optimizers[1].step()
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
