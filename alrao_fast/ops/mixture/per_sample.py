"""The backward of losses that are not summed: what they are multiplied by is known only there, so the op runs again.

The first run makes no gradients, the second no use of its loss. What the switch observes is the first one's.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from alrao_fast.ops import derivatives
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Likelihood
from alrao_fast.reference import switch_mixture as reference


def save(ctx: Any, op: Any, inputs: tuple[Any, ...]) -> None:
    """Keep the inputs of the op of the loss (`loss._Op`) for `gradients`."""
    is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*compress(inputs, is_tensor))
    # Tensors are kept where autograd's hooks find them, and nowhere else.
    others = [None if there else value for value, there in zip(inputs, is_tensor)]
    ctx.call = op, is_tensor, others


def gradients(
    ctx: Any, grad: Tensor | None, needed: Sequence[bool], no_other_derivative: str
) -> Sequence[Tensor | None]:
    """The gradients to x, weight and bias, those that are needed, from that to the losses `[B]`."""
    if grad is None:
        return None, None, None
    op, is_tensor, others = ctx.call
    saved = iter(ctx.saved_tensors)
    values = [next(saved) if there else value for there, value in zip(is_tensor, others)]
    arguments: dict[str, Any] = dict(zip(op.names, values, strict=True))
    if torch.is_grad_enabled() or derivatives.transformed() or derivatives.is_batch(grad):
        return _plain_gradients(grad, op.likelihood, arguments, no_other_derivative)
    x, weight, bias, *_ = values
    need_dx, *need_own = needed[:3]
    needs = need_dx, any(need_own)
    arguments["need_dx"], arguments["need_dw"] = needs
    row_weight = arguments["row_weight"]
    arguments["row_weight"] = grad.contiguous() if row_weight is None else row_weight * grad
    arguments["per_sample"] = False
    _loss, _stats, *found = op.run(tuple(arguments.values()))
    dtypes = checks.gradient_dtypes(x, weight, bias, *needs)
    return [None if dtype is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]


def _plain_gradients(
    grad: Tensor, likelihood: type[Likelihood], arguments: dict[str, Any], no_other_derivative: str
) -> list[Tensor | None]:
    """The same by the reference: these have a derivative by `grad`, which may also be a batch or a dual tensor."""
    x, weight, bias, log_posterior, target = list(arguments.values())[:5]
    options = {name: arguments[name] for name in likelihood.DEFINING}
    function = getattr(reference, likelihood.OP)

    def losses(inputs: list[Any]) -> Tensor:
        passed = derivatives.once(no_other_derivative, *inputs)
        found: Tensor = function(*passed, log_posterior, target, **options, reduction="sum")[0]
        return found

    return derivatives.plain_gradients(losses, (x, weight, bias), grad)
