"""Does `alrao_fast.rank` order architectures as a search over SGD's learning rates does? `python benchmarks ranking`.

Twelve networks on scikit-learn's digits, each trained by Alrao, and by SGD at every rate of a grid, whose best is what
a careful user would have found. SGD is Alrao with one clone and one rate for all features. Runs are kept in
RESULTS/ranking.jsonl; an interrupted command goes on with the next run.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks import machine
from benchmarks.experiments.demo import GRID, LR_RANGE
from benchmarks.experiments.runs import check, mean, plural
from benchmarks.experiments.tasks import BATCH, DigitsTask, load_data
from benchmarks.results import Record, Results, finite, grouped
from benchmarks.show import Table, pyplot, save


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((64, *widths), widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers)


def cnn(channels: int, *, normalise: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, channels), (channels, 2 * channels)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        layers += [nn.BatchNorm2d(outputs)] if normalise else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Flatten,
    **{f"mlp {width}": partial(mlp, width) for width in (4, 8, 32, 256)},
    "mlp 32 32 32 32": partial(mlp, 32, 32, 32, 32),
    "mlp 256 256 256": partial(mlp, 256, 256, 256),
    "tanh 64 64": partial(mlp, 64, 64, activation=nn.Tanh),
    "sigmoid 64 64": partial(mlp, 64, 64, activation=nn.Sigmoid),
    "cnn 2 4": partial(cnn, 2),
    "cnn 8 16": partial(cnn, 8),
    "cnn 8 16, batch norm": partial(cnn, 8, normalise=True),
}


class Shuffled:
    """Batches in a new order, from torch's global generator, at every pass."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.y)).split(BATCH):
            if len(batch) == BATCH:
                yield self.x[batch], self.y[batch]


def train(name: str, lr: float | None, seed: int, epochs: int, data: tuple[Any, Any]) -> Record:
    """One run: the record's losses by epoch, the least of them, and the suggested rate; lr None is Alrao."""
    clones = DigitsTask.clones if lr is None else 1
    row = alrao.rank(
        {name: MODELS[name]},
        *data,
        head=partial(alrao.ClassifierClones, num_classes=DigitsTask.classes, num_clones=clones),
        lr_range=LR_RANGE if lr is None else (lr, lr),
        epochs=epochs,
        seeds=[seed],
        device="cpu",
        progress=False,
    )[0]
    return {
        "loss": finite(row.loss),
        "accuracy": row.accuracy,
        "suggested_lr": row.suggested_lr if lr is None else lr,
        "parameters": row.parameters,
        "valid_loss": [finite(loss) for loss in row.runs[0].valid_loss],
    }


def mean_loss(records: list[Record]) -> float:
    return mean(record["loss"] for record in records)


