"""switch_mixture: the N clones of the last layer, evaluated together and mixed by the posterior.

Mathematics: reference/switch_mixture.py. The op computes the gradients along with the loss, since
one pass over the logits serves all of them; the backward only scales them. They are not the
gradients of one function: x gets the mixture's, each clone its own, so there is no second backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.ops._library import LIB, define
from alrao_fast.reference import switch_mixture as reference

OP = "switch_mixture"
# Bytes that the logits of a chunk of samples may take.
CPU_MEMORY_BUDGET = 64 << 20

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor log_posterior"
_NEEDS = "bool mean, bool need_dx, bool need_dw, int memory_budget"
_RESULT = "(Tensor loss, Tensor stats, Tensor dx, Tensor dweight, Tensor dbias)"


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_result(x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, ...]:
    wide = _accumulator(x.dtype)
    clones, classes, _ = weight.shape
    return (
        x.new_empty((), dtype=wide),
        x.new_empty((3, clones), dtype=torch.float64),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw else (0,), dtype=wide),
        x.new_empty((clones, classes) if need_dw else (0,), dtype=wide),
    )


def _fake_nll(
    x, weight, bias, log_posterior, target, ignore_index, mean, need_dx, need_dw, memory_budget
):
    return _fake_result(x, weight, need_dx, need_dw)


def _fake_gaussian_nll(
    x, weight, bias, log_posterior, target, sigma2, mean, need_dx, need_dw, memory_budget
):
    return _fake_result(x, weight, need_dx, need_dw)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtype = inputs[1].dtype
    ctx.has_bias = inputs[2] is not None
    ctx.needs = inputs[7:9]


def _scale_gradients(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if grad is None:
        return (None, None, None, *nothing)
    dx, dweight, dbias = ctx.saved_tensors
    need_dx, need_dw = ctx.needs
    return (
        dx * grad.to(dx.dtype) if need_dx else None,
        (dweight * grad).to(ctx.dtype) if need_dw else None,
        (dbias * grad).to(ctx.dtype) if need_dw and ctx.has_bias else None,
        *nothing,
    )


for _schema, _fake in (
    (f"switch_mixture_nll({_INPUTS}, Tensor target, int ignore_index, {_NEEDS}) -> {_RESULT}", _fake_nll),
    (f"switch_mixture_gaussian_nll({_INPUTS}, Tensor target, float sigma2, {_NEEDS}) -> {_RESULT}", _fake_gaussian_nll),
):
    torch.library.register_autograd(
        define(_schema, _fake), _scale_gradients, setup_context=_save_gradients, lib=LIB
    )
