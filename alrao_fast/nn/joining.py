"""Uneven numbers of batches under DistributedDataParallel: ranks without any left take part in the switch's exchange.

torch's `Join` lets a rank that has run out of batches shadow the collectives of those that go on. The switch's
gathering stands between DDP's own of the forward and of the backward, so its shadow stands between DDP's shadows of
these. It is an observation of no samples: every rank observes what all samples say, and all posteriors stay the same,
to the bit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from alrao_fast.arguments import Flag
from alrao_fast.nn.clones import LinearClones
from alrao_fast.nn.turns import Turns, name_of

_FLAG = Flag()


@contextmanager
def join(
    model: DistributedDataParallel,
    *stateful: Any,
    divide_by_initial_world_size: bool = True,
    enable: bool = True,
    throw_on_early_termination: bool = False,
) -> Iterator[None]:
    """`DistributedDataParallel.join` for networks with clones: ranks may have different numbers of batches.

        model = DistributedDataParallel(net)
        with alrao_fast.distributed.join(model, opt):
            for x, y in loader:                          # of another length on every rank
                opt.zero_grad()
                model(x, targets=y).backward()
                opt.step()

    Args:
        model: in training mode, with one observation of each head in every forward of `model`, by targets or by
            `MixtureLoss`; evaluate `model.module` inside the block, which exchanges nothing.
        stateful: the optimizers, and the schedulers or the GradScaler that are stepped in the block: what has
            `state_dict` and `load_state_dict`. A rank that has run out of batches makes no steps; at the end of the
            block it gets the weights, and these states, of a rank that has made all (through the host's memory; nothing
            is sent where all ranks have).
        divide_by_initial_world_size: whether gradients are divided by the number of all ranks (True, every sample has
            the same weight), or by the number of those that have batches left.
        enable: False to do nothing, where the ranks have equal numbers of batches.
        throw_on_early_termination: raise RuntimeError on all ranks as soon as one has run out. Networks with
            SyncBatchNorm need it, whose exchange nobody shadows.

    Inside of torch's own `model.join()` the first loss raises RuntimeError. TypeError for a model or a stateful object
    of another kind (of `ZeroRedundancyOptimizer` every rank has a part of the state), ValueError for a head whose
    process group is not that of the model, and with SyncBatchNorm; RuntimeError on all ranks for a forward in
    evaluation mode, or in which a head observes more or less than once.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model: got {type(model).__name__}, expected DistributedDataParallel")
    for entry in stateful:
        if isinstance(entry, Joinable) or not hasattr(entry, "load_state_dict"):
            raise TypeError(
                f"stateful: got {type(entry).__name__}, expected optimizers and the like, with a state_dict that is "
                "the same on all ranks"
            )
    enable = _FLAG.check("enable", enable)
    throw = _FLAG.check("throw_on_early_termination", throw_on_early_termination)
    divide = _FLAG.check("divide_by_initial_world_size", divide_by_initial_world_size)
    joined = _Joined(model, stateful, throw)
    context = Join([joined], enable, throw, divide_by_initial_world_size=divide)
    joined.enter(enable)
    try:
        with context:
            yield
            joined.check_turns()
    finally:
        joined.leave()


class _Joined(Joinable):
    """A DDP model, its heads, and what has the same state on all ranks, as one to `Join`."""

    def __init__(
        self, model: DistributedDataParallel, stateful: tuple[Any, ...], throw: bool
    ) -> None:
        self._model, self._stateful = model, stateful
        super().__init__()
        modules = list(model.module.modules())
        heads = [m for m in modules if isinstance(m, LinearClones) and not m.switch.is_alone()]
        ranks = dist.get_process_group_ranks(self.join_process_group)
        for head in heads:
            own = dist.get_process_group_ranks(head.switch.process_group)
            if own != ranks:
                raise ValueError(
                    f"process_group: got ranks {own} in that of {name_of(head)}, expected those of the model's, {ranks}"
                )
        if not throw and any(isinstance(m, nn.SyncBatchNorm) for m in modules):
            raise ValueError(
                "throw_on_early_termination: got False for a network with SyncBatchNorm, whose exchange a rank "
                "without batches does not shadow, expected True"
            )
        self._turns = Turns(heads, self.join_process_group, self.join_device)
        self._hooks: list[Any] = []

    # What `Join` knows of a member it writes here, and the model reads it.

    @property
    def _join_config(self) -> Any:
        return self._model._join_config

    @_join_config.setter
    def _join_config(self, value: Any) -> None:
        self._model._join_config = value

    @property
    def join_device(self) -> torch.device:
        return self._model.join_device

    @property
    def join_process_group(self) -> Any:
        return self._model.join_process_group

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Hook(self._model, self._model.join_hook(**kwargs), self._turns, self._stateful)

    def enter(self, enable: bool) -> None:
        if not enable:
            return
        for head in self._turns.heads:
            head.agreement.turns = self._turns
        self._hooks = [self._model.register_forward_pre_hook(self._begin)]

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        self.check_turns()
        for head in self._turns.heads:
            if not head.training:
                raise RuntimeError(
                    f"{name_of(head)} is in evaluation mode: inside of join evaluate model.module, which exchanges "
                    "nothing"
                )
        self._turns.taken = []

    def check_turns(self) -> None:
        self._turns.check()

    def leave(self) -> None:
        for head in self._turns.heads:
            head.agreement.turns = None
        for hook in self._hooks:
            hook.remove()
        # torch leaves it on, and the model would go on telling others that it has not joined.
        Joinable.__init__(self)


class _Hook(JoinHook):
    """DDP's hook, with the heads' exchange where the others have it."""

    def __init__(self, model: Any, hook: JoinHook, turns: Turns, stateful: tuple[Any, ...]) -> None:
        self._model, self._hook, self._turns, self._stateful = model, hook, turns, stateful

    def main_hook(self) -> None:
        # The last that DDP exchanges before a forward.
        name = "_check_global_requires_backward_grad_sync"
        last = getattr(self._model, name)

        def with_the_forward(*args: Any, **kwargs: Any) -> Any:
            result = last(*args, **kwargs)
            self._turns.shadow()
            return result

        setattr(self._model, name, with_the_forward)
        try:
            self._hook.main_hook()
        finally:
            delattr(self._model, name)

    def post_hook(self, is_last_joiner: bool) -> None:
        self._hook.post_hook(is_last_joiner)
        group, device = self._model.join_process_group, self._model.join_device
        rank = dist.get_rank(group)
        # The last of those that made all steps, and whether there are others.
        found = torch.tensor(
            [rank if is_last_joiner else -1, int(not is_last_joiner)], device=device
        )
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        source, uneven = found.tolist()
        if uneven:
            for entry in self._stateful:
                _hand_round(
                    entry, source, group, device, give=rank == source, take=not is_last_joiner
                )


def _hand_round(
    entry: Any, source: int, group: Any, device: torch.device, *, give: bool, take: bool
) -> None:
    """Give the ranks that `take` the state that `source` has."""
    packed = io.BytesIO()
    if give:
        torch.save(entry.state_dict(), packed)
    size = torch.tensor([packed.tell()], device=device)
    dist.broadcast(size, group=group, group_src=source)
    if give:
        sent = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8).to(device)
    else:
        sent = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(sent, group=group, group_src=source)
    if take:
        file = io.BytesIO(sent.cpu().numpy().tobytes())
        # As trustworthy as this process: it is one that trains with it.
        entry.load_state_dict(torch.load(file, map_location="cpu", weights_only=False))
