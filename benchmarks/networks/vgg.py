"""VGG19 (Simonyan, Zisserman 2014, configuration E) for 32x32 images, with batch normalisation."""

from torch import nn

from benchmarks.networks.layers import Backbone, conv_bn, scaled

# Convolutions between two poolings, and their output channels.
STAGES = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))


class VGG19(Backbone):
    """Sixteen 3x3 convolutions with bias; five poolings leave one pixel: images [B, 3, 32, 32] -> [B, 512 width].

    The two hidden layers of 4096 units between the convolutions and the classifier, made for 7x7 maps, are left out.
    """

    def __init__(self, width: float = 1.0) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for depth, outputs in STAGES:
            for _ in range(depth):
                layers += conv_bn(channels, scaled(outputs, width), 3, bias=True)
                channels = scaled(outputs, width)
            layers.append(nn.MaxPool2d(2))
        super().__init__([*layers, nn.Flatten()], channels)
