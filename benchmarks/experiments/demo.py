"""Alrao against every learning rate of a grid, and default Adam, on scikit-learn's digits: `python benchmarks demo`.

Real data that ships with scikit-learn (1,797 images of 8x8 pixels), a 64-256-256-10 ReLU network, batches of 32. Writes
a table and three plots: test loss against the learning rate, learning curves, the switch posterior over time.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks.experiments.methods import METHODS, Method, Setting, build
from benchmarks.experiments.runs import mean_and_spread
from benchmarks.experiments.tasks import BATCH, DigitsTask, Score, load_data
from benchmarks.experiments.trainer import Trainer
from benchmarks.results import grouped
from benchmarks.show import Table, legend_beside, pyplot, save
from benchmarks.timing import interleave

GRID = [10.0**k for k in range(-5, 2)]
LR_RANGE = DigitsTask.lr_range
SIZE = (6.4, 4.2)


# As they stand in a user's script: rates from torch's global generator, Adam as it is by default.
def _ours(net: nn.Module, setting: Setting) -> alrao.AlraoSGD:
    return alrao.AlraoSGD(net, setting.lr_range)


_ALRAO = Method("alrao", "Alrao, no search", _ours, is_alrao=True)
_ADAM = Method("adam", "Adam, default", lambda net, setting: torch.optim.Adam(net.parameters()))
OWN = {"alrao": _ALRAO, "sgd": METHODS["sgd"], "adam": _ADAM}


class Run(NamedTuple):
    """One training run: test loss (nats) and accuracy (%) after each epoch, the posterior at those times."""

    method: str
    seed: int
    losses: list[float]
    accuracies: list[float]
    posterior: list[list[float]]


class DemoTask(DigitsTask):
    """The digits without a validation set: four fifths to train on, the incomplete last batch too."""

    def __init__(self, seed: int) -> None:
        data = load_data(seed)
        self.x, self.y = data.train_x, data.train_y
        self.parts = {"test": (data.test_x, data.test_y)}
        self.order = torch.Generator().manual_seed(seed)

    def steps(self) -> int:
        return -(-len(self.y) // BATCH)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.y), generator=self.order).split(BATCH):
            yield self.x[batch], self.y[batch]

    def evaluate(self, net: nn.Module, part: str) -> Score:
        """Mean loss in nats (inf if it diverged) and accuracy in percent."""
        x, y = self.parts[part]
        log_probs = net(x)
        loss = float(nn.functional.nll_loss(log_probs, y))
        accuracy = float((log_probs.argmax(-1) == y).double().mean()) * 100
        return (loss if math.isfinite(loss) else math.inf), accuracy


def make(method: str, lr: float | None, seed: int) -> Trainer:
    """A fresh network and its training; `method` is alrao, sgd or adam."""
    task, own = DemoTask(seed), OWN[method]
    return Trainer(own, *build(own, Setting(lr, LR_RANGE, seed), task), task)


def train(method: str, lr: float | None, seed: int, epochs: int, bar: tqdm) -> Run:
    """Train one network; the name of an SGD run carries its learning rate."""
    trainer = make(method, lr, seed)
    run = Run(method if lr is None else f"sgd {lr:.0e}", seed, [], [], [])
    for epoch in range(epochs):
        trainer.epoch(seed, epoch)
        with trainer.evaluation(seed, epoch) as net:
            loss, accuracy = trainer.evaluate(net, "test")
        run.losses.append(loss)
        run.accuracies.append(accuracy)
        if method == "alrao":
            run.posterior.append(trainer.net.posterior().tolist())
        bar.update()
    return run


def step_times() -> dict[str, float]:
    """Median time of a training step by method, in units of plain SGD's, measured interleaved."""

    def step(net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        """The loop that every PyTorch user has, and nothing besides."""
        opt.zero_grad()
        net(x, targets=y).backward()
        opt.step()

    contenders = {}
    for method, lr in (("sgd", 0.1), ("alrao", None), ("adam", None)):
        trainer = make(method, lr, 0)
        batch = trainer.net, trainer.opt, trainer.task.x[:BATCH], trainer.task.y[:BATCH]
        contenders[method] = lambda batch=batch: step(*batch)
    times = interleave(contenders, rounds=21, seconds_per_block=0.03)
    return {method: time.median / times["sgd"].median for method, time in times.items()}


def table(runs: list[Run], times: dict[str, float]) -> Table:
    """One row per method: mean and spread over the seeds of the last epoch's test accuracy and loss."""
    by_method = grouped(runs, lambda run: run.method)
    accuracy, loss = (
        {m: mean_and_spread(getattr(run, name)[-1] for run in own) for m, own in by_method.items()}
        for name in ("accuracies", "losses")
    )
    best = max((m for m in by_method if m.startswith("sgd")), key=lambda m: accuracy[m][0])
    rows = []
    for method in by_method:
        label = method if method.startswith("sgd") else OWN[method].label
        if method == best:
            label += ", best of grid"
        finite = loss[method][0] < math.inf
        last = "{:.3f} +- {:.3f}".format(*loss[method]) if finite else "diverged"
        time = f"{times[method.split()[0]]:.2f}"
        rows.append([label, "{:.2f} +- {:.2f}".format(*accuracy[method]), last, time])
    seeds = len({run.seed for run in runs})
    title = f"scikit-learn digits, {seeds} seeds: mean +- standard deviation"
    return Table(title, ["method", "test accuracy %", "test loss", "step time / SGD"], rows)


def loss_plot(runs: list[Run]) -> Any:
    """The last test loss by SGD's learning rate, and Alrao's and Adam's."""

    def last(method: str) -> list[float]:
        return [run.losses[-1] for run in runs if run.method == method]

    figure, axes = pyplot().subplots(figsize=SIZE)
    grid = {lr: last(f"sgd {lr:.0e}") for lr in GRID}
    finite = {lr: losses for lr, losses in grid.items() if all(map(math.isfinite, losses))}
    means = [statistics.fmean(losses) for losses in finite.values()]
    axes.plot(list(finite), means, "o-", color="C0", label="SGD at one learning rate")
    ends = [[end(losses) for losses in finite.values()] for end in (min, max)]
    axes.fill_between(list(finite), *ends, color="C0", alpha=0.2)
    for lr in sorted(set(grid) - set(finite)):
        axes.axvline(lr, color="C0", linestyle=":", label=f"SGD diverged at {lr:g}")
    ours = f"Alrao over ({LR_RANGE[0]:g}, {LR_RANGE[1]:g})"
    for method, color, label in (("alrao", "C3", ours), ("adam", "C2", "Adam, default")):
        values = last(method)
        axes.axhline(statistics.fmean(values), color=color, label=label)
        axes.axhspan(min(values), max(values), color=color, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="learning rate of SGD", ylabel="test loss (nats)")
    axes.set_title("One run of Alrao, whatever the learning rate")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def curves_plot(runs: list[Run]) -> Any:
    """Test loss by epoch, of the first seed."""
    figure, axes = pyplot().subplots(figsize=SIZE)
    seed = runs[0].seed
    epochs = range(1, len(runs[0].losses) + 1)
    shades = pyplot().get_cmap("viridis")
    styles: dict[str, dict[str, Any]] = {
        "alrao": {"color": "C3", "linewidth": 2.5, "label": "Alrao"},
        "adam": {"color": "black", "linewidth": 2.5, "label": "Adam, default", "linestyle": "--"},
    }
    for k, lr in enumerate(GRID):
        method = f"sgd {lr:.0e}"
        color = shades(k / (len(GRID) - 1))
        styles[method] = {"color": color, "alpha": 0.8, "label": method}
    for run in (run for run in runs if run.seed == seed):
        axes.plot(epochs, run.losses, **styles[run.method])
    axes.set(yscale="log", xlabel="epoch", ylabel="test loss (nats)")
    axes.set_title(f"Learning curves, seed {seed}")
    legend_beside(axes)
    return figure


def posterior_plot(posterior: list[list[float]], rates: list[float]) -> Any:
    """The switch's probabilities of the clones after each epoch, stacked; `rates` are the clones' learning rates."""
    figure, axes = pyplot().subplots(figsize=SIZE)
    shades = pyplot().get_cmap("viridis")
    epochs = range(1, len(posterior) + 1)
    axes.stackplot(
        epochs,
        list(zip(*posterior, strict=True)),
        labels=[f"{rate:.0e}" for rate in rates],
        colors=[shades(i / max(len(rates) - 1, 1)) for i in range(len(rates))],
    )
    axes.set(xlabel="epoch", ylabel="posterior probability", ylim=(0, 1))
    axes.set(xlim=(1, len(epochs)) if len(epochs) > 1 else None)
    handles, labels = axes.get_legend_handles_labels()
    legend_beside(axes, handles[::-1], labels[::-1], title="clone's rate")
    return figure


def plot(runs: list[Run], folder: Path) -> list[Path]:
    """Write the three plots; return their paths."""
    first = next(run for run in runs if run.method == "alrao")
    rates = alrao.LogUniform(*LR_RANGE).clone_rates(DigitsTask.clones).tolist()
    posterior = posterior_plot(first.posterior, rates)
    title = f"Which learning rate of the last layer the switch trusts, seed {first.seed}"
    posterior.axes[0].set_title(title)
    return [
        save(loss_plot(runs), folder / "loss_vs_lr.png", 150),
        save(curves_plot(runs), folder / "learning_curves.png", 150),
        save(posterior, folder / "posterior.png", 150),
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("results/demo"))
    options = parser.parse_args(arguments)

    plans = [("alrao", None), *(("sgd", lr) for lr in GRID), ("adam", None)]
    runs = []
    with tqdm(total=len(plans) * options.seeds * options.epochs, unit="epoch") as bar:
        for seed in range(options.seeds):
            for method, lr in plans:
                bar.set_description(f"{method} {lr:g}" if lr else method)
                runs.append(train(method, lr, seed, options.epochs, bar))

    console = Console()
    with console.status("measuring the time of a step"):
        times = step_times()
    console.print(table(runs, times).rich(whole=True, bold=OWN["alrao"].label))
    paths = plot(runs, options.results)
    record = options.results / "runs.json"
    record.write_text(json.dumps({"runs": [run._asdict() for run in runs], "step_times": times}))
    console.print("plots and numbers: " + ", ".join(str(path) for path in [*paths, record]))
