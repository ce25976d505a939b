"""Alrao, all learning rates at once, at the price of plain SGD (arXiv 1810.01322).

    head = alrao_fast.ClassifierClones(in_features=512, num_classes=10)
    net = alrao_fast.AlraoModel(backbone, head)
    opt = alrao_fast.AlraoSGD(net)

and the training loop that every PyTorch user has, with `loss = net(x, targets=y)`.
"""

__version__ = "0.1.0"

from alrao_fast import backends, functional, nn, optim
from alrao_fast.backends import use_backend
from alrao_fast.clip_grad import GradNorms, clip_grad_norm_, grad_norms
from alrao_fast.graphed_step import GraphedStep

# The modules; the optimizers, samplers and layouts: as listed there.
from alrao_fast.nn import *  # noqa: F403
from alrao_fast.optim import *  # noqa: F403
from alrao_fast.ranking import Ranked, Ranking, rank

__all__ = [
    "GradNorms",
    "GraphedStep",
    "Ranked",
    "Ranking",
    "backends",
    "clip_grad_norm_",
    "functional",
    "grad_norms",
    "rank",
    "use_backend",
]
__all__ += nn.__all__ + optim.__all__
