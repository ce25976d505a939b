"""Results on the terminal."""

from rich.console import Console
from rich.table import Table

from benchmarks.speed.case import Case, Target
from benchmarks.speed.measure import Values
from benchmarks.timing import Timing, device_seconds

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
