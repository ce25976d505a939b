"""The paper's experiments: the records of `python benchmarks paper`, one part for each setting that was run."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.experiments.paper import plots, tables
from benchmarks.experiments.paper.cases import Case
from benchmarks.experiments.tasks import ImageTask, TextTask
from benchmarks.report.page import Picture, Section, picture
from benchmarks.results import Record, grouped, read

Records = dict[Case, Record]
COMMAND = "python benchmarks paper figure4 --quick --models lstm-chars"
INTRO = (
    "Tables and figures of Learning with Random Learning Rates (arXiv 1810.01322), from the runs that were done "
    "here. Columns that say 'paper' are the paper's own figures, from full-size runs; the others were measured."
)
# What runs must share to stand in one table.
SETTING = ("data", "train", "epochs", "patience", "amp", "dropout")


def section(folder: Path) -> tuple[Section, list[Record]]:
    counts = tables.table2()
    found = list(read(folder / "runs.jsonl"))
    if not found:
        return Section("The paper's experiments", INTRO, [counts], missing=COMMAND), []
    runs = [(Case.of(record["case"]), record) for record in found]
    settings = grouped(runs, lambda run: tuple(getattr(run[0], name) for name in SETTING))
    results, pictures = [counts], []
    for number, records in enumerate(map(dict, settings.values())):
        first = next(iter(records))
        title = f"{first.data}: {first.train:,} to train on, at most {first.epochs} epochs"
        tasks = {case.network: unit_of(case.network) for case in records}
        results.append(tables.results_table(title, records, tasks))
        pictures += list(figures(number, title, records, tasks))
    return Section("The paper's experiments", INTRO, results, pictures), found


def unit_of(network: str) -> Any:
    """As much of a network's task as tables and plots ask for, without its data."""
    if network.startswith("lstm"):
        unit, classes = TextTask.unit_of(network), tables.TOKENS[network]
        shared = {"per_nat": TextTask.per_nat, "lr_range": TextTask.lr_range}
        return SimpleNamespace(unit=unit, classes=classes, **shared)
    return ImageTask


def figures(number: int, title: str, records: Records, tasks: Any) -> Iterator[Picture]:
    """Those of the paper's figures that these runs make."""

    ranges = {case.lr_range for case in records if case.method == "alrao"}
    fractions = {c: r for c, r in records.items() if c.method == "fraction"}
    # The usual interval is the widest.
    widest = max(ranges, key=lambda ends: ends[1] / ends[0], default=None)
    usual = {c: r for c, r in records.items() if c.lr_range in (None, widest) and not c.p}
    widths = len({case.width for case in records}) > 1
    width = next(iter(records)).width
    plain = {c: r for c, r in usual.items() if c.width == width}
    curves = len({tables.setting(case) for case in plain}) > 1
    own = {c: r for c, r in plain.items() if c.method == "alrao" and "posterior" in r}
    ends = ("alrao", "sgd") if len(ranges) > 2 else ()
    triangle = {c: r for c, r in records.items() if c.method in ends}
    part = "loss by the part of the features that learn"
    for name, caption, draw, chosen in (
        ("curves", "validation loss by epoch", plots.learning_curves, plain if curves else {}),
        ("posterior", "the switch over time", plots.posterior, own),
        ("triangle", "test loss by the interval's ends", plots.triangle, triangle),
        ("fractions", part, plots.fractions, fractions),
        ("widths", "loss by rate and width", plots.widths, usual if widths else {}),
    ):
        if chosen:
            drawn = partial(draw, chosen, tasks)
            yield picture(f"paper-{number}-{name}", f"{title}: {caption}", drawn)
