"""`feature_sgd_`: one SGD step with one learning rate per feature, over all parameters at once."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alrao_fast.arguments import RULE, Flag, Number, checked
from alrao_fast.ops.feature import FeatureOp, Scalars, as_lists
from alrao_fast.reference.feature_sgd import feature_sgd_ as reference

OP = FeatureOp(
    stem="feature_sgd",
    states=("momentum_buffer",),
    options={
        "momentum": Number(low=0, live=True),
        "dampening": Number(live=True),
        "weight_decay": Number(low=0, live=True),
        "nesterov": Flag(),
        "authors_momentum": Flag(),
    },
    fixed_states=0,
    states_option="momentum",
    first_state="momentum_buffer",
    reference=reference,
)
# The same under the names by which users know them.
OPTIONS = {
    **{name: OP.options[name] for name in ("momentum", "dampening", "weight_decay", "nesterov")},
    "momentum_rule": RULE,
}


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
    averages: Sequence[Tensor] | None = None,
    lr: float | Tensor = 1.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    momentum_rule: Literal["torch", "authors"] = "torch",
    warmup_steps: float = 0.0,
    averaging: float = 8.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One step of SGD with one learning rate per feature, in place, for all of `params`.

    With r(i) the rate of entry i (paper, section 3.1):

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
            rounded into the parameter; or an empty tensor. Where a parameter is not its master rounded, it was written
            since, and the master takes its value first.
        steps: int64, one entry per parameter: the updates it has had; counted up here. Needed with momentum (0 means
            the first step), seeds, averages or a warm-up.
        seeds: one per parameter: round stochastically into bfloat16 and float16 parameters without a master; the
            random bits depend on seed, step and element only.
        averages: per parameter the running average of its values, float32 (float64 for float64 parameters): with t the
            updates that the parameter has had before, average += (averaging + 1) / (t + averaging + 1) * (p - average),
            p the updated value before it is rounded. From t = 2048 (averaging + 1) on only every k-th value counts,
            with t / k in place of t: k is the largest power of two up to t / (1024 (averaging + 1)). Beside smaller
            weights than that a float32 average would stand still. Or an empty tensor.
        lr: multiplier of every rate; a one-element tensor is read without synchronising.
        warmup_steps: lr grows linearly over so many updates of a parameter: update t, from 0, has
            lr * min(1, (t + 1) / warmup_steps). 0: no warm-up.
        averaging: the power by which later values count more in `averages` (polynomial-decay averaging, Shamir and
            Zhang, ICML 2013); 0: all alike.
        momentum_rule: "authors" is the rule of the paper's code, with r the rate times lr: after the first step
            buf = buf * (1 - momentum * min(sqrt(r), 1 / momentum)) + (1 - dampening) * g.
        grad_scale: one float32 element that divides the gradients.
        found_inf: one float32 element; where it is not 0 nothing is written.
        impl: "auto", or the backend by name: "cuda", "triton", "cpu", "reference".

    Raises:
        TypeError, ValueError: an option of another type or out of range, a list or an entry of another type, naming it.
            Nothing was written then, nor in the other cases.
        RuntimeError: tensors that do not fit together.
        ValueError, alrao_fast.backends.BackendUnavailableError: `impl` is unknown or cannot run here.
    """
    # Not locals(): torch.compile of 2.11 does not trace it.
    options = checked(
        OPTIONS,
        {
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "momentum_rule": momentum_rule,
        },
    )
    authors = options.pop("momentum_rule") == "authors"
    scalars = Scalars(lr, maximize, grad_scale, found_inf, warmup_steps, averaging).checked()
    lists, gradients = as_lists(
        OP,
        steps,
        inners,
        seeds,
        params=params,
        grads=grads,
        rates=rates,
        momentum_buffers=momentum_buffers,
        masters=masters,
        averages=averages,
    )
    if not lists.params:
        return
    if steps is None:
        if momentum or lists.seeds or lists.averages or scalars.warmup_steps:
            raise RuntimeError(
                "feature_sgd_: steps is None, expected an int64 tensor with one entry for each of params, because "
                "momentum, stochastic rounding, a warm-up or an average is on"
            )
        zeros = torch.zeros(len(lists.params), dtype=torch.int64, device=lists.params[0].device)
        lists = lists._replace(steps=zeros)
    options["authors_momentum"] = authors
    OP(lists, gradients, options, scalars, OP.select(lists.params, impl))
