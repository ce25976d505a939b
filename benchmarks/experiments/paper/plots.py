"""The paper's figures from the runs' records: lines differ in style and lightness, to survive a grey print."""

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.experiments.methods import METHODS
from benchmarks.experiments.paper.cases import BEST_LR, Case
from benchmarks.experiments.paper.tables import Records, best_sgd, by_setting
from benchmarks.experiments.runs import mean, mean_and_spread
from benchmarks.experiments.tasks import Task
from benchmarks.results import Record, grouped
from benchmarks.show import legend_beside, pyplot

Tasks = Mapping[str, Task]
# Everything that is not a rate of a grid: black for Alrao, by style for the others.
STYLES: dict[str, dict[str, Any]] = {
    "alrao": {"color": "black", "linestyle": "-", "linewidth": 2.5},
    "adam": {"color": "C1", "linestyle": "--", "linewidth": 2},
    "alrao-adam": {"color": "C0", "linestyle": "-.", "linewidth": 2},
    "alrao-per-weight": {"color": "C0", "linestyle": ":", "linewidth": 2.5},
}
MARKERS = "osv^D<>ph*"


Draw = Callable[[Any, str, Records, Task], None]


def _shade(place: float) -> Any:
    # The light end of the map is invisible on white.
    return pyplot().get_cmap("viridis")(0.9 * place)


def _panels(draw: Draw, records: Records, tasks: Tasks) -> Any:
    """A figure with one panel for each network, drawn from its runs."""
    networks = grouped(records.items(), lambda item: item[0].network)
    size = (6.4 * len(networks), 4.2)
    figure, axes = pyplot().subplots(1, len(networks), figsize=size, squeeze=False)
    for panel, (network, runs) in zip(axes[0], networks.items()):
        draw(panel, network, dict(runs), tasks[network])
        panel.set_title(network)
    figure.tight_layout()
    return figure


def _legend(panel: Any, **options: Any) -> None:
    legend_beside(panel, x=1.01, fontsize=8, **options)


def _mean_curve(runs: list[tuple[Case, Record]], key: str) -> list[float]:
    """The mean over the seeds, as far as every run goes and is finite."""
    curves = [record[key] for _, record in runs]
    mean = []
    for values in zip(*curves):
        if any(value is None for value in values):
            break
        mean.append(statistics.fmean(values))
    return mean


