"""Small helpers that scripts import."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset


def l2params(model: nn.Module) -> None:
    """Print the Euclidean norm of each parameter of `model`."""
    for name, param in model.named_parameters():
        print(f"{name}: {param.detach().norm().item():.4e}")


class Subset(Dataset):
    """The elements of `dataset` at `indices`."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)
