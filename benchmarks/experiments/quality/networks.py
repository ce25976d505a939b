"""The small networks of the tasks, as backbones."""

import itertools

from torch import Tensor, nn

from benchmarks.networks.layers import Backbone, conv_bn


class Bottleneck(Backbone):
    """Through `narrow` features and out of a hidden layer again: the last layer reconstructs the input."""

    def __init__(self, inputs: int, hidden: int, narrow: int) -> None:
        encoder = (nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, narrow))
        super().__init__((*encoder, nn.Linear(narrow, hidden), nn.ReLU()), hidden)


class ConvNet(Backbone):
    """Three 3x3 convolutions with or without batch normalisation, each halving the image; images of 9 to 16 pixels."""

    def __init__(self, channels: int, *, normalise: bool = True) -> None:
        layers: list[nn.Module] = []
        widths = (channels, 16, 32, 64)
        for inputs, outputs in itertools.pairwise(widths):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not normalise))
            layers += [nn.BatchNorm2d(outputs)] if normalise else []
            layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        super().__init__((*layers, nn.Flatten()), 4 * widths[-1])


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside the identity, or a 1x1 convolution where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = conv_bn(inputs, outputs, 3, stride=stride)
        self.layers = nn.Sequential(*first, *conv_bn(outputs, outputs, 3, activation=False))
        same = inputs == outputs and stride == 1
        shortcut = [] if same else conv_bn(inputs, outputs, 1, stride=stride, activation=False)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) + self.shortcut(x)).relu()


class SmallResNet(Backbone):
    """A residual network of 8 layers (He et al. 2015) for small images of one channel."""

    def __init__(self) -> None:
        blocks = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        layers = (*conv_bn(1, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(layers, 64)


class LastState(nn.Module):
    """A GRU over sequences [B, T, inputs]; its last state is the features."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.out_features = hidden
        self.gru = nn.GRU(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[1][-1]


class CharacterLSTM(nn.Module):
    """An embedding and two layers of LSTM, which start from zeros at every window: [B, T] -> [B, T, features]."""

    def __init__(self, num_tokens: int, features: int = 64) -> None:
        super().__init__()
        self.out_features = features
        self.embedding = nn.Embedding(num_tokens, features)
        self.lstm = nn.LSTM(features, features, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lstm(self.embedding(tokens))[0]


class GraphNetwork(nn.Module):
    """Two layers over the mean of a node's neighbours (Kipf and Welling 2017): nodes [B] -> [B, features].

    near: [n, n], 1 where two nodes are neighbours or the same. x: the nodes' own features [n, inputs].
    """

    near: Tensor
    x: Tensor

    def __init__(self, near: Tensor, x: Tensor, features: int) -> None:
        super().__init__()
        self.out_features = features
        self.register_buffer("near", (near / near.sum(1, keepdim=True)).to_sparse())
        self.register_buffer("x", x)
        self.first = nn.Linear(x.size(1), features)
        self.second = nn.Linear(features, features)

    def forward(self, nodes: Tensor) -> Tensor:
        # The mean of what comes in costs less than that of what goes out.
        hidden = self.first(self.near @ self.x).relu()
        return self.second(self.near @ hidden).relu()[nodes]
