"""The order of exchanges where ranks have different numbers of batches (joining.py): whose turn it is in a forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Turns:
    """The observations of a model's heads within one of its forwards: one of each.

    taken: the heads that have observed since the last forward began; None before the first.
    """

    def __init__(self, heads: list[Any], group: Any, device: torch.device) -> None:
        self.heads, self._group, self._device = heads, group, device
        self.taken: list[nn.Module] | None = None
        self._shadowing = False

    def take(self, head: nn.Module) -> None:
        """Before an exchange of this head: have the ranks that have joined shadow it."""
        if self._shadowing:
            return
        if self.taken is None or any(head is other for other in self.taken):
            raise RuntimeError(
                f"{name_of(head)} observes more than once in a forward of the DistributedDataParallel model, or "
                "outside of one: ranks that have run out of batches expect one observation of each head in every "
                "forward"
            )
        self.taken.append(head)
        if len(self.heads) > 1:
            # In which order a forward calls its heads only those know that make it.
            self._next(next(k for k, own in enumerate(self.heads) if own is head))

    def shadow(self) -> None:
        """Take part in the exchanges of a forward of the other ranks, with no samples."""
        self._shadowing = True
        try:
            for _ in self.heads:
                head = self.heads[self._next(-1) if len(self.heads) > 1 else 0]
                head._observe(torch.zeros_like(head.running))
        finally:
            self._shadowing = False

    def _next(self, number: int) -> int:
        known = torch.tensor([number], device=self._device)
        dist.all_reduce(known, dist.ReduceOp.MAX, group=self._group)
        return int(known.item())

    def check(self) -> None:
        """Raise RuntimeError unless all heads have observed since the last forward began."""
        if self.taken is None:
            return
        missing = [name_of(head) for head in self.heads if all(head is not t for t in self.taken)]
        if missing:
            raise RuntimeError(
                f"{' and '.join(missing)} observed nothing in a forward of the DistributedDataParallel model: ranks "
                "that have run out of batches expect one observation of each head in every forward"
            )


def check_join() -> None:
    """Raise RuntimeError inside of torch's own `DistributedDataParallel.join`, whose ranks would wait for ever."""
    model: Any = DistributedDataParallel._get_active_ddp_module()
    if model is not None and model._join_config.enable:
        raise RuntimeError(
            "a network with clones within DistributedDataParallel.join: ranks that have run out of batches would not "
            "take part in what its switch exchanges. Write `with alrao_fast.distributed.join(model, opt):` in its place"
        )


def name_of(head: nn.Module) -> str:
    """A head in an error."""
    return f"the head {type(head).__name__}({head.extra_repr()})"
