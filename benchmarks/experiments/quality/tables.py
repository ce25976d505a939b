"""The comparison as tables: for the terminal by rich, for files as Markdown, from the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.experiments.methods import METHODS
from benchmarks.experiments.quality.summary import Cell, Summary, cell, cost, ran, worst_cases
from benchmarks.results import grouped
from benchmarks.tables import Table


def all_tables(summary: Summary) -> Iterator[Table]:
    """One for each task; over the tasks, if there are several; every rate of the grids."""
    for task in summary:
        yield task_table(task, summary)
    if len(summary) > 1:
        yield overall_table(summary)
    yield grid_table(summary)


def task_table(task: str, summary: Summary) -> Table:
    """What a task's methods reach after the last epoch, mean +- standard deviation over the seeds, and what they cost.

    The cost is that of one seed, the whole grid included.
    """
    cells = summary[task]
    first = next(iter(ran(cells).values()), None)
    unit = first.unit if first else "nats"
    epochs = f", {first.best[0]['case']['epochs']} epochs, {seeds(first.seeds)}" if first else ""
    rows = []
    for name, own in cells.items():
        if isinstance(own, str):
            rows.append([METHODS[name].label, own, *[""] * 4])
        else:
            label = METHODS[name].label + ("" if own.lr is None else f": {own.lr:g}")
            paid = [f"{own.runs:g}", f"{own.steps:.0f}", f"{own.seconds:.2g}"]
            rows.append([label, *figures(own), *paid])
    columns = ["method", f"test loss ({unit})", "accuracy %", "runs", "steps", "seconds"]
    return Table(f"{task}{epochs}", columns, rows)


def seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def overall_table(summary: Summary) -> Table:
    """The largest gap to the best method of a task, and what one seed on every task costs."""
    worst, paid = worst_cases(summary), cost(summary)
    rows = []
    for name, gap in sorted(worst.items(), key=lambda item: item[1].loss):
        runs, steps, seconds = paid[name]
        loss = "diverged" if math.isinf(gap.loss) else f"{gap.loss:.3f}"
        row = [METHODS[name].label, loss, f"{gap.accuracy:.1f}"]
        rows.append([*row, f"{runs:g}", f"{steps:.0f}", f"{seconds:.3g}"])
    columns = ["method", "worst gap: nats", "points", "runs", "steps", "seconds"]
    return Table(f"worst case over {', '.join(summary)}", columns, rows)


def grid_table(summary: Summary) -> Table:
    """Every rate of every grid on every task."""
    rows = []
    for task, cells in summary.items():
        for name, own in ran(cells).items():
            by_lr = grouped(own.all, lambda run: run["case"]["lr"]) if own.lr is not None else {}
            for lr in sorted(by_lr):
                one = cell(by_lr[lr])
                label = METHODS[name].label.partition(",")[0]
                chosen = "best" if lr == own.lr else ""
                rows.append([f"{label} on {task}", f"{lr:g}", *figures(one), chosen])
    columns = ["grid", "rate", "test loss", "accuracy %", "by validation"]
    return Table("Every rate of the grids", columns, rows)


def figures(own: Cell) -> list[str]:
    """Test loss and accuracy."""
    spread = own.seeds > 1
    accuracy = f"{own.accuracy[0]:.1f}" + (f" +- {own.accuracy[1]:.1f}" if spread else "")
    if own.diverged:
        return [f"diverged ({own.diverged} of {own.seeds})", accuracy]
    return [f"{own.loss[0]:.3f}" + (f" +- {own.loss[1]:.3f}" if spread else ""), accuracy]
