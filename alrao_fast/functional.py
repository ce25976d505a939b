"""The ops by name; `impl="auto" | "cuda" | "triton" | "cpu" | "reference"` chooses who computes."""

from alrao_fast.ops.feature_adam import feature_adam_
from alrao_fast.ops.feature_sgd import feature_sgd_
from alrao_fast.ops.gradient_clip import gradient_clip_
from alrao_fast.ops.mixture import (
    switch_mixture_gaussian_nll,
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_nll,
    switch_mixture_stats,
)
from alrao_fast.ops.switch_update import switch_update_

# A literal list, which type checkers read: it has all names of `ops.mixture`.
__all__ = [
    "feature_adam_",
    "feature_sgd_",
    "gradient_clip_",
    "switch_mixture_gaussian_nll",
    "switch_mixture_gaussian_stats",
    "switch_mixture_log_prob",
    "switch_mixture_mean",
    "switch_mixture_nll",
    "switch_mixture_stats",
    "switch_update_",
]
