"""AlraoSGD. Protects, on every backend:

- with all rates equal it follows torch.optim.SGD for 50 steps (momentum, dampening, nesterov, weight decay, maximize);
- every entry moves by its own feature's rate, for random module trees; the gradient is never edited;
- params: a model, modules, tensors, named tensors, groups; shared vectors across groups; clone rates and `clone_lr`;
- lr as multiplier (float, tensor, schedulers), closures, hooks, the profiler's range, GradScaler, torch.compile;
- what changes behind its back is noticed: memory, strides, dtype, gradients that come and go, cleared state;
- bfloat16: stochastic rounding moves what nearest does not, master weights follow float32 and outside writes;
- invalid options, sparse gradients, lazy and non-dense parameters: the message, and nothing changed.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_layouts import trees
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from alrao_fast import backends
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
RATE = float(torch.tensor(0.01))


@pytest.fixture(autouse=True)
def _backend(request):
    """Tests that take `backend` run on it, the others on the best one."""
    if "backend" not in request.fixturenames:
        yield
        return
    with backends.use_backend(request.getfixturevalue("backend")):
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(device="cpu", dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return model.to(device=device, dtype=dtype)


def backward(model: nn.Module, step: int = 0) -> None:
    """A loss with gradients that differ from step to step."""
    param = next(model.parameters())
    torch.manual_seed(100 + step)
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64).to(param)
    model.zero_grad()
    (model(x) * torch.randn(8, 3, dtype=torch.float64).to(param)).float().mean().backward()


def params_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


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


# What `params` may be.


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
        ({"params": "new", "momentum": -1.0}, ValueError, "momentum is -1.0; expected"),
        ({"params": "new", "lr_range": (1, 0)}, ValueError, "expected 0 < lo <= hi"),
        ({"params": "new", "sampler": lambda n, g: torch.ones(1)}, ValueError, "returned"),
        ({"params": "new", "sampler": 3}, TypeError, "sampler is 3; expected"),
        ({"params": {1, 2}}, TypeError, "expected an ordered collection"),
        ({"params": [3]}, TypeError, "can only optimize Tensors"),
        ({}, KeyError, "params"),
        ([], TypeError, "param_group is a list; expected a dict"),
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
    optimizer = AlraoSGD(model, momentum=0.9)
    optimizer.step()
    assert "step" not in optimizer.state[model[0].weight]


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


# The step.


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


def test_grad_scaler(backend, device):
    plain, scaled = net(device), net(device)
    ours = AlraoSGD(plain, momentum=0.9, generator=generator())
    other = AlraoSGD(scaled, momentum=0.9, generator=generator())
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


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"lr": torch.tensor(0.5)}])
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


# What changes behind the optimizer's back.


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


def test_parameter_put_in_by_hand():
    model = net()
    optimizer = AlraoSGD(model)
    new = nn.Parameter(torch.zeros(3))
    new.grad = torch.ones(3)
    optimizer.param_groups[0]["params"] = [new]
    with pytest.raises(RuntimeError, match="without a learning rate: use add_param_group"):
        optimizer.step()


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


# Low precision.


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
    half, full = net(device, dtype), net(device, dtype).float()
    ours = AlraoSGD(half, master_weights=True, momentum=0.9, sampler=Constant(0.01))
    other = AlraoSGD(full, momentum=0.9, sampler=Constant(0.01))
    for step in range(5):
        backward(half, step)
        for p, q in zip(half.parameters(), full.parameters()):
            q.grad = p.grad.float()
        ours.step()
        other.step()
        if step == 2:
            # Written by the user: the master takes the entry and keeps the others' low bits.
            for model in (half, full):
                model[4].weight.data[0, 0] = 0.5
                with torch.no_grad():
                    model[4].weight[1, 1] = 0.25
    for p, q in zip(half.parameters(), full.parameters()):
        state = ours.state[p]
        assert state["master"].dtype == state["momentum_buffer"].dtype == torch.float32
        torch.testing.assert_close(state["master"], q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p.detach(), state["master"].to(dtype))


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; expected a multiplier >= 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \[2\]"),
        ({"lr_range": (0.0, 1.0)}, r"lr_range is \(0.0, 1.0\); expected 0 < lo <= hi"),
        ({"momentum": -0.1}, "momentum is -0.1; expected a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"nesterov": True}, "nesterov is True with momentum=0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "no dampening"),
        ({"momentum_rule": "mine"}, "momentum_rule is 'mine'; expected 'torch' or 'authors'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"rounding": "stochastic", "master_weights": True}, "expected one of the two"),
        ({"foreach": True}, "foreach is True; expected None or False"),
        ({"differentiable": True}, "differentiable is True; expected False"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        AlraoSGD(nn.Linear(2, 3), **options)


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ([], {}, ValueError, "params is empty"),
        (torch.zeros(2), {}, TypeError, "params is a tensor"),
        ([3], {}, TypeError, "can only optimize Tensors"),
        (nn.Linear(2, 3), {"sampler": 1.0}, TypeError, "sampler is 1.0; expected LogUniform"),
        (nn.Linear(2, 3), {"model": 1}, TypeError, "model is a int; expected a torch.nn.Module"),
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
    with pytest.raises(ValueError, match="generator is on meta; expected a CPU generator"):
        AlraoSGD(nn.Linear(2, 3), generator=SimpleNamespace(device=torch.device("meta")))


# describe_rates.


def test_describe_rates(capsys):
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    model = AlraoModel(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), Extra()), ClassifierClones(3, 2, 4)
    )
    model.backbone[0].requires_grad_(False)
    rows = describe_rates(model)
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
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, AlraoSGD or AlraoAdam"):
        describe_rates(3)


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
