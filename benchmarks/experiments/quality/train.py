"""One run: a fixed number of epochs, measured after each, without early stopping."""

import math
import time
from typing import Any

import torch
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks.experiments.methods import Method, Setting, build
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.trainer import Trainer
from benchmarks.results import Record, finite

# A run counts as diverged where it ends with a loss that is not finite, or this many times that of guessing.
DIVERGED = 2.0


def train(
    method: Method,
    lr: float | None,
    task: Task,
    seed: int,
    *,
    epochs: int,
    width: float,
    device: torch.device,
    bar: tqdm | None = None,
) -> Record:
    """Train one network; returns what its record holds.

    "curves": lists by epoch of "train_loss" (mean over the epoch, while the network changes), "valid_loss",
    "valid_accuracy", "test_loss" and "test_accuracy" (nats, percent; None where a loss is not finite), for Alrao also
    "posterior". "steps" and "seconds" are those of training alone: the processor time of this process on a CPU, which
    other programs do not lengthen, elapsed time on a GPU ("clock" says which). A run whose loss is no longer finite
    ends with that epoch.
    """
    setting = Setting(lr, method.lr_range or task.lr_range, seed)
    net, opt = build(method, setting, task, width=width, device=device)
    trainer = Trainer(method, net, opt, task, epochs=epochs)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    curves: dict[str, list[Any]] = {"train_loss": []}
    seconds = 0.0
    for epoch in range(epochs):
        start = clock()
        mean = trainer.epoch(seed, epoch)
        seconds += clock() - start
        curves["train_loss"].append(finite(mean, 6))
        measure(trainer, seed, epoch, curves)
        if bar is not None:
            bar.update()
        if not math.isfinite(mean) and curves["test_loss"][-1] is None:
            break
    last = curves["test_loss"][-1]
    record: Record = {
        "curves": curves,
        "test_loss": last,
        "test_accuracy": curves["test_accuracy"][-1],
        "diverged": last is None or last > DIVERGED * math.log(task.classes),
        "steps": task.steps() * len(curves["train_loss"]),
        "seconds": round(seconds, 3),
        "clock": "elapsed" if device.type == "cuda" else "processor",
        "parameters": sum(param.numel() for param in net.parameters()),
    }
    if isinstance(net, alrao.AlraoModel):
        record["clone_rates"] = net.head.clone_lr.tolist()
        record["suggested_lr"] = net.suggested_lr()
    # What a reader of the record needs to know of its task.
    record |= {"unit": task.unit, "per_nat": task.per_nat, "classes": task.classes}
    return {**record, "lr_range": list(setting.lr_range)}


def measure(trainer: Trainer, seed: int, epoch: int, curves: dict[str, list[Any]]) -> None:
    """Loss and accuracy on the validation and the test set, to six digits."""
    net = trainer.evaluated(seed, epoch)
    for part in ("valid", "test"):
        loss, accuracy = trainer.evaluate(net, part)
        curves.setdefault(f"{part}_loss", []).append(finite(loss, 6))
        curves.setdefault(f"{part}_accuracy", []).append(finite(accuracy, 6))
    if isinstance(net, alrao.AlraoModel):
        weights = [round(weight, 4) for weight in net.posterior().tolist()]
        curves.setdefault("posterior", []).append(weights)
