"""The ops by name; `impl="auto" | "cuda" | "triton" | "cpu" | "reference"` chooses who computes."""

from alrao_fast.ops import mixture
from alrao_fast.ops.feature_adam import feature_adam_
from alrao_fast.ops.feature_sgd import feature_sgd_
from alrao_fast.ops.gradient_clip import gradient_clip_

# The ops of the mixture, as listed there.
from alrao_fast.ops.mixture import *  # noqa: F403
from alrao_fast.ops.switch_update import switch_update_

__all__ = ["feature_adam_", "feature_sgd_", "gradient_clip_", "switch_update_"]
__all__ += mixture.__all__
