"""One run: a fixed number of steps, then the loss on validation and test set, without early stopping."""

import itertools
import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import alrao_fast as alrao
from benchmarks.experiments.methods import Method, Setting, build
from benchmarks.experiments.quality.tasks import SmallTask
from benchmarks.experiments.trainer import Trainer
from benchmarks.results import Record, finite

# A run counts as diverged where it ends with a loss that is not finite, or this many times that of guessing.
DIVERGED = 2.0
# Points of the curve of training losses.
POINTS = 10


def train(
    method: Method,
    task: SmallTask,
    seed: int,
    *,
    lr: float | None = None,
    lr_range: tuple[float, float] | None = None,
    device: torch.device,
) -> Record:
    """Train one network; returns what its record holds.

    "curve" is the mean training loss of each tenth of the steps; losses are in nats, accuracies in percent, None where
    a loss is not finite. A run ends early with a loss that is not finite. "seconds" are those of training alone and
    "step_ms" is the median step: the processor time of this process on a CPU, which other programs do not lengthen,
    elapsed time on a GPU. "bytes" are those of the parameters and of all that the method keeps for them.
    """
    setting = Setting(lr, lr_range or method.lr_range, seed, total_steps=task.steps())
    net, opt = build(method, setting, task, device=device)
    trainer = Trainer(method, net, opt, task)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    losses: list[float] = []
    times = []
    net.train()
    for x, y in task.batches(seed):
        start = now()
        loss = trainer.train_step(x, y)
        times.append(now() - start)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            break
    record: Record = {
        "curve": [finite(statistics.fmean(part), 4) for part in pieces(losses, POINTS)],
        "steps": len(losses),
        "seconds": round(sum(times), 3),
        "step_ms": round(1e3 * statistics.median(times), 4),
        "bytes": memory(net, opt, trainer),
        "guess": round(task.guess, 6),
    }
    with trainer.evaluation(seed, 0) as evaluated:
        for part in ("valid", "test"):
            loss, accuracy = trainer.evaluate(evaluated, part)
            record[f"{part}_loss"] = finite(loss, 6)
            record[f"{part}_accuracy"] = finite(accuracy, 5)
    finals = [losses[-1], *(record[f"{part}_loss"] for part in ("valid", "test"))]
    good = all(loss is not None and math.isfinite(loss) for loss in finals)
    record["diverged"] = not good or record["test_loss"] > DIVERGED * task.guess
    if isinstance(net, alrao.AlraoModel):
        record["posterior"] = [finite(weight, 3) for weight in net.posterior().tolist()]
        record["clone_rates"] = [finite(rate, 3) for rate in net.head.clone_lr.tolist()]
    return record


def pieces(values: list[float], count: int) -> Iterable[list[float]]:
    """The values in order, in so many pieces of about one size; fewer where there are fewer values."""
    count = min(count, len(values))
    ends = [k * len(values) // count for k in range(count + 1)]
    return (values[start:end] for start, end in itertools.pairwise(ends))


def memory(net: torch.nn.Module, opt: Any, trainer: Trainer) -> int:
    """Bytes of the parameters, the optimizer's state and the average, each storage once."""
    kept: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)

    add(list(net.parameters()))
    add(dict(opt.state))
    if trainer.average is not None:
        add(trainer.average.values)
    return sum(kept.values())
