"""The step of AlraoSGD. Protects, on every backend:

- lr as multiplier (float, tensor, schedulers), momentum switched on later, closures, hooks, the profiler's range;
- GradScaler, version counters, torch.compile, copies.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from sgd_harness import RATE, assert_same, backward, generator, net, params_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from alrao_fast.optim import (
    AlraoSGD,
    Constant,
)

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")


def test_lr_multiplies(backend, device):
    base, scaled, tensor = net(device), net(device), net(device)
    optimizers = [
        AlraoSGD(base, sampler=Constant(0.25)),
        AlraoSGD(scaled, sampler=Constant(0.125), lr=2.0),
        AlraoSGD(tensor, sampler=Constant(0.125), lr=torch.tensor(1.0)),
    ]
    optimizers[2].param_groups[0]["lr"].fill_(2.0)
    for step in range(3):
        for model, optimizer in zip((base, scaled, tensor), optimizers):
            backward(model, step)
            optimizer.step()
    assert_same(base, scaled)
    assert_same(base, tensor)


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_schedulers(lr):
    model, by_hand = net(), net()
    if isinstance(lr, torch.Tensor):
        lr = lr.clone()
    optimizer = AlraoSGD(model, sampler=Constant(0.25), lr=lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    other = AlraoSGD(by_hand, sampler=Constant(0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            backward(model, step)
            optimizer.step()
            scheduler.step()
            backward(by_hand, step)
            other.param_groups[0]["lr"] = 0.5**step
            other.step()
    assert_same(model, by_hand)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        AlraoSGD(model, momentum=0.9), max_lr=1.0, total_steps=5
    )
    backward(model)
    cycle.optimizer.step()
    cycle.step()


def test_momentum_switched_on_later():
    model, theirs = net(), net()
    ours = AlraoSGD(model, sampler=Constant(RATE))
    reference = torch.optim.SGD(theirs.parameters(), lr=RATE)
    for step in range(6):
        for m, optimizer in ((model, ours), (theirs, reference)):
            optimizer.param_groups[0]["momentum"] = 0.9 if step >= 3 else 0.0
            backward(m, step)
            optimizer.step()
    for p, q in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_closure():
    model = net()
    optimizer = AlraoSGD(model)

    def closure():
        assert torch.is_grad_enabled()
        backward(model)
        return torch.tensor(7.0)

    before = params_of(model)
    with torch.no_grad():
        assert float(optimizer.step(closure)) == 7.0
    assert not torch.equal(before[0], model[0].weight)


def test_hooks():
    model = net()
    optimizer = AlraoSGD(model)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post")),
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append("global")),
    ]
    backward(model)
    optimizer.step()
    assert calls == ["global", "pre", "post"]
    assert optimizer.step(lambda: 3) == 3
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 6


def test_profiler_range():
    model = net()
    optimizer = AlraoSGD(model)
    backward(model)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(e.key == "Optimizer.step#AlraoSGD.step" for e in profile.key_averages())


def test_zero_grad():
    model = net()
    optimizer = AlraoSGD(model)
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(backend, device, fused):
    plain, scaled = net(device), net(device)
    ours = AlraoSGD(plain, momentum=0.9, generator=generator())
    other = AlraoSGD(scaled, momentum=0.9, generator=generator(), fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        backward(plain, step)
        backward(scaled, step)
        for p in scaled.parameters():
            p.grad *= scaler.get_scale()
        scaler.scale(torch.zeros((), device=device))
        if step == 2:
            # An overflow: nothing moves, no step is counted, the scale goes down.
            before, scale = params_of(scaled), scaler.get_scale()
            scaled[4].bias.grad[0] = math.inf
            scaler.step(other)
            scaler.update()
            for p, q in zip(scaled.parameters(), before):
                assert torch.equal(p, q)
            assert scaler.get_scale() == scale / 2
            assert int(other.state[scaled[0].weight]["step"]) == 2
            continue
        if step == 4:
            scaler.unscale_(other)
        ours.step()
        scaler.step(other)
        scaler.update()
    assert_same(plain, scaled)
    assert not hasattr(other, "grad_scale")


def test_version_counters(backend, device):
    """A backward through values that the step has overwritten must fail, as with torch's optimizers."""
    linear = nn.Linear(2, 2).to(device)
    optimizer = AlraoSGD(linear, sampler=Constant(0.1))
    for _ in range(2):
        loss = (linear.weight * linear.weight).sum()
        loss.backward(retain_graph=True)
        linear.bias.grad = torch.ones_like(linear.bias)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"lr": torch.tensor(0.5)}, {"master_weights": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_step(backend, device, dtype, options):
    if backend == "reference":
        pytest.skip("plain PyTorch with host reads: nothing of ours to compile")
    torch._dynamo.reset()
    eager, compiled = net(device, dtype), net(device, dtype)
    ours = AlraoSGD(eager, generator=generator(), **options)
    other = AlraoSGD(compiled, generator=generator(), **options)
    step_of_other = torch.compile(other.step, backend="eager", fullgraph=True)
    for step in range(3):
        backward(eager, step)
        ours.step()
        backward(compiled, step)
        (step_of_other if step else other.step)()
    assert_same(eager, compiled)
    assert int(other.state[compiled[0].weight]["step"]) == 3


def test_compiled_from_the_first_step():
    torch._dynamo.reset()
    eager, compiled = net(), net()
    ours = AlraoSGD(eager, momentum=0.9, generator=generator())
    other = AlraoSGD(compiled, momentum=0.9, generator=generator())
    step_of_other = torch.compile(other.step, backend="eager")
    for step in range(3):
        backward(eager, step)
        ours.step()
        backward(compiled, step)
        step_of_other()
        if step == 1:
            for m in (eager, compiled):
                m.to(memory_format=torch.channels_last)
    assert_same(eager, compiled)


@pytest.mark.parametrize("key", ["momentum_buffer", "rate", "the dict"])
def test_states_exchanged_between_compiled_steps(key):
    """What stands in the optimizer is what runs: torch.compile has to notice by its guards."""
    torch._dynamo.reset()
    eager, compiled = net(), net()
    ours = AlraoSGD(eager, momentum=0.9, generator=generator())
    other = AlraoSGD(compiled, momentum=0.9, generator=generator())
    step_of_other = torch.compile(other.step, backend="eager")
    for step in range(6):
        backward(eager, step)
        ours.step()
        backward(compiled, step)
        step_of_other()
        if step in (2, 3):
            for m, optimizer in ((eager, ours), (compiled, other)):
                state = optimizer.state[m[0].weight]
                if key == "the dict":
                    new = torch.ones_like(state["momentum_buffer"])
                    optimizer.state[m[0].weight] = {**state, "momentum_buffer": new}
                else:
                    state[key] = state[key] * 0.5
    assert_same(eager, compiled)


def test_copies():
    model = net()
    optimizer = AlraoSGD(model, momentum=0.9, generator=generator())
    backward(model)
    optimizer.step()
    both = copy.deepcopy((model, optimizer))
    for step in range(2):
        backward(model, step)
        optimizer.step()
        backward(both[0], step)
        both[1].step()
    assert_same(model, both[0])
