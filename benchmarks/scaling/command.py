"""What Alrao adds to a training step on several ranks, and how its step scales. `python benchmarks scaling`.

The same transformer on 1, 2 and 4 processes of one thread over gloo: by torch's SGD with one head, and by AlraoSGD with
clones, each under DistributedDataParallel and under fully_shard, and with the head over the ranks. All schemes on all
numbers of ranks take turns in one run. Records are kept in RESULTS/scaling.jsonl; an interrupted command goes on with
the next network. Processes that are more than the cores tell of overhead, but not of scaling.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.experiments.runs import check
from benchmarks.results import Record, Results
from benchmarks.scaling.cases import CASES, SCHEMES
from benchmarks.scaling.processes import Effort, Key, measure
from benchmarks.show import Table
from benchmarks.timing import summary

# The goal: at most so much of the step of torch's own optimizer and one head is added.
GOAL = 0.05


def values(found: dict[Key, list[float]], case: Any) -> dict[Key, Record]:
    """Of each scheme and number of ranks: seconds of a step, the samples in it, medians of the ratios within rounds.

    `overhead`: the step over that of torch on the same ranks, less 1. `efficiency`: samples per second over those of
    the same scheme on the fewest ranks, for each of their ranks.
    """
    fewest = min(ranks for _, ranks in found)
    records = {}
    for (name, ranks), seconds in found.items():
        scheme = SCHEMES[name]
        alone, beside = found[name, fewest], found.get((scheme.beside, ranks))
        more = 1 if scheme.one_batch else ranks / fewest
        records[name, ranks] = {
            "seconds": summary(seconds)._asdict(),
            "rounds": len(seconds),
            "sequences": case.sequences * (1 if scheme.one_batch else ranks),
            "overhead": None if beside is None else _ratio(seconds, beside) - 1,
            "efficiency": _ratio(alone, seconds) * more * fewest / ranks,
        }
    return records


def _ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under))


def table(name: str, clones: int, records: dict[Key, Record]) -> Table:
    columns = ["scheme", "ranks", "sequences", "ms a step", "over torch", "efficiency", "rounds"]
    rows = []
    for (scheme, ranks), record in records.items():
        overhead = record["overhead"]
        own = overhead is None or SCHEMES[scheme].beside == scheme
        rows.append(
            [
                scheme,
                str(ranks),
                str(record["sequences"]),
                f"{1e3 * record['seconds']['median']:.2f}",
                "" if own else f"{overhead:+.1%}",
                f"{record['efficiency']:.0%}",
                str(record["rounds"]),
            ]
        )
    return Table(f"{name}, {clones} clones: medians of interleaved rounds", columns, rows)


def verdict(name: str, records: dict[Key, Record]) -> list[str]:
    """Which schemes on the same batches keep to the goal."""
    lines = []
    for (scheme, ranks), record in records.items():
        kind = SCHEMES[scheme]
        if not kind.clones or kind.one_batch or record["overhead"] is None:
            continue
        word = "within" if record["overhead"] <= GOAL else "above"
        lines.append(
            f"{name}, {scheme} on {ranks}: {record['overhead']:+.1%} of torch's step, {word} the goal of {GOAL:+.0%}"
        )
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks scaling", description=__doc__)
    add = parser.add_argument
    networks = [name for name in CASES if name != "tiny"]
    add("--networks", nargs="+", choices=CASES, default=networks)
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="SCHEME")
    add("--ranks", nargs="+", type=int, default=[1, 2, 4])
    add("--clones", type=int, default=10)
    add("--rounds", type=int, default=15)
    add("--seconds", type=float, default=240.0, help="a network's rounds end after so many")
    add("--block", type=float, default=0.3, help="seconds of steps in a row")
    add("--again", action="store_true", help="measure what has a record, too")
    add("--results", type=Path, default=Path("results/scaling"))
    options = parser.parse_args(arguments)
    check(parser, options, counts=("clones", "rounds"))
    if min(options.ranks) < 1:
        parser.error("argument --ranks: expected numbers of 1 at least")
    torch.set_num_threads(1)

    console = Console()
    if not console.is_terminal:
        # Of a file or a pipe rich does not know the width.
        console.width = 160
    results = Results(options.results / "scaling.jsonl", machine.describe())
    for name in options.networks:
        case = CASES[name]
        keys = {
            (scheme, ranks): {
                "benchmark": "scaling",
                "network": name,
                **case._asdict(),
                "clones": options.clones,
                "scheme": scheme,
                "ranks": ranks,
                "together": [options.schemes, options.ranks],
            }
            for ranks in options.ranks
            for scheme in options.schemes
        }
        records = {key: results.find(identity) for key, identity in keys.items()}
        if options.again or not all(records.values()):
            effort = Effort(options.rounds, options.seconds, options.block)
            sizes = sorted(set(options.ranks))
            found = measure(case, options.schemes, sizes, options.clones, effort)
            measured = values(found, case)
            records = {key: results.append(keys[key], **measured[key]) for key in keys}
        console.print(table(name, options.clones, records).rich())
        for line in verdict(name, records):
            console.print(line, highlight=False)
    console.print(f"records: {results.path}", highlight=False)
