"""switch_mixture: likelihoods, the loss of the N clones by them, their log-probabilities, and the checks of all."""

# Registers the decomposition of the predictions.
import alrao_fast.ops.mixture.export  # noqa: F401
from alrao_fast.ops.mixture.functions import (
    switch_mixture_gaussian_nll,
    switch_mixture_gaussian_stats,
    switch_mixture_nll,
    switch_mixture_stats,
)
from alrao_fast.ops.mixture.log_prob import switch_mixture_log_prob, switch_mixture_mean

__all__ = [
    "switch_mixture_gaussian_nll",
    "switch_mixture_gaussian_stats",
    "switch_mixture_log_prob",
    "switch_mixture_mean",
    "switch_mixture_nll",
    "switch_mixture_stats",
]
