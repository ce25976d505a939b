"""Two figures for each task: the final loss of every method, and the learning curves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.experiments.methods import METHODS
from benchmarks.experiments.quality.summary import Cell, Summary, ran
from benchmarks.show import INK, legend_beside, pyplot, save

# Alrao in black, the tuned in warm colours, those without a rate to choose in cold ones; styles differ too.
STYLES: dict[str, dict[str, Any]] = {
    "alrao": {"color": INK, "linewidth": 2.5},
    "alrao-momentum": {"color": INK, "linestyle": "--"},
    "alrao-cosine": {"color": INK, "linestyle": ":"},
    "alrao-momentum-cosine": {"color": INK, "linestyle": "-."},
    "alrao-default": {"color": "0.5"},
    "sgd": {"color": "C3"},
    "adamw": {"color": "C1"},
    "adam": {"color": "C1", "linestyle": "--"},
    "prodigy": {"color": "C0"},
    "prodigy-cosine": {"color": "C0", "linestyle": ":"},
    "dadapt": {"color": "C9"},
    "dadapt-cosine": {"color": "C9", "linestyle": ":"},
    "schedulefree-adamw": {"color": "C2"},
    "schedulefree-sgd": {"color": "C2", "linestyle": "--"},
    "dog": {"color": "C4"},
}


def final_losses(task: str, cells: Mapping[str, Cell | str]) -> Any:
    """A dot for each seed's final test loss, best method on top; runs that diverged stand at the right edge."""
    order = sorted(ran(cells).items(), key=lambda item: item[1].loss[0], reverse=True)
    figure, axes = pyplot().subplots(figsize=(7, 0.34 * len(order) + 1.2))
    labels = []
    for k, (name, own) in enumerate(order):
        color = STYLES[name]["color"]
        values = [run["test_loss"] * run["per_nat"] for run in own.best if not run["diverged"]]
        axes.plot(values, [k] * len(values), "o", color=color, alpha=0.6)
        if math.isfinite(own.loss[0]):
            axes.errorbar(own.loss[0], k, xerr=own.loss[1], fmt="|", color=color, capsize=4, ms=14)
        else:
            right = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
            axes.text(0.99, k, "diverged", **right)
        rate = "" if own.lr is None else f" ({own.lr:g})"
        labels.append(METHODS[name].label + rate)
    axes.set_yticks(range(len(order)), labels)
    unit = order[0][1].unit
    axes.set(xscale="log", xlabel=f"{task}: test loss after the last epoch ({unit})")
    _plain_ticks(axes.xaxis)
    axes.grid(axis="x", alpha=0.3)
    return figure


def learning_curves(task: str, cells: Mapping[str, Cell | str]) -> Any:
    """Test loss by epoch of the first seed, each method at its best rate."""
    figure, axes = pyplot().subplots(figsize=(7, 4.4))
    chosen = ran(cells)
    for name, own in chosen.items():
        run = min(own.best, key=lambda run: run["case"]["seed"])
        losses = run["curves"]["test_loss"]
        curve = [math.nan if loss is None else loss * run["per_nat"] for loss in losses]
        axes.plot(range(1, len(curve) + 1), curve, label=METHODS[name].label, **STYLES[name])
    first = next(iter(chosen.values())).best[0]
    guessing = math.log(first["classes"]) * first["per_nat"]
    # A diverging run must not squeeze all others against the axis.
    axes.set(yscale="log", xlabel="epoch", ylabel=f"{task}: test loss ({first['unit']})")
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.2 * guessing))
    _plain_ticks(axes.yaxis)
    legend_beside(axes, fontsize=8)
    return figure


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, where losses rarely span a decade."""
    ticker = pyplot().matplotlib.ticker
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


PLOTS = {"final": final_losses, "curves": learning_curves}


def plot(summary: Summary, folder: Path) -> list[Path]:
    """Write the figures of every task; return their paths."""
    return [
        save(draw(task, cells), folder / f"{task}_{name}.png")
        for task, cells in summary.items()
        if ran(cells)
        for name, draw in PLOTS.items()
    ]
