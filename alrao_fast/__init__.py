"""Alrao, all learning rates at once, at the price of plain SGD (arXiv 1810.01322).

    head = alrao_fast.ClassifierClones(in_features=512, num_classes=10)
    net = alrao_fast.AlraoModel(backbone, head)
    opt = alrao_fast.AlraoSGD(net)

and the training loop that every PyTorch user has, with `loss = net(x, targets=y)`.
"""

__version__ = "0.1.0"

from alrao_fast import backends, functional, plot
from alrao_fast import nn as nn
from alrao_fast import optim as optim
from alrao_fast.backends import use_backend
from alrao_fast.clip_grad import GradNorms, clip_grad_norm_, grad_norms
from alrao_fast.graphed_step import GraphedStep
from alrao_fast.monitor import History, metrics, posterior_line
from alrao_fast.nn import (
    AdaptiveClassifierClones,
    AlraoModel,
    ClassifierClones,
    MixtureLoss,
    RegressorClones,
    Switch,
    wrap,
)
from alrao_fast.optim import (
    AlraoAdam,
    AlraoMuon,
    AlraoSGD,
    Constant,
    Feature,
    Fraction,
    LogTriangular,
    LogUniform,
    PerWeight,
    RateRow,
    describe_rates,
    register_feature_layout,
)
from alrao_fast.ranking import Ranked, Ranking, rank
from alrao_fast.retirement import retire_clones

# A literal list, which type checkers read: it has all names of `nn` and `optim`, which would hide those of torch.
__all__ = [
    "AdaptiveClassifierClones",
    "AlraoAdam",
    "AlraoModel",
    "AlraoMuon",
    "AlraoSGD",
    "ClassifierClones",
    "Constant",
    "Feature",
    "Fraction",
    "GradNorms",
    "GraphedStep",
    "History",
    "LogTriangular",
    "LogUniform",
    "MixtureLoss",
    "PerWeight",
    "Ranked",
    "Ranking",
    "RateRow",
    "RegressorClones",
    "Switch",
    "backends",
    "clip_grad_norm_",
    "describe_rates",
    "functional",
    "grad_norms",
    "metrics",
    "plot",
    "posterior_line",
    "rank",
    "register_feature_layout",
    "retire_clones",
    "use_backend",
    "wrap",
]
