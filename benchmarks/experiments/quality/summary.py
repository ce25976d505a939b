"""From the records of the runs to tables: what each method reaches on each task, and what was paid for it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.experiments.methods import COMPARED
from benchmarks.experiments.runs import mean, mean_and_spread, plural
from benchmarks.results import Record, grouped
from benchmarks.show import Table

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
    """Cells by task and method, in the order of `COMPARED`; of each task's settings the one that was run last."""
    summary: Summary = {}
    for task, own in grouped(shared(records), lambda record: record["case"]["task"]).items():
        runs = latest([record for record in own if "missing" not in record])
        by_method = grouped(runs, lambda run: run["case"]["method"])
        reasons = {r["case"]["method"]: r["missing"] for r in own if "missing" in r}
        summary[task] = {
            name: cell(by_method[name]) if name in by_method else reasons[name]
            for name in COMPARED
            if name in by_method or name in reasons
        }
    return summary


def latest(runs: list[Record]) -> list[Record]:
    """The last record of every case among those with the setting that the last run has."""
    last = runs[-1:] and [runs[-1]["case"][key] for key in SETTING]
    alike = [run for run in runs if [run["case"][key] for key in SETTING] == last]
    return list({repr(sorted(run["case"].items())): run for run in alike}.values())


def shared(records: Iterable[Record]) -> list[Record]:
    """The records, and for a method whose runs on a task are those of plain Alrao, because its interval is the task's
    own there, these runs once more under its name. That is left out where it holds on every task."""
    records = list(records)
    tasks = {record["case"]["task"] for record in records}
    plain = [r for r in records if r["case"]["method"] == "alrao"]
    result = list(records)
    for method in COMPARED.values():
        if method.lr_range is None:
            continue
        same = [record for record in plain if record["lr_range"] == list(method.lr_range)]
        if {record["case"]["task"] for record in same} != tasks:
            result += [{**r, "case": {**r["case"], "method": method.name}} for r in same]
    return result


def cell(runs: list[Record]) -> Cell:
    """The runs of one method on one task, over its grid and the seeds."""
    by_lr = grouped(runs, lambda run: run["case"]["lr"])
    # Chosen on the validation set.
    lr = min(by_lr, key=lambda rate: mean(r["curves"]["valid_loss"][-1] for r in by_lr[rate]))
    best = by_lr[lr]
    seeds = len({run["case"]["seed"] for run in runs})
    losses = [math.inf if run["diverged"] else run["test_loss"] for run in best]
    return Cell(
        loss=mean_and_spread(loss * best[0]["per_nat"] for loss in losses),
        accuracy=mean_and_spread(run["test_accuracy"] for run in best),
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


def ran(cells: Mapping[str, Cell | str]) -> dict[str, Cell]:
    """The methods of a task without those that could not run."""
    return {name: own for name, own in cells.items() if isinstance(own, Cell)}


def worst_cases(summary: Summary) -> dict[str, Worst]:
    """By method, its largest gap over the tasks; only methods that ran on all of them."""
    gaps: dict[str, list[Worst]] = {}
    for cells in map(ran, summary.values()):
        least = min(map(nats, cells.values()), default=0.0)
        most = max((own.accuracy[0] for own in cells.values()), default=0.0)
        for name, own in cells.items():
            gaps.setdefault(name, []).append(Worst(nats(own) - least, most - own.accuracy[0]))
    tasks = max((len(found) for found in gaps.values()), default=0)
    return {n: Worst(*map(max, zip(*own))) for n, own in gaps.items() if len(own) == tasks}


def nats(own: Cell) -> float:
    """The mean test loss in nats."""
    return own.loss[0] / own.best[0]["per_nat"]


def cost(summary: Summary) -> dict[str, tuple[float, float, float]]:
    """By method, what one seed on every task takes: runs, training steps and seconds, the grid included."""
    paid: dict[str, list[tuple[float, float, float]]] = {}
    for cells in map(ran, summary.values()):
        for name, own in cells.items():
            paid.setdefault(name, []).append((own.runs, own.steps, own.seconds))
    return {name: tuple(map(sum, zip(*parts))) for name, parts in paid.items()}


def measured_on(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The machines and source states that the records come from, a line each."""
    fields = "{threads} threads, torch {torch}, python {python}, sources {sources}, commit {commit}"
    machines = [record["machine"] for record in records]
    return sorted({f"{m['gpu'] or m['cpu']}, " + fields.format(**m) for m in machines})


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
    epochs = f", {first.best[0]['case']['epochs']} epochs, {plural(first.seeds)}" if first else ""
    rows = []
    for name, own in cells.items():
        if isinstance(own, str):
            rows.append([COMPARED[name].label, own, *[""] * 4])
        else:
            label = COMPARED[name].label + ("" if own.lr is None else f": {own.lr:g}")
            paid = [f"{own.runs:g}", f"{own.steps:.0f}", f"{own.seconds:.2g}"]
            rows.append([label, *figures(own), *paid])
    columns = ["method", f"test loss ({unit})", "accuracy %", "runs", "steps", "seconds"]
    return Table(f"{task}{epochs}", columns, rows)


def overall_table(summary: Summary) -> Table:
    """The largest gap to the best method of a task, and what one seed on every task costs."""
    worst, paid = worst_cases(summary), cost(summary)
    rows = []
    for name, gap in sorted(worst.items(), key=lambda item: item[1].loss):
        runs, steps, seconds = paid[name]
        loss = "diverged" if math.isinf(gap.loss) else f"{gap.loss:.3f}"
        row = [COMPARED[name].label, loss, f"{gap.accuracy:.1f}"]
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
                label = COMPARED[name].label.partition(",")[0]
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
