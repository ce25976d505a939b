"""Lightning: the posterior and the clones' losses in the trainer's loggers."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from alrao_fast.arguments import Choice, Flag, Instance, checked
from alrao_fast.monitor import metrics

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
else:
    # Both packages have the same classes, of which a program uses those of one.
    packages = ["lightning.pytorch", "pytorch_lightning"]
    packages.sort(key=lambda package: package not in sys.modules)
    for package in packages:
        try:
            Callback = import_module(package).Callback
            exceptions = import_module(f"{package}.utilities.exceptions")
        except ImportError:
            continue
        MisconfigurationException = exceptions.MisconfigurationException
        break
    else:
        raise ImportError(
            "alrao_fast.integrations.lightning needs Lightning: pip install lightning"
        )

_KINDS = {
    "logging_interval": Choice("step", "epoch"),
    "prefix": Instance(str, "a string"),
    "reset": Flag(),
}


class AlraoMonitor(Callback):
    """Sends `alrao_fast.metrics` of the module to the trainer's loggers, as LearningRateMonitor does the rates.

        trainer = Trainer(callbacks=[AlraoMonitor()], logger=TensorBoardLogger("runs"))

    Args:
        logging_interval: "step", every `log_every_n_steps` batches, or "epoch", at the end of each.
        prefix: see `metrics`.
        reset: whether the clones' losses are those since the last log, or since their last reset by hand.

    The values are in `trainer.callback_metrics`, too. Raises MisconfigurationException when a training without a
    logger starts, as the LearningRateMonitor; ValueError for a module without clones.
    """

    def __init__(
        self, logging_interval: str = "step", prefix: str = "alrao/", *, reset: bool = True
    ) -> None:
        checked(_KINDS, locals())
        self.logging_interval = logging_interval
        self.prefix = prefix
        self.reset = reset

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if not trainer.loggers:
            raise MisconfigurationException(
                "Cannot use `AlraoMonitor` callback with `Trainer` that has no logger."
            )

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *batch: Any) -> None:
        step = trainer.fit_loop.total_batch_idx + 1
        every = trainer.log_every_n_steps
        if self.logging_interval == "step" and every and step % every == 0:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.logging_interval == "epoch":
            self._log(trainer, pl_module)

    def _log(self, trainer: Any, pl_module: LightningModule) -> None:
        opt = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        values = metrics(pl_module, opt, self.prefix, reset=self.reset)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
