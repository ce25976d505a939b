"""Hugging Face's Trainer: the posterior and the clones' losses in its logs."""

from __future__ import annotations

from typing import Any

import torch

from alrao_fast.arguments import Flag, Instance, checked
from alrao_fast.monitor import metrics

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
except ImportError as error:
    raise ImportError(
        "alrao_fast.integrations.transformers needs transformers: pip install transformers accelerate"
    ) from error

_KINDS = {"prefix": Instance(str, "a string"), "reset": Flag()}


class AlraoCallback(TrainerCallback):
    """Adds `alrao_fast.metrics` of the model to what the Trainer logs.

        AlraoCallback().add_to(trainer)

    Given as `Trainer(callbacks=[AlraoCallback()])` it stands behind the reporters (TensorBoard, W&B, ...), which have
    passed the logs on by then: the values are in `trainer.state.log_history` and on the console alone.

    Args:
        prefix: see `metrics`.
        reset: whether the clones' losses are those since the last log, or since their last reset by hand.

    ValueError at the first log of a model without clones.
    """

    def __init__(self, prefix: str = "alrao/", *, reset: bool = True) -> None:
        checked(_KINDS, locals())
        self.prefix = prefix
        self.reset = reset

    def add_to(self, trainer: Trainer) -> AlraoCallback:
        """Make it the first of the trainer's callbacks, so that all others see the values; returns it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **others: Any,
    ) -> None:
        # A log of the training, not of an evaluation or of its end.
        if logs is None or model is None or "loss" not in logs:
            return
        values = metrics(model, optimizer, self.prefix, reset=self.reset)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
