"""The learning problem that needs no file: scikit-learn's digits, 1,797 images of 8x8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.experiments.tasks import Score, Task, score, sums
from benchmarks.networks import MLP

BATCH = 32


class Digits(NamedTuple):
    """Images `[n, 64]` float32, standardised, and labels `[n]`, split into training and test set."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(seed: int) -> Digits:
    """The digits, shuffled by `seed`, a fifth of them for testing; standardised over all pixels of the others."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    x = (x - x[train].mean()) / x[train].std()
    return Digits(x[train], y[train], x[test], y[test])


class DigitsTask(Task):
    """A perceptron on the digits: a fifth for testing, a fifth for validation, split by the seed."""

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

    def evaluate(self, net: nn.Module, part: str) -> Score:
        x, y = self.parts[part]
        return score(*sums(net(x), y), len(y))
