"""Ranks that train one network must have the same learning rates: the switch's exchange tells, and mends it.

Every rank draws by its own random numbers, which DistributedDataParallel does not see: the ranks' weights would drift
apart. With every observation the switch gathers a few numbers of each rank; a checksum of the rates rides along, which
is looked at, once, after rates were drawn or loaded. Ranks that observe together train together: where they differ all
take over those of the group's first rank, before the first step. Who trains by himself has a process group of his own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.nn.switch import Switch
from alrao_fast.nn.turns import Turns, check_join


class _Note(NamedTuple):
    """What a rank says of the rates of its optimizers: which of the model's parameters have them, as a checksum, their
    number, their checksum, whether they are new."""

    params: float
    number: float
    checksum: float
    new: float


class Agreement:
    """What a head's processes know of each other's rates; a copy of the head gets one that knows nothing."""

    def __init__(self) -> None:
        # Of live.optimizers, at the last look: it counts up with every draw.
        self._seen = -1
        self._sent: Tensor | None = None
        # The statistics of every rank in the last exchange, and their sum.
        self._parts: list[Tensor] = []
        self._total: Tensor | None = None
        # Where ranks have different numbers of batches (joining.py).
        self.turns: Turns | None = None

    def __reduce__(self) -> tuple[type[Agreement], tuple[()]]:
        return Agreement, ()

    def sum_over_processes(self, head: nn.Module, switch: Switch, stats: Tensor) -> Tensor:
        """The sum of the statistics `stats` (float64) over the switch's processes, the same bits on every one."""
        if self.turns is not None:
            self.turns.take(head)
        elif not torch.compiler.is_compiling():
            check_join()
        new = not torch.compiler.is_compiling() and self._seen != live.optimizers.entered
        if torch.compiler.is_compiling():
            # A graph says nothing, in as many numbers: another rank may have left its own.
            sent = stats.new_full((len(_Note._fields),), math.nan)
        else:
            sent = self._note(head, stats, new)
        parts = switch.gathered(torch.cat([stats.detach().flatten(), sent]))
        if new:
            self._settle(head, switch, [_Note(*part[stats.numel() :].tolist()) for part in parts])
            self._seen = live.optimizers.entered
            # From now on they are not new.
            self._sent = None
        own = [part[: stats.numel()].view(stats.shape) for part in parts]
        total, *rest = own
        for part in rest:
            total = total + part
        if not torch.compiler.is_compiling():
            self._parts, self._total = own, total
        return total

    def is_clear(self) -> bool:
        """Whether a clone had a finite loss on all ranks in the last exchange, if there was any.

        Waits for the device.
        """
        return self._total is None or any(map(math.isfinite, self._total[0].tolist()))

    def ranks_have_losses(self) -> Tensor | None:
        """Whether each rank `[R]` had a clone with a finite loss in the last exchange; None if there was none."""
        return (
            torch.stack([part[0] for part in self._parts]).isfinite().any(1)
            if self._parts
            else None
        )

    def _note(self, head: nn.Module, like: Tensor, new: bool) -> Tensor:
        if new or self._sent is None or self._sent.device != like.device:
            self._sent = like.new_tensor(_note(head, new))
        return self._sent

    def _settle(self, head: nn.Module, switch: Switch, notes: list[_Note]) -> None:
        """Take over the first rank's rates where they differ; RuntimeError where that cannot be."""
        if len({note[:3] for note in notes}) == 1 or any(math.isnan(note.new) for note in notes):
            return
        if len({note.params for note in notes}) > 1:
            # Each rank updates some of the parameters and sends them to the others (ZeroRedundancyOptimizer).
            return
        numbers = [int(note.number) for note in notes]
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"process_group: the processes that observe together have {numbers} learning rates, expected the same "
                "optimizers on every one; a network that is trained by one process alone has a process_group of its own"
            )
        if not all(note.new for note in notes):
            fresh = [rank for rank, note in enumerate(notes) if note.new]
            raise RuntimeError(
                f"the learning rates of the processes differ, and only those of ranks {fresh} of the switch's group "
                "were drawn or loaded since the last observation: make the optimizer, and load a checkpoint, on every "
                "rank"
            )
        optimizers, _ = _optimizers_of(_params_of(head))
        for optimizer in optimizers:
            optimizer._take_over(switch.process_group)


def _params_of(head: nn.Module) -> list[nn.Parameter]:
    """The parameters of the model that the head is in, or its own.

    In a forward of FullyShardedDataParallel (FSDP1) it has none: its ranks have agreed when the rates were drawn.
    """
    own = {id(p) for p in head.parameters()}
    for net in live.models if own else ():
        params = list(net.parameters())
        if own <= set(map(id, params)):
            return params
    return list(head.parameters())


def _optimizers_of(params: list[nn.Parameter]) -> tuple[list[Any], list[int]]:
    """The Alrao optimizers of a model, for each parameter the one that drew or loaded rates last, and which have one.

    One that is not used any more is alive until the garbage collection of its process comes.
    """
    left = {id(p): number for number, p in enumerate(params)}
    optimizers, numbers = [], []
    for optimizer in reversed(list(live.optimizers)):
        own = [p for group in optimizer.param_groups for p in group["params"]]
        found = [left.pop(id(p)) for p in own if id(p) in left]
        if found:
            optimizers.append(optimizer)
            numbers += found
    return optimizers, numbers


def _note(head: nn.Module, new: bool) -> _Note:
    optimizers, numbers = _optimizers_of(_params_of(head))
    # A float64 holds 2^52.
    params = sum(pow(3, number, 2**52) for number in numbers) % 2**52
    checksum, rates = 0, 0
    for optimizer in optimizers:
        own, count = optimizer._fingerprint()
        checksum, rates = (3 * checksum + own) % 2**52, rates + count
    return _Note(float(params), float(rates), float(checksum), float(new))
