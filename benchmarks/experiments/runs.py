"""Many runs in a row: those with a record are not done again. Figures over their seeds; options that commands share."""

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.results import Record, Results


class Run(NamedTuple):
    """A run that is wanted.

    case: what names its record. train: what the record holds; called with the `bar` of its `epochs`, or, where they
    are None, with nothing. missing: why it cannot be done here, which is recorded under `named` in its place. done:
    called when the record is on the disk.
    """

    label: str
    case: Record
    epochs: int | None
    train: Callable[..., Record]
    missing: str | None = None
    named: Record | None = None
    done: Callable[[], object] | None = None


@contextmanager
def side_by_side(runs: list[Run], results: Results, jobs: int) -> Iterator[dict[int, Future]]:
    """The runs to do in `jobs` processes that work through them in order, by place in the list; none for one job."""
    if jobs == 1:
        yield {}
        return
    # Forked before anything has started threads: the package lies on no path that a fresh process would look at.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        try:
            yield {
                k: pool.submit(run.train)
                for k, run in enumerate(runs)
                if run.missing is None and results.find(run.case, any_machine=True) is None
            }
        finally:
            pool.shutdown(cancel_futures=True)


def run_all(
    runs: list[Run], results: Results, *, desc: str, labels: bool = False, jobs: int = 1
) -> list[Record]:
    """The record of every run, in the order given.

    A finished run counts wherever it was done, on another machine or by another version of the kernels: its result is
    a sample of what the method does, and its record says where it comes from. With `labels` the bar of the runs names
    each of them. `jobs` processes work side by side, for runs that a process can be sent.
    """
    records = []
    with (
        side_by_side(runs, results, jobs) as ahead,
        tqdm(total=len(runs), unit="run", desc=desc) as bar,
    ):
        for k, run in enumerate(runs):
            if labels:
                bar.set_description(f"{desc}: {run.label}")
            record = results.find(run.case, any_machine=True)
            if record is None and run.missing is not None:
                assert run.named is not None
                record = results.find(run.named, any_machine=True)
                if record is None or record["missing"] != run.missing:
                    record = results.append(run.named, missing=run.missing)
            elif record is None and k in ahead:
                record = results.append(run.case, **ahead[k].result())
            elif record is None and run.epochs is None:
                record = results.append(run.case, **run.train())
            elif record is None:
                with tqdm(total=run.epochs, unit="epoch", desc=run.label, leave=False) as epochs:
                    record = results.append(run.case, **run.train(bar=epochs))
                if run.done is not None:
                    run.done()
            records.append(record)
            bar.update()
    return records


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value); (inf, 0) where a run has diverged: one is None or inf."""
    present = [math.inf if value is None else value for value in values]
    mean = statistics.fmean(present)
    return mean, statistics.stdev(present) if len(present) > 1 and mean < math.inf else 0.0


def mean(values: Iterable[float | None]) -> float:
    """The mean alone; inf where a run has diverged."""
    return mean_and_spread(values)[0]


def plural(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def check(
    cli: argparse.ArgumentParser,
    options: argparse.Namespace,
    counts: tuple[str, ...],
    factors: tuple[str, ...] = (),
) -> None:
    """Exit with a message where one of the `counts` is not 1 at least, or one of the `factors` not positive."""
    for names, good, expected in (
        (counts, lambda value: value >= 1, "1 at least"),
        (factors, lambda value: 0 < value < float("inf"), "a factor > 0"),
    ):
        for name in names:
            value: Any = getattr(options, name)
            if value is not None and not good(value):
                cli.error(f"--{name.replace('_', '-')} is {value}; expected {expected}")


def device_of(options: argparse.Namespace) -> torch.device:
    """`--device`; by default a GPU where there is one."""
    return options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
