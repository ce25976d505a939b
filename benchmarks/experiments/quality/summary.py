"""From the records of the runs to figures: by task and method, against the best of the tuned, over the tasks."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.experiments.quality.methods import METHODS, TUNED
from benchmarks.experiments.quality.train import DIVERGED
from benchmarks.experiments.runs import mean
from benchmarks.results import Record, grouped

Interval = tuple[float, float]


class Row(NamedTuple):
    """A method, and the interval of its rates where that was given in place of its own."""

    method: str
    interval: Interval | None = None

    @property
    def label(self) -> str:
        ends = "" if self.interval is None else ", ({:g}, {:g})".format(*self.interval)
        return METHODS[self.method].label + ends


class Cell(NamedTuple):
    """A method on a task, at the rate of least mean validation loss where there was a choice.

    `losses` are the test losses by seed, inf where a run has diverged; `valid` is the mean validation loss. `best` are
    the records at that rate by seed, `all` those of the grid too. `at_edge`: the rate is an end of the grid.
    """

    losses: dict[int, float]
    valid: float
    lr: float | None
    at_edge: bool
    best: dict[int, Record]
    all: list[Record]

    @property
    def loss(self) -> float:
        """The mean test loss."""
        return statistics.fmean(self.losses.values())

    @property
    def diverged(self) -> int:
        return sum(record["diverged"] for record in self.best.values())

    @property
    def step_ms(self) -> dict[str, float]:
        """By the machines that it has run on; records without a time are of runs on another day than the rest."""
        found: dict[str, float] = {}
        for record in self.all:
            if "step_ms" in record:
                device = record["machine"]["gpu"] or record["machine"]["cpu"]
                found[device] = min(record["step_ms"], found.get(device, math.inf))
        return found

    @property
    def bytes(self) -> int:
        return max(record["bytes"] for record in self.all)


Cells = dict[Row, Cell]
# By task, in the order of the records.
Summary = dict[str, Cells]


def row_of(record: Record) -> Row:
    ends = record["case"]["interval"]
    return Row(record["case"]["method"], None if ends is None else (ends[0], ends[1]))


def summarise(records: Iterable[Record]) -> Summary:
    """Cells by task and row, methods in the order of `METHODS`; the last record of a case counts."""
    ran = [r for r in records if "missing" not in r and r["case"]["method"] in METHODS]
    latest = {repr(sorted(record["case"].items())): record for record in ran}.values()
    order = list(METHODS)
    summary: Summary = {}
    for task, own in grouped(latest, lambda record: record["case"]["task"]).items():
        rows = grouped(longest(own), row_of)
        by_method = sorted(rows, key=lambda row: order.index(row.method))
        summary[task] = {row: cell(rows[row]) for row in by_method}
    return summary


def stopped_early(records: Iterable[Record]) -> list[Record]:
    """The records as if each run had ended where its validation loss was least, of those that say where that is."""
    result = []
    for record in records:
        if "stopped" in record:
            least = record["stopped"] or {"valid_loss": None, "test_loss": None}
            loss = least["test_loss"]
            diverged = loss is None or loss > DIVERGED * record["guess"]
            losses = {name: least[name] for name in ("valid_loss", "test_loss")}
            result.append({**record, **losses, "diverged": diverged})
    return result


def longest(records: list[Record]) -> list[Record]:
    """Of a task's records, which may be of runs of several lengths, those of the longest."""
    steps = max(record["case"]["steps"] for record in records)
    return [record for record in records if record["case"]["steps"] == steps]


def cell(records: list[Record]) -> Cell:
    """The runs of one method on one task, over its grid and the seeds."""
    by_lr = grouped(records, lambda record: record["case"]["lr"])
    # Only rates that all seeds have tried: an interrupted grid must not favour a rate that met an easy seed.
    most = max(len(own) for own in by_lr.values())
    valid = {
        lr: mean(None if r["diverged"] else r["valid_loss"] for r in own)
        for lr, own in by_lr.items()
        if len(own) == most
    }
    lr = min(valid, key=lambda rate: valid[rate])
    best = {record["case"]["seed"]: record for record in by_lr[lr]}
    losses = {seed: math.inf if r["diverged"] else r["test_loss"] for seed, r in best.items()}
    at_edge = len(by_lr) > 1 and lr in (min(by_lr), max(by_lr))
    return Cell(losses, valid[lr], lr, at_edge, best, records)


def reference(cells: Mapping[Row, Cell]) -> Cell | None:
    """The best of the tuned methods, each at its best rate, by mean validation loss."""
    tuned = [cells[Row(name)] for name in TUNED if Row(name) in cells]
    return min(tuned, key=lambda own: own.valid, default=None)


