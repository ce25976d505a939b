"""The learning problems: data on the device, its batches, how a network is measured on it, and the paper's settings."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.experiments.data import CLASSES, Crops, Images, Streams, Text
from benchmarks.networks import IMAGE_NETWORKS, MLP, LSTMBackbone

Score = tuple[float, float]
# Digits in a batch.
BATCH = 32


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
    # Targets are `classes` real numbers in place of one of as many classes.
    regression = False

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

    def predictions(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities `[n, classes]` and targets on "valid" or "test", batch by batch; `net` is in eval mode."""
        raise NotImplementedError

    def evaluate(self, net: nn.Module, part: str) -> Score:
        """Mean loss in nats and accuracy in percent."""
        loss, correct, count = 0, 0, 0
        for log_probs, y in self.predictions(net, part):
            log_probs = log_probs.float()
            loss += nn.functional.nll_loss(log_probs, y, reduction="sum").double()
            correct += (log_probs.argmax(-1) == y).sum()
            count += len(y)
        return float(loss) / count, 100 * float(correct) / count


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
        held_out = order[n - n // 5 :][:valid]
        first, valid_part = (
            (images.train_x[index].to(device), images.train_y[index].to(device))
            for index in (order[:train], held_out)
        )
        self.crops = Crops(*first, self.batch)
        test_part = (images.test_x[:test].to(device), images.test_y[:test].to(device))
        self.parts = {"valid": valid_part, "test": test_part}

    def backbone(self, width: float, dropout: float) -> nn.Module:
        return IMAGE_NETWORKS[self.network](width)

    def steps(self) -> int:
        return len(self.crops)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.crops.epoch(seed, epoch)

    def predictions(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(*(tensor.split(self.eval_batch) for tensor in self.parts[part])):
            yield net(self.crops.normalize(x)), y


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
            lengths = ", ".join(str(len(part)) for part in parts)
            expected = f"expected more than {self.length} in each"
            raise ValueError(f"the text's parts have {lengths} tokens; {expected}")
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

    def predictions(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        state = None
        for x, y in self.parts[part].pieces(whole=True):
            log_probs, state = net(x, state)
            yield log_probs.flatten(0, -2), y.flatten()


class Digits(NamedTuple):
    """Images `[n, 64]` float32, standardised, and labels `[n]`, split into training and test set."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(seed: int) -> Digits:
    """The digits, shuffled by `seed`, a fifth of them for testing; standardised over all pixels of the others."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    x = (x - x[train].mean()) / x[train].std()
    return Digits(x[train], y[train], x[test], y[test])


class DigitsTask(Task):
    """A perceptron on scikit-learn's digits, 1,797 images of 8x8 pixels, split by the seed: a fifth for testing, a
    fifth for validation."""

    classes = 10
    data = "scikit-learn digits"
    unit, per_nat = "nats", 1.0
    lr_range, clones = (1e-5, 10.0), 10

    def __init__(self, seed: int, device: torch.device) -> None:
        data = load_data(seed)
        valid = len(data.test_y)
        train = len(data.train_y) - valid
        self.sizes = train, valid, valid
        self.x, self.y = data.train_x[:train].to(device), data.train_y[:train].to(device)
        self.parts = {
            "valid": (data.train_x[train:].to(device), data.train_y[train:].to(device)),
            "test": (data.test_x.to(device), data.test_y.to(device)),
        }

    def backbone(self, width: float, dropout: float) -> nn.Module:
        return MLP(width=width)

    def steps(self) -> int:
        return len(self.y) // BATCH

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((seed << 32) + epoch)
        order = torch.randperm(len(self.y), generator=generator).to(self.y.device)
        for batch in order[: self.steps() * BATCH].split(BATCH):
            yield self.x[batch], self.y[batch]

    def predictions(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.parts[part]
        yield net(x), y
