"""The interval of the rates, narrowed during a run around what the clones have found.

The clones measure which rates serve: the switch's posterior over their log-spaced rates. With q the part of the run
that is over, w the width that is left at its end, m the middle and h half the width of the log-interval, a rate drawn
as log r becomes

    log r(q) = m + s(q) + k (log r - m),    k = 1 - q (1 - w),    s(q) = q (c(q) - m), at most (1 - k) h either way

where c(q) is the posterior mean of the clones' log-rates as drawn: the narrowed interval lies within that of the draw.
Where the rates come from another interval than the clones', its middle moves as far as theirs does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alrao_fast import live
from alrao_fast.optim.rates import LogUniform

if TYPE_CHECKING:
    from alrao_fast.optim.base import AlraoOptimizer

# The share of the log-interval's width that is left at the end, and how often in a run it is narrowed.
WIDTH, TIMES = 0.1, 40


class Run:
    """A run of known length: how many steps an optimizer has taken of it, and the rates that go with them."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps, self.taken = total_steps, 0

    def go_on_from(self, taken: int | None, states: Iterable[Mapping[str, Any]]) -> None:
        """After loading; where nobody has kept what was `taken`, as flattened checkpoints do not, the updates count."""
        steps = [int(own["step"]) for own in states if "step" in own]
        self.taken = max(steps, default=0) if taken is None else taken

    def count(self, optimizer: AlraoOptimizer) -> None:
        """After a step."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "total_steps: a compiled step counts nothing, expected step() to be called by Python: compile the "
                "model alone, or call anneal_rates(progress) outside of the compiled function instead"
            )
        self.taken += 1
        if self.taken % max(1, self.total_steps // TIMES) == 0 and self.taken <= self.total_steps:
            anneal(optimizer, self.taken / self.total_steps, WIDTH)


@torch.no_grad()
def anneal(optimizer: AlraoOptimizer, progress: float, width: float) -> None:
    """Rewrite the rates in place, on their devices: nothing waits."""
    optimizer.refresh()
    intervals = list(_intervals(optimizer))
    shift = progress * _shift(optimizer, intervals)
    keep = 1 - progress * (1 - width)
    originals: dict[int, Tensor] = {}
    for sampler, params in intervals:
        middle, half = _middle_and_half(sampler)
        limit = (1 - keep) * half
        for own in (optimizer.state[param] for param in params):
            rate = own["rate"]
            if id(rate) in originals:
                own.setdefault("drawn_rate", originals[id(rate)])
                continue
            drawn = originals[id(rate)] = own.setdefault("drawn_rate", rate.clone())
            moved = middle + shift.clamp(-limit, limit).to(rate.device)
            narrowed = (moved + keep * (drawn.double().log() - middle)).exp()
            rate.copy_(narrowed.clamp(max=own["rate_limit"]) if "rate_limit" in own else narrowed)


def _intervals(optimizer: AlraoOptimizer) -> Iterator[tuple[LogUniform, list[Tensor]]]:
    """The param groups whose rates come from an interval, and it; those of other samplers, such as `Constant`, stay."""
    for number, group in enumerate(optimizer.param_groups):
        sampler = optimizer._sampler_of(number)
        if isinstance(sampler, LogUniform):
            yield sampler, group["params"]


def _middle_and_half(sampler: LogUniform) -> tuple[float, float]:
    lo, hi = math.log(sampler.lo), math.log(sampler.hi)
    return 0.5 * (hi + lo), 0.5 * (hi - lo)


def _shift(optimizer: AlraoOptimizer, intervals: list[tuple[LogUniform, list[Tensor]]]) -> Tensor:
    """How far the posterior mean of the clones' log-rates is from the middle of their interval; of several heads the
    mean."""
    shifts = []
    for sampler, params in intervals:
        own = set(params)
        for head in live.heads:
            clones = [param for param in head.parameters() if param in own]
            if not clones:
                continue
            posterior = head.switch.posterior()
            own_state = optimizer.state[clones[0]]
            drawn = own_state.get("drawn_rate", own_state["rate"])
            mean = (posterior * drawn.double().log().to(posterior.device)).sum()
            # Where every clone is dead nothing is known, and the rates must not become NaN.
            shifts.append((mean - _middle_and_half(sampler)[0]).nan_to_num(0.0))
    if not shifts:
        raise ValueError(
            "params: got no clones whose rates come from an interval, expected those of a head: their posterior says "
            "where the rates go"
        )
    return torch.stack([shift.to(shifts[0].device) for shift in shifts]).mean()
