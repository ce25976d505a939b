"""MobileNetV2 (Sandler et al. 2018) for 32x32 images."""

from torch import Tensor, nn

from benchmarks.networks.layers import Backbone, conv_bn, scaled

# Expansion, output channels, blocks, stride of the first one (Sandler et al., table 2). Two of the five strides of 2
# are 1 here, for images a seventh of the size: the maps end at 4x4 pixels.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by 3x3, project back; a shortcut wherever the size is kept.

    Where only the number of channels changes the shortcut is a 1x1 convolution. The expansion by 1 is a layer too.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.layers = nn.Sequential(
            *conv_bn(inputs, hidden, 1),
            *conv_bn(hidden, hidden, 3, stride=stride, groups=hidden),
            *conv_bn(hidden, outputs, 1, activation=False),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            same = inputs == outputs
            self.shortcut = nn.Sequential(
                *([] if same else conv_bn(inputs, outputs, 1, activation=False))
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(Backbone):
    """Seventeen inverted residuals at 32 to 4 pixels, then the mean: images [B, 3, 32, 32] -> [B, 1280 width].

    ReLU, not ReLU6: the bound of 6 serves arithmetic in few bits.
    """

    def __init__(self, width: float = 1.0) -> None:
        channels = scaled(32, width)
        layers = conv_bn(3, channels, 3)
        for expansion, outputs, blocks, first_stride in STAGES:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(channels, scaled(outputs, width), expansion, stride))
                channels = scaled(outputs, width)
        features = scaled(1280, width)
        layers += [*conv_bn(channels, features, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(layers, features)
