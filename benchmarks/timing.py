"""Interleaved timing: every candidate runs in every round, so that the machine's moods fall on all alike.

On a CPU the wall clock tells; on a GPU there are three clocks: the device's own time, by events and by replays of a
CUDA graph; wall and host time.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch


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


Runs = Sequence[Callable[[], object]]
# A block of calls takes about this long, but has no more calls than the queue of launches holds with room to spare.
BLOCK_SECONDS, MOST_CALLS = 0.02, 48


class Measured(NamedTuple):
    """What the clocks say of one candidate: seconds by clock, and why a clock is missing."""

    times: dict[str, Timing]
    missing: dict[str, str]


def input_sets(set_bytes: float) -> int:
    """How many sets of inputs to rotate so that none is in the L2 cache when its turn comes; at most 8."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(8, int(3 * cache / max(set_bytes, 1)) + 1)) if set_bytes < 2 * cache else 1


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that are allocated at most during `call` beyond those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def capture(runs: Runs) -> torch.cuda.CUDAGraph:
    """A graph of one run of each set. Raises RuntimeError where something in them cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


class _Block:
    """Calls in a row between two events: one observation of each clock."""

    def __init__(self, runs: Runs, once: float, clocks: tuple[str, ...]) -> None:
        self.runs = runs
        self.clocks = clocks
        rounds = max(1, round(min(BLOCK_SECONDS / max(once, 1e-6), MOST_CALLS) / len(runs)))
        self.calls = list(runs) * rounds
        self.observed: dict[str, list[float]] = {clock: [] for clock in clocks}

    def observe(self, sets_per_call: int = 1) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        for call in self.calls:
            call()
        end.record()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        count = len(self.calls) * sets_per_call
        seconds = (start.elapsed_time(end) / 1e3, done - begin, queued - begin)
        for clock, value in zip(self.clocks, seconds):
            self.observed[clock].append(value / count)


def _once(runs: Runs) -> float:
    """Seconds of a warm call."""
    for run in (*runs, *runs[:2]):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for run in runs:
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(runs)


def gpu_interleave(
    candidates: Mapping[str, Runs],
    *,
    rounds: int,
    seconds: float,
    captured: float,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Measured]:
    """Time the candidates, each a list of one call per set of inputs, in interleaved rounds, 3 at least, for `seconds`.

    Clocks: "gpu", device time between two events around calls in a row (where launches are slower than the kernels, it
    is the launches that it sees); "graph", device time of a replay; "wall" and "host", eager: until the device is done,
    and until everything is queued. Calls of more than `captured` seconds are not captured: their launches are hidden,
    and a graph would hold a copy of all their buffers.
    """
    results = {name: Measured({}, {}) for name in candidates}
    blocks: dict[str, list[tuple[_Block, int]]] = {}
    for name, runs in candidates.items():
        once = _once(runs)
        blocks[name] = [(_Block(runs, once, ("gpu", "wall", "host")), 1)]
        if once > captured:
            results[name].missing["graph"] = "slow enough for its launches to be hidden"
            continue
        try:
            graph = capture(runs)
        except Exception as error:  # Whatever a peer raises: the eager clocks go on without it.
            results[name].missing["graph"] = f"cannot be captured: {_first_line(error)}"
            torch.cuda.synchronize()
            continue
        replay = _Block([graph.replay], once * len(runs), ("graph",))
        blocks[name].append((replay, len(runs)))
    for name in turns(list(candidates), rounds, seconds, on_round):
        for block, sets in blocks[name]:
            block.observe(sets)
    for name, measured in results.items():
        for block, _ in blocks[name]:
            for clock, values in block.observed.items():
                measured.times[clock] = summary(values)
    return results


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
