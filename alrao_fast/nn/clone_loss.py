"""Alrao with a criterion of the user's (`LinearClones.clone_loss`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alrao_fast.arguments import Function, shown
from alrao_fast.ops import derivatives
from alrao_fast.ops.mixture.loss import NO_OTHER_DERIVATIVE
from alrao_fast.reference import switch_mixture as reference

if TYPE_CHECKING:
    from alrao_fast.nn.clones import LinearClones

CRITERION = Function("a function outputs [N, ..., C] -> losses [N, ...]")


def mixture_of_losses(
    head: LinearClones,
    features: Tensor,
    clones: tuple[Tensor | None, ...],
    criterion: Callable[[Tensor], Tensor],
    log_posterior: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and statistics `[3, N]` of the losses of `clones`, their weight, bias and tails, mixed by the log-posterior
    `[N]`."""
    # Each branch detaches, and makes finite, what it has no gradient for: 0 * inf would be NaN in its backward.
    x, *params = derivatives.once(NO_OTHER_DERIVATIVE, features, *clones)
    own_outputs = head.linear_outputs(_finite_rows(x.detach(), -1), *params)
    fixed: list[Any] = [None if p is None else _finite_clones(p.detach()) for p in params]
    mixture_outputs = head.linear_outputs(x, *fixed)
    own = _per_sample(criterion(head.capped(own_outputs)), head.num_clones)
    mixture = _per_sample(criterion(head.capped(mixture_outputs)), head.num_clones)
    samples = own.shape[1:]
    own, mixture = (losses.flatten(1).t() for losses in (own, mixture))
    alive = own.detach().isfinite() & mixture.detach().isfinite()
    never_dead = alive.all(0).view(-1, *[1] * (own_outputs.dim() - 1))

    # A masked loss sends a zero gradient back through the criterion, which may make it 0 * inf = NaN.
    if own_outputs.requires_grad:
        own_outputs.register_hook(lambda grad: torch.where(never_dead, grad, 0))
    if mixture_outputs.requires_grad:
        mixture_outputs.register_hook(
            lambda grad: torch.where(never_dead | grad.isfinite(), grad, 0)
        )
    loss, stats = reference.combine(
        torch.where(alive, -mixture, -math.inf),
        torch.where(alive, -own, -math.inf),
        alive,
        torch.full_like(own, math.nan, dtype=torch.float64),
        torch.ones_like(alive[:, 0]),
        log_posterior,
        head.reduction,
        per_sample=head.reduction == "none",
    )
    return loss.view(samples) if head.reduction == "none" else loss, stats


def _finite_rows(tensor: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """`tensor` with zeros in place of every row along `dims` that holds a non-finite entry."""
    return torch.where(tensor.isfinite().all(dims, keepdim=True), tensor, 0)


def _finite_clones(param: Tensor) -> Tensor:
    return _finite_rows(param, tuple(range(1, param.dim())))


def _per_sample(losses: Any, num_clones: int) -> Tensor:
    """The criterion's losses `[N, ...]`, float32 at least."""
    expected = f"[{num_clones}, ...]: one per clone and sample, without reduction"
    if not isinstance(losses, Tensor) or losses.is_complex() or losses.layout is not torch.strided:
        raise TypeError(
            f"criterion: returned {shown(losses)}, expected a tensor of real losses {expected}"
        )
    if losses.dim() < 2 or losses.size(0) != num_clones:
        raise ValueError(
            f"criterion: returned losses of shape {list(losses.shape)}, expected {expected}"
        )
    return losses.to(torch.promote_types(losses.dtype, torch.float32))
