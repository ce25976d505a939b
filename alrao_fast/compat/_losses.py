"""The loss of every last layer on one batch, and its gradient with respect to that layer's outputs.

For the usual criteria both are written down for all layers at once; any other criterion is called once per layer on
its outputs alone, which are small beside the layers themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alrao_fast.arguments import shown
from alrao_fast.compat.custom_layers import L2LossLog

Criterion = Callable[[Any, Any], Tensor]


def nll_ignoring(
    criterion: Criterion, classified: int | None, targets: Any, *, normalised: bool
) -> int | None:
    """`ignore_index` where `criterion` on outputs [N, M, C] and classes [M] is the mean negative log-likelihood.

    classified: M, or None for outputs of another number of dimensions.

    None where it is something else. normalised: the outputs are exact log-probabilities along their last dimension.
    """
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or classified is None:
        return None
    if targets.shape != (classified,):
        return None
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


def _squared_scale(
    criterion: Criterion, outputs: Tensor, targets: Any
) -> tuple[float, float] | None:
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


class NllTerms(NamedTuple):
    """The mean negative log-likelihood as -sum_m share[m] outputs[n, m, targets[m]]."""

    targets: Tensor
    share: Tensor


def nll_terms(outputs: Tensor, targets: Tensor, ignored: int) -> NllTerms:
    """The terms of the mean over the targets that are not `ignored`."""
    counted = targets != ignored
    share = counted.to(outputs.dtype)
    return NllTerms(torch.where(counted, targets, 0), share / share.sum())


def nll_losses(outputs: Tensor, terms: NllTerms) -> Tensor:
    """The losses [N]; NaN where no sample counts, as torch has it."""
    index = terms.targets.view(1, -1, 1).expand(outputs.size(0), -1, 1)
    picked = outputs.gather(2, index).squeeze(2)
    # An ignored sample has no say even where a layer's output is not finite; NaN shares are kept.
    return -torch.where(terms.share == 0, 0, picked * terms.share).sum(1)


@torch.no_grad()
def clone_losses(
    criterion: Criterion, outputs: Tensor, targets: Any, *, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The losses [N] of the layers' `outputs [N, ...]`, and the gradient of each by its own outputs, `[N, ...]`."""
    squared = _squared_scale(criterion, outputs, targets)
    if squared is not None:
        error = outputs - targets
        losses = error.square().sum((1, 2)) * squared[0] + squared[1]
        return losses, error * (2 * squared[0]) if need_grad else None

    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_(need_grad)
        each = [criterion(output, targets) for output in leaf.unbind(0)]
        for loss in each:
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"criterion: returned {shown(loss)}, expected a tensor of one element, such as the mean over the "
                    "batch"
                )
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


def known_losses(
    criterion: Criterion, outputs: Tensor, targets: Any, ignored: int | None
) -> Tensor:
    """The losses [N] without gradients; ignored: what `nll_ignoring` says of the criterion."""
    if ignored is None:
        return clone_losses(criterion, outputs, targets, need_grad=False)[0]
    return nll_losses(outputs, nll_terms(outputs, targets, ignored))


def correct_predictions(outputs: Tensor, targets: Tensor) -> Tensor:
    """The number [N] of targets [...] that are predicted by the outputs [N, ..., C]."""
    # A maximum is faster to find than its place; a class that attains it is predicted.
    index = torch.where(targets >= 0, targets, 0).expand(outputs.shape[:-1]).unsqueeze(-1)
    at_target = outputs.gather(-1, index).squeeze(-1)
    return ((at_target >= outputs.amax(-1)) & (targets >= 0)).flatten(1).sum(1)
