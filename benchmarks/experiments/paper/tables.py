"""Table 1 and table 2, and what every figure's runs ended with; the paper's figures (arXiv 1810.01322) beside ours."""

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

import alrao_fast as alrao
from benchmarks.experiments.data import CLASSES
from benchmarks.experiments.paper.cases import BEST_LR, NETWORKS, Case
from benchmarks.experiments.runs import mean_and_spread
from benchmarks.experiments.tasks import Task
from benchmarks.networks import IMAGE_NETWORKS, LSTMBackbone
from benchmarks.results import Record, grouped
from benchmarks.show import Table


class Entry(NamedTuple):
    """A cell of table 1: loss (nats per image, bits per character) and accuracy in percent, mean and deviation."""

    loss: float
    loss_spread: float
    accuracy: float
    accuracy_spread: float


# Table 1: network -> method -> test loss and accuracy.
_ROWS = {
    "mobilenet": ((0.37, 0.01, 90.2, 0.3), (1.01, 0.95, 78, 11), (0.42, 0.02, 88.1, 0.6)),
    "googlenet": ((0.45, 0.05, 89.6, 1.0), (0.47, 0.04, 89.8, 0.4), (0.47, 0.03, 88.9, 0.8)),
    "vgg19": ((0.42, 0.02, 89.5, 0.2), (0.43, 0.02, 88.9, 0.4), (0.45, 0.03, 87.5, 0.4)),
    "lstm-chars": ((1.566, 0.003, 66.1, 0.1), (1.587, 0.005, 65.6, 0.1), (1.67, 0.01, 64.1, 0.2)),
}
TABLE1 = {
    network: dict(zip(("sgd", "adam", "alrao"), map(Entry._make, entries)))
    for network, entries in _ROWS.items()
}
# Table 2: network -> parameters with one last layer, and with Alrao's clones.
TABLE2 = {
    "googlenet": (6_166_250, 6_258_500),
    "vgg19": (20_040_522, 20_086_692),
    "mobilenet": (2_296_922, 2_412_212),
    "lstm-chars": (171_650, 196_900),
    "lstm-words": (2_171_600, 7_221_600),
}
# Tokens of the Penn Treebank.
TOKENS = {"lstm-chars": 50, "lstm-words": 10_000}

Records = Mapping[Case, Record]
# A setting: a case whatever its seed.
Setting = tuple[Any, ...]


def setting(case: Case) -> Setting:
    return case.network, case.width, case.method, case.lr, case.lr_range, case.p


def by_setting(records: Records) -> dict[Setting, list[tuple[Case, Record]]]:
    """Runs that differ in the seed alone, together, in the order of `records`."""
    return grouped(records.items(), lambda item: setting(item[0]))


def least_valid_loss(record: dict[str, Any]) -> float:
    """What runs are chosen by; infinite where the run diverged at once."""
    return min((loss for loss in record["valid_loss"] if loss is not None), default=math.inf)


def best_sgd(records: Records, network: str, width: float | None = None) -> float | None:
    """The grid's rate of least mean validation loss, chosen without the test set; None without SGD runs."""
    runs = [
        (case.lr, least_valid_loss(record))
        for case, record in records.items()
        if case.network == network and case.method == "sgd" and width in (None, case.width)
    ]
    by_lr = grouped(runs, lambda run: run[0])
    means = {lr: statistics.fmean(loss for _, loss in same) for lr, same in by_lr.items()}
    return min(means, key=means.__getitem__, default=None)


def results_table(title: str, records: Records, tasks: Mapping[str, Task]) -> Table:
    """A row per network, width and method; the figures of table 1 for its rate and interval, and no wider network."""
    rows = []
    for runs in by_setting(records).values():
        case, task = runs[0][0], tasks[runs[0][0].network]
        loss = mean_and_spread(record["test_loss"] for _, record in runs)
        guessed = 100 / task.classes
        accuracy = mean_and_spread(record["test_accuracy"] or guessed for _, record in runs)
        best = case.method == "sgd" and case.lr == best_sgd(records, case.network, case.width)
        known = TABLE1.get(case.network, {}).get(case.method)
        chosen = {
            "sgd": case.lr == BEST_LR.get(case.network),
            "alrao": case.lr_range == task.lr_range,
        }
        if case.width > 1 or not chosen.get(case.method, True):
            known = None
        network = case.network if case.width == 1 else f"{case.network} x{case.width:g}"
        row = [network, case.label() + (", best of grid" if best else ""), str(len(runs))]
        if loss[0] < math.inf:
            row += [_pair(*(part * task.per_nat for part in loss), 3), _pair(*accuracy, 1)]
        else:
            row += ["diverged", "-"]
        paper = f"{_pair(*known[:2], 3)}, {_pair(*known[2:], 1)}" if known else ""
        rows.append([*row, paper])
    columns = ["network", "method", "runs", "loss", "accuracy %", "paper: loss, acc. %"]
    return Table(title, columns, rows)


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
    parts = (backbone, layer, head)
    own, plain, with_clones = (sum(p.numel() for p in part.parameters()) for part in parts)
    return own + plain, own + with_clones


def table2() -> Table:
    """Parameter counts beside the paper's."""
    counts = {network: (*parameter_counts(network), *TABLE2[network]) for network in NETWORKS}
    rows = [[network, *(f"{count:,}" for count in own)] for network, own in counts.items()]
    columns = ["network", "plain", "Alrao", "paper: plain", "paper: Alrao"]
    return Table("Table 2: parameters", columns, rows)