def paired(cell: Cell, other: Cell, *, relative: bool = False) -> list[float]:
    """Differences of the test losses seed by seed, of the seeds that both have; relative ones as parts of `other`."""
    pairs = [(cell.losses[s], other.losses[s]) for s in cell.losses if s in other.losses]
    # Where the other has diverged nothing is worse than it.
    known = [(a, b) for a, b in pairs if b < math.inf]
    return [(a - b) / (b if relative else 1) for a, b in known]


Gaps = dict[Row, dict[str, list[float]]]


def gaps(summary: Summary) -> Gaps:
    """By row and task, the differences to the best of the tuned, seed by seed; nothing where it has not run."""
    result: Gaps = {}
    for task, cells in summary.items():
        best = reference(cells)
        for row, own in cells.items():
            differences = paired(own, best) if best is not None else []
            if differences:
                result.setdefault(row, {})[task] = differences
    return result


class Standing(NamedTuple):
    """A method over the tasks: largest, mean and median gap in nats of test loss, where the largest is, on how many."""

    worst: float
    worst_task: str
    mean: float
    median: float
    tasks: int


def standings(found: Gaps) -> dict[Row, Standing]:
    """The methods at their own settings: those on all tasks first, then the best worst case, then the mean."""
    result = {}
    for row, by_task in found.items():
        if row.interval is None:
            means = {task: statistics.fmean(own) for task, own in by_task.items()}
            worst = max(means, key=lambda task: means[task])
            middle = statistics.fmean(means.values()), statistics.median(means.values())
            result[row] = Standing(means[worst], worst, *middle, len(means))
    order = sorted(
        result, key=lambda row: (-result[row].tasks, result[row].worst, result[row].mean)
    )
    return {row: result[row] for row in order}


NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PERCENT = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def behind(summary: Summary, *, relative: bool) -> dict[Row, list[float]]:
    """By row, on each of its tasks, how far its mean test loss is behind the least of all rows: nats, or percent."""
    result: dict[Row, list[float]] = {}
    for cells in summary.values():
        own = {row: cell for row, cell in cells.items() if row.interval is None}
        least = min((cell.loss for cell in own.values()), default=math.inf)
        if least < math.inf:
            for row, cell in own.items():
                scale = 100 / least if relative else 1.0
                result.setdefault(row, []).append((cell.loss - least) * scale)
    return result


def share_within(distances: list[float], limit: float) -> float:
    """The part of the tasks, in percent: a point of a performance profile (Dolan and More 2002)."""
    return 100 * sum(distance <= limit for distance in distances) / len(distances)


def sensitivity(summary: Summary) -> dict[str, dict[Interval, dict[str, list[float]]]]:
    """By method, interval and task: relative changes of the test loss to the method's own setting, seed by seed.

    Where that has diverged on a task and the other has not, there is no figure.
    """
    result: dict[str, dict[Interval, dict[str, list[float]]]] = {}
    for task, cells in summary.items():
        for row, own in cells.items():
            if row.interval is not None and Row(row.method) in cells:
                changes = paired(own, cells[Row(row.method)], relative=True)
                by_interval = result.setdefault(row.method, {})
                by_interval.setdefault(row.interval, {})[task] = changes
    return result


class Cost(NamedTuple):
    """Of a method, in multiples of Adam's, geometric means over the tasks: time of a step on the same machine, None
    where no task has run both there, and bytes that it keeps; and how many runs a task takes."""

    step: float | None
    bytes: float
    runs: float


ADAM = Row("adam")


def costs(summary: Summary) -> dict[Row, Cost]:
    """On the tasks that Adam has run on too."""
    times: dict[Row, list[float]] = {}
    others: dict[Row, list[tuple[float, float]]] = {}
    for cells in summary.values():
        adam = cells.get(ADAM)
        for row, own in cells.items():
            if adam is not None and row.interval is None:
                others.setdefault(row, []).append(
                    (own.bytes / adam.bytes, len(own.all) / len(own.best))
                )
                base, there = adam.step_ms, own.step_ms
                times.setdefault(row, []).extend(
                    there[device] / base[device] for device in there if device in base
                )
    result = {}
    for row, found in others.items():
        kept, runs = zip(*found)
        step = statistics.geometric_mean(times[row]) if times[row] else None
        result[row] = Cost(step, statistics.geometric_mean(kept), statistics.fmean(runs))
    return result


def measured_on(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The machines and source states that the records come from, a line each."""
    fields = "{threads} threads, torch {torch}, python {python}, sources {sources}, commit {commit}"
    machines = [record["machine"] for record in records]
    return sorted({f"{m['gpu'] or m['cpu']}, " + fields.format(**m) for m in machines})
