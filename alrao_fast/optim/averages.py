"""Running averages of the parameters in the parameters' place, for as long as they are evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import update_bn

if TYPE_CHECKING:
    from alrao_fast.optim.base import AlraoOptimizer


@contextmanager
def averaged(
    optimizer: AlraoOptimizer, model: nn.Module | None, loader: Iterable[Any] | None
) -> Iterator[None]:
    """What `AlraoOptimizer.averaged` returns."""
    if (model is None) != (loader is None):
        missing, given = ("loader", "model") if loader is None else ("model", "loader")
        raise ValueError(f"{missing}: got None with a {given}, expected both or neither")
    if optimizer._shows_averages:
        raise RuntimeError("averaged() within averaged()")
    shown = _shown(optimizer)
    params = [param for param, _ in shown]
    norms = [m for m in model.modules() if isinstance(m, _NormBase)] if model else []
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    with torch.no_grad():
        kept = [tensor.detach().clone() for tensor in (*params, *statistics)]
    optimizer._shows_averages = True
    try:
        with torch.no_grad():
            for param, average in shown:
                param.copy_(average)
        if model is not None and loader is not None:
            update_bn(loader, model, device=params[0].device)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip((*params, *statistics), kept):
                tensor.copy_(value)
        optimizer._shows_averages = False


def _shown(optimizer: AlraoOptimizer) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have been updated, and their averages."""
    optimizer.refresh()
    groups = [g for g in optimizer.param_groups if g.get("averaging") is not None]
    if not groups:
        raise ValueError(
            "averaging: got None in every param group, expected a number, such as 8, in at least one"
        )
    found = []
    for param in (param for group in groups for param in group["params"]):
        own = optimizer.state[param]
        if "average" in own and int(own["step"]) > 0:
            found.append((param, own["average"]))
    return found
