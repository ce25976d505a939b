"""The backward of losses that are not summed: what they are multiplied by is known only there.

On a CPU the forward keeps the gradients of the clones' own losses to the logits, `dlogits [chunks, N C, lanes]`, the
gradient to x, and `marks [N, B]`: 1 where a clone is dead for a sample, -1 for samples that do not count. The backward
multiplies by the losses' factors and makes one product. Where these would take too much memory, and on a GPU, the
forward makes no gradients and the backward runs the op again, with no use of its loss. What the switch observes is the
first one's.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from alrao_fast.ops import derivatives
from alrao_fast.ops.dispatch import define, overload
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Likelihood
from alrao_fast.reference import switch_mixture as reference

IN_NO_GRAPH = "per_sample: got True with gradients, expected False in a graph, whose backward calls the op again"
# The place of log_posterior among the arguments of the op.
_POSTERIOR = 3
# The gradients to the logits are kept up to so many times the memory budget.
_KEPT = 8
# They are kept for this many samples at a time (kLaneTile).
_LANES = 16
_BACKWARD = "switch_mixture_losses_backward"


def _fake(dlogits: Tensor, marks: Tensor, dx: Tensor, x: Tensor, grad: Tensor) -> Any:
    raise NotImplementedError(f"{_BACKWARD}: {IN_NO_GRAPH}")


define(
    f"{_BACKWARD}(Tensor dlogits, Tensor marks, Tensor dx, Tensor x, Tensor grad)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake,
)
_backward = overload(_BACKWARD)


def keeps(x: Tensor, weight: Tensor, memory_budget: int, backend: str) -> bool:
    """Whether the forward keeps what the backward needs of it."""
    if backend != "cpu" or not derivatives.is_readable(x):
        return False
    clones, classes, _ = weight.shape
    size = 8 if x.dtype is torch.float64 else 4
    samples = -(-x.size(0) // _LANES) * _LANES
    return samples * clones * classes * size <= _KEPT * memory_budget


def save(ctx: Any, op: Any, inputs: tuple[Any, ...], made: Sequence[Tensor]) -> None:
    """Keep the inputs of the op of the loss (`loss._Op`), and what it made besides, for `gradients`."""
    x, weight, bias, need_dx, need_dw = op.find(inputs)
    ctx.kept = need_dx or need_dw
    ctx.dtypes = checks.gradient_dtypes(x, weight, bias, need_dx, need_dw)
    if ctx.kept:
        # Of the posterior, which the observation of this batch changes, the few numbers: a clone would take longer.
        ctx.log_posterior = inputs[_POSTERIOR].tolist()
        inputs = *inputs[:_POSTERIOR], None, *inputs[_POSTERIOR + 1 :]
    is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*compress(inputs, is_tensor), *(made if ctx.kept else ()))
    # Tensors are kept where autograd's hooks find them, and nowhere else.
    others = [None if there else value for value, there in zip(inputs, is_tensor)]
    ctx.call = op, is_tensor, others


def gradients(
    ctx: Any, grad: Tensor | None, needed: Sequence[bool], no_other_derivative: str
) -> Sequence[Tensor | None]:
    """The gradients to x, weight and bias, those that are needed, from that to the losses `[B]`."""
    if grad is None:
        return None, None, None
    saved = ctx.saved_tensors
    plain = torch.is_grad_enabled() or derivatives.transformed() or derivatives.is_batch(grad)
    if ctx.kept and not plain:
        *_, dx, dlogits, marks = saved
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward(dlogits, marks, dx, saved[0], grad)
        return [checks.in_dtype(g, dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)]
    op, is_tensor, others = ctx.call
    tensors = iter(saved)
    values = [next(tensors) if there else value for value, there in zip(others, is_tensor)]
    arguments = dict(zip(op.names, values, strict=True))
    if plain:
        if ctx.kept:
            arguments["log_posterior"] = saved[0].new_tensor(ctx.log_posterior, dtype=torch.float64)
        return _plain_gradients(grad, op.likelihood, arguments, no_other_derivative)
    x, weight, bias, *_ = values
    needs = needed[0], needed[1] or needed[2]
    found = _again(op, arguments, *needs, grad)
    dtypes = checks.gradient_dtypes(x, weight, bias, *needs)
    return [checks.in_dtype(g, dtype) for g, dtype in zip(found, dtypes, strict=True)]


def _again(
    op: Any, arguments: dict[str, Any], need_dx: bool, need_dw: bool, grad: Tensor
) -> Sequence[Tensor]:
    """The op's gradients, of the sum of the losses times `grad`."""
    row_weight = arguments["row_weight"]
    if row_weight is None:
        factors = grad.contiguous()
    else:
        # A sample that does not count has no gradient, whatever comes: 0 * inf would be NaN.
        factors = torch.where(row_weight == 0, 0, row_weight * grad)
    arguments |= {"need_dx": need_dx, "need_dw": need_dw}
    arguments |= {"row_weight": factors, "per_sample": False}
    _loss, _stats, *found = op.run(tuple(arguments.values()))
    return found


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
