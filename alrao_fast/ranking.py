"""What `rank` returns: the candidates with their figures, and the curves behind them."""

from __future__ import annotations

import math
from typing import NamedTuple


class Trained(NamedTuple):
    """One training, by epoch: `train_loss`, `valid_loss` (nats), `accuracy` (percent; None in regression).

    `best_epoch` counts from 1 and is that of least validation loss; `suggested_lr` is `AlraoModel.suggested_lr` there;
    `seconds` is the mean training time of an epoch.
    """

    seed: int
    train_loss: list[float]
    valid_loss: list[float]
    accuracy: list[float | None]
    best_epoch: int
    suggested_lr: float
    seconds: float

    @property
    def loss(self) -> float:
        return self.valid_loss[self.best_epoch - 1]


class Ranked(NamedTuple):
    """A candidate: mean and standard deviation over the seeds of its best validation loss, and what else to know of it.

    `accuracy` in percent at that epoch, None in regression. `suggested_lr`: a rate for a later run of plain SGD, the
    geometric mean over the seeds. `parameters` with one last layer, `alrao_parameters` with the clones in its place.
    `seconds` is the training time of an epoch. `runs` has the curves, one `Trained` for each seed.
    """

    name: str
    loss: float
    spread: float
    accuracy: float | None
    suggested_lr: float
    parameters: int
    alrao_parameters: int
    seconds: float
    runs: list[Trained]


class Ranking(list[Ranked]):
    """The candidates, best first: a list of `Ranked`, whose `str` is a table."""

    def __str__(self) -> str:
        header = [
            "",
            "model",
            "validation loss",
            "accuracy %",
            "best epoch",
            "SGD rate",
            "parameters",
        ]
        lines = [[*header, "s/epoch"]]
        for place, row in enumerate(self, 1):
            loss = f"{row.loss:.4g}" if math.isfinite(row.loss) else "diverged"
            epochs = sorted({run.best_epoch for run in row.runs})
            lines.append(
                [
                    str(place),
                    row.name,
                    loss + (f" +- {row.spread:.2g}" if len(row.runs) > 1 else ""),
                    "" if row.accuracy is None else f"{row.accuracy:.1f}",
                    f"{epochs[0]}" + (f"-{epochs[-1]}" if len(epochs) > 1 else ""),
                    f"{row.suggested_lr:.1g}",
                    f"{row.parameters:,}",
                    f"{row.seconds:.2g}",
                ]
            )
        widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if k == 1 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        )
