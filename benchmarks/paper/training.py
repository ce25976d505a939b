"""One run: epochs of training with early stopping on the validation set, a checkpoint after each epoch, its record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import alrao_fast as alrao
from paper.cases import Case, build
from paper.images import epoch_seed
from paper.steps import CapturedStep, Step
from paper.tasks import Task

History = dict[str, list[Any]]
# Readings of the switch in an epoch: it moves fastest in the first one.
READINGS = 20


class Runtime(NamedTuple):
    """Where and how runs are executed: nothing that decides what they compute."""

    device: torch.device
    checkpoints: Path
    cuda_graph: bool = False


def train(case: Case, task: Task, runtime: Runtime, bar: tqdm | None = None) -> dict[str, Any]:
    """Train one case, going on from its checkpoint where there is one; returns what its record holds.

    Lists by epoch: "train_loss" (mean over the epoch, while the network changes), "valid_loss" and "valid_accuracy"
    (nats per image or token; percent; a loss that is not finite is None). "test_loss" and "test_accuracy" are those at
    "best_epoch", the one of least validation loss. Alrao also has "posterior" (the clones' probabilities) at the times
    "posterior_epochs". The run ends after `case.patience` epochs without improvement, after `case.epochs`, or when
    both losses have diverged.
    """
    torch.manual_seed(case.seed)
    backbone = task.backbone(case.width, case.dropout)
    net, opt = build(case, backbone, task.classes, runtime.device)
    # The baselines of torch.optim take ordinary steps: the same numbers, only slower.
    make = CapturedStep if runtime.cuda_graph and isinstance(net, alrao.AlraoModel) else Step
    step = make(net, opt, recurrent=task.recurrent, clip=task.clip, amp=case.amp)
    history: History = {"train_loss": [], "valid_loss": [], "valid_accuracy": []}
    best: dict[str, Any] = {"best_epoch": None, "test_loss": None, "test_accuracy": None}
    if isinstance(net, alrao.AlraoModel):
        history |= {"posterior_epochs": [0.0], "posterior": [_rounded(net.posterior())]}
    checkpoint = runtime.checkpoints / f"{case.key()}.pt"
    if checkpoint.exists():
        stored = torch.load(checkpoint, map_location=runtime.device, weights_only=True)
        net.load_state_dict(stored["net"])
        opt.load_state_dict(stored["opt"])
        step.load_state_dict(stored["step"])
        history, best = stored["history"], stored["best"]
    if bar is not None:
        bar.update(len(history["train_loss"]))

    while not _ended(case, history, best):
        epoch = len(history["train_loss"])
        # Dropout draws from the global generator; from the epoch's number, so that a resumed run draws the same.
        torch.manual_seed(epoch_seed(case.seed, epoch))
        _train_epoch(case, task, net, step, epoch, history)
        _measure(task, net, step, epoch, history, best)
        state = {"net": net.state_dict(), "opt": opt.state_dict(), "step": step.state_dict()}
        _save({**state, "history": history, "best": best}, checkpoint)
        if bar is not None:
            bar.update()
            shown = history["valid_loss"][-1]
            bar.set_postfix(valid="diverged" if shown is None else f"{shown * task.per_nat:.3f}")
    return {**history, **best, "parameters": sum(p.numel() for p in net.parameters())}


def _train_epoch(
    case: Case, task: Task, net: nn.Module, step: Step, epoch: int, history: History
) -> None:
    steps = task.steps()
    every = max(1, steps // READINGS)
    total = torch.zeros((), dtype=torch.float64)
    readings = []
    net.train()
    step.reset_state()
    # Shown only where an epoch takes a while.
    batches = tqdm(task.batches(case.seed, epoch), total=steps, leave=False, delay=10, unit="step")
    for number, (x, y) in enumerate(batches, 1):
        loss = step(x, y)
        total = total.to(loss.device) + loss
        if isinstance(net, alrao.AlraoModel) and number % every == 0:
            readings.append((epoch + number / steps, net.posterior().clone()))
    history["train_loss"].append(_finite(float(total) / steps))
    for time, posterior in readings:
        history["posterior_epochs"].append(round(time, 4))
        history["posterior"].append(_rounded(posterior))


@torch.no_grad()
def _measure(
    task: Task, net: nn.Module, step: Step, epoch: int, history: History, best: dict[str, Any]
) -> None:
    """Validation, and the test set where validation is the best so far."""
    net.eval()
    with step.autocast():
        loss, accuracy = task.evaluate(net, "valid")
        losses = history["valid_loss"]
        least = min((value for value in losses if value is not None), default=math.inf)
        if loss < least:
            test_loss, test_accuracy = task.evaluate(net, "test")
            best |= {"best_epoch": epoch + 1, "test_loss": _finite(test_loss)}
            best["test_accuracy"] = test_accuracy
    losses.append(_finite(loss))
    history["valid_accuracy"].append(accuracy)


def _ended(case: Case, history: History, best: dict[str, Any]) -> bool:
    done = len(history["train_loss"])
    if done and history["train_loss"][-1] is None and history["valid_loss"][-1] is None:
        return True
    return done >= case.epochs or done - (best["best_epoch"] or 0) >= case.patience


def _save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded(posterior: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in posterior.tolist()]
