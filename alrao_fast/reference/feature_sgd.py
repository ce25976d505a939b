"""SGD with one learning rate per feature (paper, section 3.1), one tensor after the other.

With r(i) the rate of entry i and s the learning-rate multiplier of the group:

    g   = (-g if maximize else g) / grad_scale + weight_decay * p
    buf = g on the first step, else momentum * buf + (1 - dampening) * g
    d   = g + momentum * buf if nesterov else buf            (momentum 0: d = g)
    p   = p - s * r(i) * d

In memory order entry i of a parameter has the rate `rate[(i // inner) % len(rate)]`. Arithmetic in float32 (float64
for float64 parameters), storage in each tensor's dtype. Where found_inf is not 0 nothing is written.

Over the first `warmup_steps` updates s grows linearly: s min(1, (t + 1) / warmup_steps), t the updates before this one.
The running average of the values, before they are rounded, counts later ones more (polynomial-decay averaging, Shamir
and Zhang, ICML 2013): average += (averaging + 1) / (t + averaging + 1) * (p - average). That weight falls for ever,
and a float32 average would stand still beside it: from t = 2048 (averaging + 1) on only every k-th value counts, with
t / k in place of t, where k is the largest power of two up to t / (1024 (averaging + 1)). A value then weighs 2^-11 to
2^-10.

With a float32 master, p is the master's entry as long as the parameter's is that entry rounded; where it is not, the
parameter was written by someone else, and p is what it holds.
"""

import torch
from torch import Tensor

from alrao_fast.reference.rounding import random_bits16, stochastic_round


def memory_order(tensor: Tensor) -> Tensor:
    """The entries of a dense tensor as a vector in memory order, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def like_parameter(grad: Tensor, param: Tensor) -> Tensor:
    """The entries of `grad` as a vector in the memory order of `param`; a copy where their strides differ."""
    if grad.stride() != param.stride():
        strided = torch.empty_strided(
            param.size(), param.stride(), dtype=grad.dtype, device=grad.device
        )
        grad = strided.copy_(grad)
    return memory_order(grad)


def entry_rates(rate: Tensor, inner: int, numel: int, dtype: torch.dtype) -> Tensor:
    """The rate of every entry in memory order, `[numel]`."""
    index = torch.arange(numel, device=rate.device) // inner % rate.numel()
    return rate.to(dtype)[index]


def values(param: Tensor, master: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The entries to update, in memory order and the arithmetic's dtype: the master's where the parameter still holds
    them, rounded, else the parameter's."""
    own = memory_order(param)
    if master is None:
        return own.to(dtype)
    kept = memory_order(master)
    return torch.where(kept.to(own.dtype) == own, kept, own.to(dtype))


def store(param: Tensor, master: Tensor | None, value: Tensor, seed: int | None, step: int) -> None:
    """Write `value` (memory order) into the parameter, through its float32 master or stochastically if it has one."""
    if master is not None:
        memory_order(master).copy_(value)
    elif seed is not None and param.dtype in (torch.bfloat16, torch.float16):
        bits = random_bits16(value.numel(), seed, step, value.device)
        value = stochastic_round(value, param.dtype, bits)
    memory_order(param).copy_(value)


def warmed_up(scale: float, step: int, warmup_steps: float) -> float:
    """The multiplier of the rates in the update after `step` others."""
    return scale * min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else scale


def average_weight(step: int, averaging: float) -> float:
    """What the value after the update that follows `step` others weighs in its average, 0 where it does not count."""
    stride = 1
    while 2 * stride <= step / (1024 * (averaging + 1)):
        stride *= 2
    return 0.0 if step % stride else (averaging + 1) / (step // stride + averaging + 1)


def update_average(average: Tensor, value: Tensor, step: int, averaging: float) -> None:
    """Take `value` (memory order) into the running average; nothing where there is none, or the value does not
    count."""
    weight = average_weight(step, averaging)
    if average.numel() and weight:
        stored = memory_order(average)
        if step == 0:
            stored.copy_(value)
        else:
            stored.add_(value - stored, alpha=weight)


def scaled_gradient(
    grad: Tensor, param: Tensor, dtype: torch.dtype, maximize: bool, grad_scale: Tensor | None
) -> Tensor:
    """The gradient to follow, in memory order and the arithmetic's dtype, loss scaling taken out."""
    g = like_parameter(grad, param).to(dtype)
    g = -g if maximize else g
    return g if grad_scale is None else g / grad_scale.to(dtype)


@torch.no_grad()
def feature_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    masters: list[Tensor],
    averages: list[Tensor],
    rates: list[Tensor],
    inners: list[int],
    seeds: list[int],
    steps: Tensor,
    *,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    warmup_steps: float,
    averaging: float,
    authors_momentum: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update `params`, `momentum_buffers`, `masters`, `averages` and `steps` in place.

    `momentum_buffers` is empty without momentum; `masters` is empty or holds, per parameter, a float32 copy or an
    empty tensor, and so is `averages`; `seeds` is empty (round to nearest) or one seed per parameter; `steps [T]` int64
    counts the updates each tensor has had. `authors_momentum` is the rule of the paper's code: from the second step on,
    buf = buf * (1 - momentum * min(sqrt(r), 1 / momentum)) + (1 - dampening) * g.
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

        g = scaled_gradient(grads[t], param, dtype, maximize, grad_scale)
        if weight_decay:
            g = g + weight_decay * p
        d = g
        if momentum:
            stored = memory_order(momentum_buffers[t])
            if step == 0:
                buf = g
            elif authors_momentum:
                keep = 1 - momentum * rate.sqrt().clamp(max=1 / momentum)
                buf = keep * stored.to(dtype) + (1 - dampening) * g
            else:
                buf = momentum * stored.to(dtype) + (1 - dampening) * g
            stored.copy_(buf)
            d = g + momentum * buf if nesterov else buf
        p = p - rate * d
        store(param, master, p, seeds[t] if seeds else None, step)
        if averages:
            update_average(averages[t], p, step, averaging)
    steps.add_(1)
