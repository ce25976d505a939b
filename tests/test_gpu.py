"""What this file protects, for every backend of each device: a training step never waits for the device, stays on its
stream and its device, and within the memory budget. What only a GPU can show runs on the CPU too, where it holds
trivially: so the tests themselves are tried everywhere."""

import contextlib

import pytest
import test_gpu_large as large
import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import backends

OP = "switch_mixture"


@pytest.fixture(autouse=True)
def nondeterministic():
    """Some of torch's own operations have no deterministic version on a GPU."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def chosen(backend):
    if backend == "triton" and backends.INTERPRETED:
        pytest.skip("Triton's kernels are interpreted in this process")
    with backends.use_backend(backend):
        yield


def train(device, steps, optimizer=alrao.AlraoSGD, before=lambda: None, **options):
    """Losses, parameters and posterior after some steps of a small convolutional network, and the net."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16)
    )
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(16, 5, 3)).to(device)
    opt = optimizer(net, (1e-3, 1.0), generator=torch.Generator().manual_seed(1), **options)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        y = torch.randint(5, (8,), generator=generator)
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        before()
        x, y = (t.to(device, non_blocking=True) for t in (x, y))
        opt.zero_grad()
        loss = net(x, targets=y)
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in net.parameters()), net.posterior()]


@contextlib.contextmanager
def waiting_is_an_error(device):
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (alrao.AlraoSGD, {}),
        (alrao.AlraoSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        (alrao.AlraoAdam, {}),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_a_step_never_waits_for_the_device(device, optimizer, options):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(16, 5, 3)).to(device)
    opt = optimizer(net, (1e-3, 1.0), **options)
    x = torch.randn(8, 6, device=device)
    y = torch.randint(5, (8,), device=device)

    def step():
        opt.zero_grad()
        net(x, targets=y).backward()
        opt.step()

    # Tables are made and kernels compiled at the first step.
    step()
    with waiting_is_an_error(device):
        for _ in range(3):
            step()
        net.eval()(x)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("optimizer", [alrao.AlraoSGD, alrao.AlraoAdam, alrao.AlraoMuon])
def test_a_step_stays_on_its_stream(device, optimizer):
    expected = train(device, 4, optimizer)
    side = torch.cuda.Stream() if device.type == "cuda" else None

    def late():
        # The batch arrives long after the launches: whoever runs on another stream reads what was there before.
        if side is not None:
            torch.cuda._sleep(20_000_000)

    if side is not None:
        torch.cuda.synchronize()
    with torch.cuda.stream(side):
        actual = train(device, 4, optimizer, late)
    if side is not None:
        side.synchronize()
    for got, want in zip(actual, expected, strict=True):
        # Convolutions may add in another order.
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_step_on_a_device_that_is_not_the_current_one(device):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1) if device.type == "cuda" else device
    for got, want in zip(train(other, 3), train(device, 3), strict=True):
        assert got.device == other
        torch.testing.assert_close(got.to(device), want, rtol=1e-3, atol=1e-4)


def test_the_head_stays_within_its_memory_budget(device):
    batch, features, classes, clones = 2048, 64, 8192, 6
    budget = 16 << 20
    if device.type != "cuda":
        batch, classes, budget = 32, 64, 1 << 12
    if backends.select(OP, device) == "reference":
        pytest.skip("the reference holds all logits")
    head = alrao.ClassifierClones(features, classes, clones, memory_budget=budget).to(device)
    x = torch.randn(batch, features, device=device, requires_grad=True)
    y = torch.randint(classes, (batch,), device=device)

    def run():
        head(x, y).backward()

    # Brings libraries' workspaces and the gradients, which are outputs.
    run()
    if device.type != "cuda":
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    extra = torch.cuda.max_memory_allocated() - before
    # Beside the chunk of logits: new gradients, accumulated into the old ones, and their float32 sums.
    outputs = 4 * (clones * classes * (features + 1) + batch * features)
    assert extra <= 3 * budget + 3 * outputs + (16 << 20)
    assert extra < batch * clones * classes * 4 / 2


@pytest.mark.parametrize("check", large.CHECKS)
def test_the_checks_of_large_tensors_on_small_ones(device, check):
    large.CHECKS[check](device, small=True)
