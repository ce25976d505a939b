"""The optimizers, the samplers of learning rates, and the feature layouts."""

# Registers the layouts of torch.nn's modules.
import alrao_fast.optim.rules  # noqa: F401
from alrao_fast.optim.layouts import Feature, register_feature_layout
from alrao_fast.optim.rates import Constant, Fraction, LogUniform, PerWeight

__all__ = [
    "Constant",
    "Feature",
    "Fraction",
    "LogUniform",
    "PerWeight",
    "register_feature_layout",
]
