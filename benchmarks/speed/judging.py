"""What the values of a case say: ratios and the figures to reach, and the tables of them on the terminal."""

from rich.console import Console
from rich.table import Table

from benchmarks.speed.case import Case, Target
from benchmarks.speed.measure import Values
from benchmarks.timing import Timing, device_seconds

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


CLOCKS = ("graph", "gpu", "wall", "host")


def show_case(console: Console, case: Case, values: dict[str, Values]) -> None:
    """One row per candidate: times by clock, each as a ratio to the first candidate's too."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in case.sizes.items())
    clocks = [c for c in CLOCKS if any(c in v.get("seconds", {}) for v in values.values())]
    table = Table(title=f"{case.name} ({case.dtype}; {sizes})", title_justify="left")
    table.add_column("candidate", no_wrap=True)
    columns = ("ratio", "quartiles", "% copy", "% matrix", "memory, MB", "error", "")
    for title in (*(f"{clock}, us" for clock in clocks), *columns):
        table.add_column(title, justify="right" if title else "left")
    first = next((time for v in values.values() if (time := device_seconds(v))), None)
    for name, row in values.items():
        if "missing" in row:
            blank = [""] * (len(clocks) + len(columns) - 1)
            table.add_row(f"[dim]{name}", *blank, f"[dim]{row['missing']}")
        else:
            medians = [row["seconds"].get(clock, {}).get("median") for clock in clocks]
            times = ["-" if m is None else f"{m * 1e6:,.1f}" for m in medians]
            table.add_row(name, *times, *figures(row, first, device_seconds(row), "-"))
    console.print(table)


def figures(row: Values, first: Timing, unit: Timing, absent: str) -> list[str]:
    """Of a candidate that was timed: the ratio to the `first`; its range as ratios to `unit`; shares of the rates,
    memory and error, as far as there are any."""
    time = device_seconds(row)
    assert time is not None
    rest = (
        ("copy_share", 100, ".0f"),
        ("matrix_share", 100, ".0f"),
        ("peak_memory", 1e-6, ",.1f"),
        ("error", 1, ".0e"),
    )
    return [
        f"{time.median / first.median:.2f}",
        f"{time.lower / unit.median:.2f}-{time.upper / unit.median:.2f}",
        *(absent if row.get(k) is None else format(row[k] * by, digits) for k, by, digits in rest),
    ]


def show_targets(
    console: Console, judged: list[tuple[Case, Target, Values]], dry_run: bool
) -> None:
    """The figures to reach, met or not."""
    if not judged:
        return
    title = "Figures to reach" + (" (dry run: the ratios mean nothing)" if dry_run else "")
    table = Table(title=title, title_justify="left")
    for name in ("row", "case", "metric", "against", "ratio", "limit", ""):
        table.add_column(name, justify="right" if name in ("ratio", "limit") else "left")
    for case, target, result in judged:
        ratio = result["ratio"]
        size = "{} {:,}".format(*next(iter(case.sizes.items())))
        verdict = {True: "[green]met", False: "[red]not met", None: f"[dim]{result.get('missing')}"}
        table.add_row(
            target.row,
            f"{case.name} ({case.dtype}, {size})",
            result["clock"] or target.metric,
            target.peer or "floor",
            "-" if ratio is None else f"{ratio:.3g}",
            f"{target.limit:.3g}",
            verdict[result["met"]],
        )
    console.print(table)
