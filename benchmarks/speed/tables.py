"""Results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from timing import Timing

from speed.case import Case, Target
from speed.measure import Values, device_seconds

CLOCKS = ("graph", "gpu", "wall", "host")


def show_case(console: Console, case: Case, values: dict[str, Values]) -> None:
    """One row per candidate: times by clock, each as a ratio to the first candidate's too."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in case.sizes.items())
    clocks = [
        clock for clock in CLOCKS if any(clock in v.get("seconds", {}) for v in values.values())
    ]
    table = Table(title=f"{case.name} ({case.dtype}; {sizes})", title_justify="left")
    table.add_column("candidate", no_wrap=True)
    columns = ("ratio", "quartiles", "% copy", "% matrix", "memory, MB", "error", "")
    for clock in clocks:
        table.add_column(f"{clock}, us", justify="right")
    for title in columns:
        table.add_column(title, justify="right" if title else "left")
    first = next((time for v in values.values() if (time := device_seconds(v))), None)
    for name, row in values.items():
        if "missing" in row:
            blank = [""] * (len(clocks) + len(columns) - 1)
            table.add_row(f"[dim]{name}", *blank, f"[dim]{row['missing']}")
        else:
            table.add_row(name, *(_clock(row, clock) for clock in clocks), *_rest(row, first))
    console.print(table)


def _clock(row: Values, clock: str) -> str:
    if clock not in row["seconds"]:
        return "-"
    return f"{row['seconds'][clock]['median'] * 1e6:,.1f}"


def _rest(row: Values, first: Timing | None) -> list[str]:
    time = device_seconds(row)
    assert time is not None and first is not None
    low, high = (t / time.median for t in (time.lower, time.upper))
    return [
        f"{time.median / first.median:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{100 * row['copy_share']:.0f}" if "copy_share" in row else "-",
        f"{100 * row['matrix_share']:.0f}" if "matrix_share" in row else "-",
        f"{row['peak_memory'] / 1e6:,.1f}" if "peak_memory" in row else "-",
        f"{row['error']:.0e}",
    ]


def show_targets(
    console: Console, judged: list[tuple[Case, Target, Values]], dry_run: bool = False
) -> None:
    """The figures to reach, met or not."""
    if not judged:
        return
    title = "Figures to reach" + (" (dry run: the ratios mean nothing)" if dry_run else "")
    table = Table(title=title, title_justify="left")
    for name in ("row", "case", "metric", "against"):
        table.add_column(name)
    for name in ("ratio", "limit"):
        table.add_column(name, justify="right")
    table.add_column("")
    for case, target, result in judged:
        ratio = result["ratio"]
        verdict = {True: "[green]met", False: "[red]not met", None: f"[dim]{result.get('missing')}"}
        table.add_row(
            target.row,
            f"{case.name} ({case.dtype}, {_size(case)})",
            result["clock"] or target.metric,
            target.peer or "floor",
            "-" if ratio is None else f"{ratio:.3g}",
            f"{target.limit:.3g}",
            verdict[result["met"]],
        )
    console.print(table)


def _size(case: Case) -> str:
    sizes: dict[str, Any] = dict(case.sizes)
    return f"{next(iter(sizes))} {next(iter(sizes.values())):,}"
