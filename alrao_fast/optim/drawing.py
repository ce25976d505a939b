"""The rates of an optimizer's parameters, drawn in the model's order whatever the groups."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.rates import Sampler, draw, draw_clones


def draw_all(
    pending: Mapping[Tensor, tuple[Sampler | None, tuple[float, float]]],
    own: Sampler,
    generator: torch.Generator | None,
    layouts: dict[Tensor, Layout],
    vectors: dict[Any, Tensor],
) -> dict[Tensor, Tensor]:
    """The rates of the parameters of `pending`, in the order of `layouts`.

    pending: for each parameter the sampler of its group, None for the optimizer's `own`, and the group's interval.
    layouts: where one rate per entry is drawn, the parameter's layout is replaced.
    vectors: those drawn by the optimizer's own sampler, which parameters that come later share.
    """
    drawn: dict[Any, Tensor] = {}
    rates: dict[Tensor, Tensor] = {}
    for param in [p for p in layouts if p in pending] if pending else ():
        layout = layouts[param]
        group_sampler, lr_range = pending[param]
        sampler = group_sampler or own
        if layout.vector.kind != "clone" and getattr(sampler, "per_weight", False):
            layout = layouts[param] = layout.per_entry(param)
        cache = vectors if group_sampler is None else drawn
        key = layout.vector if group_sampler is None else (layout.vector, id(group_sampler))
        if key not in cache:
            length = layout.vector.length
            if layout.vector.kind == "clone":
                total, numbers = layout.vector.among or (length, range(length))
                cache[key] = draw_clones(sampler, lr_range, total)[list(numbers)]
            else:
                cache[key] = draw(sampler, length, generator)
        rates[param] = layout.rates(cache[key])
    return rates
