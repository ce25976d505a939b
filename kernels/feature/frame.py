"""One step of any optimizer over all tensors: what is the same for all of them (reference/feature_sgd.py).

One launch for the tensors of a dtype, and one that counts the steps. Bound by memory: an entry's parameter, gradient
and states are read, the parameter and the states written; tables and rates add under 0.1 %. A small model is bound by
the two launches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Prepared
from .multi_tensor import (
    AVERAGE,
    INDEX,
    MASTER,
    NUMEL,
    PARAM,
    SEED,
    STATE,
    average_weight,
    cell,
    chunk_is_wide,
    chunk_rates,
    master_value,
    random_bits16,
    read,
    stochastic_round,
    write,
)
from .plan import Group, Lists, Plan, count_steps, find_plan, in_memory_order

Options = Mapping[str, float | bool]


class Update(NamedTuple):
    """An optimizer.

    prepare(step, n0, .., n7, ACC): what `update` needs besides the entries, the same for a whole tensor: a tuple, in
        the arithmetic's dtype ACC. `step` counts the updates before this one, n0 to n7 are the float64 `numbers`.
    update(p, g, s1, s2, s3, rate, ready, A, B, C): the new parameter and states of one entry, four values always; the
        gradient is without loss scale, the rate times the multiplier, `ready` what `prepare` returned.
    numbers(options): up to eight floats that a step may change. flags(options): three switches, each combination
        compiled by itself: the constexpr arguments A, B, C.
    """

    prepare: Any
    update: Any
    numbers: Callable[[Options], Sequence[float]]
    flags: Callable[[Options], Sequence[bool]]


@triton.jit
def chunk_update(
    chunk,
    numbers,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    P_DTYPE: tl.constexpr,
    S1_DTYPE: tl.constexpr,
    S2_DTYPE: tl.constexpr,
    S3_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    table, row, grad_address, start, numel, step = chunk
    lr, factor, weight, ready = numbers
    # Made pointers here: Triton 3.6 loses a hint on an argument, or on what a function returns.
    param_ptr = cell(table, row, PARAM).to(tl.pointer_type(P_DTYPE))
    s1_ptr = cell(table, row, STATE).to(tl.pointer_type(S1_DTYPE))
    s2_ptr = cell(table, row, STATE + 1).to(tl.pointer_type(S2_DTYPE))
    s3_ptr = cell(table, row, STATE + 2).to(tl.pointer_type(S3_DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(P_DTYPE))
    master_ptr = cell(table, row, MASTER).to(tl.pointer_type(tl.float32))
    average_ptr = cell(table, row, AVERAGE).to(tl.pointer_type(ACC))
    seed = cell(table, row, SEED)
    if not MASKED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        s1_ptr = tl.multiple_of(s1_ptr, 16)
        s2_ptr = tl.multiple_of(s2_ptr, 16)
        s3_ptr = tl.multiple_of(s3_ptr, 16)
        master_ptr = tl.multiple_of(master_ptr, 16)
        average_ptr = tl.multiple_of(average_ptr, 16)
    for base in range(0, CHUNK, BLOCK):
        within = base + tl.arange(0, BLOCK)
        offs = start + within
        mask = offs < numel
        rate = lr * chunk_rates(table, row, start, within, mask, R_DTYPE, CHUNK).to(ACC)
        p = read(param_ptr, offs, mask, ACC, MASKED)
        g = read(grad_ptr, offs, mask, ACC, MASKED) * factor
        s1 = g
        s2 = g
        s3 = g
        if STATES > 0:
            s1 = read(s1_ptr, offs, mask, ACC, MASKED)
        if STATES > 1:
            s2 = read(s2_ptr, offs, mask, ACC, MASKED)
        if STATES > 2:
            s3 = read(s3_ptr, offs, mask, ACC, MASKED)
        if HAS_MASTER:
            # Read last: in another order more kernels spill.
            p = master_value(read(master_ptr, offs, mask, ACC, MASKED), p, P_DTYPE)
        p, s1, s2, s3 = UPDATE(p, g, s1, s2, s3, rate, ready, A, B, C)
        if STATES > 0:
            write(s1_ptr, offs, mask, s1, S1_DTYPE, MASKED)
        if STATES > 1:
            write(s2_ptr, offs, mask, s2, S2_DTYPE, MASKED)
        if STATES > 2:
            write(s3_ptr, offs, mask, s3, S3_DTYPE, MASKED)
        stored = p
        if STOCHASTIC:
            # A value of P_DTYPE already: the conversion on the way to memory is exact.
            stored = stochastic_round(p, random_bits16(seed, step, start + base, BLOCK), P_DTYPE)
        write(param_ptr, offs, mask, stored, P_DTYPE, MASKED)
        if HAS_MASTER:
            write(master_ptr, offs, mask, p, tl.float32, MASKED)
        if HAS_AVERAGE:
            average = read(average_ptr, offs, mask, ACC, MASKED)
            # The first value takes the place of whatever was there, NaN included; one without weight leaves it, NaN
            # or not.
            change = tl.where(weight == 0, 0.0, weight * (p - average))
            average = tl.where(weight == 1, p, average + change)
            write(average_ptr, offs, mask, average, ACC, MASKED)


@triton.jit
def feature_kernel(
    table,
    chunks,
    grads,
    steps,
    lr_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    lr: tl.float64,
    sign: tl.float64,
    warmup_steps: tl.float64,
    averaging: tl.float64,
    n0: tl.float64,
    n1: tl.float64,
    n2: tl.float64,
    n3: tl.float64,
    n4: tl.float64,
    n5: tl.float64,
    n6: tl.float64,
    n7: tl.float64,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    P_DTYPE: tl.constexpr,
    S1_DTYPE: tl.constexpr,
    S2_DTYPE: tl.constexpr,
    S3_DTYPE: tl.constexpr,
    R_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    HAS_LR: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lr = tl.full([], lr, ACC)
    if HAS_LR:
        lr *= tl.load(lr_ptr).to(ACC)
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
        updates = (step + 1).to(tl.float64)
        # Without a warm-up 1 is divided.
        steps_left = tl.maximum(tl.full([], warmup_steps, tl.float64), updates)
        lr *= (updates / steps_left).to(ACC)
        weight = average_weight(step, tl.full([], averaging, tl.float64)).to(ACC)
        ready = PREPARE(step, n0, n1, n2, n3, n4, n5, n6, n7, ACC)
        if chunk_is_wide(table, row, grad_address, start, numel, CHUNK):
            chunk_update(
                (table, row, grad_address, start, numel, step),
                (lr, factor, weight, ready),
                UPDATE,
                STATES,
                A,
                B,
                C,
                P_DTYPE,
                S1_DTYPE,
                S2_DTYPE,
                S3_DTYPE,
                R_DTYPE,
                ACC,
                HAS_MASTER,
                HAS_AVERAGE,
                STOCHASTIC,
                False,
                CHUNK,
                BLOCK,
            )
        else:
            chunk_update(
                (table, row, grad_address, start, numel, step),
                (lr, factor, weight, ready),
                UPDATE,
                STATES,
                A,
                B,
                C,
                P_DTYPE,
                S1_DTYPE,
                S2_DTYPE,
                S3_DTYPE,
                R_DTYPE,
                ACC,
                HAS_MASTER,
                HAS_AVERAGE,
                STOCHASTIC,
                True,
                CHUNK,
                BLOCK,
            )


def _prepare(
    update: Update, group: Group, states: int, flags: Sequence[bool], there: Sequence[bool]
) -> Prepared:
    """The kernel of a group of tensors; `there`: whether the learning rate, the gradients' scale and found_inf are
    tensors."""
    own = group.constants["P_DTYPE"]
    constants = {f"S{k}_DTYPE": own for k in (1, 2, 3)} | group.constants
    # With a third state of float32, or a master and one state, registers spill in blocks of 1024 (Triton 3.6).
    if (states == 3 and own is tl.float32) or (states == 1 and constants["HAS_MASTER"]):
        constants["BLOCK"] = 512
    return Prepared(
        feature_kernel,
        num_warps=group.num_warps,
        # As in the reference, every operation is rounded.
        fuse=False,
        PREPARE=update.prepare,
        UPDATE=update.update,
        STATES=states,
        **dict(zip("ABC", flags)),
        **dict(zip(("HAS_LR", "HAS_SCALE", "HAS_FOUND"), there)),
        **constants,
    )


def run_plan(
    plan: Plan,
    update: Update,
    lists: Lists,
    grads: Sequence[Tensor],
    options: Options,
    *,
    lr: float,
    lr_tensor: Tensor | None,
    maximize: bool,
    warmup_steps: float,
    averaging: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: Callable[[], None],
    addresses: list[int] | None = None,
) -> None:
    """One step by the plan of these lists; `check` raises where the other arguments do not fit it.

    addresses: the gradients', where these are known to fit. Nothing waits for the device.
    """
    steps = lists.steps
    known = addresses is not None or plan.fits(grads)
    if not known or not scalars_fit(lr_tensor, grad_scale, found_inf):
        check()
    if addresses is None:
        # Copies live until the launch.
        grads = grads if known else in_memory_order(grads, lists.params)
        addresses = [grad.data_ptr() for grad in grads]
    pointers = plan.on_device(addresses, steps.device)
    numbers = [*map(float, update.numbers(options))]
    given = [
        pointers,
        steps,
        steps if lr_tensor is None else lr_tensor,
        steps if grad_scale is None else grad_scale,
        steps if found_inf is None else found_inf,
        float(lr),
        -1.0 if maximize else 1.0,
        float(warmup_steps),
        float(averaging),
        *numbers,
        *[0.0] * (8 - len(numbers)),
    ]
    there = tuple(scalar is not None for scalar in (lr_tensor, grad_scale, found_inf))
    flags = tuple(update.flags(options))
    for group in plan.groups:
        kernel = group.kernels.get((flags, there))
        if kernel is None:
            kernel = _prepare(update, group, len(lists.states), flags, there)
            group.kernels[flags, there] = kernel
        kernel((group.num_chunks, 1, 1), group.table, group.chunks, *given)
    count_steps(steps, found_inf)


def run(
    update: Update,
    lists: Lists,
    grads: Sequence[Tensor],
    options: Options,
    *,
    check: Callable[[], None],
    **scalars: Any,
) -> None:
    """The list op: `run_plan` on a plan that is kept for these tensors."""
    if lists.params:
        plan = find_plan(lists, check)
        run_plan(plan, update, lists, grads, options, check=check, **scalars)


def scalars_fit(*scalars: Tensor | None) -> bool:
    """Whether each is None, or one number that a kernel can read."""
    return all(
        scalar is None or (scalar.numel() == 1 and scalar.dtype in (torch.float32, torch.float64))
        for scalar in scalars
    )
