"""The figures to reach: ratios of what was measured side by side in one case."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.case import Case, Target
from benchmarks.timing import Timing, device_seconds

Values = dict[str, Any]
Rates = dict[str, float]


def judge(case: Case, target: Target, values: dict[str, Values], rates: Rates) -> Values:
    """`ratio`, `limit` and `met` of a target, and the clock of both sides; or why there is no ratio."""
    result: Values = {"limit": target.limit, "ratio": None, "met": None, "clock": None}
    peer_name = _fastest(values, target) if target.peer == "best" else target.peer
    missing = [
        f"{name}: {values[name]['missing']}"
        for name in (target.ours, peer_name)
        if name is not None and "missing" in values[name]
    ]
    if missing:
        return {**result, "missing": "; ".join(missing)}
    ours = values[target.ours]
    if target.peer is None:
        return _over_the_floor(case, target, ours, rates, result)
    if peer_name is None:
        return {**result, "missing": "no peer could be measured"}
    peer = values[peer_name]
    if target.metric == "memory":
        pair = (ours.get("peak_memory"), peer.get("peak_memory"))
        if None in pair:
            return {**result, "missing": "peak memory was not measured"}
        return _ratio(result, *pair, "memory")
    if target.metric == "gpu":
        for clock in ("graph", "gpu", "wall"):
            if clock in ours["seconds"] and clock in peer["seconds"]:
                return _clocked(result, ours, peer, clock)
    if target.metric not in ours["seconds"]:
        return {**result, "missing": f"no {target.metric} clock on this device"}
    return _clocked(result, ours, peer, target.metric)


def floor(case: Case, rates: Rates) -> float | None:
    """Seconds that the case's bytes and flops take at the machine's rates, whichever is longer."""
    times = []
    if case.bytes is not None and "copy" in rates:
        times.append(case.bytes / rates["copy"])
    if case.flops is not None and case.dtype in rates:
        times.append(case.flops / rates[case.dtype])
    return max(times, default=None)


def shares(case: Case, values: Values, rates: Rates) -> Values:
    """What the candidate's time makes of the machine: its share of the copy rate and of the matrix rate."""
    time = device_seconds(values)
    found: Values = {}
    if time is None:
        return found
    if case.bytes is not None and "copy" in rates:
        found["copy_share"] = case.bytes / time.median / rates["copy"]
    if case.flops is not None and case.dtype in rates:
        found["matrix_share"] = case.flops / time.median / rates[case.dtype]
    return found


def _clocked(result: Values, ours: Values, peer: Values, clock: str) -> Values:
    medians = (Timing(**side["seconds"][clock]).median for side in (ours, peer))
    return _ratio(result, *medians, clock)


def _fastest(values: dict[str, Values], target: Target) -> str | None:
    """The peer with the shortest time on the device; all backends of ours aside."""
    times = {
        name: time.median
        for name, peer in values.items()
        if not name.startswith(target.ours) and (time := device_seconds(peer)) is not None
    }
    return min(times, key=times.__getitem__, default=None)


def _over_the_floor(
    case: Case, target: Target, ours: Values, rates: Rates, result: Values
) -> Values:
    if target.metric == "memory":
        if "peak_memory" not in ours or case.allowed_memory is None:
            return {**result, "missing": "peak memory was not measured"}
        return _ratio(result, ours["peak_memory"], case.allowed_memory, "memory")
    time, least = device_seconds(ours), floor(case, rates)
    if time is None or least is None:
        return {**result, "missing": "the floor is not known"}
    return _ratio(result, time.median, least, "gpu")


def _ratio(result: Values, ours: float, peer: float, clock: str) -> Values:
    if not peer > 0:
        return {**result, "missing": f"the peer's {clock} is {peer}"}
    ratio = ours / peer
    return {**result, "ratio": ratio, "met": ratio <= result["limit"], "clock": clock}
