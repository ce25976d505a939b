"""The interval of the rates, narrowed during a run around what the clones have found.

The clones measure which rates serve: the switch's posterior over the rates that they have. With q the part of the run
that is over and w the share of the interval's width that is left at its end, a rate drawn as log r becomes

    log r(q) = k log r + (1 - k) c(q),    1 / k = 1 + q (1 / w - 1)

where c(q) is the posterior mean of the clones' log-rates as drawn: what the clones agree on stays where it is, and all
rates stay in their interval. Where they come from another interval than the clones', c is as far from its middle. All
intervals narrow to the same width in decades, wide ones faster: within a tenth of a run, nine to 2.9 and four to 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alrao_fast import compiler, live
from alrao_fast.arguments import Integer, Optional
from alrao_fast.optim.rates import LogUniform
from alrao_fast.optim.states import rates_in

if TYPE_CHECKING:
    from alrao_fast.optim.rated import Rated

# The decades that are left at the end of a run, and how often in it rates are narrowed.
WIDTH, TIMES = 0.4, 40


class Run:
    """A run of known length: how many steps an optimizer has taken of it, and the rates that go with them."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps, self.taken = total_steps, 0

    def go_on_from(self, taken: int | None, states: Iterable[Mapping[str, Any]]) -> None:
        """After loading; where nobody has kept what was `taken`, as flattened checkpoints do not, the updates count."""
        steps = [int(own["step"]) for own in states if "step" in own]
        self.taken = max(steps, default=0) if taken is None else taken

    @compiler.disable("the steps of the run are counted")
    def count(self, optimizer: Rated) -> None:
        """After a step."""
        total, before = self.total_steps, self.taken
        self.taken += 1
        if before < total and self.taken * TIMES // total != before * TIMES // total:
            anneal(optimizer, self.taken / total, WIDTH)

    def catch_up(self, optimizer: Rated, params: Collection[Tensor]) -> None:
        """Narrow the rates of `params`, drawn just now, as far as those of the others are."""
        narrowings = min(self.taken, self.total_steps) * TIMES // self.total_steps
        last = math.ceil(narrowings * self.total_steps / TIMES)
        narrow(optimizer, last / self.total_steps, WIDTH, params)


def recipe(
    total_steps: Any, warmup_steps: Any, averaging: Any
) -> tuple[Run | None, dict[str, Any]]:
    """What a constructor's `total_steps`, checked here, implies: the run, and the two options where they are None."""
    total = Optional(Integer(low=1)).check("total_steps", total_steps)
    if warmup_steps is None:
        warmup_steps = math.ceil(total / 20) if total else 0
    if averaging is None and total:
        averaging = 8.0
    elif averaging is False:
        averaging = None
    run = Run(total) if total else None
    return run, {"warmup_steps": warmup_steps, "averaging": averaging}


def anneal(optimizer: Rated, progress: float, width: float) -> None:
    """Rewrite the rates in place, on their devices: nothing waits."""
    optimizer.refresh()
    narrow(optimizer, progress, width)


@torch.no_grad()
def narrow(
    optimizer: Rated,
    progress: float,
    width: float,
    among: Collection[Tensor] | None = None,
) -> None:
    """The same for parameters that all have rates, or for those `among` them."""
    chosen = None if among is None else set(among)
    intervals = list(_intervals(optimizer))
    shift = _shift(optimizer, intervals)
    originals: dict[int, Tensor] = {}
    for sampler, params in intervals:
        lo, hi = math.log(sampler.lo), math.log(sampler.hi)
        keep = _kept(progress, width * math.log(10), hi - lo)
        centre = (0.5 * (lo + hi) + shift).clamp(lo, hi)
        for param in params if chosen is None else [p for p in params if p in chosen]:
            own = optimizer.state[param]
            rate = own["rate"]
            if id(rate) in originals:
                own.setdefault("drawn_rate", originals[id(rate)])
            else:
                drawn = originals[id(rate)] = own.setdefault("drawn_rate", rate.clone())
                narrowed = keep * drawn.double().log() + (1 - keep) * centre.to(rate.device)
                narrowed = narrowed.exp()
                limit = own.get("rate_limit")
                rate.copy_(narrowed if limit is None else narrowed.clamp(max=limit))
            optimizer._rates[param] = rates_in(own)
    for head in live.heads:
        head.follow_optimizer()


def _kept(progress: float, left: float, whole: float) -> float:
    """The share of a log-interval's width `whole` that is kept, where `left` is left at the end."""
    if progress == 0 or left >= whole:
        return 1.0
    return left / (left + progress * (whole - left))


def _intervals(optimizer: Rated) -> Iterator[tuple[LogUniform, list[Tensor]]]:
    """The param groups whose rates come from an interval, and it; those of other samplers, such as `Constant`, stay."""
    for number, group in enumerate(optimizer.param_groups):
        sampler = optimizer._sampler_of(number)
        if isinstance(sampler, LogUniform):
            yield sampler, group["params"]


def _shift(optimizer: Rated, intervals: list[tuple[LogUniform, list[Tensor]]]) -> Tensor:
    """How far the posterior mean of the clones' log-rates is from the middle of their interval; of several heads the
    mean."""
    shifts = []
    for sampler, params in intervals:
        own = set(params)
        for head in live.heads:
            posterior = head.switch.posterior()
            rates = optimizer.rates_of_clones(head, posterior.numel(), own)
            if not rates:
                continue
            drawn = rates.get("drawn_rate", rates["rate"])
            if posterior.is_meta:
                shifts.append(torch.zeros((), dtype=torch.float64, device="cpu"))
                continue
            mean = (posterior * drawn.double().log().to(posterior.device)).sum()
            middle = 0.5 * (math.log(sampler.lo) + math.log(sampler.hi))
            # Where every clone is dead nothing is known, and the rates must not become NaN.
            shifts.append((mean - middle).nan_to_num(0.0))
    if not shifts:
        raise ValueError(
            "params: got no clones whose rates come from an interval, expected those of a head: their posterior says "
            "where the rates go; a network without any takes warmup_steps= and averaging= in place of total_steps="
        )
    return torch.stack([shift.to(shifts[0].device) for shift in shifts]).mean()
