"""feature_sgd_: one SGD step with one learning rate per feature over all tensors (reference/feature_sgd.py).

One launch for the tensors of a dtype, and one that counts the steps. Bound by memory: at 4.3 TB/s, the copy rate of an
H200, 12 bytes an entry in float32 without momentum (124M entries: 347 us), 20 with (579 us), 6 and 10 in bfloat16 (174
and 289 us); tables and rates add under 0.1 %. About 90 % of the bound is expected from 16-byte accesses with some 100
kB in flight per multiprocessor; small models are bound by the two launches (5 us).
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .multi_tensor import (
    INDEX,
    MASTER,
    NUMEL,
    PARAM,
    SEED,
    STATE,
    Lists,
    cell,
    chunk_is_wide,
    chunk_rates,
    count_steps,
    find_plan,
    in_layout_of,
    read,
    root,
    scalar,
    store_parameter,
    write,
)


@triton.jit
def sgd_math(
    p,
    g,
    buf,
    rate,
    first,
    momentum,
    keep_gradient,
    weight_decay,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    AUTHORS: tl.constexpr,
):
    """New parameter and momentum buffer of one entry; `rate` is times the multiplier, `g` without loss scale."""
    # Left out where it is 0: 0 * inf would be NaN.
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    d = g
    if HAS_MOMENTUM:
        if AUTHORS:
            decay = 1 - momentum * tl.minimum(root(rate), 1 / momentum)
        else:
            decay = momentum
        buf = tl.where(first, g, decay * buf + keep_gradient * g)
        if NESTEROV:
            d = g + momentum * buf
        else:
            d = buf
    return p - rate * d, buf


@triton.jit
def sgd_chunk(
    table,
    row,
    grad_address,
    start,
    numel,
    step,
    lr,
    factor,
    momentum,
    keep_gradient,
    weight_decay,
    P_DTYPE: tl.constexpr,
    S1_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    AUTHORS: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Made pointers here: Triton 3.6 loses a hint on an argument, or on what a function returns.
    param_ptr = cell(table, row, PARAM).to(tl.pointer_type(P_DTYPE))
    state_ptr = cell(table, row, STATE).to(tl.pointer_type(S1_DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(P_DTYPE))
    master_ptr = cell(table, row, MASTER).to(tl.pointer_type(tl.float32))
    seed = cell(table, row, SEED)
    if not MASKED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        state_ptr = tl.multiple_of(state_ptr, 16)
        master_ptr = tl.multiple_of(master_ptr, 16)
    for base in range(0, CHUNK, BLOCK):
        within = base + tl.arange(0, BLOCK)
        offs = start + within
        mask = offs < numel
        rate = lr * chunk_rates(table, row, start, within, mask, R_DTYPE, CHUNK).to(ACC)
        if HAS_MASTER:
            p = read(master_ptr, offs, mask, ACC, MASKED)
        else:
            p = read(param_ptr, offs, mask, ACC, MASKED)
        g = read(grad_ptr, offs, mask, ACC, MASKED) * factor
        buf = g
        if HAS_MOMENTUM:
            buf = read(state_ptr, offs, mask, ACC, MASKED)
        p, buf = sgd_math(
            p,
            g,
            buf,
            rate,
            step == 0,
            momentum,
            keep_gradient,
            weight_decay,
            HAS_MOMENTUM,
            NESTEROV,
            AUTHORS,
        )
        if HAS_MOMENTUM:
            write(state_ptr, offs, mask, buf, S1_DTYPE, MASKED)
        store_parameter(
            param_ptr,
            master_ptr,
            offs,
            mask,
            p,
            seed,
            step,
            start + base,
            P_DTYPE,
            HAS_MASTER,
            STOCHASTIC,
            MASKED,
            BLOCK,
        )


@triton.jit
def feature_sgd_kernel(
    table,
    chunks,
    grads,
    steps,
    lr_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    lr: tl.float64,
    sign: tl.float64,
    momentum: tl.float64,
    keep_gradient: tl.float64,
    weight_decay: tl.float64,
    P_DTYPE: tl.constexpr,
    S1_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_LR: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    AUTHORS: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lr = scalar(lr, lr_ptr, ACC, HAS_LR)
    momentum = tl.full([], momentum, ACC)
    keep_gradient = tl.full([], keep_gradient, ACC)
    weight_decay = tl.full([], weight_decay, ACC)
    skip = tl.full([], 0.0, tl.float32)
    if HAS_FOUND:
        skip = tl.load(found_inf_ptr).to(tl.float32)
    if skip == 0:
        chunk = tl.program_id(0).to(tl.int64)
        row = tl.load(chunks + 2 * chunk)
        start = tl.load(chunks + 2 * chunk + 1) * CHUNK
        numel = cell(table, row, NUMEL)
        index = cell(table, row, INDEX)
        grad_address = tl.load(grads + index)
        step = tl.load(steps + index)
        factor = tl.full([], sign, ACC)
        if HAS_SCALE:
            factor = factor / tl.load(grad_scale_ptr).to(ACC)
        if chunk_is_wide(table, row, grad_address, start, numel, CHUNK):
            sgd_chunk(
                table,
                row,
                grad_address,
                start,
                numel,
                step,
                lr,
                factor,
                momentum,
                keep_gradient,
                weight_decay,
                P_DTYPE,
                S1_DTYPE,
                R_DTYPE,
                ACC,
                HAS_MOMENTUM,
                NESTEROV,
                AUTHORS,
                HAS_MASTER,
                STOCHASTIC,
                False,
                CHUNK,
                BLOCK,
            )
        else:
            sgd_chunk(
                table,
                row,
                grad_address,
                start,
                numel,
                step,
                lr,
                factor,
                momentum,
                keep_gradient,
                weight_decay,
                P_DTYPE,
                S1_DTYPE,
                R_DTYPE,
                ACC,
                HAS_MOMENTUM,
                NESTEROV,
                AUTHORS,
                HAS_MASTER,
                STOCHASTIC,
                True,
                CHUNK,
                BLOCK,
            )


def feature_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    masters: list[Tensor],
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
    authors_momentum: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: Callable[[], None],
) -> None:
    """The op; `check` raises where the arguments do not fit together. Nothing waits for the device."""
    if not params:
        return
    states = (momentum_buffers,) if momentum else ()
    lists = Lists(params, grads, states, masters, rates, inners, seeds, steps)
    plan = find_plan(lists, (lr_tensor, grad_scale, found_inf), check)
    grads = [in_layout_of(grad, param) for grad, param in zip(grads, params)]
    pointers = plan.gradients(grads, steps.device)
    for group in plan.groups:
        constants = {"S1_DTYPE": group.constants["P_DTYPE"], **group.constants}
        launch(
            feature_sgd_kernel,
            (group.num_chunks,),
            group.table,
            group.chunks,
            pointers,
            steps,
            steps if lr_tensor is None else lr_tensor,
            steps if grad_scale is None else grad_scale,
            steps if found_inf is None else found_inf,
            float(lr),
            -1.0 if maximize else 1.0,
            float(momentum),
            1.0 - dampening,
            float(weight_decay),
            num_warps=group.num_warps,
            # As in the reference, every operation is rounded.
            fuse=False,
            HAS_LR=lr_tensor is not None,
            HAS_SCALE=grad_scale is not None,
            HAS_FOUND=found_inf is not None,
            HAS_MOMENTUM=momentum != 0,
            NESTEROV=nesterov,
            AUTHORS=authors_momentum,
            **constants,
        )
    count_steps(steps, found_inf)
