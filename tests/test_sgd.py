"""The numbers of AlraoSGD. Protects, on every backend:

- with all rates equal it follows torch.optim.SGD for 50 steps (momentum, dampening, nesterov, weight decay, maximize);
- every entry moves by its own feature's rate, for random module trees; the gradient is never edited;
- bfloat16: stochastic rounding moves what nearest does not, master weights follow float32 and outside writes.

Beside this file: test_sgd_params.py, _step.py, _changes.py and _refusals.py.
"""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from layout_harness import trees
from sgd_harness import RATE, backward, generator, net, params_of
from torch import nn

from alrao_fast.optim import (
    AlraoSGD,
    Constant,
    PerWeight,
    describe_rates,
)

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")

OPTIONS = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": w, "maximize": x}
    for m, d, n, w, x in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True)
    )
    if not (n and (m == 0 or d)) and not (d and not m)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{v}" for v in o.values()))
def test_follows_torch(backend, device, options):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        ours, theirs = net(device, dtype), net(device, dtype)
        optimizer = AlraoSGD(ours, sampler=Constant(RATE), **options)
        reference = torch.optim.SGD(theirs.parameters(), lr=RATE, foreach=False, **options)
        # The plain reference is held to torch over fewer steps: it is slow.
        for _ in range(6 if backend == "reference" else 50):
            for p, q in zip(ours.parameters(), theirs.parameters()):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            optimizer.step()
            reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_by_hand(backend, device):
    linear = nn.Linear(2, 2).to(device)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([5.0, 6.0]))
    optimizer = AlraoSGD(linear, sampler=lambda n, g: torch.tensor([0.5, 0.25]), lr=2.0)
    for p in linear.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert linear.weight.tolist() == [[0.0, 1.0], [2.5, 3.5]]
    assert linear.bias.tolist() == [4.0, 5.5]
    assert all(bool((p.grad == 1).all()) for p in linear.parameters())


def test_authors_momentum_by_hand(device="cpu"):
    param = nn.Parameter(torch.tensor([1.0, 1.0]))
    module = nn.Module()
    module.p = param
    optimizer = AlraoSGD(
        module,
        sampler=lambda n, g: torch.tensor([0.25, 4.0]),
        momentum=0.8,
        momentum_rule="authors",
    )
    for _ in range(2):
        param.grad = torch.tensor([1.0, 1.0])
        optimizer.step()
    # buf: 1, then 1 - 0.8 min(sqrt(r), 1 / 0.8) + 1 = 1.6 for r = 0.25 and 1.0 for r = 4.
    torch.testing.assert_close(param.detach(), torch.tensor([1 - 0.25 * 2.6, 1 - 4.0 * 2.0]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_every_entry_moves_by_its_rate(model):
    if not list(model.parameters()):
        return
    optimizer = AlraoSGD(model, generator=generator())
    rows = {row.parameter: row for row in describe_rates(optimizer, file=io.StringIO())}
    assert len(rows) == len(list(model.parameters()))
    before = params_of(model)
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    moved = {}
    for p, old in zip(model.parameters(), before):
        layout = optimizer.layout_of(p)
        rate = optimizer.state[p]["rate"]
        # From zero, with the gradient -1, an entry becomes its rate.
        assert set(p.detach().flatten().tolist()) == set(rate.tolist())
        assert p.shape == old.shape
        moved.setdefault(layout.vector.name, set()).update(p.detach().flatten().tolist())
        if len(layout.dims) == 1 and layout.feature_of is None:
            d = layout.dims[0]
            expected = rate.repeat(p.size(d) // rate.numel())
            shape = [-1 if k == d else 1 for k in range(p.dim())]
            assert torch.equal(p.detach(), expected.view(shape).expand(p.shape))
    for name, values in moved.items():
        row = next(r for r in rows.values() if r.vector == name)
        assert len(values) <= row.features


def test_per_weight():
    conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    optimizer = AlraoSGD(conv, sampler=PerWeight(1e-3, 1.0), generator=generator())
    expected = PerWeight(1e-3, 1.0)
    g = generator()
    for p in conv.parameters():
        p.data.zero_()
        p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    # Drawn in row-major order, whatever the order in memory.
    for p in conv.parameters():
        assert torch.equal(p.detach(), expected(p.numel(), g).view(p.shape))
    conv.to(memory_format=torch.contiguous_format)
    for p in conv.parameters():
        p.grad = torch.full_like(p, 1.0)
    optimizer.step()
    for p in conv.parameters():
        assert torch.equal(p.detach(), torch.zeros_like(p))


def test_bfloat16_rounding(backend, device):
    """A rate of 1e-5 on a weight of 1: nearest never moves, stochastic moves on average by the exact update."""
    n, steps, update = 4096, 20, 1e-4

    def run(**options):
        module = nn.Linear(n, 1, bias=False, device=device, dtype=torch.bfloat16)
        nn.init.ones_(module.weight)
        optimizer = AlraoSGD(module, sampler=Constant(update), generator=generator(), **options)
        for _ in range(steps):
            module.weight.grad = torch.ones_like(module.weight)
            optimizer.step()
        return module.weight.detach().float()

    assert bool((run(rounding="nearest") == 1).all())
    mean = float(1 - run().double().mean())
    # One bfloat16 step below 1 is 2^-8: a sum of independent roundings, 5 standard deviations.
    deviation = math.sqrt(steps * update * 2**-8 / n)
    assert abs(mean - steps * update) < 5 * deviation
    exact = torch.tensor(1 - steps * update).bfloat16().float()
    assert torch.equal(run(master_weights=True), torch.full((1, n), float(exact), device=device))
    assert torch.equal(run(), run(rounding="stochastic"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights(backend, device, dtype):
    # All but the first pass autograd's version counter by.
    writes = {
        0: lambda p: p[:1].fill_(0.25),
        1: lambda p: p.data.clamp_(-0.1, 0.1),
        2: lambda p: p.data[:2].mul_(1.5),
        3: lambda p: p.data.copy_(torch.ones_like(p)),
    }
    half, full = net(device, dtype), net(device, dtype).float()
    ours = AlraoSGD(half, master_weights=True, momentum=0.9, sampler=Constant(0.01))
    other = AlraoSGD(full, momentum=0.9, sampler=Constant(0.01))
    for step in range(5):
        backward(half, step)
        for p, q in zip(half.parameters(), full.parameters()):
            q.grad = p.grad.float()
        ours.step()
        other.step()
        # Written by the user: the masters take these entries and keep the others' low bits.
        with torch.no_grad():
            written = writes.get(step, lambda p: None)
            for p, q in zip(half.parameters(), full.parameters()):
                before = p.clone()
                written(p)
                q.copy_(torch.where(p == before, q, p.float()))
    for p, q in zip(half.parameters(), full.parameters()):
        state = ours.state[p]
        assert state["master"].dtype == state["momentum_buffer"].dtype == torch.float32
        torch.testing.assert_close(state["master"], q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p.detach(), state["master"].to(dtype))
