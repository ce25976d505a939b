"""The last forward of a model: its features and outputs, and what a training step asks about them afterwards."""

from typing import Any

import torch
from torch import Tensor

from alrao_fast.compat._losses import (
    Criterion,
    clone_losses,
    correct_predictions,
    known_losses,
    nll_ignoring,
)
from alrao_fast.compat._passes import ClonePass

# The gradients of one parameter of all layers, and the tensor [N, ...] they are slices of.
Stacked = tuple[list[Tensor], Tensor]


class Evaluation:
    """`x`: the features, with their graph; `clone_pass`: the layers' outputs on them."""

    def __init__(self, x: Tensor, clone_pass: ClonePass) -> None:
        self.x = x
        self.clone_pass = clone_pass
        self._attached: Tensor | None = None
        # Losses by criterion, and the targets they are for: the switch asks for what the gradients needed already.
        self._losses: dict[Any, tuple[Any, Tensor]] = {}
        self._correct: tuple[Any, Tensor] | None = None

    def outputs(self) -> Tensor:
        """The outputs [N, ...], differentiable where gradients are on."""
        if self._attached is None:
            if not torch.is_grad_enabled():
                return self.clone_pass.outputs
            self._attached = self.clone_pass.attached(self.x)
        return self._attached

    def losses(self, criterion: Criterion, targets: Any) -> Tensor:
        """The layers' losses [N]."""
        key = self._ignoring(criterion, targets)
        known = self._losses.get(criterion if key is None else key)
        if known is not None and known[0] is targets:
            return known[1]
        return known_losses(criterion, self.clone_pass.outputs, targets, key)

    def correct(self, targets: Tensor) -> Tensor:
        """The number of correct predictions [N] of the classes `targets`."""
        if self._correct is not None and self._correct[0] is targets:
            return self._correct[1]
        return correct_predictions(self.clone_pass.outputs, targets)

    def _ignoring(self, criterion: Criterion, targets: Any) -> int | None:
        clone_pass = self.clone_pass
        return nll_ignoring(
            criterion, clone_pass.classified, targets, normalised=clone_pass.normalised
        )

    @torch.no_grad()
    def own_gradients(
        self, criterion: Criterion, targets: Any, remove_non_numerical: bool
    ) -> list[Stacked]:
        """Set the gradients of the layers to those of their own losses on the features as they are.

        A frozen parameter has none; hooks of a parameter see its gradient, as in a backward.

        remove_non_numerical: a layer whose loss is not finite gets a zero gradient.
        """
        clone_pass = self.clone_pass
        clone_pass.check_unchanged()
        key = self._ignoring(criterion, targets)
        if key is not None:
            own = clone_pass.own_nll(targets, key, masked=remove_non_numerical)
            losses, slots = own.losses, own.slots
            self._correct = None if own.correct is None else (targets, own.correct)
        else:
            losses, grad = clone_losses(criterion, clone_pass.outputs, targets)
            assert grad is not None
            _, slots = clone_pass.pull(grad, features=False, masked=remove_non_numerical)
            if remove_non_numerical:
                slots = clone_pass.only(losses.isfinite(), slots)
        self._losses[criterion if key is None else key] = targets, losses
        grads = clone_pass.split(slots)
        for param, grad in zip(clone_pass.params, grads):
            if param._backward_hooks and grad is not None and not clone_pass.calls_hooks:
                for hook in param._backward_hooks.values():
                    changed = hook(grad)
                    grad = grad if changed is None else changed
            param.grad = grad if param.requires_grad else None
        if len(slots) == len(grads):
            return []
        n = len(grads) // len(slots)
        return [
            (grads[k * n : (k + 1) * n], slot)  # type: ignore[misc]
            for k, slot in enumerate(slots)
            if slot is not None
        ]
