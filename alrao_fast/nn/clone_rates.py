"""The learning rates that a head shows: those that the optimizer of its clones has."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from alrao_fast import live
from alrao_fast.nn.switch import FixedDtypeBuffers


class WithRates(FixedDtypeBuffers):
    """A module of clones whose buffer `clone_lr` follows their optimizer."""

    # The optimizer that gave the rates, which may be gone.
    _rates_from: weakref.ref[torch.optim.Optimizer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy's clones are not those that the optimizer has.
        return {**self.__dict__, "_rates_from": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        live.heads.enter(self)

    @property
    def clone_lr(self) -> Tensor:
        """The clones' learning rates `[N]`, float32, NaN while no optimizer has set them.

        They are those that the optimizer of the clones has now; of several optimizers the one that drew or loaded
        rates last. While it lives, values that the module's `load_state_dict` brings do not count; without an
        optimizer, or after its end, they do. The buffer of this name, which `state_dict` saves, follows.
        """
        rates = self._buffers.get("clone_lr")
        if rates is None:
            raise AttributeError(f"{type(self).__name__} has no clone_lr yet")
        self.follow_optimizer()
        return rates

    @torch.no_grad()
    def take_rates(self, optimizer: Any) -> bool:
        """From now on have the clones' rates from this Alrao optimizer; False where it has none."""
        own = self._buffers["clone_lr"]
        rate = None if own is None else optimizer.rates_of_clones(self, own.numel()).get("rate")
        if own is None or rate is None:
            return False
        own.copy_(rate)
        self._rates_from = weakref.ref(optimizer)
        return True

    def follow_optimizer(self) -> None:
        """Copy the rates that the clones have now into the buffer."""
        if self._rates_from is not None:
            optimizer = self._rates_from()
            if optimizer is None or self.take_rates(optimizer):
                return
        # A copy, or clones that have left their optimizer.
        any(map(self.take_rates, reversed(list(live.optimizers))))

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.follow_optimizer()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.follow_optimizer()
