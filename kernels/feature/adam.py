"""feature_adam_: Adam and AdamW with one learning rate per feature over all tensors (reference/feature_adam.py).

One launch for the tensors of a dtype, and one that counts the steps. Bound by memory: at 4.3 TB/s, the copy rate of an
H200, 28 bytes an entry in float32 (124M entries: 810 us), 14 in bfloat16 (405 us), 36 and 18 with amsgrad. The bias
corrections are two float64 exponentials a program, once a chunk. About 90 % of the bound is expected; small models are
bound by the two launches (5 us).
"""

import math
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
    quotient,
    read,
    root,
    scalar,
    store_parameter,
    write,
)


@triton.jit
def adam_math(
    p,
    g,
    m,
    v,
    v_max,
    rate,
    beta1,
    rest1,
    beta2,
    rest2,
    correction1,
    root_correction2,
    eps,
    weight_decay,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AUTHORS: tl.constexpr,
):
    """New parameter and moments of one entry; `rate` is times the multiplier, `g` without loss scale."""
    if DECOUPLED:
        p = p * (1 - rate * weight_decay)
    else:
        # Left out where it is 0: 0 * inf would be NaN.
        g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    second = v
    if AMSGRAD:
        # Spelt out so that NaN in either operand stays.
        v_max = tl.where((v > v_max) | (v != v), v, v_max)
        second = v_max
    if AUTHORS:
        change = quotient(quotient(root_correction2, correction1) * m, root(second) + eps)
    else:
        change = quotient(quotient(m, correction1), quotient(root(second), root_correction2) + eps)
    return p - rate * change, m, v, v_max


