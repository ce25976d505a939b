"""One run: epochs of training with early stopping on the validation set, a checkpoint after each epoch, its record."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks.experiments.data import epoch_seed
from benchmarks.experiments.methods import METHODS, build
from benchmarks.experiments.paper.cases import Case
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.trainer import Trainer
from benchmarks.results import Record, finite

History = dict[str, list[Any]]
# Readings of the switch in an epoch: it moves fastest in the first one.
READINGS = 20


class Runtime(NamedTuple):
    """Where and how runs are executed: nothing that decides what they compute."""

    device: torch.device
    checkpoints: Path
    cuda_graph: bool = False

    def checkpoint(self, case: Case) -> Path:
        return self.checkpoints / f"{case.key()}.pt"


def make(case: Case, task: Task, device: torch.device, *, cuda_graph: bool = False) -> Trainer:
    """The case's network and its training, at the start."""
    method = METHODS[case.method]
    shape = {"width": case.width, "dropout": case.dropout, "clones": case.clones}
    net, opt = build(method, case.setting(), task, device=device, **shape)
    return Trainer(method, net, opt, task, amp=case.amp, cuda_graph=cuda_graph)


def train(case: Case, task: Task, runtime: Runtime, bar: tqdm | None = None) -> Record:
    """Train one case, going on from its checkpoint where there is one; returns what its record holds.

    Lists by epoch: "train_loss" (mean over the epoch, while the network changes), "valid_loss" and "valid_accuracy"
    (nats per image or token; percent; a loss that is not finite is None). "test_loss" and "test_accuracy" are those at
    "best_epoch", the one of least validation loss. Alrao also has "posterior" (the clones' probabilities) at the times
    "posterior_epochs". The run ends after `case.patience` epochs without improvement, after `case.epochs`, or when
    both losses have diverged.
    """
    trainer = make(case, task, runtime.device, cuda_graph=runtime.cuda_graph)
    parts = {"net": trainer.net, "opt": trainer.opt, "step": trainer.step}
    history: History = {"train_loss": [], "valid_loss": [], "valid_accuracy": []}
    best: Record = {"best_epoch": None, "test_loss": None, "test_accuracy": None}
    if isinstance(trainer.net, alrao.AlraoModel):
        history |= {"posterior_epochs": [0.0], "posterior": [_rounded(trainer.net.posterior())]}
    checkpoint = runtime.checkpoint(case)
    if checkpoint.exists():
        stored = torch.load(checkpoint, map_location=runtime.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(stored[name])
        history, best = stored["history"], stored["best"]
    if bar is not None:
        bar.update(len(history["train_loss"]))

    while not _ended(case, history, best):
        epoch = len(history["train_loss"])
        # Dropout draws from the global generator; from the epoch's number, so that a resumed run draws the same.
        torch.manual_seed(epoch_seed(case.seed, epoch))
        _train_epoch(case, trainer, epoch, history)
        _measure(case, trainer, epoch, history, best)
        state = {name: part.state_dict() for name, part in parts.items()}
        _save({**state, "history": history, "best": best}, checkpoint)
        if bar is not None:
            bar.update()
            shown = history["valid_loss"][-1]
            bar.set_postfix(valid="diverged" if shown is None else f"{shown * task.per_nat:.3f}")
    return {**history, **best, "parameters": sum(p.numel() for p in trainer.net.parameters())}


def _train_epoch(case: Case, trainer: Trainer, epoch: int, history: History) -> None:
    net, steps = trainer.net, trainer.task.steps()
    every = max(1, steps // READINGS)
    readings = []

    def read(count: int) -> None:
        if isinstance(net, alrao.AlraoModel) and count % every == 0:
            readings.append((epoch + count / steps, net.posterior().clone()))

    history["train_loss"].append(finite(trainer.epoch(case.seed, epoch, read)))
    for time, posterior in readings:
        history["posterior_epochs"].append(round(time, 4))
        history["posterior"].append(_rounded(posterior))


def _measure(case: Case, trainer: Trainer, epoch: int, history: History, best: Record) -> None:
    """Validation, and the test set where validation is the best so far."""
    with trainer.evaluation(case.seed, epoch) as net:
        loss, accuracy = trainer.evaluate(net, "valid")
        known = (value for value in history["valid_loss"] if value is not None)
        if loss < min(known, default=math.inf):
            test_loss, test_accuracy = trainer.evaluate(net, "test")
            best |= {"best_epoch": epoch + 1, "test_loss": finite(test_loss)}
            best["test_accuracy"] = test_accuracy
    history["valid_loss"].append(finite(loss))
    history["valid_accuracy"].append(accuracy)


def _ended(case: Case, history: History, best: Record) -> bool:
    done = len(history["train_loss"])
    if done and history["train_loss"][-1] is None and history["valid_loss"][-1] is None:
        return True
    return done >= case.epochs or done - (best["best_epoch"] or 0) >= case.patience


def _save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _rounded(posterior: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in posterior.tolist()]
