"""How time and memory grow with the clones, the classes, the parameters: `python benchmarks speed --sweep clones`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.speed.case import Case
from benchmarks.speed.heads import Head, mixture_case
from benchmarks.speed.measure import Values
from benchmarks.speed.optimizers import linear_network, optimizer_case
from benchmarks.timing import device_seconds

# What grows: its key and that of its exponent in the records, and its name.
KINDS = (
    ("seconds", "time_exponent", "time"),
    ("peak_memory", "memory_exponent", "peak extra memory"),
)
HEADS = ("alrao", "one by one", "linear_cross_entropy x N", "linear_cross_entropy by rows")


def _heads(heads: dict[int, Head]) -> list[tuple[int, Case]]:
    return [(n, mixture_case(head, keep=HEADS, memory=True)) for n, head in heads.items()]


def _clones(device: torch.device) -> list[tuple[int, Case]]:
    shape = (4096, 1024, 4096) if device.type == "cuda" else (256, 256, 1000)
    return _heads({n: Head(f"{n} clones", *shape, n) for n in (1, 2, 4, 8, 16, 32)})


def _classes(device: torch.device) -> list[tuple[int, Case]]:
    shape = (2048, 512) if device.type == "cuda" else (64, 64)
    sizes = (10, 100, 1000, 10_000, 32_000, 128_000)
    return _heads({c: Head(f"{c} classes", *shape, c, 6) for c in sizes})


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _parameters(device: torch.device) -> list[tuple[int, Case]]:
    names = ("alrao", "torch fused", "torch foreach")
    # Parameters and gradients in float32, a copy for the comparison, and room to work in.
    fitting = [size for size in (10**k for k in range(5, 10)) if 16 * size < _free_memory(device)]
    networks = {size: (f"linear layers, {size:,}", linear_network(size)) for size in fitting}
    return [
        (size, optimizer_case(name, make_network=make, keep=names))
        for size, (name, make) in networks.items()
    ]


SWEEPS = {"clones": _clones, "classes": _classes, "parameters": _parameters}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The power of the size by which the values grow: the slope of least squares in log-log over the upper half.

    Small sizes cost a constant; None with fewer than 2 points.
    """
    points = [(s, v) for s, v in zip(sizes, values) if v > 0]
    points = points[-max(2, (len(points) + 1) // 2) :]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def summaries(points: list[tuple[int, dict[str, Values]]]) -> dict[str, dict[str, Any]]:
    """By candidate: sizes, times, memory and their exponents; sizes at which it could not run are left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in points[0][1]:
        rows = [(size, values[name]) for size, values in points if "seconds" in values[name]]
        if not rows:
            continue
        at = [size for size, _ in rows]
        seconds = [time.median for _, row in rows if (time := device_seconds(row)) is not None]
        memory = [row.get("peak_memory", 0) for _, row in rows]
        found[name] = {"at": at, "seconds": seconds, "peak_memory": memory}
        found[name]["time_exponent"] = exponent(at, seconds)
        found[name]["memory_exponent"] = exponent(at, memory)
    return found


def lines(axes: Any, rows: Mapping[str, Any], key: str, power: str, unit: float = 1.0) -> None:
    """A line of each candidate's values over the sizes, log-log, in units of `unit`; labels tell the fitted power."""
    for name, row in rows.items():
        points = [(size, v / unit) for size, v in zip(row["at"], row.get(key) or []) if v > 0]
        if points:
            fitted = row.get(power)
            label = name if fitted is None else f"{name}: power {fitted:.2f}"
            axes.loglog(*zip(*points), marker="o", markersize=4, label=label)


def plot(sweep: str, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Time and memory against the size, log-log, relative to Alrao's at the smallest size."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for (key, power, title), ax in zip(KINDS, figure.subplots(1, 2)):
        unit = next((v for f in found.values() for v in f[key] if v > 0), None)
        if unit is None:
            ax.set_axis_off()
            ax.set_title(f"{title}: not measured")
            continue
        lines(ax, found, key, power, unit)
        ax.set_xlabel(sweep)
        ax.set_title(f"{title}, in units of the first point of the first line", fontsize=10)
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
