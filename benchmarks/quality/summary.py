"""From the records of the runs to one row per method: what it reaches on each task, and what was paid for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from quality.methods import METHODS

Record = dict[str, Any]
# A task's data and the length of training: what runs must share to be compared.
SETTING = ("task", "data", "sizes", "epochs", "width")


class Cell(NamedTuple):
    """A method on a task: mean and standard deviation over the seeds of the last epoch's test loss and accuracy.

    Losses are in `unit`; a mean is inf where a run has diverged (`diverged` counts them). `lr` is the rate of least
    mean validation loss, where there was a choice. `runs` and `steps` are what one seed costs, the whole grid
    included, `seconds` its training time. `best` are the records of the seeds at `lr`, `all` those of the grid too.
    """

    loss: tuple[float, float]
    accuracy: tuple[float, float]
    unit: str
    diverged: int
    seeds: int
    lr: float | None
    runs: float
    steps: float
    seconds: float
    best: list[Record]
    all: list[Record]


# By task, then by method; a rival that could not run has the reason in place of a cell.
Summary = dict[str, dict[str, Cell | str]]


class Worst(NamedTuple):
    """How far behind a task's best method a method falls, at worst: nats of test loss, points of accuracy."""

    loss: float
    accuracy: float


def summarise(records: Iterable[Record]) -> Summary:
    """Cells by task and method, in the order of `METHODS`; of each task's settings the one that was run last."""
    records = shared(records)
    summary: Summary = {}
    for task in dict.fromkeys(record["case"]["task"] for record in records):
        own = [record for record in records if record["case"]["task"] == task]
        runs = [record for record in own if "missing" not in record]
        if runs:
            runs = list(latest(runs).values())
        row: dict[str, Cell | str] = {}
        for method in METHODS:
            same = [record for record in runs if record["case"]["method"] == method]
            reasons = [
                r["missing"] for r in own if "missing" in r and r["case"]["method"] == method
            ]
            if same:
                row[method] = cell(same)
            elif reasons:
                row[method] = reasons[-1]
        summary[task] = row
    return summary


def latest(runs: list[Record]) -> dict[str, Record]:
    """The last record of every case among those with the setting that the last run has."""
    setting = {key: runs[-1]["case"][key] for key in SETTING}
    return {
        repr(sorted(run["case"].items())): run
        for run in runs
        if all(run["case"][key] == value for key, value in setting.items())
    }


def shared(records: Iterable[Record]) -> list[Record]:
    """The records, and for a method whose runs on a task are those of plain Alrao, because its interval is the task's
    own there, these runs once more under its name. That is left out where it holds on every task."""
    records = list(records)
    tasks = {record["case"]["task"] for record in records}
    result = list(records)
    for method in METHODS.values():
        if method.lr_range is None:
            continue
        same = [
            record
            for record in records
            if record["case"]["method"] == "alrao" and record["lr_range"] == list(method.lr_range)
        ]
        if {record["case"]["task"] for record in same} != tasks:
            result += [{**r, "case": {**r["case"], "method": method.name}} for r in same]
    return result


def cell(runs: list[Record]) -> Cell:
    """The runs of one method on one task, over its grid and the seeds."""
    by_lr: dict[float | None, list[Record]] = {}
    for run in runs:
        by_lr.setdefault(run["case"]["lr"], []).append(run)
    lr = min(by_lr, key=lambda rate: validation(by_lr[rate]))
    best = by_lr[lr]
    seeds = len({run["case"]["seed"] for run in runs})
    losses = [math.inf if run["diverged"] else run["test_loss"] for run in best]
    return Cell(
        loss=mean_and_spread([loss * best[0]["per_nat"] for loss in losses]),
        accuracy=mean_and_spread([run["test_accuracy"] for run in best]),
        unit=best[0]["unit"],
        diverged=sum(run["diverged"] for run in best),
        seeds=len(best),
        lr=lr,
        runs=len(runs) / seeds,
        steps=sum(run["steps"] for run in runs) / seeds,
        seconds=sum(run["seconds"] for run in runs) / seeds,
        best=best,
        all=runs,
    )


def validation(runs: list[Record]) -> float:
    """Mean validation loss after the last epoch; inf where it is not finite."""
    losses = [run["curves"]["valid_loss"][-1] for run in runs]
    return math.inf if None in losses else statistics.fmean(losses)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds (0 for a single one); (inf, 0) where one is inf."""
    if any(math.isinf(value) for value in values):
        return math.inf, 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def worst_cases(summary: Summary) -> dict[str, Worst]:
    """By method, its largest gap over the tasks; only methods that ran on all of them."""
    gaps: dict[str, list[Worst]] = {}
    for cells in summary.values():
        ran = {name: cell for name, cell in cells.items() if isinstance(cell, Cell)}
        if not ran:
            continue
        least = min(nats(cell) for cell in ran.values())
        most = max(cell.accuracy[0] for cell in ran.values())
        for name, own in ran.items():
            gaps.setdefault(name, []).append(Worst(nats(own) - least, most - own.accuracy[0]))
    tasks = max((len(found) for found in gaps.values()), default=0)
    return {
        name: Worst(max(gap.loss for gap in found), max(gap.accuracy for gap in found))
        for name, found in gaps.items()
        if len(found) == tasks
    }


def nats(own: Cell) -> float:
    """The mean test loss in nats."""
    return own.loss[0] / own.best[0]["per_nat"]


def cost(summary: Summary) -> dict[str, tuple[float, float, float]]:
    """By method, what one seed on every task takes: runs, training steps and seconds, the grid included."""
    total: dict[str, tuple[float, float, float]] = {}
    for cells in summary.values():
        for name, own in cells.items():
            if isinstance(own, Cell):
                before = total.get(name, (0.0, 0.0, 0.0))
                total[name] = (
                    before[0] + own.runs,
                    before[1] + own.steps,
                    before[2] + own.seconds,
                )
    return total


def measured_on(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The machines and source states that the records come from, a line each."""
    lines = set()
    for record in records:
        m = record["machine"]
        lines.add(
            f"{m['gpu'] or m['cpu']}, {m['threads']} threads, torch {m['torch']}, python {m['python']}, "
            f"sources {m['sources']}, commit {m['commit']}"
        )
    return sorted(lines)
