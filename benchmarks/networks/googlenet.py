"""GoogLeNet (Szegedy et al. 2015) for 32x32 images, with batch normalisation."""

import torch
from torch import Tensor, nn

from benchmarks.networks.layers import Backbone, conv_bn, scaled

# Output channels by branch (Szegedy et al., table 1): 1x1; reduction and 3x3; reduction and 5x5; 1x1 after pooling.
Branches = tuple[int, int, int, int, int, int]
STAGES: tuple[tuple[Branches, ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
    """Four branches side by side, joined by channel. The 5x5 convolution is two of 3x3, with the same field."""

    def __init__(self, inputs: int, branches: Branches) -> None:
        super().__init__()
        one, reduce_three, three, reduce_five, five, pooled = branches
        self.one = nn.Sequential(*conv_bn(inputs, one, 1, bias=True))
        self.three = nn.Sequential(
            *conv_bn(inputs, reduce_three, 1, bias=True),
            *conv_bn(reduce_three, three, 3, bias=True),
        )
        self.five = nn.Sequential(
            *conv_bn(inputs, reduce_five, 1, bias=True),
            *conv_bn(reduce_five, five, 3, bias=True),
            *conv_bn(five, five, 3, bias=True),
        )
        self.pooled = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), *conv_bn(inputs, pooled, 1, bias=True)
        )
        self.out_features = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


class GoogLeNet(Backbone):
    """Nine inception blocks at 32, 16 and 8 pixels, then the mean: images [B, 3, 32, 32] -> [B, 1024 width].

    One 3x3 convolution of 192 channels stands for the first layers, which shrink larger images; no side classifiers.
    """

    def __init__(self, width: float = 1.0) -> None:
        channels = scaled(192, width)
        layers = conv_bn(3, channels, 3, bias=True)
        for number, stage in enumerate(STAGES):
            if number > 0:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for branches in stage:
                block = Inception(channels, tuple(scaled(branch, width) for branch in branches))
                layers.append(block)
                channels = block.out_features
        super().__init__([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()], channels)
