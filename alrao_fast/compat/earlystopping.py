"""Stop when a metric no longer gets better."""

import math
from typing import Any

from alrao_fast.arguments import Choice


class EarlyStopping:
    """`step(metric)` after each epoch; `stop` is true after more than `patience` steps without improvement.

    mode: "min" or "max". threshold_mode: "rel": an improvement is better than best * (1 -+ threshold); "abs": better
    than best -+ threshold.
    """

    def __init__(
        self,
        mode: str = "min",
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
    ) -> None:
        self.mode = Choice("min", "max").check("mode", mode)
        threshold_mode = Choice("rel", "abs").check("threshold_mode", threshold_mode)
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = 0

    def step(self, metric: Any) -> None:
        """Take the metric of one more epoch, a number or a one-element tensor."""
        value = float(metric)
        if self._better(value):
            self.best = value
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1

    @property
    def stop(self) -> bool:
        return self.num_bad_epochs > self.patience

    def _better(self, value: float) -> bool:
        sign = 1.0 if self.mode == "min" else -1.0
        if math.isinf(self.best):
            return sign * value < sign * self.best
        margin = self.threshold * (abs(self.best) if self.threshold_mode == "rel" else 1.0)
        return sign * value < sign * self.best - margin

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)