class Comparison:
    """The records by network: Alrao's, and SGD's at the rate of least mean validation loss."""

    def __init__(self, records: list[Record]) -> None:
        self.alrao: dict[str, list[Record]] = {}
        self.sgd: dict[str, list[Record]] = {}
        for name, own in grouped(records, lambda record: record["case"]["model"]).items():
            by_lr = grouped(own, lambda record: record["case"]["lr"])
            ours = by_lr.pop(None, None)
            # Unfinished: nothing to compare.
            if ours is not None and by_lr:
                self.alrao[name] = ours
                self.sgd[name] = min(by_lr.values(), key=mean_loss)

    def rate(self, name: str) -> float:
        """The best of SGD's rates."""
        return self.sgd[name][0]["case"]["lr"]

    def agreement(self) -> float:
        """Spearman's correlation between the two orders of the networks, by mean loss over the seeds."""
        both = ([mean_loss(runs[name]) for name in self.alrao] for runs in (self.alrao, self.sgd))
        return float(spearmanr(*both).statistic)

    def agreement_of_seeds(self) -> tuple[float, float] | None:
        """The same between single seeds, mean over all pairs of different ones: Alrao with SGD, and SGD with SGD.

        The second is what chance in initial values leaves of the order even where the method is the same.
        """
        both = (*self.alrao.values(), *self.sgd.values())
        count = min(len(runs) for runs in both)
        if count < 2:
            return None

        def agree(first: dict[str, list[Record]], i: int, j: int) -> float:
            kinds = ((first, i), (self.sgd, j))
            orders = ([mean_loss([own[k]]) for own in runs.values()] for runs, k in kinds)
            return float(spearmanr(*orders).statistic)

        pairs = list(itertools.permutations(range(count), 2))
        mixed, same = (
            statistics.fmean(agree(first, *pair) for pair in pairs)
            for first in (self.alrao, self.sgd)
        )
        return mixed, same

    def table(self) -> Table:
        seeds = len(next(iter(self.alrao.values())))
        title = f"validation loss on digits, mean over {plural(seeds)}"
        columns = ["model", "Alrao", "place", "best SGD", "place", "its rate", "suggested"]
        order, by_sgd = (
            sorted(runs, key=lambda name, runs=runs: mean_loss(runs[name]))
            for runs in (self.alrao, self.sgd)
        )
        rows = []
        for place, name in enumerate(by_sgd, 1):
            hints = [record["suggested_lr"] for record in self.alrao[name]]
            ours = [f"{mean_loss(self.alrao[name]):.3f}", str(order.index(name) + 1)]
            sgd = [f"{mean_loss(self.sgd[name]):.3f}", str(place), f"{self.rate(name):g}"]
            rows.append([name, *ours, *sgd, f"{statistics.geometric_mean(hints):.2g}"])
        return Table(title, columns, rows)

    def verdict(self) -> list[str]:
        """What the figures say, in sentences."""
        lines = [f"Spearman's correlation of the two orders: {self.agreement():.2f}"]
        seeds = self.agreement_of_seeds()
        if seeds is not None:
            mixed, same = seeds
            lines.append(
                f"of single seeds: Alrao with the best SGD {mixed:.2f}, the best SGD with itself {same:.2f}"
            )
        off = [
            abs(math.log10(record["suggested_lr"] / self.rate(name)))
            for name, runs in self.alrao.items()
            for record in runs
        ]
        lines.append(
            f"the suggested rate is off SGD's best by a factor of {10 ** statistics.median(off):.1f} (median), "
            f"{10 ** max(off):.0f} (at most)"
        )
        return lines

    def plot(self) -> Any:
        """Alrao's loss against the best SGD's."""
        figure, axes = pyplot().subplots(figsize=(6, 5))
        points = {n: (mean_loss(self.sgd[n]), mean_loss(self.alrao[n])) for n in self.sgd}
        ends = [edge for point in points.values() for edge in point if edge < math.inf]
        line = [min(ends) * 0.2, max(ends) * 1.6]
        axes.plot(line, line, color="0.7", zorder=0)
        for name, point in points.items():
            # On the side away from the point of nearest height, whose name would overlap.
            others = [other for other in points.values() if other != point]
            nearest = min(others or [point], key=lambda other: abs(math.log(other[1] / point[1])))
            offset, align = (-6, "right") if nearest[0] > point[0] else (6, "left")
            beside = {"xytext": (offset, 0), "textcoords": "offset points", "ha": align}
            axes.plot(*point, "o", color="C3")
            axes.annotate(name, point, va="center", fontsize=8, **beside)
        axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
        axes.set(xlabel="validation loss, SGD at its best rate", ylabel="validation loss, Alrao")
        axes.set_title(f"{len(points)} networks on digits, Spearman {self.agreement():.2f}")
        return figure


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks ranking", description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--results", type=Path, default=Path("results/ranking"))
    options = parser.parse_args(arguments)
    check(parser, options, counts=("epochs", "seeds"))
    torch.set_num_threads(1)
    digits = load_data(0)
    train_x, valid_x = (x.view(-1, 1, 8, 8) for x in (digits.train_x, digits.test_x))
    data = (Shuffled(train_x, digits.train_y), [(valid_x, digits.test_y)])

    results = Results(options.results / "ranking.jsonl", machine.describe())
    plans = list(itertools.product(range(options.seeds), options.models, [None, *GRID]))
    records = []
    for seed, name, lr in tqdm(plans, unit="run"):
        case = {"model": name, "lr": lr, "seed": seed, "epochs": options.epochs}
        record = results.find(case, any_machine=True)
        if record is None:
            record = results.append(case, **train(name, lr, seed, options.epochs, data))
        records.append(record)

    comparison = Comparison(records)
    console = Console()
    console.print(comparison.table().rich())
    for line in comparison.verdict():
        console.print(line, highlight=False)
    path = save(comparison.plot(), options.results / "ranking.png")
    console.print(f"runs and plot: {results.path}, {path}", highlight=False)
