"""One run: a fixed number of epochs, measured after each, without early stopping."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from paper.steps import Step
from paper.tasks import Task
from tqdm import tqdm

import alrao_fast as alrao
from quality.methods import Method, Trained, build

Curves = dict[str, list[Any]]
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
) -> dict[str, Any]:
    """Train one network; returns what its record holds.

    "curves": lists by epoch of "train_loss" (mean over the epoch, while the network changes), "valid_loss",
    "valid_accuracy", "test_loss" and "test_accuracy" (nats, percent; None where a loss is not finite), for Alrao also
    "posterior". "steps" and "seconds" are those of training alone: the processor time of this process on a CPU, which
    other programs do not lengthen, elapsed time on a GPU ("clock" says which). A run whose loss is no longer finite
    ends with that epoch.
    """
    net, opt = build(method, lr, task, width, seed, device)
    trained = Trained(method, net, opt)
    step = Step(net, opt, recurrent=task.recurrent, clip=task.clip)
    schedule = None
    if method.schedule:
        total = epochs * task.steps()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=total)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    curves: Curves = {"train_loss": []}
    steps, seconds = 0, 0.0
    for epoch in range(epochs):
        trained.resume()
        step.reset_state()
        start = clock()
        total_loss = torch.zeros((), device=device, dtype=torch.float64)
        for x, y in task.batches(seed, epoch):
            total_loss += step(x, y)
            trained.after_step()
            if schedule is not None:
                schedule.step()
        mean = float(total_loss) / task.steps()
        seconds += clock() - start
        steps += task.steps()
        curves["train_loss"].append(finite(mean))
        _measure(trained, task, seed, epoch, curves)
        if bar is not None:
            bar.update()
        if not math.isfinite(mean) and curves["test_loss"][-1] is None:
            break
    record: dict[str, Any] = {
        "curves": curves,
        "test_loss": curves["test_loss"][-1],
        "test_accuracy": curves["test_accuracy"][-1],
        "diverged": diverged(curves["test_loss"][-1], task.classes),
        "steps": steps,
        "seconds": round(seconds, 3),
        "clock": "elapsed" if device.type == "cuda" else "processor",
        "parameters": sum(param.numel() for param in net.parameters()),
    }
    if isinstance(net, alrao.AlraoModel):
        record["clone_rates"] = net.head.clone_lr.tolist()
        record["suggested_lr"] = net.suggested_lr()
    return record


@torch.no_grad()
def _measure(trained: Trained, task: Task, seed: int, epoch: int, curves: Curves) -> None:
    net = trained.evaluated(task.batches(seed, epoch))
    for part in ("valid", "test"):
        loss, accuracy = task.evaluate(net, part)
        curves.setdefault(f"{part}_loss", []).append(finite(loss))
        curves.setdefault(f"{part}_accuracy", []).append(finite(accuracy))
    if isinstance(net, alrao.AlraoModel):
        weights = [round(weight, 4) for weight in net.posterior().tolist()]
        curves.setdefault("posterior", []).append(weights)


def diverged(loss: float | None, classes: int) -> bool:
    """Whether a run that ends with this test loss (None: not finite) has diverged."""
    return loss is None or loss > DIVERGED * math.log(classes)


def finite(value: float) -> float | None:
    """The value as JSON holds it, to six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
