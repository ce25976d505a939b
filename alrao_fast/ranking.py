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

from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.nn.clones import LinearClones
from alrao_fast.optim import AlraoSGD

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
        clip_grad_norm: bound on the norm of all gradients.
        device: None is the GPU where there is one, else the CPU.
        progress: show a bar, where tqdm is installed.

    A candidate's place is decided by its least validation loss over the epochs (mean over the seeds); one that is never
    finite comes last. Every candidate is built and tried on one batch before the first is trained, so that a mistake
    shows at once. Raises ValueError or TypeError naming the argument or the candidate.
    """
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    _check(models, train, valid, num_classes, head, epochs, patience, seeds)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if head is None and num_classes is not None:
        head = partial(ClassifierClones, num_classes=num_classes)

    def make_optimizer(net: AlraoModel, seed: int) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(seed)
        if optimizer is not None:
            return optimizer(net, generator)
        return AlraoSGD(net, lr_range, generator=generator)

    rows = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        sample = [part.to(device) for part in _first_batch(train)]
        training = _Training(train, valid, epochs, patience, clip_grad_norm, device)
        for name, make in models.items():
            # One training step of a model that is thrown away.
            net = _build(name, make, head, sample, seeds[0], device)
            opt, (*inputs, targets) = make_optimizer(net, seeds[0]), sample
            with _naming(name, "a training step"):
                _loss(net(*inputs, targets=targets)).backward()
                opt.step()
        with _bar(len(models) * len(seeds) * epochs, progress) as update:
            for name, make in models.items():
                runs = []
                for seed in seeds:
                    net = _build(name, make, head, sample, seed, device)
                    opt = make_optimizer(net, seed)
                    runs.append(training.run(net, opt, seed, partial(update, name)))
                rows.append(_row(name, net, runs))
    return Ranking(sorted(rows, key=lambda row: row.loss))


def _check(
    models: Any,
    train: Any,
    valid: Any,
    num_classes: int | None,
    head: Any,
    epochs: int,
    patience: int | None,
    seeds: list[int],
) -> None:
    if not isinstance(models, Mapping) or not models:
        raise TypeError(
            f"models: got {models!r:.80}, expected a dictionary {{name: function that builds a model}}"
        )
    for name, make in models.items():
        if isinstance(make, nn.Module) or not callable(make):
            raise TypeError(
                f"models[{name!r}]: got {type(make).__name__}, expected a function that builds a fresh model, such as "
                "`lambda: MyBackbone()`: every seed starts from new initial values"
            )
    for name, batches in (("train", train), ("valid", valid)):
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{name}: got {type(batches).__name__}, expected batches to iterate over"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                f"{name}: got an iterator, which is empty after one epoch; expected a DataLoader or a list of batches"
            )
    if num_classes is not None and head is not None:
        raise ValueError("num_classes and head: got both, expected one of the two")
    if not seeds:
        raise ValueError("seeds: got none, expected at least one")
    for name, value in (("epochs", epochs), ("patience", patience)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


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
    with torch.no_grad(), _naming(name, "the backbone"):
        out = net.eval()(*inputs)
    net.train(training)
    features = out[0] if isinstance(out, tuple) else out
    if not isinstance(features, Tensor) or features.dim() < 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"models[{name!r}]: the backbone returned {shape}, expected features [batch, ..., D]"
        )
    return AlraoModel(net, head(features.size(-1))).to(device)


def _first_batch(batches: Batches) -> Sequence[Tensor]:
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(
                f"train: a batch is a {type(batch).__name__}, expected (*inputs, targets)"
            )
        if not all(isinstance(part, Tensor) for part in batch):
            kinds = ", ".join(type(part).__name__ for part in batch)
            raise TypeError(f"train: a batch holds {kinds}; expected tensors")
        return batch
    raise ValueError("train: got no batches")


@contextmanager
def _naming(name: str, what: str) -> Iterator[None]:
    """Says which candidate an error comes from."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, IndexError) as problem:
        raise ValueError(
            f"models[{name!r}]: {what} failed on the first batch: {problem}"
        ) from problem


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
        self, net: AlraoModel, opt: torch.optim.Optimizer, seed: int, update: Callable[[], None]
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
            train_loss.append(self._epoch(net, opt))
            seconds += time.perf_counter() - start
            loss, accuracy = self._evaluate(net)
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
            *inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
            opt.zero_grad()
            loss = _loss(net(*inputs, targets=targets))
            loss.backward()
            if self.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), self.clip_grad_norm)
            opt.step()
            total += loss.detach()
            count += 1
        return float(total) / count

    @torch.no_grad()
    def _evaluate(self, net: AlraoModel) -> tuple[float, float | None]:
        """Mean loss in nats, inf where it is not finite, and accuracy in percent (None in regression)."""
        net.eval()
        classifier = net.head if isinstance(net.head, ClassifierClones) else None
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct, count = torch.zeros_like(loss), torch.zeros_like(loss)
        for batch in self.valid:
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
        if samples == 0:
            raise ValueError("valid: got no samples")
        mean_loss = float(loss) / samples
        accuracy = None if classifier is None else 100 * float(correct) / samples
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
