"""Ranking architectures without a search for learning rates: what Alrao was made for (paper, section 1)."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alrao_fast.arguments import checked
from alrao_fast.clip_grad import clip_grad_norm_
from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.nn.clones import LinearClones
from alrao_fast.optim import AlraoSGD
from alrao_fast.rank_arguments import (
    KINDS,
    as_seeds,
    check_batch,
    check_batches,
    check_models,
    check_optimizer,
    first_batch,
    naming,
    telling,
)

Batches = Iterable[Sequence[Tensor]]
MakeOptimizer = Callable[[AlraoModel, torch.Generator], torch.optim.Optimizer]


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


def rank(
    models: Mapping[str, Callable[[], nn.Module]],
    train: Batches,
    valid: Batches,
    *,
    num_classes: int | None = None,
    head: Callable[[int], LinearClones] | None = None,
    epochs: int = 10,
    patience: int | None = None,
    seeds: int | Iterable[int] = 1,
    lr_range: tuple[float, float] = (1e-5, 10.0),
    optimizer: MakeOptimizer | None = None,
    clip_grad_norm: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Ranking:
    """Train every candidate once with Alrao and rank them by validation loss: no learning rate is searched for.

        ranking = alrao_fast.rank({"narrow": make_a, "wide": make_b}, train_loader, valid_loader, num_classes=10)
        print(ranking)

    Args:
        models: name -> function that builds the candidate: a backbone (features `[..., D]` come out, or a tuple
            (features, *extras); D may be any), which gets Alrao's clones as its last layer, or a whole `AlraoModel`.
        train, valid: batches (*inputs, targets) of tensors, to be iterated anew in every epoch: DataLoaders, or lists.
        num_classes: of the classifier put on backbones, 10 clones.
        head: in place of `num_classes`, a function D -> `ClassifierClones` or `RegressorClones`.
        epochs: how long each is trained at most; with `patience`, until validation has not improved for so many epochs.
        seeds: how many trainings of each candidate, or the seeds themselves. A seed decides initial values, rates, and
            the order of the batches, as far as they come from torch's global generator; it is the same for all
            candidates. That generator is left as it was.
        lr_range: the interval of the rates. The paper's recurrent networks use (1e-3, 100).
        optimizer: (model, generator of its rates) -> optimizer, in place of `AlraoSGD(model, lr_range)`.
        clip_grad_norm: bound on the norms of the gradients, by `alrao_fast.clip_grad_norm_`.
        device: None is the GPU where there is one, else the CPU.
        progress: show a bar, where tqdm is installed.

    A candidate's place is decided by its least validation loss over the epochs (mean over the seeds); one that is never
    finite comes last. Every candidate is built and tried on one batch of `train` and one of `valid` before the first is
    trained, so that a mistake shows at once. Raises ValueError or TypeError naming the argument, or the candidate and
    the loader; RuntimeError, naming them, for what fails later in a training.
    """
    options = checked(KINDS, locals())
    epochs, patience, lr_range = options["epochs"], options["patience"], options["lr_range"]
    clip_grad_norm, progress = options["clip_grad_norm"], options["progress"]
    seeds = as_seeds(seeds)
    check_models(models)
    check_batches(train=train, valid=valid)
    if num_classes is not None and head is not None:
        raise ValueError("num_classes and head: got both, expected one of the two")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if head is None and num_classes is not None:
        head = partial(ClassifierClones, num_classes=options["num_classes"])

    def make_optimizer(name: str, net: AlraoModel, seed: int) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(seed)
        if optimizer is None:
            return AlraoSGD(net, lr_range, generator=generator)
        with naming(name, "optimizer(model, generator)"):
            made = optimizer(net, generator)
        check_optimizer(name, net, made)
        return made

    rows = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        sample, held_out = (
            [part.to(device) for part in first_batch(loader, batches)]
            for loader, batches in (("train", train), ("valid", valid))
        )
        training = _Training(train, valid, epochs, patience, clip_grad_norm, device)
        for name, make in models.items():
            # One training step and one validation of a model that is thrown away.
            net = _build(name, make, head, sample, seeds[0], device)
            opt, (*inputs, targets) = make_optimizer(name, net, seeds[0]), sample
            with naming(name, "a training step", "train"):
                _loss(net(*inputs, targets=targets)).backward()
                opt.step()
            with naming(name, "validation", "valid"):
                training.evaluate(net, [held_out])
        with _bar(len(models) * len(seeds) * epochs, progress) as update:
            for name, make in models.items():
                runs = []
                for seed in seeds:
                    net = _build(name, make, head, sample, seed, device)
                    opt = make_optimizer(name, net, seed)
                    runs.append(training.run(net, opt, seed, partial(update, name), name))
                rows.append(_row(name, net, runs))
    return Ranking(sorted(rows, key=lambda row: row.loss))


def _build(
    name: str,
    make: Callable[[], nn.Module],
    head: Callable[[int], LinearClones] | None,
    sample: Sequence[Tensor],
    seed: int,
    device: torch.device,
) -> AlraoModel:
    """A fresh candidate; the width of a backbone's features is seen from one batch."""
    torch.manual_seed(seed)
    with naming(name, "the function"):
        net = make()
    if not isinstance(net, nn.Module):
        raise TypeError(f"models[{name!r}]: built a {type(net).__name__}, expected an nn.Module")
    net = net.to(device)
    if isinstance(net, AlraoModel):
        return net
    if head is None:
        raise ValueError(
            f"models[{name!r}]: built a backbone without clones: pass num_classes (or head), or build an AlraoModel"
        )
    *inputs, _ = sample
    training = net.training
    with torch.no_grad(), naming(name, "the backbone", "train"):
        out = net.eval()(*inputs)
    net.train(training)
    features = out[0] if isinstance(out, tuple) else out
    if not isinstance(features, Tensor) or features.dim() < 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"models[{name!r}]: the backbone returned {shape}, expected features [batch, ..., D]"
        )
    with naming(name, f"head({features.size(-1)})"):
        return AlraoModel(net, head(features.size(-1))).to(device)


