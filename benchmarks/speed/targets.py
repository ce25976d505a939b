"""The figures to reach: ratios of what was measured side by side in one case."""

from typing import Any

from benchmarks.speed.case import Case, Target
from benchmarks.timing import device_seconds

Values = dict[str, Any]
Rates = dict[str, float]


def judge(case: Case, target: Target, values: dict[str, Values], rates: Rates) -> Values:
    """`ratio`, `limit` and `met` of a target, and the clock of both sides; or why there is no ratio."""
    result: Values = {"limit": target.limit, "ratio": None, "met": None, "clock": None}
    peer_name = _fastest(values, target) if target.peer == "best" else target.peer
    names = [name for name in (target.ours, peer_name) if name is not None]
    missing = [f"{n}: {values[n]['missing']}" for n in names if "missing" in values[n]]
    if missing:
        return {**result, "missing": "; ".join(missing)}
    if target.peer is not None and peer_name is None:
        return {**result, "missing": "no peer could be measured"}
    ours, peer = values[target.ours], values[peer_name] if peer_name else {}
    if target.metric == "memory":
        bound = peer.get("peak_memory") if peer_name else case.allowed_memory
        if "peak_memory" not in ours or bound is None:
            return {**result, "missing": "peak memory was not measured"}
        return _ratio(result, ours["peak_memory"], bound, "memory")
    if peer_name is None:
        time, least = device_seconds(ours), floor(case, rates)
        if time is None or least is None:
            return {**result, "missing": "the floor is not known"}
        return _ratio(result, time.median, least, "gpu")
    clocks = ("graph", "gpu", "wall") if target.metric == "gpu" else (target.metric,)
    for clock in clocks:
        if clock in ours["seconds"] and clock in peer["seconds"]:
            medians = (side["seconds"][clock]["median"] for side in (ours, peer))
            return _ratio(result, *medians, clock)
    return {**result, "missing": f"no {target.metric} clock on this device"}


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


def _fastest(values: dict[str, Values], target: Target) -> str | None:
    """The peer with the shortest time on the device; all backends of ours aside."""
    times = {
        name: time.median
        for name, peer in values.items()
        if not name.startswith(target.ours) and (time := device_seconds(peer)) is not None
    }
    return min(times, key=times.__getitem__, default=None)


def _ratio(result: Values, ours: float, peer: float, clock: str) -> Values:
    if not peer > 0:
        return {**result, "missing": f"the peer's {clock} is {peer}"}
    ratio = ours / peer
    return {**result, "ratio": ratio, "met": ratio <= result["limit"], "clock": clock}
