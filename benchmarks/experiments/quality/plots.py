"""Three figures: every method's gap on every task, performance profiles, and what the interval does."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiments.quality import summary as figures
from benchmarks.experiments.quality.methods import METHODS, TUNED
from benchmarks.experiments.quality.summary import Summary
from benchmarks.show import INK, legend_beside, pyplot, save

# Okabe and Ito's colours, which stay apart for the colour-blind; line styles and markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#B8A800")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X<>"
# Colours end here: a gap (nats) that is larger is as bad.
FULL_GAP = 0.3
# And changes of the loss here, in percent.
TOP = 2000.0


def gap_map(summary: Summary) -> Any:
    """A row for each method, best worst case on top, a column for each task, the mean gaps as colours and numbers."""
    found = figures.gaps(summary)
    order = list(figures.standings(found))
    tasks = list(summary)
    size = (0.72 * len(tasks) + 3.6, 0.32 * len(order) + 1.4)
    figure, axes = pyplot().subplots(figsize=size)
    values = [
        [statistics.fmean(found[row][t]) if t in found[row] else math.nan for t in tasks]
        for row in order
    ]
    shown = [[min(max(value, -FULL_GAP), FULL_GAP) for value in line] for line in values]
    # Squares and no image, which a page could not recolour or scale.
    axes.pcolormesh(
        range(len(tasks)), range(len(order)), shown, cmap="PuOr_r", vmin=-FULL_GAP, vmax=FULL_GAP
    )
    axes.invert_yaxis()
    for k, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                text = "div." if math.isinf(value) else f"{value:+.2f}"
                color = "white" if abs(value) > 0.75 * FULL_GAP else INK
                axes.text(column, k, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(order)), [row.label for row in order])
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
    axes.tick_params(length=0)
    axes.set_title(
        "test loss behind the best tuned (nats); worst case smallest on top", fontsize=10
    )
    return figure


def profiles(summary: Summary) -> Any:
    """The share of the tasks on which a method is so near to the best, in nats and in percent: high, left is good."""
    figure, both = pyplot().subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axes, relative in zip(both, (False, True)):
        distances = figures.behind(summary, relative=relative)
        most = max(map(len, distances.values()))
        left, right = (0.3, 100.0) if relative else (0.003, 1.0)
        shown = [row for row in METHODS if len(distances.get(figures.Row(row), [])) == most]
        for k, name in enumerate(shown):
            own = sorted(distances[figures.Row(name)])
            xs = [left, *(min(max(value, left), 2 * right) for value in own), 2 * right]
            ys = [100 * sum(d <= x for d in own) / most for x in xs]
            ours = METHODS[name].is_alrao
            style = {"linewidth": 2.2 if ours else 1.3, "linestyle": LINES[k // len(COLORS)]}
            color = COLORS[k % len(COLORS)]
            every = (k % 4 / 40, 0.1)
            axes.plot(
                xs,
                ys,
                drawstyle="steps-post",
                label=METHODS[name].label,
                color=color,
                marker=MARKERS[k % len(MARKERS)],
                markevery=every,
                markersize=5,
                **style,
            )
        unit = "% of its loss" if relative else "nats"
        axes.set(xscale="log", xlim=(left, right), ylim=(-2, 102))
        axes.set_xlabel(f"at most so far behind the best ({unit})")
        axes.xaxis.set_major_formatter(pyplot().matplotlib.ticker.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3)
    both[0].set_ylabel(f"percent of {most} tasks")
    legend_beside(both[1], fontsize=8)
    figure.tight_layout()
    return figure


def interval_plot(method: str, summary: Summary) -> Any:
    """The change of the test loss by the interval, a line for each task."""
    by_interval = figures.sensitivity(summary)[method]
    order = sorted(by_interval, key=lambda ends: math.log(ends[1] / ends[0]))
    figure, axes = pyplot().subplots(figsize=(7, 4.4))
    axes.axhspan(-2, 2, color="0.9", zorder=0)
    tried = {task for found in by_interval.values() for task in found}
    for k, task in enumerate(task for task in summary if task in tried):
        changes = [by_interval[interval].get(task) for interval in order]
        means = [100 * statistics.fmean(own) if own else math.nan for own in changes]
        style = {"color": COLORS[k % len(COLORS)], "linestyle": LINES[k // len(COLORS)]}
        # What diverges is beyond every figure: on the upper edge.
        means = [TOP if math.isinf(value) else min(value, TOP) for value in means]
        style |= {"marker": MARKERS[k % len(MARKERS)], "clip_on": False}
        axes.plot(range(len(order)), means, label=task, **style)
    axes.set_xticks(range(len(order)), ["({:g}, {:g})".format(*interval) for interval in order])
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(-40, TOP)
    axes.set_yticks([-20, -10, -2, 2, 10, 30, 100, 300, 1000])
    axes.yaxis.set_major_formatter(pyplot().matplotlib.ticker.FormatStrFormatter("%+g"))
    axes.set(xlabel="interval of the rates", ylabel="change of the test loss (%)")
    axes.set_title(f"{METHODS[method].label}; grey: within 2 %; at the top: diverged", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    legend_beside(axes, fontsize=8)
    return figure


def plots(summary: Summary) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Of every figure that there is something for: a caption, and what draws it, by name."""
    found: dict[str, tuple[str, Callable[[], Any]]] = {}
    if any(figures.Row(name) in cells for cells in summary.values() for name in TUNED):
        caption = "Test loss behind the best of the tuned methods' grids, by method and task"
        found["gaps"] = caption, partial(gap_map, summary)
    if len(summary) > 1:
        caption = "On how many tasks a method is nearly as good as the best one"
        found["profiles"] = caption, partial(profiles, summary)
    for method in figures.sensitivity(summary):
        caption = f"{METHODS[method].label}: what the interval of the rates does to the test loss"
        found[f"interval-{method}"] = caption, partial(interval_plot, method, summary)
    return found


def plot(summary: Summary, folder: Path) -> list[Path]:
    """Write the figures; return their paths."""
    drawn = plots(summary)
    return [save(draw(), folder / f"{name}.png") for name, (_, draw) in drawn.items()]
