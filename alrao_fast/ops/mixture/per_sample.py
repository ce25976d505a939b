"""The backward of losses that are not summed: what they are multiplied by is known only there, so the op runs again.

The first run makes no gradients, the second no use of its loss. What the switch observes is the first one's.
"""

from typing import Any

import torch
from torch import Tensor

from alrao_fast.ops import derivatives
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Likelihood
from alrao_fast.reference import switch_mixture as reference


def save(
    ctx: Any,
    op: Any,
    likelihood: type[Likelihood],
    names: tuple[str, ...],
    inputs: tuple[Any, ...],
) -> None:
    """Keep the op's inputs, of these names, for `gradients`."""
    ctx.call = op, likelihood
    tensors = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.arguments = list(zip(names, tensors, others, strict=True))


def gradients(ctx: Any, grad: Tensor | None, no_other_derivative: str) -> tuple[Tensor | None, ...]:
    """The gradients to the op's inputs, x, weight and bias first, from that to the losses `[B]`."""
    found = [None] * 3 if grad is None else _gradients(ctx, grad, no_other_derivative)
    return *found, *[None] * (len(ctx.arguments) - 3)


def _gradients(ctx: Any, grad: Tensor, no_other_derivative: str) -> list[Tensor | None]:
    op, likelihood = ctx.call
    saved = iter(ctx.saved_tensors)
    arguments: dict[str, Any] = {
        name: next(saved) if is_tensor else value for name, is_tensor, value in ctx.arguments
    }
    if torch.is_grad_enabled() or derivatives.transformed() or derivatives.is_batch(grad):
        return _plain_gradients(grad, likelihood, arguments, no_other_derivative)
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    # A torch.autograd.Function has inputs of its own in front.
    need_dx, *need_own = ctx.needs_input_grad[-len(arguments) :][:3]
    needs = need_dx, any(need_own)
    arguments["need_dx"], arguments["need_dw"] = needs
    row_weight = arguments["row_weight"]
    arguments["row_weight"] = grad.contiguous() if row_weight is None else row_weight * grad
    arguments["per_sample"] = False
    _loss, _stats, *found = op(*arguments.values())
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
