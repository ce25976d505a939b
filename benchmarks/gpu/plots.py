"""`python benchmarks gpu_plots`: the share of the GPU's limit that a kernel reaches, case by case, as a figure.

The limit is the time of the case's matrix products at the rate of large ones, or that of its bytes at the rate of
copies, whichever the case is bound by. The figures are lines of `docs/results/gpu/shares.csv`: case, backend, percent
of the limit, goal, and the source state they were taken of.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.show import INK, legend_beside, pyplot, save

FOLDER = ROOT / "docs" / "results" / "gpu"
# Okabe and Ito's light blue and orange.
COLORS = {"cuda": "#56B4E9", "triton": "#E69F00"}


def shares_plot(lines: list[dict[str, str]]) -> Any:
    """A bar for each line, those of a case together, and the goal as a tick across it."""
    cases = list(dict.fromkeys(line["case"] for line in lines))
    figure, axes = pyplot().subplots(figsize=(7.5, 0.42 * len(cases) + 1.2))
    for place, case in enumerate(cases):
        own = [line for line in lines if line["case"] == case]
        height = 0.8 / len(own)
        for k, line in enumerate(own):
            middle = place + (k + 0.5) * height - 0.4
            share, goal = float(line["share"]), float(line["goal"])
            axes.barh(middle, share, 0.9 * height, color=COLORS[line["backend"]])
            axes.text(
                share - 1, middle, line["share"], ha="right", va="center", color=INK, fontsize=8
            )
            ends = [middle - height / 2, middle + height / 2]
            axes.plot([goal, goal], ends, color=INK, linewidth=2)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="percent of the limit: products or copies")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    patch, rule = pyplot().matplotlib.patches.Patch, pyplot().matplotlib.lines.Line2D
    keys = [patch(color=color, label=name) for name, color in COLORS.items()]
    legend_beside(axes, handles=[*keys, rule([], [], color=INK, linewidth=2, label="goal")])
    return figure


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks gpu_plots", description=__doc__)
    parser.add_argument("--shares", type=Path, default=FOLDER / "shares.csv", help="the figures")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the plot")
    options = parser.parse_args(arguments)
    with options.shares.open(newline="") as file:
        lines = list(csv.DictReader(file))
    print(f"wrote {save(shares_plot(lines), options.out / 'shares.png')}")
    return 0
