"""What a call of an op updates of vectors that hold slices of parameters: each run of entries as a tensor."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alrao_fast.ops.feature import Lists
from alrao_fast.optim.flat_layouts import FlatLayout, Run, Slice


class FlatParts:
    """The runs of some vectors, and how a call comes by their gradients; `lists` has their tensors.

    They are views, bound while the vectors' memory is what it is: who shards a module gives its parameters other
    memory, and gathers it in a forward.

    derived: those of the rates that are copies, by number, with what makes them.
    """

    def __init__(
        self,
        params: list[Tensor],
        layouts: Sequence[FlatLayout],
        rates: Sequence[Tensor],
        seeds: Sequence[int],
        steps: Tensor,
        kept: Sequence[Sequence[Tensor]],
    ) -> None:
        """`kept`: the lists of the states, the masters, the averages; `steps`: the count of each vector."""
        self.params = params
        self._held = [params, *(tensors for tensors in kept if tensors)]
        self._memory = [_memory(tensor) for tensors in self._held for tensor in tensors]
        self._names = [layout.name for layout in layouts]
        self._runs: list[list[Run]] = []
        self.rates: list[Tensor] = []
        self.inners: list[int] = []
        self.seeds: list[int] = []
        self.derived: dict[int, Callable[[], Tensor]] = {}
        for layout, rate, seed in zip(layouts, rates, seeds):
            self._runs.append([])
            for number, part in enumerate(layout.slices):
                for run in part.runs(rate):
                    self._add(part, run, rate)
                    first = part.start + run.begin - part.at
                    self.seeds.append(_seed(seed, number, first))
            if not self._runs[-1]:
                # Its steps are counted all the same.
                self._runs[-1].append(Run(0, 0, 0, 1, 1))
                self.rates.append(rate.new_ones(1))
                self.inners.append(1)
                self.seeds.append(seed)
        owner = [k for k, own in enumerate(self._runs) for _ in own]
        self._first = torch.tensor([owner.index(k) for k in owner], device=steps.device)
        self.steps = steps[torch.tensor(owner, device=steps.device)]
        # The place of each vector's own count.
        self.places = [owner.index(k) for k in range(len(params))]

    def _add(self, part: Slice, run: Run, rate: Tensor) -> None:
        in_memory, _ = part.in_memory(rate)
        if in_memory.untyped_storage().data_ptr() != rate.untyped_storage().data_ptr():
            self.derived[len(self.rates)] = partial(_rates_of, part, run, rate)
        self.rates.append(in_memory[run.low : run.high])
        self.inners.append(run.inner)
        self._runs[-1].append(run)

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The runs of these, one for each vector."""
        return [
            tensor[run.begin : run.end] for tensor, own in zip(tensors, self._runs) for run in own
        ]

    def gradients(self, grads: Sequence[Tensor]) -> list[Tensor] | None:
        """The runs of all gradients; None where the vectors have other memory."""
        if self._memory != [_memory(tensor) for tensors in self._held for tensor in tensors]:
            return None
        for grad, param, name in zip(grads, self.params, self._names):
            if grad.shape != param.shape:
                raise RuntimeError(
                    f"parameter {name!r} has a gradient of shape {list(grad.shape)}, expected {list(param.shape)}, as "
                    "its flat shard"
                )
        return self.views(grads)

    def count(self, steps: Tensor) -> None:
        """Give all runs of a vector the count of its first, which the state shows."""
        if len(self._runs) < len(self.rates):
            steps.copy_(steps[self._first])


def flat_lists(
    params: list[Tensor],
    layouts: Sequence[FlatLayout],
    owns: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    steps: Tensor,
    kept: Sequence[Sequence[Tensor]],
) -> tuple[Lists, FlatParts]:
    """The op's tensors, with seeds whether they are needed or not; the states `owns` get the counts that it keeps.

    kept: the lists of each state, the masters and the averages.
    """
    rates = [own["rate"] for own in owns]
    parts = FlatParts(params, layouts, rates, seeds, steps, kept)
    counts = parts.steps.unbind()
    for own, place in zip(owns, parts.places):
        own["step"] = counts[place]
    *states, masters, averages = [parts.views(tensors) if tensors else [] for tensors in kept]
    whole = [param.detach() for param in params]
    given = parts.views(whole), states, masters, parts.rates, parts.inners, parts.seeds, parts.steps
    return Lists(*given, averages), parts


def _memory(tensor: Tensor) -> Any:
    # Graphs of torch.compile have no addresses.
    return tensor.shape, 0 if torch.compiler.is_compiling() else tensor.data_ptr()


def _rates_of(part: Slice, run: Run, rate: Tensor) -> Tensor:
    return part.in_memory(rate)[0][run.low : run.high]


def _seed(seed: int, number: int, first: int) -> int:
    """A seed for rounding a run: that of one process for the first entries of a parameter that has a vector of its
    own, else one that no other run has, since the kernels count a tensor's entries from 0."""
    return (seed + number * 0x632BE59BD9B4E019 + first * 0x9E3779B97F4A7C15) % 2**63
