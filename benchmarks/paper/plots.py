"""The paper's figures from the runs' records: lines differ in style and lightness, to survive a grey print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paper.cases import METHODS, Case
from paper.published import BEST_LR
from paper.tables import Records, best_sgd, by_setting, mean_and_spread
from paper.tasks import Task

Tasks = Mapping[str, Task]
# Everything that is not a rate of a grid: black for Alrao, by style for the others.
STYLES: dict[str, dict[str, Any]] = {
    "alrao": {"color": "black", "linestyle": "-", "linewidth": 2.5},
    "adam": {"color": "C1", "linestyle": "--", "linewidth": 2},
    "alrao-adam": {"color": "C0", "linestyle": "-.", "linewidth": 2},
    "alrao-per-weight": {"color": "C0", "linestyle": ":", "linewidth": 2.5},
}
MARKERS = "osv^D<>ph*"


def _shade(place: float) -> Any:
    import matplotlib

    # The light end of the map is invisible on white.
    return matplotlib.colormaps["viridis"](0.9 * place)


def _networks(records: Records) -> list[str]:
    return list(dict.fromkeys(case.network for case in records))


def _panels(records: Records, draw: Callable[[Any, str, Records], None]) -> Any:
    """A figure with one panel for each network, drawn from its runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = _networks(records)
    figure, axes = plt.subplots(1, len(networks), figsize=(6.4 * len(networks), 4.2), squeeze=False)
    for panel, network in zip(axes[0], networks):
        draw(panel, network, {c: r for c, r in records.items() if c.network == network})
        panel.set_title(network)
    figure.tight_layout()
    return figure


def _legend(panel: Any, **options: Any) -> None:
    """Beside the panel, where it hides nothing."""
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, **options)


def _mean_curve(runs: list[tuple[Case, dict[str, Any]]], key: str) -> list[float]:
    """The mean over the seeds, as far as every run goes and is finite."""
    curves = [record[key] for _, record in runs]
    mean = []
    for values in zip(*curves):
        if any(value is None for value in values):
            break
        mean.append(statistics.fmean(values))
    return mean


def _curves(panel: Any, network: str, records: Records, tasks: Tasks) -> None:
    """Validation loss by epoch: a line per method, SGD's rates from dark to light."""
    task = tasks[network]
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
        label = f"SGD {case.lr:g}" if case.method == "sgd" else METHODS[case.method]
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


def learning_curves(records: Records, tasks: Tasks) -> Any:
    return _panels(records, lambda panel, network, runs: _curves(panel, network, runs, tasks))


def triangle(records: Records, tasks: Tasks) -> Any:
    """Test loss by both ends of the interval."""

    def draw(panel: Any, network: str, runs: Records) -> None:
        task = tasks[network]
        cells: dict[tuple[float, float], list[float | None]] = {}
        for case, record in runs.items():
            lo, hi = case.lr_range or (case.lr, case.lr)
            cells.setdefault((lo, hi), []).append(record["test_loss"])  # type: ignore[arg-type]
        ends = sorted({end for cell in cells for end in cell})
        grid = np.full((len(ends), len(ends)), np.nan)
        for (lo, hi), losses in cells.items():
            grid[ends.index(lo), ends.index(hi)] = mean_and_spread(losses)[0] * task.per_nat
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

    return _panels(records, draw)


def posterior(records: Records, tasks: Tasks) -> Any:
    """The switch's probabilities over time, of the first seed."""

    def draw(panel: Any, network: str, runs: Records) -> None:
        case, record = next(iter(runs.items()))
        assert case.lr_range is not None and case.clones is not None
        rates = np.geomspace(*case.lr_range, case.clones)
        for k, (rate, weights) in enumerate(zip(rates, zip(*record["posterior"]))):
            panel.plot(
                record["posterior_epochs"],
                weights,
                color=_shade(k / max(case.clones - 1, 1)),
                marker=MARKERS[k % len(MARKERS)],
                markevery=(k, max(1, len(weights) // 6)),
                markersize=5,
                label=f"{rate:.0e}",
            )
        panel.set(xlabel="epoch", ylabel="posterior probability", ylim=(0, 1.02))
        _legend(panel, title="clone's rate", title_fontsize=8)

    return _panels(records, draw)


def fractions(records: Records, tasks: Tasks) -> Any:
    """Test loss by the part of the features that learn."""

    def draw(panel: Any, network: str, runs: Records) -> None:
        task = tasks[network]
        points: dict[float, list[float | None]] = {}
        for case, record in runs.items():
            points.setdefault(case.p or 0.0, []).append(record["test_loss"])
        means = {p: mean_and_spread(losses) for p, losses in sorted(points.items())}
        finite = [p for p in means if means[p][0] < math.inf]
        panel.errorbar(
            finite,
            [means[p][0] * task.per_nat for p in finite],
            [means[p][1] * task.per_nat for p in finite],
            color="black",
            marker="o",
            capsize=3,
        )
        panel.set(
            xlabel=f"part of the features that learn, at rate {BEST_LR.get(network, 1.0):g}",
            ylabel=f"test loss ({task.unit})",
            xlim=(0, 1.05),
        )

    return _panels(records, draw)


def widths(records: Records, tasks: Tasks) -> Any:
    """Test loss by SGD's rate, and Alrao's and Adam's, at each width."""

    def draw(panel: Any, network: str, runs: Records) -> None:
        task = tasks[network]
        sizes = sorted({case.width for case in runs})
        for k, width in enumerate(sizes):
            color = _shade(k / max(len(sizes) - 1, 1) * 0.6)
            groups = [g for g in by_setting(runs).values() if g[0][0].width == width]
            points = {}
            for group in groups:
                case = group[0][0]
                loss = mean_and_spread(record["test_loss"] for _, record in group)[0] * task.per_nat
                if case.method == "sgd":
                    points[case.lr] = loss
                elif loss < math.inf:
                    label = f"{METHODS[case.method]}, width x{width:g}"
                    style = {**STYLES[case.method], "color": color, "linewidth": 1.5 + k}
                    panel.axhline(loss, label=label, **style)
            finite = sorted(lr for lr, loss in points.items() if loss < math.inf)
            best = best_sgd(runs, network, width)
            panel.plot(
                finite,
                [points[lr] for lr in finite],
                marker=MARKERS[k],
                linestyle=":",
                color=color,
                label=f"SGD, width x{width:g}" + (f", best {best:g}" if best else ""),
            )
        panel.set(xscale="log", xlabel="learning rate of SGD", ylabel=f"test loss ({task.unit})")
        _legend(panel)

    return _panels(records, draw)


PLOTS: dict[str, Callable[[Records, Tasks], Any]] = {
    "table1": learning_curves,
    "figure2": learning_curves,
    "figure3": triangle,
    "figure4": posterior,
    "figure5": learning_curves,
    "figure6": learning_curves,
    "figure7": fractions,
    "figure8": widths,
}


def plot(command: str, records: Records, tasks: Tasks, path: Path) -> None:
    """Write the command's figure as a PNG."""
    import matplotlib.pyplot as plt

    figure = PLOTS[command](records, tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
