"""What N clones of an output layer consist of: linear layers in one tensor, and the tails of an adaptive softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.nn.clone_rates import WithRates
from alrao_fast.sharding import draw_row_


class WithParameters(WithRates):
    """N linear layers, `weight [N, C, D]` and `bias [N, C]` or None; a subclass may have more."""

    in_features: int
    num_clones: int
    # The constructor's name for the width of a clone's output.
    _width: str

    def _make_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Register the parameters, without values."""
        self._make_layers(getattr(self, self._width), bias, device, dtype)

    def _make_layers(self, rows: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        shape = self.num_clones, rows
        weight = torch.empty(*shape, self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        if bias:
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def _draw(self, n: int) -> None:
        """Draw clone n anew, as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features)
        draw_row_(self.weight, n, bound)
        if self.bias is not None:
            draw_row_(self.bias, n, bound)

    def tails(self) -> tuple[Tensor, ...]:
        """What the clones have beside weight and bias, `[N, ., .]` each."""
        return ()

    def owners(self) -> list[nn.Module]:
        """The modules whose own parameters the clones' are."""
        return [self]

    def parts(self) -> tuple[Tensor | None, ...]:
        """All that the clones consist of: weight, bias and tails."""
        return self.weight, self.bias, *self.tails()


def largest_outputs(
    size: float | Tensor, weight: Tensor, bias: Tensor | None, *tails: Any
) -> Tensor:
    """A bound `[N]` of each clone's outputs on features of absolute values up to `size`."""
    largest = weight.abs().sum(2) * size
    if bias is not None:
        largest = largest + bias.abs()
    found = [largest.amax(1)]
    for projection, tail in zip(tails[::2], tails[1::2], strict=True):
        hidden = projection.abs().sum(2) * size
        found.append(torch.bmm(tail.abs(), hidden.unsqueeze(2)).amax((1, 2)))
    return torch.stack(found).amax(0)
