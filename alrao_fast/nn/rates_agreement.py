"""Ranks that train one network must have the same learning rates: the switch's exchange tells, and mends it.

Every rank draws by its own random numbers, which DistributedDataParallel does not see: the ranks' weights would drift
apart. With every observation the switch gathers a few numbers of each rank; a checksum of the rates rides along, which
is looked at, once, after rates were drawn or loaded. Ranks that observe together train together: where they differ all
take over those of the group's first rank, before the first step. Who trains by himself has a process group of his own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.nn.switch import Switch


class _Note(NamedTuple):
    """What a rank says of the rates of its optimizers: their checksum, their number, whether they are new."""

    checksum: float
    number: float
    new: float


class Agreement:
    """What a head's processes know of each other's rates; a copy of the head gets one that knows nothing."""

    def __init__(self) -> None:
        # Of live.optimizers, at the last look: it numbers up with every draw.
        self._seen = -1
        self._sent: Tensor | None = None

    def __reduce__(self) -> tuple[type[Agreement], tuple[()]]:
        return Agreement, ()

    def sum_over_processes(self, head: nn.Module, switch: Switch, stats: Tensor) -> Tensor:
        """The sum of the statistics `stats` (float64) over the switch's processes, the same bits on every one."""
        if torch.compiler.is_compiling() or stats.dtype != torch.float64:
            return switch.sum_over_processes(stats)
        new = self._seen != live.optimizers.entered
        if new or self._sent is None or self._sent.device != stats.device:
            own = _note(_optimizers_of(head), new)
            self._sent = stats.new_tensor(own)
        parts = switch.gathered(torch.cat([stats.detach().flatten(), self._sent]))
        if new:
            self._settle(head, switch, [_Note(*part[stats.numel() :].tolist()) for part in parts])
            self._seen = live.optimizers.entered
            # From now on they are not new.
            self._sent = None
        total, *rest = [part[: stats.numel()] for part in parts]
        for part in rest:
            total = total + part
        return total.view(stats.shape)

    def _settle(self, head: nn.Module, switch: Switch, notes: list[_Note]) -> None:
        """Take over the first rank's rates where they differ; RuntimeError where that cannot be."""
        if len({note[:2] for note in notes}) == 1:
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
        for optimizer in _optimizers_of(head):
            optimizer.take_over(switch.process_group)


def _optimizers_of(head: nn.Module) -> list[Any]:
    """The Alrao optimizers of the head and of its model, for each parameter the one that drew or loaded rates last.

    One that is not used any more is alive until the garbage collection of its process comes.
    """
    own = {id(p) for p in head.parameters()}
    for net in live.models:
        held = {id(p) for p in net.parameters()}
        if own <= held:
            own = held
            break
    found = []
    for optimizer in reversed(list(live.optimizers)):
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not own.isdisjoint(params):
            own -= params
            found.append(optimizer)
    return found


def _note(optimizers: list[Any], new: bool) -> _Note:
    checksum, number = 0, 0
    for optimizer in optimizers:
        own, rates = optimizer.fingerprint()
        # A float64 holds 2^52.
        checksum, number = (3 * checksum + own) % 2**52, number + rates
    return _Note(float(checksum), float(number), float(new))