def _curves(panel: Any, network: str, records: Records, task: Task) -> None:
    """Validation loss by epoch: a line per method, SGD's rates from dark to light."""
    rates = sorted({case.lr for case in records if case.method == "sgd" and case.lr is not None})
    highest = 0.0
    for runs in by_setting(records).values():
        case = runs[0][0]
        curve = [loss * task.per_nat for loss in _mean_curve(runs, "valid_loss")]
        if case.method == "sgd":
            k = rates.index(case.lr)  # type: ignore[arg-type]
            style: dict[str, Any] = {
                "color": _shade(k / max(len(rates) - 1, 1)),
                "marker": MARKERS[k % len(MARKERS)],
                "markevery": max(1, len(curve) // 8),
                "markersize": 4,
                "linewidth": 1,
            }
        else:
            style = STYLES[case.method]
        label = f"SGD {case.lr:g}" if case.method == "sgd" else METHODS[case.method].label
        if curve:
            panel.plot(range(1, len(curve) + 1), curve, label=label, **style)
            highest = max(highest, curve[0])
        else:
            panel.plot([], [], label=f"{label}: diverged", **style)
    # A diverging run must not squeeze all others against the axis.
    guessing = math.log(task.classes) * task.per_nat
    panel.set(xlabel="epoch", ylabel=f"validation loss ({task.unit})")
    panel.set_ylim(top=min(panel.get_ylim()[1], max(1.15 * guessing, 0)))
    panel.xaxis.get_major_locator().set_params(integer=True)
    _legend(panel)


def _triangle(panel: Any, network: str, runs: Records, task: Task) -> None:
    """Test loss by both ends of the interval."""
    cells = grouped(runs.items(), lambda item: item[0].lr_range or (item[0].lr, item[0].lr))
    ends = sorted({end for cell in cells for end in cell})
    grid = np.full((len(ends), len(ends)), np.nan)
    for (lo, hi), same in cells.items():
        loss = mean(record["test_loss"] for _, record in same)
        grid[ends.index(lo), ends.index(hi)] = loss * task.per_nat
    finite = np.where(np.isfinite(grid), grid, np.nan)
    image = panel.imshow(finite, cmap="viridis_r", origin="lower")
    panel.figure.colorbar(image, ax=panel, label=f"test loss ({task.unit})")
    middle = (np.nanmin(finite) + np.nanmax(finite)) / 2
    for row, column in zip(*np.nonzero(~np.isnan(grid))):
        value = grid[row, column]
        text, color = (f"{value:.2f}", "white") if value > middle else (f"{value:.2f}", "black")
        if math.isinf(value):
            text, color = "div.", "black"
        panel.text(column, row, text, color=color, ha="center", va="center", fontsize=8)
    names = [f"{end:g}" for end in ends]
    panel.set_xticks(range(len(ends)), names, rotation=45)
    panel.set_yticks(range(len(ends)), names)
    panel.set(xlabel="highest rate", ylabel="lowest rate (diagonal: SGD at this rate)")


def _posterior(panel: Any, network: str, runs: Records, task: Task) -> None:
    """The switch's probabilities over time, of the first seed."""
    case, record = next(iter(runs.items()))
    assert case.lr_range is not None and case.clones is not None
    rates = np.geomspace(*case.lr_range, case.clones)
    for k, (rate, weights) in enumerate(zip(rates, zip(*record["posterior"]))):
        style = {"marker": MARKERS[k % len(MARKERS)], "markersize": 5, "label": f"{rate:.0e}"}
        style |= {"markevery": (k, max(1, len(weights) // 6))}
        color = _shade(k / max(case.clones - 1, 1))
        panel.plot(record["posterior_epochs"], weights, color=color, **style)
    panel.set(xlabel="epoch", ylabel="posterior probability", ylim=(0, 1.02))
    _legend(panel, title="clone's rate", title_fontsize=8)


def _fractions(panel: Any, network: str, runs: Records, task: Task) -> None:
    """Test loss by the part of the features that learn."""
    points = grouped(runs.items(), lambda item: item[0].p or 0.0)
    means = {p: mean_and_spread(r["test_loss"] for _, r in points[p]) for p in sorted(points)}
    finite = {p: loss for p, loss in means.items() if loss[0] < math.inf}
    losses, spreads = ([loss[k] * task.per_nat for loss in finite.values()] for k in (0, 1))
    panel.errorbar(list(finite), losses, spreads, color="black", marker="o", capsize=3)
    rate = f"part of the features that learn, at rate {BEST_LR.get(network, 1.0):g}"
    panel.set(xlabel=rate, ylabel=f"test loss ({task.unit})", xlim=(0, 1.05))


def _widths(panel: Any, network: str, runs: Records, task: Task) -> None:
    """Test loss by SGD's rate, and Alrao's and Adam's, at each width."""
    sizes = sorted({case.width for case in runs})
    for k, width in enumerate(sizes):
        color = _shade(k / max(len(sizes) - 1, 1) * 0.6)
        points = {}
        for group in by_setting(runs).values():
            case = group[0][0]
            if case.width != width:
                continue
            loss = mean(record["test_loss"] for _, record in group) * task.per_nat
            if case.method == "sgd":
                points[case.lr] = loss
            elif loss < math.inf:
                label = f"{METHODS[case.method].label}, width x{width:g}"
                style = {**STYLES[case.method], "color": color, "linewidth": 1.5 + k}
                panel.axhline(loss, label=label, **style)
        finite = sorted(lr for lr, loss in points.items() if loss < math.inf)
        best = best_sgd(runs, network, width)
        label = f"SGD, width x{width:g}" + (f", best {best:g}" if best else "")
        style = {"marker": MARKERS[k], "linestyle": ":", "color": color}
        panel.plot(finite, [points[lr] for lr in finite], label=label, **style)
    panel.set(xscale="log", xlabel="learning rate of SGD", ylabel=f"test loss ({task.unit})")
    _legend(panel)


learning_curves, triangle, posterior, fractions, widths = (
    partial(_panels, draw) for draw in (_curves, _triangle, _posterior, _fractions, _widths)
)
# The commands whose plot is not that of the learning curves.
PLOTS = {"figure3": triangle, "figure4": posterior, "figure7": fractions, "figure8": widths}
