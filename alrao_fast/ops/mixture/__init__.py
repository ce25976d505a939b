"""switch_mixture: the loss of the N clones, their log-probabilities, and the checks of both."""

from alrao_fast.ops.mixture.loss import (
    CPU_MEMORY_BUDGET,
    GPU_MEMORY_BUDGET,
    Observer,
    switch_mixture_gaussian_nll,
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_nll,
    switch_mixture_stats,
)

__all__ = [
    "CPU_MEMORY_BUDGET",
    "GPU_MEMORY_BUDGET",
    "Observer",
    "switch_mixture_gaussian_nll",
    "switch_mixture_gaussian_stats",
    "switch_mixture_log_prob",
    "switch_mixture_mean",
    "switch_mixture_nll",
    "switch_mixture_stats",
]
