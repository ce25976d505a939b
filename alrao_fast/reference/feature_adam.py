"""Adam and AdamW with one learning rate per feature: torch.optim.Adam's equations with lr = s * r(i).

With t the number of this update, from 1:

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2          (amsgrad: v_max = max(v_max, v))
    p = p - s r(i) / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Decoupled weight decay (AdamW) multiplies p by max(0, 1 - s r(i) weight_decay) first; otherwise it is added to the
gradient. Below 0 the factor would flip the weights, below -1 drive them to infinity: rates span orders of magnitude.
Layouts, rounding, skipped steps, warm-up and averages are those of `feature_sgd`.
"""

import torch
from torch import Tensor

from alrao_fast.reference.feature_sgd import (
    entry_rates,
    memory_order,
    scaled_gradient,
    store,
    update_average,
    values,
    warmed_up,
)


@torch.no_grad()
def feature_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    rates: list[Tensor],
    inners: list[int],
    seeds: list[int],
    steps: Tensor,
    *,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    decoupled: bool,
    maximize: bool,
    warmup_steps: float,
    averaging: float,
    authors_eps: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update `params`, the moments, `masters`, `averages` and `steps` in place.

    `max_exp_avg_sqs` is empty without amsgrad. `authors_eps` is the rule of the paper's code, where eps is not
    rescaled: p = p - s r sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    scale = lr if lr_tensor is None else lr * lr_tensor.item()
    for t, param in enumerate(params):
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        master = masters[t] if masters and masters[t].numel() else None
        p = values(param, master, dtype)
        step = int(steps[t])
        multiplier = warmed_up(scale, step, warmup_steps)
        rate = multiplier * entry_rates(rates[t], inners[t], param.numel(), dtype)
        correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)

        g = scaled_gradient(grads[t], param, dtype, maximize, grad_scale)
        if decoupled:
            p = p * (1 - rate * weight_decay).clamp(min=0)
        elif weight_decay:
            g = g + weight_decay * p

        first, second = memory_order(exp_avgs[t]), memory_order(exp_avg_sqs[t])
        m = beta1 * first.to(dtype) + (1 - beta1) * g
        v = beta2 * second.to(dtype) + (1 - beta2) * g * g
        first.copy_(m)
        second.copy_(v)
        if amsgrad:
            largest = memory_order(max_exp_avg_sqs[t])
            v = torch.maximum(largest.to(dtype), v)
            largest.copy_(v)

        if authors_eps:
            change = correction2**0.5 / correction1 * m / (v.sqrt() + eps)
        else:
            change = m / correction1 / (v.sqrt() / correction2**0.5 + eps)
        p = p - rate * change
        store(param, master, p, seeds[t] if seeds else None, step)
        if averages:
            update_average(averages[t], p, step, averaging)
    steps.add_(1)
