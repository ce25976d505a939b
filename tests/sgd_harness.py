"""What the tests of AlraoSGD share: a small network, its gradients, and comparisons."""

from __future__ import annotations

import torch
from torch import nn

RATE = float(torch.tensor(0.01))


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
