"""The loss of every last layer on one batch, and its gradient with respect to that layer's outputs.

For the usual criteria both are written down for all layers at once; any other criterion is called once per layer on
its outputs alone, which are small beside the layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alrao_fast.compat.custom_layers import L2LossAdditional, L2LossLog

Criterion = Callable[[Any, Any], Tensor]


def own_criterion(criterion: Criterion, loss: Criterion) -> Criterion:
    """The criterion of a single last layer: `loss` where `criterion` only scores their mixture."""
    return loss if isinstance(criterion, L2LossAdditional) else criterion


def _ignored_class(criterion: Criterion, normalised: bool) -> int | None:
    """`ignore_index` where the criterion is the mean negative log-likelihood of log-probabilities, else None."""
    if criterion is F.nll_loss or (criterion is F.cross_entropy and normalised):
        return -100
    plain: tuple[type, ...] = (nn.NLLLoss,)
    if normalised:
        # The cross-entropy of log-probabilities: log_softmax changes nothing there.
        plain += (nn.CrossEntropyLoss,)
    if type(criterion) not in plain:
        return None
    assert isinstance(criterion, nn.NLLLoss | nn.CrossEntropyLoss)
    if criterion.weight is not None or criterion.reduction != "mean":
        return None
    return criterion.ignore_index if not getattr(criterion, "label_smoothing", 0.0) else None


def _squared_scale(criterion: Criterion, outputs: Tensor, targets: Any) -> tuple[float, float] | None:
    """(s, c) where the criterion is s * (sum of squared errors) + c, else None."""
    if not isinstance(targets, Tensor) or outputs.shape[1:] != targets.shape or outputs.dim() != 3:
        return None
    if not targets.is_floating_point() or targets.numel() == 0:
        return None
    if type(criterion) is L2LossLog:
        return 0.5 / (criterion.sigma2 * targets.size(0)), criterion.constant()
    if criterion is F.mse_loss or (type(criterion) is nn.MSELoss and criterion.reduction == "mean"):
        return 1.0 / targets.numel(), 0.0
    return None


@torch.no_grad()
def clone_losses(
    criterion: Criterion, outputs: Tensor, targets: Any, *, normalised: bool, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The losses [N] of the layers' `outputs [N, ...]`, and the gradient of each by its own outputs, `[N, ...]`.

    normalised: the outputs are exact log-probabilities along their last dimension.
    """
    if isinstance(targets, Tensor) and outputs.dim() == 3 and outputs.shape[1:2] == targets.shape:
        ignored = _ignored_class(criterion, normalised) if targets.dtype == torch.int64 else None
        if ignored is not None:
            return _negative_log_likelihood(outputs, targets, ignored, need_grad)
    squared = _squared_scale(criterion, outputs, targets)
    if squared is not None:
        error = outputs - targets
        losses = error.square().sum((1, 2)) * squared[0] + squared[1]
        return losses, error * (2 * squared[0]) if need_grad else None

    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_(need_grad)
        each = [criterion(output, targets) for output in leaf.unbind(0)]
        if any(loss.numel() != 1 for loss in each):
            raise ValueError(
                f"criterion returned a tensor of shape {list(each[0].shape)}; expected a scalar, such as the mean "
                "over the batch"
            )
        losses = torch.stack([loss.reshape(()) for loss in each])
    if not need_grad or not losses.requires_grad:
        return losses.detach(), torch.zeros_like(outputs) if need_grad else None
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def _negative_log_likelihood(
    outputs: Tensor, targets: Tensor, ignored: int, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    counted = targets != ignored
    share = counted.to(outputs.dtype)
    share = share / share.sum()
    index = torch.where(counted, targets, 0).view(1, -1, 1).expand(outputs.size(0), -1, 1)
    picked = outputs.gather(2, index).squeeze(2)
    # An ignored sample has no say even where a layer's output is not finite.
    losses = -torch.where(counted, picked * share, 0).sum(1)
    losses = torch.where(share.isfinite().all(), losses, torch.nan)
    if not need_grad:
        return losses, None
    grad = torch.zeros_like(outputs)
    return losses, grad.scatter_(2, index, -share.view(1, -1, 1).expand_as(index))
