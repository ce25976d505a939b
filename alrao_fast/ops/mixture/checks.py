"""The inputs that all ops of the mixture have: brought into one form, and checked (alrao_fast/ops/checks.py)."""

import math
from typing import Any

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.arguments import FLOATS, Choice, Integer, Number, Optional
from alrao_fast.ops.checks import check, check_dtype, check_tensor

OP = "switch_mixture"
backends.OPS[OP] = "switch_mixture_nll"
INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor log_posterior"
# Bytes that the logits of a chunk of samples may take: on a CPU about its caches, on a GPU enough rows for a product of
# matrices to run at full speed with 128,000 classes.
CPU_MEMORY_BUDGET = 64 << 20
GPU_MEMORY_BUDGET = 1 << 30


def flat(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples in rows, and all in the widest of the floating dtypes, as under autocast."""
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected [..., D]")
    check_weight(weight)
    dtype = x.dtype
    if dtype not in FLOATS:
        check_dtype("x", x, FLOATS)
    if weight.dtype != dtype:
        check_dtype("weight", weight, FLOATS)
        dtype = torch.promote_types(dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        check_dtype("bias", bias, FLOATS)
        bias = bias.to(dtype)
    return (x if x.dim() == 2 else x.reshape(-1, x.size(-1))), weight, bias


REDUCTION = Choice("mean", "sum", "none")
_BUDGET = Optional(Integer(words="a positive number of bytes"))


def budget(x: Tensor, memory_budget: int | None) -> int:
    if memory_budget is not None:
        return _BUDGET.check("memory_budget", memory_budget)
    return CPU_MEMORY_BUDGET if x.device.type == "cpu" else GPU_MEMORY_BUDGET


SOFTCAP = Optional(Number(above=0))


def softcap(logit_softcap: Any) -> float:
    """The bound of the logits as the ops take it, 0 for none."""
    return 0.0 if logit_softcap is None else float(SOFTCAP.check("logit_softcap", logit_softcap))


def check_softcap(softcap: float) -> None:
    check(0 <= softcap < math.inf, f"softcap: got {softcap:g}, expected a finite number >= 0")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of `dtype`, and of the results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the loss keeps the gradient to the clones' weights, by that of its inputs.

    It is the largest of the results. A factor of the loss comes in the backward, which float16 has not the range for.
    """
    return dtype if dtype == torch.bfloat16 else accumulator(dtype)


def empty_loss_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as the loss returns them, those that are not needed without elements."""
    dx, dweight, dbias = empty_gradients(x, weight, need_dx, need_dw)
    dweight = dweight.to(weight_gradient_dtype(x.dtype))
    return dx, dweight, dbias if bias is not None else dbias.new_empty(0)


def empty_gradients(
    x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the log-probabilities."""
    wide = accumulator(x.dtype)
    return (
        x.new_empty(x.shape if need_dx else (0,), dtype=wide),
        x.new_empty(weight.shape if need_dw else (0,), dtype=wide),
        x.new_empty(weight.shape[:2] if need_dw else (0,), dtype=wide),
    )


def gradient_dtypes(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_dx: bool, need_dw: bool
) -> tuple[torch.dtype | None, ...]:
    """The dtypes that autograd expects of dx, dweight and dbias, None for what is not needed."""
    return (
        x.dtype if need_dx else None,
        weight.dtype if need_dw else None,
        bias.dtype if need_dw and bias is not None else None,
    )


def in_dtype(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in the dtype that autograd expects, None for what is not needed."""
    if gradient is None or dtype is None:
        return None
    # No call that does nothing: this runs in every training step.
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def check_weight(weight: Tensor) -> None:
    # A tracer warns of sizes that are looked at.
    if torch.jit.is_tracing():
        return
    shape = weight.shape
    if len(shape) != 3 or shape[0] < 1 or shape[1] < 1:
        raise RuntimeError(
            f"weight: got shape {list(shape)}, expected [N, C, D] with N >= 1 and C >= 1"
        )


def check_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor, memory_budget: int
) -> None:
    if torch.jit.is_tracing():
        return
    check_weight(weight)
    clones, classes, features = weight.shape
    check_tensor("weight", weight, weight.shape, FLOATS, weight.device)
    check(
        x.dim() == 2 and x.size(1) == features,
        f"x: got shape {list(x.shape)}, expected [B, {features}], D being that of weight "
        f"{list(weight.shape)}",
    )
    same = (weight.dtype,)
    check_tensor("x", x, x.shape, same, weight.device)
    if bias is not None:
        check_tensor("bias", bias, (clones, classes), same, weight.device)
    posterior_dtypes = (torch.float32, torch.float64)
    check_tensor("log_posterior", log_posterior, (clones,), posterior_dtypes, weight.device)
    check(
        memory_budget > 0,
        f"memory_budget: got {memory_budget}, expected a positive number of bytes",
    )