@triton.jit
def adam_chunk(
    table,
    row,
    grad_address,
    start,
    numel,
    step,
    lr,
    factor,
    beta1,
    rest1,
    beta2,
    rest2,
    correction1,
    root_correction2,
    eps,
    weight_decay,
    P_DTYPE: tl.constexpr,
    S1_DTYPE: tl.constexpr,
    S2_DTYPE: tl.constexpr,
    S3_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AUTHORS: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Made pointers here: Triton 3.6 loses a hint on an argument, or on what a function returns.
    param_ptr = cell(table, row, PARAM).to(tl.pointer_type(P_DTYPE))
    first_ptr = cell(table, row, STATE).to(tl.pointer_type(S1_DTYPE))
    second_ptr = cell(table, row, STATE + 1).to(tl.pointer_type(S2_DTYPE))
    max_ptr = cell(table, row, STATE + 2).to(tl.pointer_type(S3_DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(P_DTYPE))
    master_ptr = cell(table, row, MASTER).to(tl.pointer_type(tl.float32))
    seed = cell(table, row, SEED)
    if not MASKED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        first_ptr = tl.multiple_of(first_ptr, 16)
        second_ptr = tl.multiple_of(second_ptr, 16)
        max_ptr = tl.multiple_of(max_ptr, 16)
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
        m = read(first_ptr, offs, mask, ACC, MASKED)
        v = read(second_ptr, offs, mask, ACC, MASKED)
        v_max = v
        if AMSGRAD:
            v_max = read(max_ptr, offs, mask, ACC, MASKED)
        p, m, v, v_max = adam_math(
            p,
            g,
            m,
            v,
            v_max,
            rate,
            beta1,
            rest1,
            beta2,
            rest2,
            correction1,
            root_correction2,
            eps,
            weight_decay,
            AMSGRAD,
            DECOUPLED,
            AUTHORS,
        )
        write(first_ptr, offs, mask, m, S1_DTYPE, MASKED)
        write(second_ptr, offs, mask, v, S2_DTYPE, MASKED)
        if AMSGRAD:
            write(max_ptr, offs, mask, v_max, S3_DTYPE, MASKED)
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
def feature_adam_kernel(
    table,
    chunks,
    grads,
    steps,
    lr_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    lr: tl.float64,
    sign: tl.float64,
    beta1: tl.float64,
    rest1: tl.float64,
    log_beta1: tl.float64,
    beta2: tl.float64,
    rest2: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    P_DTYPE: tl.constexpr,
    S1_DTYPE: tl.constexpr,
    S2_DTYPE: tl.constexpr,
    S3_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_LR: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AUTHORS: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lr = scalar(lr, lr_ptr, ACC, HAS_LR)
    beta1 = tl.full([], beta1, ACC)
    rest1 = tl.full([], rest1, ACC)
    beta2 = tl.full([], beta2, ACC)
    rest2 = tl.full([], rest2, ACC)
    eps = tl.full([], eps, ACC)
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
        # 1 - beta^(step + 1) in float64: beta is close to 1.
        updates = (step + 1).to(tl.float64)
        correction1 = (1 - tl.exp(tl.full([], log_beta1, tl.float64) * updates)).to(ACC)
        correction2 = 1 - tl.exp(tl.full([], log_beta2, tl.float64) * updates)
        root_correction2 = tl.sqrt(correction2).to(ACC)
        if chunk_is_wide(table, row, grad_address, start, numel, CHUNK):
            adam_chunk(
                table,
                row,
                grad_address,
                start,
                numel,
                step,
                lr,
                factor,
                beta1,
                rest1,
                beta2,
                rest2,
                correction1,
                root_correction2,
                eps,
                weight_decay,
                P_DTYPE,
                S1_DTYPE,
                S2_DTYPE,
                S3_DTYPE,
                R_DTYPE,
                ACC,
                AMSGRAD,
                DECOUPLED,
                AUTHORS,
                HAS_MASTER,
                STOCHASTIC,
                False,
                CHUNK,
                BLOCK,
            )
        else:
            adam_chunk(
                table,
                row,
                grad_address,
                start,
                numel,
                step,
                lr,
                factor,
                beta1,
                rest1,
                beta2,
                rest2,
                correction1,
                root_correction2,
                eps,
                weight_decay,
                P_DTYPE,
                S1_DTYPE,
                S2_DTYPE,
                S3_DTYPE,
                R_DTYPE,
                ACC,
                AMSGRAD,
                DECOUPLED,
                AUTHORS,
                HAS_MASTER,
                STOCHASTIC,
                True,
                CHUNK,
                BLOCK,
            )


def feature_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
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
    authors_eps: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: Callable[[], None],
) -> None:
    """The op; `check` raises where the arguments do not fit together. Nothing waits for the device."""
    if not params:
        return
    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if amsgrad else (exp_avgs, exp_avg_sqs)
    lists = Lists(params, grads, states, masters, rates, inners, seeds, steps)
    plan = find_plan(lists, (lr_tensor, grad_scale, found_inf), check)
    grads = [in_layout_of(grad, param) for grad, param in zip(grads, params)]
    pointers = plan.gradients(grads, steps.device)
    for group in plan.groups:
        constants = {"S3_DTYPE": group.constants["P_DTYPE"], **group.constants}
        # A fourth tensor of float32: fewer entries at a time, or registers spill (Triton 3.6).
        if amsgrad and constants["P_DTYPE"] is tl.float32:
            constants["BLOCK"] = 512
        launch(
            feature_adam_kernel,
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
            float(beta1),
            1.0 - beta1,
            _log(beta1),
            float(beta2),
            1.0 - beta2,
            _log(beta2),
            float(eps),
            float(weight_decay),
            num_warps=group.num_warps,
            # As in the reference, every operation is rounded.
            fuse=False,
            HAS_LR=lr_tensor is not None,
            HAS_SCALE=grad_scale is not None,
            HAS_FOUND=found_inf is not None,
            AMSGRAD=amsgrad,
            DECOUPLED=decoupled,
            AUTHORS=authors_eps,
            **constants,
        )
    count_steps(steps, found_inf)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
