"""The optimizers, the samplers of learning rates, and the feature layouts."""

# Register the layouts of torch.nn's modules and of other packages'.
import alrao_fast.optim.library_layouts
import alrao_fast.optim.torch_layouts  # noqa: F401
from alrao_fast.optim.adam import AlraoAdam
from alrao_fast.optim.describe import RateRow, describe_rates
from alrao_fast.optim.layouts import Feature, register_feature_layout
from alrao_fast.optim.muon import AlraoMuon
from alrao_fast.optim.rates import Constant, Fraction, LogTriangular, LogUniform, PerWeight
from alrao_fast.optim.sgd import AlraoSGD

__all__ = [
    "AlraoAdam",
    "AlraoMuon",
    "AlraoSGD",
    "Constant",
    "Feature",
    "Fraction",
    "LogTriangular",
    "LogUniform",
    "PerWeight",
    "RateRow",
    "describe_rates",
    "register_feature_layout",
]
