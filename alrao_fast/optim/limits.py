"""The most that a feature's rate may be: a share of the size of its weights.

Adam moves every entry by about its rate, whatever the gradient: by a rate of b times the root mean square of a
feature's weights the feature changes by about the share b in a step, and by a higher one too much. Rates drawn above
are set to that. As layers draw their weights by their fan-in, the limits follow the width of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from alrao_fast import sharding
from alrao_fast.arguments import FLOATS
from alrao_fast.optim.layouts import Layout, Vector

# The least size that a feature counts as, in relation to what torch's layers would draw.
SMALLEST = 0.1


@torch.no_grad()
def rate_limits(
    bounds: Mapping[Tensor, float],
    layouts: Mapping[Tensor, Layout],
    sums: Mapping[Tensor, Tensor] = MappingProxyType({}),
) -> dict[Tensor, Tensor]:
    """A parameter's bound times the root mean square of each feature, over all of the parameters that share it: float32
    on the CPU, laid out as the parameters' rates.

    Not of clones: the switch leaves out those whose rate is too high. A feature whose entries are all 0, or not there
    yet (on meta), counts as one of n entries drawn as torch's layers do, of the size 1 / sqrt(3 n); one that is small
    on purpose, as a layer's scale that starts at 1e-6, as a tenth of that at least, or it would stay what it is.

    sums: the sums of squares of each rate's entries, float64 on the CPU, of parameters that are nowhere whole.
    """
    found = [p for p in bounds if layouts[p].vector.kind != "clone"]
    squares: dict[Vector, Tensor] = {}
    counts: dict[Vector, Tensor] = {}
    for param in found:
        layout = layouts[param]
        length = layout.vector.length
        total = squares.setdefault(layout.vector, _zeros(length))
        count = counts.setdefault(layout.vector, _zeros(length))
        own = sums[param] if param in sums else _squares(param, layout)
        if layout.per_weight and param in sums:
            # One entry says nothing of the size of its feature: that of the tensor.
            own = (own.sum() / max(own.numel(), 1)).expand(own.numel())
        features = torch.arange(own.numel(), device="cpu") % max(length, 1)
        if layout.feature_of is not None and not layout.per_weight:
            features = layout.feature_of.cpu()
        total.index_add_(0, features, own)
        each = param.numel() / max(own.numel(), 1)
        count.index_add_(0, features, torch.full_like(own, each))
    sizes: dict[Vector, Tensor] = {}
    for vector, total in squares.items():
        count = counts[vector].clamp(min=1)
        size = (total / count).sqrt()
        usual = 1 / (3 * count).sqrt()
        known = (size > 0) & size.isfinite()
        sizes[vector] = torch.where(known, torch.maximum(size, SMALLEST * usual), usual)
    limits: dict[tuple[Vector, float], Tensor] = {}
    for param in found:
        vector, bound = layouts[param].vector, bounds[param]
        if (vector, bound) not in limits:
            limits[vector, bound] = (bound * sizes[vector]).float()
    return {p: layouts[p].rates(limits[layouts[p].vector, bounds[p]]) for p in found}


def _squares(param: Tensor, layout: Layout) -> Tensor:
    """The sum of the squares of the entries at each position along the dimensions of the features, float64."""
    sizes = [param.size(dim) for dim in layout.dims]
    # Frozen parameters of other dtypes, such as quantized ones, have no size.
    if param.is_meta or not param.numel() or param.dtype not in FLOATS:
        return _zeros(param.numel() if layout.per_weight else math.prod(sizes))
    others = [dim for dim in range(param.dim()) if dim not in layout.dims]
    values = param.detach()
    if layout.per_weight:
        # One entry says nothing of the size of its feature: that of the tensor.
        norm = sharding.whole(torch.linalg.vector_norm(values, dtype=torch.float64))
        return (norm.double().square() / param.numel()).expand(param.numel()).cpu()
    if others:
        values = torch.linalg.vector_norm(values, dim=others, dtype=torch.float64)
    values = sharding.whole(values).double().square().cpu()
    # The dimensions that are left are in ascending order.
    ascending = sorted(layout.dims)
    return values.permute([ascending.index(dim) for dim in layout.dims]).reshape(-1)


def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64, device="cpu")


def limited(
    rates: Mapping[Tensor, Tensor], limits: Mapping[Tensor, Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """What the states of parameters have of their rates, on the parameters' devices, shared vectors as one tensor.

    Where there is a limit: what was drawn, the limit, and the smaller of both as the rate.
    """
    moved: dict[tuple[int, int, torch.device], dict[str, Tensor]] = {}
    found = {}
    for param, drawn in rates.items():
        device = drawn.device if param.is_meta else param.device
        limit = limits.get(param)
        key = (id(drawn), id(limit), device)
        if key not in moved:
            own = {"rate": drawn.to(device)}
            if limit is not None:
                own["drawn_rate"], own["rate_limit"] = own["rate"], limit.to(device)
                own["rate"] = torch.minimum(own["drawn_rate"], own["rate_limit"])
            moved[key] = own
        found[param] = dict(moved[key])
    return found
