"""Alrao against every learning rate of a grid, and default Adam, on scikit-learn's digits: `python benchmarks demo`.

Real data that ships with scikit-learn (1,797 images of 8x8 pixels), a 64-256-256-10 ReLU network, batches of 32. Writes
a table and three plots: test loss against the learning rate, learning curves, the switch posterior over time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import MLP, PlainModel
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from timing import interleave
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao

HIDDEN, CLASSES, BATCH = 256, 10, 32
LR_RANGE, NUM_CLONES = (1e-5, 10.0), 10
GRID = [10.0**k for k in range(-5, 2)]


class Data(NamedTuple):
    """Images `[n, 64]` float32, standardised, and labels `[n]`, split into training and test set."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Run(NamedTuple):
    """One training run: test loss (nats) and accuracy (%) after each epoch, the posterior at those times."""

    method: str
    seed: int
    losses: list[float]
    accuracies: list[float]
    posterior: list[list[float]]


def load_data(seed: int) -> Data:
    """The digits, shuffled by `seed`, a fifth of them for testing; standardised over all pixels of the others."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    x = (x - x[train].mean()) / x[train].std()
    return Data(x[train], y[train], x[test], y[test])


def build(method: str, lr: float | None, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh network and optimizer; `method` is alrao, sgd or adam."""
    torch.manual_seed(seed)
    backbone = MLP(hidden=HIDDEN)
    if method == "alrao":
        net = alrao.AlraoModel(backbone, alrao.ClassifierClones(HIDDEN, CLASSES, NUM_CLONES))
        return net, alrao.AlraoSGD(net, lr_range=LR_RANGE)
    model = PlainModel(backbone, HIDDEN, CLASSES)
    if method == "adam":
        return model, torch.optim.Adam(model.parameters())
    return model, torch.optim.SGD(model.parameters(), lr=lr, fused=True)


def step(net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of the loop that every PyTorch user has; the same for all methods."""
    opt.zero_grad()
    loss = net(x, targets=y)
    loss.backward()
    opt.step()


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss in nats (inf if it diverged) and accuracy in percent."""
    net.eval()
    log_probs = net(x)
    net.train()
    loss = float(nn.functional.nll_loss(log_probs, y))
    accuracy = float((log_probs.argmax(-1) == y).double().mean()) * 100
    return (loss if math.isfinite(loss) else math.inf), accuracy


def train(method: str, lr: float | None, seed: int, epochs: int, bar: tqdm) -> Run:
    """Train one network; the name of an SGD run carries its learning rate."""
    data = load_data(seed)
    net, opt = build(method, lr, seed)
    order = torch.Generator().manual_seed(seed)
    run = Run(method if lr is None else f"sgd {lr:.0e}", seed, [], [], [])
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y), generator=order).split(BATCH):
            step(net, opt, data.train_x[batch], data.train_y[batch])
        loss, accuracy = evaluate(net, data.test_x, data.test_y)
        run.losses.append(loss)
        run.accuracies.append(accuracy)
        if method == "alrao":
            run.posterior.append(net.posterior().tolist())
        bar.update()
    return run


