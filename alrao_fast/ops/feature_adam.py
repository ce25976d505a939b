"""`feature_adam_`: one Adam or AdamW step with one learning rate per feature, over all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.ops import dispatch
from alrao_fast.ops.dispatch import LIB, define
from alrao_fast.ops.feature import State, bump_versions, check_inputs, default_inners
from alrao_fast.reference import feature_adam as reference


def _fake(*args: object, **kwargs: object) -> None:
    """Nothing is returned; the kernel checks its arguments."""


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    rates: Sequence[Tensor],
    inners: Sequence[int],
    seeds: Sequence[int],
    steps: Tensor,
    *,
    lr_tensor: Tensor | None,
    amsgrad: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **others: object,
) -> None:
    """For the implementations in Python; the compiled ones check by themselves."""
    states = {"exp_avgs": State(exp_avgs), "exp_avg_sqs": State(exp_avg_sqs)}
    option = "amsgrad is on" if amsgrad else "amsgrad is off"
    states["max_exp_avg_sqs"] = State(max_exp_avg_sqs, amsgrad, option)
    check_inputs(
        "feature_adam_",
        params,
        grads,
        states,
        masters,
        rates,
        inners,
        seeds,
        steps,
        {"lr": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf},
    )


_SCHEMA = (
    "feature_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor[] rates, int[] inners, int[] seeds, Tensor(f!) steps, "
    "*, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool amsgrad, "
    "bool decoupled, bool maximize, bool authors_eps, Tensor? grad_scale, Tensor? found_inf) -> ()"
)
_NAME = define(_SCHEMA, _fake)
_TRITON_NAME = dispatch.define_triton(_SCHEMA, _fake, "feature.adam", _check, planned=True)
# An optimizer step is no part of any graph: skip autograd instead of searching the lists for tensors that require it.
for _name in (_NAME, _TRITON_NAME):
    LIB.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def feature_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rates: Sequence[Tensor],
    *,
    steps: Tensor,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    inners: Sequence[int] | None = None,
    masters: Sequence[Tensor] | None = None,
    seeds: Sequence[int] | None = None,
    lr: float | Tensor = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    eps_rule: Literal["torch", "authors"] = "torch",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One step of Adam or AdamW with one learning rate per feature, in place, for all of `params`.

    With r(i) the rate of entry i and t the number of this update, from 1::

        g = (-g if maximize else g) / grad_scale
        p = p * (1 - lr * r(i) * weight_decay) if decoupled_weight_decay, else g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2                        (amsgrad: v_max = max(v_max, v) in place of v below)
        p = p - lr * r(i) / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Arithmetic in float32 (float64 for float64 parameters). The gradients are only read.

    Args:
        params: dense tensors of any strides, float64, float32, bfloat16 or float16, of one device.
        grads: one per parameter, of its shape and dtype; other strides than the parameter's cost a copy.
        exp_avgs, exp_avg_sqs: m and v, one per parameter, of its dtype or float32; zeros before the first step.
        rates: one float32 vector per parameter (float64 is taken for float64 parameters).
        steps: int64, one entry per parameter: the updates it has had; counted up here.
        max_exp_avg_sqs: v_max; giving it turns amsgrad on.
        inners, masters, seeds, lr, grad_scale, found_inf, impl: as in `feature_sgd_`.
        eps_rule: "authors" is the rule of the paper's code, whose eps is not rescaled:
            p = p - lr * r(i) * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).

    Raises:
        RuntimeError: arguments that do not fit together; nothing has been written then.
        ValueError, alrao_fast.backends.BackendUnavailableError: `impl` is unknown or cannot run here.
    """
    if eps_rule not in ("torch", "authors"):
        raise ValueError(f"eps_rule: got {eps_rule!r}, expected 'torch' or 'authors'")
    if not params:
        return
    params, grads, rates = list(params), list(grads), list(rates)
    firsts, seconds, largest = list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs or ())
    masters, seeds = list(masters or ()), list(seeds or ())
    inners = default_inners(params, rates) if inners is None else list(inners)
    args = (params, grads, firsts, seconds, largest, masters, rates, inners, seeds, steps)
    scalars: dict[str, Any] = {
        "lr": 1.0 if isinstance(lr, Tensor) else lr,
        "lr_tensor": lr if isinstance(lr, Tensor) else None,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": len(largest) > 0,
        "decoupled": decoupled_weight_decay,
        "maximize": maximize,
        "authors_eps": eps_rule == "authors",
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }
    implementation = backends.select("feature_adam", params[0].device, impl)
    with torch.no_grad():
        if implementation == "reference":
            _check(*args, **scalars)
            reference.feature_adam_(*args, **scalars)
        else:
            dispatch.overload("feature_adam_", implementation)(*args, **scalars)
            bump_versions(params, firsts, seconds, largest, masters, [steps])
