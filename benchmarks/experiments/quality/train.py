"""One run: a fixed number of steps, then the loss on validation and test set; and what stopping it early would give."""

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
# Points of the curves of training and validation losses.
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
    a loss is not finite. A run ends early with a loss that is not finite. "valid_curve" is the validation loss after
    each tenth, "stopped" the steps, validation and test loss where that is least, None if it is nowhere finite: what
    early stopping gives. A schedule is that of the whole run all the same. "seconds" are those of training alone and
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
    checks = EarlyStopping(trainer, seed)
    net.train()
    for x, y in task.batches(seed):
        start = now()
        loss = trainer.train_step(x, y)
        times.append(now() - start)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            break
        if len(losses) * POINTS // task.steps() > (len(losses) - 1) * POINTS // task.steps():
            checks.measure(len(losses))
    record: Record = {
        "curve": [finite(statistics.fmean(part), 4) for part in pieces(losses, POINTS)],
        "steps": len(losses),
        "seconds": round(sum(times), 3),
        "step_ms": round(1e3 * statistics.median(times), 4),
        "bytes": memory(net, opt, trainer),
        "guess": round(task.guess, 6),
        "valid_curve": checks.curve,
        "stopped": checks.least,
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


class EarlyStopping:
    """The validation losses of a run so far, and the test loss where they are least."""

    def __init__(self, trainer: Trainer, seed: int) -> None:
        self.trainer, self.seed = trainer, seed
        self.curve: list[float | None] = []
        self.least: dict[str, Any] | None = None

    def measure(self, steps: int) -> None:
        """After so many steps; the run goes on as if nothing had been measured."""
        with self.trainer.evaluation(self.seed, 0) as net:
            valid, _ = self.trainer.evaluate(net, "valid")
            if math.isfinite(valid) and (self.least is None or valid < self.least["valid_loss"]):
                test, _ = self.trainer.evaluate(net, "test")
                losses = {"valid_loss": finite(valid, 6), "test_loss": finite(test, 6)}
                self.least = {"steps": steps, **losses}
        self.trainer.net.train()
        self.curve.append(finite(valid, 4))


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
