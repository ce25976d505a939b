"""A multilayer perceptron."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.networks.layers import scaled


class MLP(nn.Module):
    """Two hidden ReLU layers: [B, inputs] -> [B, hidden width]."""

    def __init__(self, inputs: int = 64, hidden: int = 256, *, width: float = 1.0) -> None:
        super().__init__()
        self.out_features = scaled(hidden, width)
        self.layers = nn.Sequential(
            nn.Linear(inputs, self.out_features),
            nn.ReLU(),
            nn.Linear(self.out_features, self.out_features),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
