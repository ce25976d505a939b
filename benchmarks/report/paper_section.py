"""The paper's experiments: the records of `python benchmarks paper`, one part for each setting that was run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paper import plots, tables
from paper.cases import Case
from results import read
from rich.table import Table as RichTable

from report.page import Picture, Section, Table, picture

Records = dict[Case, dict[str, Any]]
COMMAND = "python benchmarks paper figure4 --quick --models lstm-chars"
INTRO = (
    "Tables and figures of Learning with Random Learning Rates (arXiv 1810.01322), from the runs that were done "
    "here. Columns that say 'paper' are the paper's own figures, from full-size runs; the others were measured."
)
# What runs must share to stand in one table.
SETTING = ("data", "train", "epochs", "patience", "amp", "dropout")


def section(folder: Path) -> tuple[Section, list[dict[str, Any]]]:
    counts = shown(tables.table2())
    found = list(read(folder / "runs.jsonl"))
    if not found:
        return Section("The paper's experiments", INTRO, [counts], missing=COMMAND), []
    groups: dict[str, Records] = {}
    for record in found:
        fields = dict(record["case"])
        if "lr_range" in fields:
            fields["lr_range"] = tuple(fields["lr_range"])
        case = Case(**fields)
        key = json.dumps([getattr(case, name) for name in SETTING])
        groups.setdefault(key, {})[case] = record
    results, pictures = [counts], []
    for number, records in enumerate(groups.values()):
        first = next(iter(records))
        title = f"{first.data}: {first.train:,} to train on, at most {first.epochs} epochs"
        tasks = {case.network: unit_of(case.network) for case in records}
        results.append(shown(tables.results_table(title, records, tasks)))
        pictures += list(figures(number, title, records, tasks))
    return Section("The paper's experiments", INTRO, results, pictures), found


def unit_of(network: str) -> Any:
    """As much of a network's task as tables and plots ask for, without its data."""
    if network.startswith("lstm"):
        unit = "bits per " + ("character" if network == "lstm-chars" else "word")
        classes = tables.TOKENS[network]
        return SimpleNamespace(unit=unit, per_nat=1 / math.log(2), classes=classes)
    return SimpleNamespace(unit="nats", per_nat=1.0, classes=tables.CLASSES)


def figures(number: int, title: str, records: Records, tasks: Any) -> Iterator[Picture]:
    """Those of the paper's figures that these runs make."""
    methods = {case.method for case in records}
    ranges = {case.lr_range for case in records if case.method == "alrao"}
    kinds: list[tuple[str, str, Callable[..., Any], Records]] = []
    # The usual interval is the widest.
    usual = {c: r for c, r in records.items() if c.lr_range in (None, widest(ranges))}
    plain = {c: r for c, r in usual.items() if c.width == first_width(records) and c.p is None}
    if len({tables.setting(case) for case in plain}) > 1:
        kinds.append(("curves", "validation loss by epoch", plots.learning_curves, plain))
    own = {c: r for c, r in plain.items() if c.method == "alrao" and "posterior" in r}
    if own:
        kinds.append(("posterior", "the switch over time", plots.posterior, own))
    if len(ranges) > 2:
        chosen = {c: r for c, r in records.items() if c.method in ("alrao", "sgd")}
        kinds.append(("triangle", "test loss by the interval's ends", plots.triangle, chosen))
    if "fraction" in methods:
        part = {c: r for c, r in records.items() if c.method == "fraction"}
        kinds.append(
            ("fractions", "loss by the part of the features that learn", plots.fractions, part)
        )
    if len({case.width for case in records}) > 1:
        kinds.append(("widths", "loss by rate and width", plots.widths, usual))
    for name, caption, draw, chosen in kinds:
        yield picture(f"paper-{number}-{name}", f"{title}: {caption}", partial(draw, chosen, tasks))


def widest(ranges: set[tuple[float, float] | None]) -> tuple[float, float] | None:
    return max((r for r in ranges if r is not None), key=lambda r: r[1] / r[0], default=None)


def first_width(records: Records) -> float:
    return next(iter(records)).width


def shown(table: RichTable) -> Table:
    """A rich table as one of the page's."""
    columns = [str(column.header) for column in table.columns]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    return Table(str(table.title), columns, [list(row) for row in zip(*cells)])
