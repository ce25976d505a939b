"""Who else has listed the parameters of clones that are about to be exchanged, and would go on with the old ones."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from alrao_fast import live

# Of torch.distributed, by module.
_WRAPPERS = {
    "torch.nn.parallel.distributed": "DistributedDataParallel",
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
}


def params_of(groups: list[dict[str, Any]]) -> Iterator[nn.Parameter]:
    """The parameters of param groups."""
    return (param for group in groups for param in group["params"])


def check_holders(params: Iterable[nn.Parameter]) -> None:
    """Raise ValueError where something has the parameters that does not notice when they are exchanged.

    That is what exchanges gradients or updates between ranks and, where no optimizer of ours has them, another one.
    """
    own = {id(param) for param in params}
    kinds: tuple[type, ...] = ()
    if dist.is_available() and dist.is_initialized():
        modules = (sys.modules.get(name) for name in _WRAPPERS)
        kinds = tuple(getattr(m, _WRAPPERS[m.__name__]) for m in modules if m is not None)
    if not any(id(p) in own for opt in live.optimizers for p in params_of(opt.param_groups)):
        kinds += (Optimizer,)

    def holder_of() -> str | None:
        """The name of one; nothing that is alive lists its parameters to those who look for them."""
        for holder in live.instances(kinds):
            # One whose construction has failed may have no groups.
            if isinstance(holder, Optimizer):
                held = params_of(getattr(holder, "param_groups", []))
            else:
                held = holder.parameters()
            if any(id(param) in own for param in held):
                return type(holder).__name__
        return None

    if kinds and holder_of():
        # One that was let go may be in a cycle.
        gc.collect()
        name = holder_of()
        if name:
            raise ValueError(
                f"net: got parameters that a {name} has, expected none, for it would go on with those that are "
                "exchanged: undo it (`net = ddp.module; del ddp`; `del optimizer`), retire or load, and make a new one"
            )
