"""The command line of `python benchmarks quality`."""

import argparse
import functools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.experiments.data import DataMissing, load_images
from benchmarks.experiments.quality import plots
from benchmarks.experiments.quality.methods import INTERVALS, METHODS
from benchmarks.experiments.quality.summary import (
    Interval,
    Summary,
    measured_on,
    stopped_early,
    summarise,
)
from benchmarks.experiments.quality.tables import detail_tables, main_tables
from benchmarks.experiments.quality.tasks import KINDS, LARGE, Kind, SmallTask, cifar_kinds
from benchmarks.experiments.quality.train import train
from benchmarks.experiments.runs import Run, check, device_of, run_all
from benchmarks.results import Record, Results

FULL_SEEDS, QUICK_TASKS, QUICK_STEPS = 3, ("digits", "cnn-plain", "graph"), 60
# Whose interval is varied.
INTERVALS_OF = ("alrao", "alrao-adam-run", "unbounded-run")
CIFAR = ("cifar", "cifar-plain")
# Characters of a terminal that shows all tables.
WIDE = 180

DESCRIPTION = f"""A comparison without tuning, each method at one fixed setting on small tasks of different kinds,
against the best of grids of SGD and AdamW, chosen on validation data. All methods of a seed start from the same
backbone and see the same data in the same order. Tasks: {", ".join(KINDS)}; from a file {", ".join(CIFAR)}. Methods:
{", ".join(METHODS)}. Every run is kept in RESULTS/quality.jsonl; an interrupted command goes on with the next run."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python benchmarks quality", description=DESCRIPTION)
    add = result.add_argument
    quick = f"{', '.join(QUICK_TASKS)}, one seed, {QUICK_STEPS} steps: under a minute"
    add("--quick", action="store_true", help=quick)
    medium = f"one seed of all tasks but {LARGE}: about 20 minutes on a core"
    add("--medium", action="store_true", help=medium)
    tasks = f"default: all, and {' and '.join(CIFAR)} with --cifar"
    add("--tasks", nargs="+", choices=(*KINDS, *CIFAR), metavar="NAME", help=tasks)
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        default=list(METHODS),
        help="default: all",
    )
    add(
        "--intervals-of",
        nargs="*",
        choices=METHODS,
        metavar="NAME",
        default=list(INTERVALS_OF),
        help=f"methods to try on several intervals (default {' '.join(INTERVALS_OF)})",
    )
    seeds = f"default {FULL_SEEDS}, of {LARGE} 1; with --quick and --medium 1"
    add("--seeds", type=int, help=seeds)
    add("--steps", type=int, help="of every run, in place of each task's own number")
    add("--cifar", type=Path, metavar="PATH", help="cifar-10-batches-py, or a .npz of JPEG files")
    add("--jobs", type=int, default=1, help="runs side by side, a process each (default 1)")
    add("--device", type=torch.device, help="default: a GPU where there is one")
    threads = "of torch on the CPU (default 1: the networks are small)"
    add("--threads", type=int, default=1, help=threads)
    add("--results", type=Path, default=Path("results/quality"))
    return result


def main(arguments: list[str]) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    check(cli, options, ("seeds", "steps", "threads", "jobs"))
    torch.set_num_threads(options.threads)
    stem = "quick" if options.quick else "quality"
    results = Results(options.results / f"{stem}.jsonl", machine.describe())
    try:
        runs = list(plan(options))
    except (DataMissing, ValueError) as problem:
        cli.exit(2, f"{cli.prog}: {problem}\n")
    records = run_all(runs, results, desc="quality", labels=True, jobs=options.jobs)
    missing = [record for record in records if "missing" in record]
    report(summarise(records), summarise(stopped_early(records)), missing, options, Console())


def kinds_of(options: argparse.Namespace) -> dict[str, Kind]:
    """The tasks by name. Raises DataMissing where there is no file for one of them."""
    cache = options.results / "data"
    known = {**KINDS, **(cifar_kinds(options.cifar, cache) if options.cifar else {})}
    names = options.tasks or (QUICK_TASKS if options.quick else known)
    if options.medium and not options.tasks:
        names = [name for name in names if name != LARGE]
    for name in names:
        if name not in known:
            raise DataMissing(f"the task {name} needs --cifar PATH")
    if options.cifar and set(CIFAR) & set(names):
        # Read once, and found to be what it is said to be, before the first run.
        load_images(options.cifar, cache)
    return {name: known[name] for name in names}


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """One seed after the other, so that an interruption leaves whole seeds; the large task comes last of all."""
    kinds = kinds_of(options)
    steps = options.steps or (QUICK_STEPS if options.quick else None)
    seeds = options.seeds or (1 if options.quick or options.medium else FULL_SEEDS)
    several = [(name, seed) for seed in range(seeds) for name in kinds if name != LARGE]
    once = [(LARGE, seed) for seed in range(options.seeds or 1) if LARGE in kinds]
    device = device_of(options)
    for name, seed in [*several, *once]:
        for method in map(METHODS.__getitem__, dict.fromkeys(options.methods)):
            for lr in method.grid:
                yield planned(name, kinds[name], method.name, seed, lr, None, steps, device)
            if method.name in options.intervals_of:
                for interval in INTERVALS:
                    if interval != method.lr_range:
                        yield planned(
                            name, kinds[name], method.name, seed, None, interval, steps, device
                        )


def planned(
    name: str,
    kind: Kind,
    method: str,
    seed: int,
    lr: float | None,
    interval: Interval | None,
    steps: int | None,
    device: torch.device,
) -> Run:
    case = {"task": name, "method": method, "lr": lr, "seed": seed}
    case |= {"interval": interval and list(interval), "steps": steps or kind.steps}
    start = partial(trained, kind, method, seed, lr, interval, steps, device)
    chosen = lr if interval is None else interval
    label = f"{name} {method}{'' if chosen is None else f' {chosen}'} seed {seed}"
    return Run(label, case, None, start, METHODS[method].missing(), {"method": method})


@functools.lru_cache(maxsize=1)
def _task(kind: Kind, seed: int, device: torch.device, steps: int | None) -> SmallTask:
    return SmallTask(kind, seed, device, steps)


def trained(
    kind: Kind,
    method: str,
    seed: int,
    lr: float | None,
    interval: Interval | None,
    steps: int | None,
    device: torch.device,
) -> Record:
    """What the run's record holds. Arguments are what a process can be sent."""
    task = _task(kind, seed, device, steps)
    return train(METHODS[method], task, seed, lr=lr, lr_range=interval, device=device)


def report(
    summary: Summary,
    stopped: Summary,
    missing: list[Record],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Print what the comparison says; write that, the details and the plots."""
    tables = list(main_tables(summary, stopped))
    # A column for each task needs room.
    for table in tables if console.width >= WIDE else tables[:1]:
        console.print(table.rich(whole=console.width >= WIDE))
    tables += detail_tables(summary, stopped, missing)
    written = [table.markdown() + "\n" for table in tables]
    runs = (run for cells in summary.values() for own in cells.values() for run in own.all)
    sources = measured_on(runs)
    for line in sources:
        console.print("measured on " + line, highlight=False)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / ("quick.md" if options.quick else "quality.md")
    path.write_text("\n".join([*written, *(f"Measured on {line}.\n" for line in sources)]))
    figures = plots.plot(summary, options.results / "quick" if options.quick else options.results)
    console.print("tables, plots: " + ", ".join(map(str, [path, *figures])), highlight=False)
