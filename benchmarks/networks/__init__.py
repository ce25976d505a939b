"""The networks of the Alrao paper, as backbones: features come out, the last layer (or its clones) is the caller's.

Each class takes a `width` that multiplies every layer's number of features, and has `out_features`. With one linear
layer on top, and with the clones of Alrao in its place (10, for the LSTM 6), they have the paper's parameter counts.
"""

from networks.googlenet import GoogLeNet
from networks.lstm import LSTMBackbone
from networks.mobilenet import MobileNetV2
from networks.vgg import VGG19

# Backbones for 3x32x32 images by the name that the commands take.
IMAGE_NETWORKS = {"mobilenet": MobileNetV2, "googlenet": GoogLeNet, "vgg19": VGG19}

__all__ = ["IMAGE_NETWORKS", "VGG19", "GoogLeNet", "LSTMBackbone", "MobileNetV2"]
