"""`feature_sgd_`: one SGD step with one learning rate per feature, over all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.ops import dispatch
from alrao_fast.ops.dispatch import LIB, define
from alrao_fast.ops.feature import State, bump_versions, check_inputs, default_inners
from alrao_fast.reference import feature_sgd as reference


def _fake(*args: object, **kwargs: object) -> None:
    """Nothing is returned; the kernel checks its arguments."""


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
    rates: Sequence[Tensor],
    inners: Sequence[int],
    seeds: Sequence[int],
    steps: Tensor,
    *,
    lr_tensor: Tensor | None,
    momentum: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **others: object,
) -> None:
    """For the implementations in Python; the compiled ones check by themselves."""
    option = "momentum is not 0" if momentum else "momentum is 0"
    check_inputs(
        "feature_sgd_",
        params,
        grads,
        {"momentum_buffers": State(momentum_buffers, momentum != 0, option)},
        masters,
        rates,
        inners,
        seeds,
        steps,
        {"lr": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf},
    )


_SCHEMA = (
    "feature_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] masters, "
    "Tensor[] rates, int[] inners, int[] seeds, Tensor(d!) steps, *, float lr, Tensor? lr_tensor, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool authors_momentum, Tensor? grad_scale, "
    "Tensor? found_inf) -> ()"
)
_NAME = define(_SCHEMA, _fake)
_TRITON_NAME = dispatch.define_triton(_SCHEMA, _fake, "feature.sgd", _check, planned=True)
# An optimizer step is no part of any graph: skip autograd instead of searching the lists for tensors that require it.
for _name in (_NAME, _TRITON_NAME):
    LIB.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def feature_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rates: Sequence[Tensor],
    *,
    inners: Sequence[int] | None = None,
    momentum_buffers: Sequence[Tensor] | None = None,
    masters: Sequence[Tensor] | None = None,
    steps: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    lr: float | Tensor = 1.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    momentum_rule: Literal["torch", "authors"] = "torch",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One step of SGD with one learning rate per feature, in place, for all of `params`.

    With r(i) the rate of entry i (paper, section 3.1)::

        g   = (-g if maximize else g) / grad_scale + weight_decay * p
        buf = g on the first step, else momentum * buf + (1 - dampening) * g
        d   = g + momentum * buf if nesterov else buf            (momentum 0: d = g)
        p   = p - lr * r(i) * d

    Arithmetic in float32 (float64 for float64 parameters). The gradients are only read.

    Args:
        params: dense tensors of any strides, float64, float32, bfloat16 or float16, of one device.
        grads: one per parameter, of its shape and dtype; other strides than the parameter's cost a copy.
        rates: one float32 vector per parameter (float64 is taken for float64 parameters).
        inners: in memory order entry i has the rate `rate[(i // inner) % len(rate)]`. Default: features run along
            dim 0, or a single rate.
        momentum_buffers: needed if and only if `momentum` is not 0; of the parameter's dtype or float32.
        masters: per parameter a float32 copy of a bfloat16 or float16 parameter, which takes the update and is then
            rounded into the parameter; or an empty tensor.
        steps: int64, one entry per parameter: the updates it has had; counted up here. Needed with momentum (0 means
            the first step) or seeds.
        seeds: one per parameter: round stochastically into bfloat16 and float16 parameters without a master; the
            random bits depend on seed, step and element only.
        lr: multiplier of every rate; a one-element tensor is read without synchronising.
        momentum_rule: "authors" is the rule of the paper's code, with r the rate times lr: after the first step
            buf = buf * (1 - momentum * min(sqrt(r), 1 / momentum)) + (1 - dampening) * g.
        grad_scale: one float32 element that divides the gradients.
        found_inf: one float32 element; where it is not 0 nothing is written.
        impl: "auto", or the backend by name: "cuda", "triton", "cpu", "reference".

    Raises:
        RuntimeError: arguments that do not fit together; nothing has been written then.
        ValueError, alrao_fast.backends.BackendUnavailableError: `impl` is unknown or cannot run here.
    """
    if momentum_rule not in ("torch", "authors"):
        raise ValueError(f"momentum_rule: got {momentum_rule!r}, expected 'torch' or 'authors'")
    if not params:
        return
    if steps is None:
        if momentum or seeds:
            raise RuntimeError(
                "feature_sgd_: steps is None, expected an int64 tensor with one entry for each of params, because "
                "momentum or stochastic rounding is on"
            )
        steps = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
    params, grads, rates = list(params), list(grads), list(rates)
    buffers, masters, seeds = list(momentum_buffers or ()), list(masters or ()), list(seeds or ())
    inners = default_inners(params, rates) if inners is None else list(inners)
    args = (params, grads, buffers, masters, rates, inners, seeds, steps)
    scalars: dict[str, Any] = {
        "lr": 1.0 if isinstance(lr, Tensor) else lr,
        "lr_tensor": lr if isinstance(lr, Tensor) else None,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "authors_momentum": momentum_rule == "authors",
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }
    implementation = backends.select("feature_sgd", params[0].device, impl)
    with torch.no_grad():
        if implementation == "reference":
            _check(*args, **scalars)
            reference.feature_sgd_(*args, **scalars)
        else:
            dispatch.overload("feature_sgd_", implementation)(*args, **scalars)
            bump_versions(params, buffers, masters, [steps])
