"""The figures of the summary as tables: what is worst comes first."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.experiments.quality import summary as figures
from benchmarks.experiments.quality.methods import METHODS, TUNED
from benchmarks.experiments.quality.summary import Cell, Row, Summary
from benchmarks.experiments.runs import mean_and_spread, plural
from benchmarks.results import Record, grouped
from benchmarks.show import Table

DIVERGED = "diverged"


def main_tables(summary: Summary, stopped: Summary) -> Iterator[Table]:
    """What the comparison says, as far as there are figures for it; `stopped` is that of runs stopped early."""
    found = figures.gaps(summary)
    if found:
        yield standings_table(summary, found)
        yield gaps_table(summary, found)
    if found := figures.gaps(stopped):
        yield stopped_table(stopped, found)
    if len(summary) > 1:
        yield profile_table(summary)
    yield from sensitivity_tables(summary)


def detail_tables(
    summary: Summary, stopped: Summary, missing: Iterable[Record] = ()
) -> Iterator[Table]:
    """What it stands on."""
    title = "test loss (nats; regressions: half the mean squared error), and the rate chosen"
    yield losses_table(summary, title)
    if stopped:
        yield losses_table(stopped, "the same with early stopping")
    if any(own.lr is not None for cells in summary.values() for own in cells.values()):
        yield grid_table(summary)
    ran = {row.method for cells in summary.values() for row in cells}
    reasons = {
        METHODS[name].label: record["missing"]
        for record in missing
        if (name := record["case"]["method"]) not in ran
    }
    if reasons:
        yield Table("What is missing", ["method", "why"], [list(item) for item in reasons.items()])


def nats(value: float, *, sign: bool = True) -> str:
    """A loss or a difference of losses."""
    return DIVERGED if math.isinf(value) else f"{value:{'+' if sign else ''}.3f}"


def percent(value: float) -> str:
    """A relative change."""
    return DIVERGED if math.isinf(value) else f"{100 * value:+.1f} %"


def change(values: Sequence[float]) -> str:
    """Mean of relative changes +- its standard error."""
    center, deviation = mean_and_spread(values)
    if len(values) == 1 or center == math.inf:
        return percent(center)
    return f"{100 * center:+.1f} +- {100 * deviation / math.sqrt(len(values)):.1f} %"


def spread(values: Iterable[float], *, sign: bool = True) -> str:
    """Mean +- standard deviation."""
    values = list(values)
    center, deviation = mean_and_spread(values)
    shown = len(values) > 1 and center < math.inf
    return nats(center, sign=sign) + (f" +- {deviation:.3f}" if shown else "")


def standings_table(summary: Summary, found: figures.Gaps) -> Table:
    """The methods over all tasks."""
    paid = figures.costs(summary)
    rows = []
    for row, own in figures.standings(found).items():
        line = [row.label, nats(own.worst), own.worst_task, nats(own.mean), nats(own.median)]
        line += [str(own.tasks)]
        cost = paid.get(row)
        if cost is None:
            rows.append([*line, "", "", ""])
        else:
            step = "" if cost.step is None else f"{cost.step:.2f}"
            rows.append([*line, f"{cost.runs:.3g}", step, f"{cost.bytes:.2f}"])
    columns = [
        "method",
        "worst gap",
        "where",
        "mean gap",
        "median",
        "tasks",
        "runs",
        "step",
        "memory",
    ]
    title = (
        "test loss behind the best of the grids of SGD and AdamW (nats); step and memory are multiples of "
        "Adam's"
    )
    return Table(title, columns, rows)


def gaps_table(summary: Summary, found: figures.Gaps) -> Table:
    """Every task, paired by seed."""
    rows = [
        [row.label, *(spread(found[row][t]) if t in found[row] else "" for t in summary)]
        for row in figures.standings(found)
    ]
    seeds = max(len(own.losses) for cells in summary.values() for own in cells.values())
    title = f"the same on each task, paired, mean +- standard deviation of {plural(seeds)}"
    return Table(title, ["method", *summary], rows)


def stopped_table(stopped: Summary, found: figures.Gaps) -> Table:
    """The methods where every run ends at its least validation loss."""
    rows = []
    for row, own in figures.standings(found).items():
        line = [row.label, nats(own.worst), own.worst_task, nats(own.mean), str(own.tasks)]
        by_task = found[row]
        line += [nats(statistics.fmean(by_task[t])) if t in by_task else "" for t in stopped]
        rows.append(line)
    title = (
        "the same with early stopping: each run, those of the grids too, ends where its validation loss, measured ten "
        "times, is least"
    )
    return Table(title, ["method", "worst gap", "where", "mean gap", "tasks", *stopped], rows)


def profile_table(summary: Summary) -> Table:
    """How often a method is nearly as good as the best."""
    by_nats, by_percent = (figures.behind(summary, relative=flag) for flag in (False, True))
    most = max((len(own) for own in by_nats.values()), default=0)
    rows = []
    for row in by_nats:
        if len(by_nats[row]) == most:
            shares = [figures.share_within(by_nats[row], limit) for limit in figures.NATS]
            shares += [figures.share_within(by_percent[row], limit) for limit in figures.PERCENT]
            rows.append([row.label, *(f"{share:.0f}" for share in shares)])
    rows.sort(key=lambda line: -sum(map(float, line[1:])))
    columns = [*(f"{limit:g} nats" for limit in figures.NATS)]
    columns += [f"{limit:g} %" for limit in figures.PERCENT]
    title = f"percent of {most} tasks on which a method's loss is so close to the best method's"
    return Table(title, ["method", *columns], rows)


def sensitivity_tables(summary: Summary) -> Iterator[Table]:
    """What the interval of the rates does to the test loss, by method."""
    for method, by_interval in figures.sensitivity(summary).items():
        rows = []
        for interval in sorted(by_interval, key=lambda ends: math.log(ends[1] / ends[0])):
            changes = by_interval[interval]
            means = {task: statistics.fmean(own) for task, own in changes.items() if own}
            shown = [change(changes[task]) if task in means else "" for task in summary]
            worst = percent(max(means.values())) if means else ""
            rows.append(["({:g}, {:g})".format(*interval), worst, *shown])
        own = METHODS[method].lr_range
        setting = "its own interval" if own is None else "({:g}, {:g})".format(*own)
        title = (
            f"{METHODS[method].label}: change of the test loss by the interval, against {setting}, mean +- standard "
            "error"
        )
        yield Table(title, ["interval", "worst", *summary], rows)


def losses_table(summary: Summary, title: str) -> Table:
    """The losses themselves, and the rate where one was chosen."""
    rows = []
    for row in {row: None for cells in summary.values() for row in cells}:
        shown = [shown_loss(cells[row]) if row in cells else "" for cells in summary.values()]
        rows.append([row.label, *shown])
    return Table(title, ["method", *summary], rows)


def shown_loss(own: Cell) -> str:
    rate = "" if own.lr is None else f" ({own.lr:g}{', the edge' if own.at_edge else ''})"
    if own.diverged:
        return f"{DIVERGED} ({own.diverged} of {len(own.losses)}){rate}"
    return spread(own.losses.values(), sign=False) + rate


def grid_table(summary: Summary) -> Table:
    """Mean test loss at every rate of the grids."""
    rows = []
    for name in TUNED:
        for task, cells in summary.items():
            own = cells.get(Row(name))
            if own is not None:
                by_lr = grouped(own.all, lambda record: record["case"]["lr"])
                losses = {lr: figures.cell(by_lr[lr]).loss for lr in sorted(by_lr)}
                entries = (
                    f"{lr:g}: {nats(loss, sign=False)}{' *' if lr == own.lr else ''}"
                    for lr, loss in losses.items()
                )
                rows.append([METHODS[name].label, task, "; ".join(entries)])
    return Table(
        "every rate of the grids, * the best on validation data", ["grid", "task", "losses"], rows
    )
