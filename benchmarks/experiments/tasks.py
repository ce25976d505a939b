"""The learning problems: data on the device, its batches, how a network is measured on it, and the paper's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.experiments.images import CLASSES, Crops, Images
from benchmarks.experiments.text import Streams, Text
from benchmarks.networks import IMAGE_NETWORKS, LSTMBackbone

Score = tuple[float, float]


class Task:
    """Data of one kind for the networks of that kind.

    `sizes` are the numbers of images or tokens in (training, validation, test); `unit` is that of a loss times
    `per_nat`; `lr_range`, `clones` and `grid` are the paper's; gradients are clipped to the norm `clip`.
    """

    sizes: tuple[int, int, int]
    classes: int
    data: str
    unit: str
    per_nat: float
    lr_range: tuple[float, float]
    clones: int
    clip: float | None = None
    # The backbone returns a state that goes into the next batch.
    recurrent = False

    @property
    def grid(self) -> list[float]:
        """The learning rates of SGD, by powers of ten from end to end of the interval."""
        first, last = (round(math.log10(rate)) for rate in self.lr_range)
        return [10.0**k for k in range(first, last + 1)]

    def backbone(self, width: float, dropout: float) -> nn.Module:
        raise NotImplementedError

    def steps(self) -> int:
        """Training batches of an epoch."""
        raise NotImplementedError

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of an epoch, all of one shape."""
        raise NotImplementedError

    def evaluate(self, net: nn.Module, part: str) -> Score:
        """Mean loss in nats and accuracy in percent on "valid" or "test"; `net` is in eval mode."""
        raise NotImplementedError


class ImageTask(Task):
    """CIFAR-10 by the paper's protocol: 40,000 images to train on, crops and flips, batches of 32."""

    unit, per_nat, classes = "nats", 1.0, CLASSES
    lr_range, clones = (1e-5, 10.0), 10
    batch, eval_batch = 32, 500

    def __init__(
        self, network: str, images: Images, train_images: int | None, device: torch.device
    ) -> None:
        self.network = network
        self.data = images.name
        n = len(images.train_y)
        train = min(train_images or n * 4 // 5, n * 4 // 5)
        valid, test = train // 4, len(images.test_y)
        if train_images is not None:
            test = min(test, valid)
        if train < self.batch or valid < 1:
            raise ValueError(f"{train} training images; expected {self.batch} at least")
        # The same split for every run, whatever its seed.
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        self.sizes = train, valid, test
        x, y = self._part(images.train_x, images.train_y, order[:train], device)
        self.crops = Crops(x, y, self.batch)
        held_out = order[n - n // 5 :][:valid]
        self.parts = {
            "valid": self._part(images.train_x, images.train_y, held_out, device),
            "test": (images.test_x[:test].to(device), images.test_y[:test].to(device)),
        }

    @staticmethod
    def _part(x: Tensor, y: Tensor, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        return x[index].to(device), y[index].to(device)

    def backbone(self, width: float, dropout: float) -> nn.Module:
        return IMAGE_NETWORKS[self.network](width)

    def steps(self) -> int:
        return len(self.crops)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.crops.epoch(seed, epoch)

    def evaluate(self, net: nn.Module, part: str) -> Score:
        images, labels = self.parts[part]
        loss, correct = torch.zeros(2, dtype=torch.float64, device=labels.device)
        for x, y in zip(images.split(self.eval_batch), labels.split(self.eval_batch)):
            batch_loss, batch_correct = sums(net(self.crops.normalize(x)), y)
            loss += batch_loss
            correct += batch_correct
        return score(loss, correct, len(labels))


class TextTask(Task):
    """Prediction of the next token: 20 streams, truncated backpropagation over 70 tokens, state carried over."""

    lr_range, clones = (1e-3, 100.0), 6
    per_nat = 1 / math.log(2)
    clip = 0.25
    recurrent = True
    streams, length = 20, 70

    def __init__(
        self, network: str, text: Text, train_tokens: int | None, device: torch.device
    ) -> None:
        self.unit = self.unit_of(network)
        self.data = text.name
        self.classes = len(text.vocabulary)
        limit = train_tokens or len(text.train)
        parts = [text.train[:limit]]
        held_out = max(limit // 8, self.length + 1) if train_tokens else None
        parts += [part[:held_out] for part in (text.valid, text.test)]
        if min(len(part) for part in parts) <= self.length:
            raise ValueError(
                f"the text's parts have {', '.join(str(len(part)) for part in parts)} tokens; expected more than "
                f"{self.length} in each"
            )
        self.sizes = len(parts[0]), len(parts[1]), len(parts[2])
        train, valid, test = (Streams(part.to(device), self.streams, self.length) for part in parts)
        self.train = train
        self.parts = {"valid": valid, "test": test}

    @staticmethod
    def unit_of(network: str) -> str:
        return "bits per " + ("character" if network == "lstm-chars" else "word")

    def backbone(self, width: float, dropout: float) -> nn.Module:
        return LSTMBackbone(self.classes, width=width, dropout=dropout)

    def steps(self) -> int:
        return len(self.train)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.train.pieces()

    def evaluate(self, net: nn.Module, part: str) -> Score:
        streams = self.parts[part]
        loss, correct = torch.zeros(2, dtype=torch.float64, device=streams.targets.device)
        state = None
        for x, y in streams.pieces(whole=True):
            log_probs, state = net(x, state)
            batch_loss, batch_correct = sums(log_probs.flatten(0, -2), y.flatten())
            loss += batch_loss
            correct += batch_correct
        return score(loss, correct, streams.targets.numel())


def sums(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss in nats, and how many predictions are right."""
    log_probs = log_probs.float()
    loss = nn.functional.nll_loss(log_probs, targets, reduction="sum")
    return loss.double(), (log_probs.argmax(-1) == targets).sum()


def score(loss: Tensor, correct: Tensor, count: int) -> Score:
    """Mean loss, and accuracy in percent."""
    return float(loss) / count, 100 * float(correct) / count
