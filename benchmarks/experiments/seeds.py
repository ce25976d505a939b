"""Figures over the seeds of a setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value); (inf, 0) where a run has diverged: one is None or inf."""
    present = [math.inf if value is None else value for value in values]
    mean = statistics.fmean(present)
    return mean, statistics.stdev(present) if len(present) > 1 and mean < math.inf else 0.0


def mean(values: Iterable[float | None]) -> float:
    """The mean alone; inf where a run has diverged."""
    return mean_and_spread(values)[0]
