"""Networks as backbones: features come out, the last layer (or its clones, see `networks.heads`) is the caller's.

Each class has `out_features`, and but for the transformer takes a `width` that multiplies every layer's number of
features. With one linear layer on top, and with the clones of Alrao in its place (10, for the LSTM 6), GoogLeNet,
VGG19, MobileNetV2 and the LSTM have the parameter counts of the Alrao paper.
"""

from benchmarks.networks.googlenet import GoogLeNet
from benchmarks.networks.heads import ClonesOneByOne, PlainModel, PlainRegressor, first
from benchmarks.networks.lstm import LSTMBackbone
from benchmarks.networks.mlp import MLP
from benchmarks.networks.mobilenet import MobileNetV2
from benchmarks.networks.senet import SENet18
from benchmarks.networks.transformer import TransformerLM
from benchmarks.networks.vgg import VGG19

# The paper's backbones for 3x32x32 images by the name that the commands take.
IMAGE_NETWORKS = {"mobilenet": MobileNetV2, "googlenet": GoogLeNet, "vgg19": VGG19}

__all__ = [
    "IMAGE_NETWORKS",
    "MLP",
    "VGG19",
    "ClonesOneByOne",
    "GoogLeNet",
    "LSTMBackbone",
    "MobileNetV2",
    "PlainModel",
    "PlainRegressor",
    "SENet18",
    "TransformerLM",
    "first",
]