def step_times() -> dict[str, float]:
    """Median time of a training step by method, in units of plain SGD's, measured interleaved."""
    data = load_data(0)
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    contenders = {}
    for method, lr in (("sgd", 0.1), ("alrao", None), ("adam", None)):
        net, opt = build(method, lr, 0)
        contenders[method] = lambda net=net, opt=opt: step(net, opt, x, y)
    times = interleave(contenders, rounds=21, seconds_per_block=0.03)
    return {method: time.median / times["sgd"].median for method, time in times.items()}


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds (0 for a single one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def final(runs: list[Run]) -> dict[str, dict[str, tuple[float, float]]]:
    """By method: mean and spread over the seeds of the last epoch's test accuracy and loss."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return {
        method: {
            "accuracy": mean_and_spread([run.accuracies[-1] for run in same]),
            "loss": mean_and_spread([run.losses[-1] for run in same])
            if all(math.isfinite(run.losses[-1]) for run in same)
            else (math.inf, 0.0),
        }
        for method, same in by_method.items()
    }


def show_table(
    summary: dict[str, dict[str, tuple[float, float]]], times: dict[str, float], seeds: int
) -> Table:
    """The result as a table: one row per method."""
    table = Table(title=f"scikit-learn digits, {seeds} seeds: mean +- standard deviation")
    for name in ("method", "test accuracy %", "test loss", "step time / SGD"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    best = max((m for m in summary if m.startswith("sgd")), key=lambda m: summary[m]["accuracy"][0])
    for method, row in summary.items():
        label = {"alrao": "Alrao, no search", "adam": "Adam, default"}.get(method, method)
        table.add_row(
            label + (", best of grid" if method == best else ""),
            "{:.2f} +- {:.2f}".format(*row["accuracy"]),
            "{:.3f} +- {:.3f}".format(*row["loss"]) if row["loss"][0] < math.inf else "diverged",
            f"{times[method.split()[0]]:.2f}",
            style="bold" if method == "alrao" else None,
        )
    return table


def plot(runs: list[Run], folder: Path) -> list[Path]:
    """Write the three plots; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name: str) -> Path:
        path = folder / name
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
        return path

    def last(method: str) -> list[float]:
        return [run.losses[-1] for run in runs if run.method == method]

    paths = []
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    grid = [(lr, last(f"sgd {lr:.0e}")) for lr in GRID]
    finite = [(lr, losses) for lr, losses in grid if all(math.isfinite(v) for v in losses)]
    means = [statistics.fmean(losses) for _, losses in finite]
    axes.plot([lr for lr, _ in finite], means, "o-", color="C0", label="SGD at one learning rate")
    axes.fill_between(
        [lr for lr, _ in finite],
        [min(losses) for _, losses in finite],
        [max(losses) for _, losses in finite],
        color="C0",
        alpha=0.2,
    )
    for lr in sorted({lr for lr, _ in grid} - {lr for lr, _ in finite}):
        axes.axvline(lr, color="C0", linestyle=":", label=f"SGD diverged at {lr:g}")
    for method, color, label in (
        ("alrao", "C3", f"Alrao over ({LR_RANGE[0]:g}, {LR_RANGE[1]:g})"),
        ("adam", "C2", "Adam, default"),
    ):
        values = last(method)
        axes.axhline(statistics.fmean(values), color=color, label=label)
        axes.axhspan(min(values), max(values), color=color, alpha=0.15)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="learning rate of SGD",
        ylabel="test loss (nats)",
        title="One run of Alrao, whatever the learning rate",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    paths.append(save(figure, "loss_vs_lr.png"))

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    seed = runs[0].seed
    epochs = range(1, len(runs[0].losses) + 1)
    shades = plt.get_cmap("viridis")
    for run in (run for run in runs if run.seed == seed):
        if run.method.startswith("sgd"):
            place = GRID.index(float(run.method.split()[1])) / (len(GRID) - 1)
            axes.plot(epochs, run.losses, color=shades(place), alpha=0.8, label=run.method)
        else:
            color, label = ("C3", "Alrao") if run.method == "alrao" else ("black", "Adam, default")
            style = "-" if run.method == "alrao" else "--"
            axes.plot(epochs, run.losses, style, color=color, linewidth=2.5, label=label)
    axes.set(
        yscale="log",
        xlabel="epoch",
        ylabel="test loss (nats)",
        title=f"Learning curves, seed {seed}",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    paths.append(save(figure, "learning_curves.png"))

    alrao_run = next(run for run in runs if run.method == "alrao")
    rates = alrao.LogUniform(*LR_RANGE).clone_rates(NUM_CLONES).tolist()
    figure = posterior_plot(alrao_run.posterior, rates)
    figure.axes[0].set_title(
        f"Which learning rate of the last layer the switch trusts, seed {alrao_run.seed}"
    )
    paths.append(save(figure, "posterior.png"))
    return paths


def posterior_plot(posterior: list[list[float]], rates: list[float]) -> Any:
    """The switch's probabilities of the clones after each epoch, stacked; `rates` are the clones' learning rates."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    shades = plt.get_cmap("viridis")
    epochs = range(1, len(posterior) + 1)
    axes.stackplot(
        epochs,
        list(zip(*posterior, strict=True)),
        labels=[f"{rate:.0e}" for rate in rates],
        colors=[shades(i / max(len(rates) - 1, 1)) for i in range(len(rates))],
    )
    axes.set(
        xlabel="epoch",
        ylabel="posterior probability",
        ylim=(0, 1),
        xlim=(1, len(epochs)) if len(epochs) > 1 else None,
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        title="clone's rate",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    return figure


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
    summary = final(runs)
    console.print(show_table(summary, times, options.seeds))
    options.results.mkdir(parents=True, exist_ok=True)
    paths = plot(runs, options.results)
    record = options.results / "runs.json"
    record.write_text(json.dumps({"runs": [run._asdict() for run in runs], "step_times": times}))
    console.print("plots and numbers: " + ", ".join(str(path) for path in [*paths, record]))
