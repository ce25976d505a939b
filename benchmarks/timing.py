"""Interleaved timing: every candidate runs in every round, so that the machine's moods fall on all alike."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Median seconds of one call, and the first and third quartile over the rounds."""

    median: float
    lower: float
    upper: float


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds_per_block: float = 0.05,
    seconds: float = math.inf,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time the candidates in `rounds` rounds of one block each, in an order that rotates from round to round.

    A block repeats its call for about `seconds_per_block` seconds; its mean is one observation. After `seconds` no
    further round begins, but there are 3 at least.
    """
    names = list(candidates)
    repeats = {}
    for name in names:
        call = candidates[name]
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = max(1, round(seconds_per_block / max(once, 1e-7)))
    observed: dict[str, list[float]] = {name: [] for name in names}
    for name in turns(names, rounds, seconds, on_round):
        call, count = candidates[name], repeats[name]
        start = time.perf_counter()
        for _ in range(count):
            call()
        observed[name].append((time.perf_counter() - start) / count)
    return {name: summary(values) for name, values in observed.items()}


def turns(
    names: Sequence[str], rounds: int, seconds: float, on_round: Callable[[], None] | None
) -> Iterator[str]:
    """Whose turn it is: each once in a round, in rotated order; after `seconds` no round begins but the first 3."""
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        shift = turn % len(names)
        yield from (*names[shift:], *names[:shift])
        if on_round is not None:
            on_round()


def device_seconds(values: Mapping[str, Any]) -> Timing | None:
    """A candidate's time on the device: of a graph's replay, else between events, else on the wall clock."""
    seconds = values.get("seconds", {})
    clock = next((clock for clock in ("graph", "gpu", "wall") if clock in seconds), None)
    return None if clock is None else Timing(**seconds[clock])


def summary(values: list[float]) -> Timing:
    """Median and quartiles of the observations."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4)
    return Timing(median, lower, upper)
