"""The modules: the switch, the clones of the last layer, and the model that joins them to a backbone."""

from alrao_fast.nn.adaptive import AdaptiveClassifierClones
from alrao_fast.nn.clones import ClassifierClones
from alrao_fast.nn.mixture_loss import MixtureLoss
from alrao_fast.nn.model import AlraoModel
from alrao_fast.nn.regressor import RegressorClones
from alrao_fast.nn.switch import Switch
from alrao_fast.nn.wrap import wrap

__all__ = [
    "AdaptiveClassifierClones",
    "AlraoModel",
    "ClassifierClones",
    "MixtureLoss",
    "RegressorClones",
    "Switch",
    "wrap",
]
