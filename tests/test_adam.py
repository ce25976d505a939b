"""AlraoAdam. Protects, on every backend:

- with all rates equal it follows torch.optim.Adam and AdamW for 50 steps (betas, eps, weight decay, amsgrad, maximize);
- every entry moves by its own feature's rate; a first step computed by hand; the authors' eps rule, not for clones;
- the moments of bfloat16 parameters are float32 and come down again; master weights follow float32;
- GradScaler, torch.compile, parameters moved in memory, amsgrad switched on later;
- invalid options: the message.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.optim import AlraoAdam, Constant

OP = "feature_adam"
pytestmark = pytest.mark.usefixtures("used_backend")
RATE = float(torch.tensor(0.01))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(device="cpu", dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    return model.to(device=device, dtype=dtype)


def give_gradients(*models: nn.Module, step: int = 0, scale: float = 1.0) -> None:
    """The same random gradients for each model."""
    for k, params in enumerate(zip(*(m.parameters() for m in models))):
        torch.manual_seed(1000 * step + k)
        grad = torch.randn(params[0].shape, dtype=torch.float64) * scale
        for p in params:
            p.grad = grad.to(p)


OPTIONS = [
    {"betas": b, "eps": e, "weight_decay": w, "amsgrad": a, "maximize": m}
    for (b, e), w, a, m in itertools.product(
        (((0.9, 0.999), 1e-8), ((0.5, 0.8), 1e-3)), (0.0, 0.1), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{v}" for v in o.values()))
def test_follows_torch(backend, device, options, decoupled):
    theirs_type = torch.optim.AdamW if decoupled else torch.optim.Adam
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        ours, theirs = net(device, dtype), net(device, dtype)
        optimizer = AlraoAdam(
            ours, sampler=Constant(RATE), decoupled_weight_decay=decoupled, **options
        )
        reference = theirs_type(theirs.parameters(), lr=RATE, foreach=False, **options)
        # The plain reference is held to torch over fewer steps: it is slow.
        for step in range(6 if backend == "reference" else 50):
            give_gradients(ours, theirs, step=step)
            optimizer.step()
            reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_by_hand(backend, device):
    linear = nn.Linear(2, 2).to(device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    rates = torch.tensor([0.5, 0.25])
    optimizer = AlraoAdam(linear, sampler=lambda n, g: rates, lr=2.0)
    linear.weight.grad = torch.tensor([[3.0, -7.0], [1e-3, 50.0]], device=device)
    linear.bias.grad = torch.tensor([-1.0, 2.0], device=device)
    optimizer.step()
    # The first step of Adam is lr * rate * sign(gradient), whatever its size.
    expected = torch.tensor([[-1.0, 1.0], [-0.5, -0.5]])
    torch.testing.assert_close(linear.weight.detach().cpu(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(linear.bias.detach().cpu(), torch.tensor([1.0, -0.5]))


def test_every_entry_moves_by_its_rate(backend, device):
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.LSTM(2, 3), nn.Embedding(4, 5), nn.LayerNorm(3)
    ).to(device)
    model.to(memory_format=torch.channels_last)
    optimizer = AlraoAdam(model, generator=generator(), eps=0.0)
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.full_like(p, -3.0)
    optimizer.step()
    for p in model.parameters():
        rate = optimizer.state[p]["rate"]
        for value in p.detach().unique():
            assert float((rate / value - 1).abs().min()) < 1e-5
        assert p.detach().unique().numel() <= rate.unique().numel()
    lstm = model[1]
    by_unit = lstm.weight_hh_l0.detach().view(4, 3, 3)
    for unit in range(3):
        assert by_unit[:, unit].unique().numel() == 1


@pytest.mark.parametrize("rule", ["torch", "authors"])
def test_eps_rule(backend, device, rule):
    eps, rate, grad = 0.1, 0.5, 2.0
    model = AlraoModel(nn.Linear(1, 1, bias=False), ClassifierClones(1, 2, 2)).to(device)
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.full_like(p, grad)
    optimizer = AlraoAdam(model, sampler=Constant(rate), eps=eps, eps_rule=rule)
    optimizer.step()
    torchs = -rate * grad / (grad + eps)
    second = math.sqrt(1 - 0.999)
    authors = -rate * second / (1 - 0.9) * (0.1 * grad) / (second * grad + eps)
    # The pre-classifier follows the rule, the clones always torch's.
    backbone, head = model.backbone.weight.item(), model.head.weight.flatten()[0].item()
    assert backbone == pytest.approx(torchs if rule == "torch" else authors, rel=1e-4)
    assert head == pytest.approx(torchs, rel=1e-4)
    rules = [group["eps_rule"] for group in optimizer.param_groups]
    assert rules == (["torch"] if rule == "torch" else ["authors", "torch"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_low_precision(backend, device, dtype, amsgrad):
    half, full = net(device, dtype), net(device, dtype).float()
    ours = AlraoAdam(half, master_weights=True, sampler=Constant(0.01), amsgrad=amsgrad)
    other = AlraoAdam(full, sampler=Constant(0.01), amsgrad=amsgrad)
    stochastic = AlraoAdam(net(device, dtype), generator=generator())
    for step in range(5):
        give_gradients(half, step=step)
        for p, q in zip(half.parameters(), full.parameters()):
            q.grad = p.grad.float()
        ours.step()
        other.step()
        if step == 2:
            # Past autograd's version counter: the masters take these entries all the same.
            for p, q in zip(half.parameters(), full.parameters()):
                p.data[:1] = q.data[:1] = 0.5
        for group in stochastic.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        stochastic.step()
    for p, q in zip(half.parameters(), full.parameters()):
        torch.testing.assert_close(ours.state[p]["master"], q.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(p.detach(), ours.state[p]["master"].to(dtype))
    for state in stochastic.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_second_moment_comes_down(backend, device):
    """In bfloat16, 0.999 v rounds back to v: the second moment would stay at its highest value for ever."""
    linear = nn.Linear(4, 4, device=device, dtype=torch.bfloat16)
    optimizer = AlraoAdam(linear, sampler=Constant(0.0))
    for step in range(200):
        for p in linear.parameters():
            p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        optimizer.step()
    moment = optimizer.state[linear.weight]["exp_avg_sq"]
    torch.testing.assert_close(
        moment, torch.full_like(moment, 1e-3 * 0.999**199), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(backend, device, fused):
    plain, scaled = net(device), net(device)
    ours = AlraoAdam(plain, generator=generator())
    other = AlraoAdam(scaled, generator=generator(), fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000)
    for step in range(5):
        give_gradients(plain, step=step)
        give_gradients(scaled, step=step, scale=scaler.get_scale())
        scaler.scale(torch.zeros((), device=device))
        if step == 2:
            scaled[2].bias.grad[0] = math.nan
        else:
            ours.step()
        scaler.step(other)
        scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters()):
        assert torch.equal(p, q)
    assert int(other.state[scaled[0].weight]["step"]) == 4


def test_moved_parameters_and_amsgrad_later(backend, device):
    still, moved = net(device), net(device)
    optimizers = [AlraoAdam(m, generator=generator()) for m in (still, moved)]
    for step in range(6):
        give_gradients(still, moved, step=step)
        for optimizer in optimizers:
            optimizer.param_groups[0]["amsgrad"] = step >= 3
            optimizer.step()
        if step == 1:
            moved.to(memory_format=torch.channels_last)
        if step == 4:
            for p in moved.parameters():
                p.data = p.data.clone()
    for p, q in zip(still.parameters(), moved.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert "max_exp_avg_sq" in optimizers[0].state[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_step(dtype):
    torch._dynamo.reset()
    eager, compiled = net(dtype=dtype), net(dtype=dtype)
    ours = AlraoAdam(eager, generator=generator(), amsgrad=True)
    other = AlraoAdam(compiled, generator=generator(), amsgrad=True)
    step_of_other = torch.compile(other.step, backend="eager", fullgraph=True)
    for step in range(3):
        give_gradients(eager, compiled, step=step)
        ours.step()
        (step_of_other if step else other.step)()
    for p, q in zip(eager.parameters(), compiled.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: got 1.0, expected a finite number >= 0 and < 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]: got -0.1"),
        ({"betas": 0.9}, "betas: got 0.9, expected a tuple of 2"),
        ({"eps": -1.0}, "eps: got -1.0, expected a finite number >= 0"),
        ({"eps_rule": "mine"}, "eps_rule: got 'mine', expected 'torch' or 'authors'"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"foreach": True}, "foreach: got True"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        AlraoAdam(nn.Linear(2, 3), **options)


def test_sparse_gradients():
    model = nn.EmbeddingBag(5, 3, sparse=True, mode="sum")
    optimizer = AlraoAdam(model)
    model(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
