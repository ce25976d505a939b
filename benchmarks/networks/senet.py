"""SENet18 (Hu et al. 2018) for 32x32 images: a residual network of 18 layers that weighs its channels."""

from torch import Tensor, nn

from benchmarks.networks.layers import Backbone, conv_bn, scaled

# Output channels and the stride of the first of the two blocks of a stage.
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
# A block's channels are weighed by a perceptron whose hidden layer is this many times narrower.
REDUCTION = 16


class Excitation(nn.Module):
    """Squeeze and excitation: each channel times a weight in (0, 1) that depends on the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // REDUCTION)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x)


class SEBlock(nn.Module):
    """Two 3x3 convolutions and the excitation, added to the input (by a 1x1 convolution where the size changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(inputs, outputs, 3, stride=stride),
            *conv_bn(outputs, outputs, 3, activation=False),
            Excitation(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential(
            *([] if same else conv_bn(inputs, outputs, 1, stride=stride, activation=False))
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


class SENet18(Backbone):
    """Eight blocks at 32 to 4 pixels, then the mean: images [B, 3, 32, 32] -> [B, 512 width]."""

    def __init__(self, width: float = 1.0) -> None:
        channels = scaled(64, width)
        layers: list[nn.Module] = conv_bn(3, channels, 3)
        for features, first_stride in STAGES:
            for stride in (first_stride, 1):
                layers.append(SEBlock(channels, scaled(features, width), stride))
                channels = scaled(features, width)
        super().__init__([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()], channels)
