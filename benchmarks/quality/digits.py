"""The learning problem that needs no file: scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from demo import BATCH, CLASSES, HIDDEN, load_data
from networks import MLP
from paper.tasks import Score, Task, score, sums
from torch import Tensor, nn


class DigitsTask(Task):
    """The demo's network on its images: a fifth for testing, a fifth for validation, split by the seed."""

    classes = CLASSES
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
        return MLP(hidden=HIDDEN, width=width)

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