def _loss(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _suggested_lr(net: AlraoModel) -> float:
    """NaN where the training has diverged."""
    try:
        return net.suggested_lr()
    except RuntimeError:
        return math.nan


class _Training(NamedTuple):
    """How each candidate is trained; the arguments are those of `rank`."""

    train: Batches
    valid: Batches
    epochs: int
    patience: int | None
    clip_grad_norm: float | None
    device: torch.device

    def run(
        self,
        net: AlraoModel,
        opt: torch.optim.Optimizer,
        seed: int,
        update: Callable[[], None],
        name: str,
    ) -> Trained:
        train_loss: list[float] = []
        valid_loss: list[float] = []
        accuracies: list[float | None] = []
        least, best_epoch, suggested = math.inf, 1, math.nan
        seconds = 0.0
        for epoch in range(self.epochs):
            # The same order of batches for every candidate, however many random numbers it draws itself.
            torch.manual_seed((seed << 32) + epoch)
            start = time.perf_counter()
            where = f"models[{name!r}], epoch {epoch + 1} of seed {seed}"
            with telling(f"{where}, train"):
                train_loss.append(self._epoch(net, opt))
            seconds += time.perf_counter() - start
            with telling(f"{where}, valid"):
                loss, accuracy = self.evaluate(net, self.valid)
            valid_loss.append(loss)
            accuracies.append(accuracy)
            if loss < least or epoch == 0:
                least, best_epoch, suggested = min(loss, least), epoch + 1, _suggested_lr(net)
            update()
            if self.patience is not None and epoch + 1 - best_epoch >= self.patience:
                break
        mean = seconds / len(train_loss)
        return Trained(seed, train_loss, valid_loss, accuracies, best_epoch, suggested, mean)

    def _epoch(self, net: AlraoModel, opt: torch.optim.Optimizer) -> float:
        """One pass over the training batches; returns their mean loss, which is the first wait for the device."""
        net.train()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self.train:
            check_batch("train", batch)
            *inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
            opt.zero_grad()
            loss = _loss(net(*inputs, targets=targets))
            loss.backward()
            if self.clip_grad_norm is not None:
                clip_grad_norm_(net, self.clip_grad_norm)
            opt.step()
            total += loss.detach()
            count += 1
        return float(total) / count

    @torch.no_grad()
    def evaluate(self, net: AlraoModel, batches: Batches) -> tuple[float, float | None]:
        """Mean loss in nats, inf where it is not finite, and accuracy in percent (None in regression)."""
        net.eval()
        classifier = net.head if isinstance(net.head, ClassifierClones) else None
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct, count = torch.zeros_like(loss), torch.zeros_like(loss)
        for batch in batches:
            check_batch("valid", batch)
            *inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
            if classifier is None:
                samples = targets.numel() // targets.size(-1)
                mean = net.head.reduction == "mean"
                loss += _loss(net(*inputs, targets=targets)) * (samples if mean else 1)
                count += samples
                continue
            log_probs = _loss(net(*inputs)).flatten(0, -2)
            targets, ignored = targets.flatten(), classifier.ignore_index
            loss += nn.functional.nll_loss(
                log_probs, targets, ignore_index=ignored, reduction="sum"
            )
            correct += (log_probs.argmax(-1) == targets).sum()
            count += (targets != ignored).sum()
        samples = int(count)
        if samples == 0 and batches is self.valid:
            raise ValueError("valid: got no samples")
        mean_loss = float(loss) / max(samples, 1)
        accuracy = None if classifier is None else 100 * float(correct) / max(samples, 1)
        return (mean_loss if math.isfinite(mean_loss) else math.inf), accuracy


def _row(name: str, net: AlraoModel, runs: list[Trained]) -> Ranked:
    losses = [run.loss for run in runs]
    finite = all(math.isfinite(loss) for loss in losses)
    accuracies = [run.accuracy[run.best_epoch - 1] for run in runs]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    with_clones = sum(param.numel() for param in net.parameters())
    last = [param.numel() // net.head.num_clones for param in net.head.parameters()]
    return Ranked(
        name=name,
        loss=statistics.fmean(losses) if finite else math.inf,
        spread=statistics.stdev(losses) if finite and len(losses) > 1 else 0.0,
        accuracy=statistics.fmean(known) if known else None,
        suggested_lr=statistics.geometric_mean([run.suggested_lr for run in runs]),
        parameters=with_clones - (net.head.num_clones - 1) * sum(last),
        alrao_parameters=with_clones,
        seconds=statistics.fmean([run.seconds for run in runs]),
        runs=runs,
    )


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[str], None]]:
    """A function that counts an epoch of the candidate it names."""
    try:
        from tqdm import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda name: None
        return
    with tqdm(total=total, unit="epoch") as bar:

        def update(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield update
