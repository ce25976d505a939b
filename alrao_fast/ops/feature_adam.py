"""`feature_adam_`: one Adam or AdamW step with one learning rate per feature, over all parameters at once."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from alrao_fast.arguments import RULE, Flag, Number, Several, checked
from alrao_fast.ops.feature import FeatureOp, Scalars, as_lists
from alrao_fast.reference.feature_adam import feature_adam_ as reference

_BETA = Number(low=0, below=1, live=True)
OP = FeatureOp(
    stem="feature_adam",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    options={
        "beta1": _BETA,
        "beta2": _BETA,
        "eps": Number(low=0, live=True),
        "weight_decay": Number(low=0, live=True),
        "amsgrad": Flag(),
        "decoupled": Flag(),
        "authors_eps": Flag(),
    },
    fixed_states=2,
    states_option="amsgrad",
    reference=reference,
)
# The same under the names by which users know them; whether v_max is kept says amsgrad.
OPTIONS = {
    "betas": Several(_BETA, 2),
    "eps": OP.options["eps"],
    "weight_decay": OP.options["weight_decay"],
    "decoupled_weight_decay": OP.options["decoupled"],
    "eps_rule": RULE,
}


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
    averages: Sequence[Tensor] | None = None,
    lr: float | Tensor = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    eps_rule: Literal["torch", "authors"] = "torch",
    warmup_steps: float = 0.0,
    averaging: float = 8.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One step of Adam or AdamW with one learning rate per feature, in place, for all of `params`.

    With r(i) the rate of entry i and t the number of this update, from 1:

        g = (-g if maximize else g) / grad_scale
        p = p * max(0, 1 - lr * r(i) * weight_decay) if decoupled_weight_decay, else g = g + weight_decay * p
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
        inners, masters, seeds, averages, lr, warmup_steps, averaging, grad_scale, found_inf, impl: as in
            `feature_sgd_`.
        eps_rule: "authors" is the rule of the paper's code, whose eps is not rescaled:
            p = p - lr * r(i) * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).

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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "eps_rule": eps_rule,
        },
    )
    scalars = Scalars(lr, maximize, grad_scale, found_inf, warmup_steps, averaging).checked()
    lists, gradients = as_lists(
        OP,
        steps,
        inners,
        seeds,
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        max_exp_avg_sqs=max_exp_avg_sqs,
        rates=rates,
        masters=masters,
        averages=averages,
    )
    if not lists.params:
        return
    OP(
        lists,
        gradients,
        {
            "beta1": options["betas"][0],
            "beta2": options["betas"][1],
            "eps": options["eps"],
            "weight_decay": options["weight_decay"],
            "amsgrad": len(lists.states) == len(OP.states),
            "decoupled": options["decoupled_weight_decay"],
            "authors_eps": options["eps_rule"] == "authors",
        },
        scalars,
        OP.select(lists.params, impl),
    )
