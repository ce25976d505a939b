"""Functions that give each parameter a tensor of learning rates or momenta."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rates = Callable[[Tensor], Tensor]


def fdet_lr_log(minLR: float, maxLR: float) -> Rates:
    """Rates from 10^minLR to 10^maxLR, evenly spaced in the logarithm over dim 0."""

    def rates(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return torch.full_like(tensor, 10**minLR)
        count = tensor.size(0)
        spread = 10 ** torch.linspace(minLR, maxLR, count, dtype=torch.float64, device="cpu")
        spread = spread.to(tensor.device, tensor.dtype)
        return spread.view(count, *[1] * (tensor.dim() - 1)).expand_as(tensor).contiguous()

    return rates


def fdet_lr_unif(lr: float) -> Rates:
    """The rate `lr` everywhere."""
    return lambda tensor: torch.full_like(tensor, lr)


def frand_lr_log(minLR: float, maxLR: float) -> Rates:
    """One rate for a whole tensor, log-uniform between 10^minLR and 10^maxLR."""

    def rates(tensor: Tensor) -> Tensor:
        exponent = (
            minLR + (maxLR - minLR) * torch.rand((), dtype=torch.float64, device="cpu").item()
        )
        return torch.full_like(tensor, 10**exponent)

    return rates


def fdet_mom_id(tensor: Tensor | None = None) -> Any:
    """The identity: momenta that are given as they shall be. Without an argument: that function."""
    return fdet_mom_id if tensor is None else tensor


def fdet_mom_unif(momentum: float) -> Rates:
    """The momentum `momentum` everywhere."""
    return lambda tensor: torch.full_like(tensor, momentum)
