"""A multilayer perceptron."""

from torch import nn

from benchmarks.networks.layers import Backbone, scaled


class MLP(Backbone):
    """Two hidden ReLU layers: [B, inputs] -> [B, hidden width]."""

    def __init__(self, inputs: int = 64, hidden: int = 256, *, width: float = 1.0) -> None:
        features = scaled(hidden, width)
        layers = (nn.Linear(inputs, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU())
        super().__init__(layers, features)
