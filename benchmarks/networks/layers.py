"""What the convolutional networks are made of."""

from collections.abc import Iterable

from torch import Tensor, nn


class Backbone(nn.Module):
    """Layers one after the other, and the number of features that come out."""

    def __init__(self, layers: Iterable[nn.Module], out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def scaled(features: int, width: float) -> int:
    """A layer's number of features in a network of `width` times the original's, at least 1."""
    return max(1, round(features * width))


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    activation: bool = True,
) -> list[nn.Module]:
    """A convolution that keeps the image's size (but for `stride`), batch normalisation, and ReLU unless turned off."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(outputs),
    ]
    return [*layers, nn.ReLU(inplace=True)] if activation else layers
