"""Table 1 and table 2, and what every figure's runs ended with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from networks import IMAGE_NETWORKS, LSTMBackbone
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import alrao_fast as alrao
from paper.cases import Case
from paper.experiments import NETWORKS
from paper.images import CLASSES
from paper.published import BEST_LR, TABLE1, TABLE2, TOKENS
from paper.tasks import Task

Records = Mapping[Case, dict[str, Any]]
# A setting: a case whatever its seed.
Setting = tuple[Any, ...]


def setting(case: Case) -> Setting:
    return case.network, case.width, case.method, case.lr, case.lr_range, case.p


def by_setting(records: Records) -> dict[Setting, list[tuple[Case, dict[str, Any]]]]:
    """Runs that differ in the seed alone, together, in the order of `records`."""
    groups: dict[Setting, list[tuple[Case, dict[str, Any]]]] = {}
    for case, record in records.items():
        groups.setdefault(setting(case), []).append((case, record))
    return groups


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and standard deviation (0 for one value); infinite where a run diverged."""
    present = [math.inf if value is None else value for value in values]
    mean = statistics.fmean(present)
    return mean, statistics.stdev(present) if len(present) > 1 and mean < math.inf else 0.0


def least_valid_loss(record: dict[str, Any]) -> float:
    """What runs are chosen by; infinite where the run diverged at once."""
    return min((loss for loss in record["valid_loss"] if loss is not None), default=math.inf)


def best_sgd(records: Records, network: str, width: float | None = None) -> float | None:
    """The grid's rate of least mean validation loss, chosen without the test set; None without SGD runs."""
    means: dict[float, list[float]] = {}
    for case, record in records.items():
        if case.network == network and case.method == "sgd" and width in (None, case.width):
            assert case.lr is not None
            means.setdefault(case.lr, []).append(least_valid_loss(record))
    return min(means, key=lambda lr: statistics.fmean(means[lr])) if means else None


def results_table(title: str, records: Records, tasks: Mapping[str, Task]) -> Table:
    """A row per network, width and method; the paper's figures of table 1 where they are for this row."""
    table = Table(title=title, box=box.MARKDOWN)
    columns = ("network", "method", "runs", "loss", "accuracy %", "paper: loss, acc. %")
    for name in columns:
        # Numbers stay whole; a narrow terminal folds the names.
        words = name in columns[:2]
        table.add_column(
            name, justify="left" if words else "right", no_wrap=not words, overflow="fold"
        )
    for runs in by_setting(records).values():
        case, task = runs[0][0], tasks[runs[0][0].network]
        loss, loss_spread = mean_and_spread(record["test_loss"] for _, record in runs)
        accuracy = mean_and_spread(
            record["test_accuracy"] or 100 / task.classes for _, record in runs
        )
        best = case.method == "sgd" and case.lr == best_sgd(records, case.network, case.width)
        known = TABLE1.get(case.network, {}).get(case.method)
        if case.method == "sgd" and case.lr != BEST_LR.get(case.network):
            known = None
        network = case.network if case.width == 1 else f"{case.network} x{case.width:g}"
        table.add_row(
            network,
            case.label() + (", best of grid" if best else ""),
            str(len(runs)),
            _pair(loss * task.per_nat, loss_spread * task.per_nat, 3)
            if loss < math.inf
            else "diverged",
            _pair(*accuracy, 1) if loss < math.inf else "-",
            f"{_pair(*known[:2], 3)}, {_pair(*known[2:], 1)}" if known else "",
        )
    return table


def _pair(mean: float, spread: float, digits: int) -> str:
    return f"{mean:.{digits}f}±{spread:.{digits}f}" if spread else f"{mean:.{digits}f}"


def parameter_counts(network: str) -> tuple[int, int]:
    """Parameters of a network with one last layer, and with Alrao's clones; no memory is taken for them."""
    with torch.device("meta"):
        if network in IMAGE_NETWORKS:
            backbone, classes, clones = IMAGE_NETWORKS[network](), CLASSES, 10
        else:
            classes, clones = TOKENS[network], 6
            backbone = LSTMBackbone(classes)
        layer = nn.Linear(backbone.out_features, classes)
        head = alrao.ClassifierClones(backbone.out_features, classes, clones)
    own, plain, with_clones = (
        sum(param.numel() for param in module.parameters()) for module in (backbone, layer, head)
    )
    return own + plain, own + with_clones


def table2() -> Table:
    """Parameter counts beside the paper's."""
    table = Table(title="Table 2: parameters", box=box.MARKDOWN)
    for name in ("network", "plain", "Alrao", "paper: plain", "paper: Alrao"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for network in NETWORKS:
        counts = [*parameter_counts(network), *TABLE2[network]]
        table.add_row(network, *(f"{count:,}" for count in counts))
    return table


def write(table: Table, path: Path) -> None:
    """The table as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        Console(file=file, width=160).print(table)
