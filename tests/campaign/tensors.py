"""Kinds of tensors: the same values in another form, which are right, and forms that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from campaign.values import Kind, Odd

Change = Callable[[Tensor], Any]


def strided(t: Tensor) -> Tensor:
    """The same values with gaps in memory."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else strided(t)


def offset(t: Tensor) -> Tensor:
    """At an odd place in memory."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t


SAME: dict[str, Change] = {
    "as it is": lambda t: t,
    "strided": strided,
    "transposed": transposed,
    "unaligned": offset,
    "a leaf with requires_grad": lambda t: t.clone().requires_grad_(t.is_floating_point()),
    "negative view": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}
# Forms that are nothing that an op takes, whatever it takes.
NONSENSE: dict[str, Change] = {
    "a list": lambda t: t.tolist() if t.dim() else [t.item()],
    "numpy": lambda t: t.detach().numpy(),
    "None": lambda t: None,
    "text": lambda t: "tensor",
    "an object": lambda t: Odd(),
    "meta": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse() if t.dim() else t.detach().to("meta"),
    "complex": lambda t: t.detach().to(torch.complex64),
    "a dimension more": lambda t: t.detach().unsqueeze(0),
    "one too short": lambda t: t.detach()[..., :-1] if t.dim() else t.detach().expand(2),
    "one too long": lambda t: torch.cat([t, t[..., :1]], -1).detach() if t.dim() else t.new_ones(3),
}


def same(rng: Random) -> tuple[str, Change]:
    return rng.choice(list(SAME.items()))


def nonsense(rng: Random, *without: str) -> tuple[str, Change]:
    return rng.choice([item for item in NONSENSE.items() if item[0] not in without])


def kinds(rng: Random, tensor: Tensor, *without: str, odds: float = 0.55) -> tuple[str, Kind]:
    """A text, and the tensor in a form that is "right" or "refused"."""
    if rng.random() < odds:
        text, change = nonsense(rng, *without)
        return text, ("refused", change(tensor))
    text, change = same(rng)
    return text, ("right", change(tensor))
