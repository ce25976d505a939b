"""Kernels of the mixture streamed over the clones: one buffer holds a chunk of one clone's logits (C large).

Responsibilities need not be known before the features' gradient: as flash attention does over keys, each sample keeps a
running maximum m of a_n + logp_n, the sum s of its exponentials and the sum of what they weight, rescaled when m grows.
A row kernel reads the logits twice and writes their gradient once (three times for the backward of log_prob).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, round_to, widen
from .gemm import finite, matmul, settle
from .options import cap, cap_derivative, load_weight, option_terms
from .problem import Loss, lowest, row_block


@triton.jit
def load_logits(z_ptr, bias_ptr, offs, mask, softcap, HAS_BIAS, CAPPED, ACC):
    """Finite logits, and how many of them were not."""
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        z += widen(tl.load(bias_ptr + offs, mask=mask, other=0.0), ACC)
    finite = tl.abs(z) < float("inf")
    z = tl.where(finite, z, 0.0)
    if CAPPED:
        z = cap(z, softcap, ACC)
    return z, tl.where(finite, 0, 1)


@triton.jit
def load_block(z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK):
    """The logits of BLOCK classes from `base` on, as `load_logits` has them; those classes, and which of them exist."""
    offs = base + tl.arange(0, BLOCK)
    mask = offs < num_classes
    z, broken = load_logits(z_ptr, bias_ptr, offs, mask, softcap, HAS_BIAS, CAPPED, ACC)
    return z, broken, offs, mask


@triton.jit
def row_statistics(z_ptr, bias_ptr, num_classes, softcap, HAS_BIAS, CAPPED, LOWEST, ACC, BLOCK):
    """Largest logit, its place, the sum of exp(z - largest), and whether all are finite."""
    peak = tl.full([BLOCK], LOWEST, ACC)
    total = tl.zeros([BLOCK], ACC)
    place = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for base in range(0, num_classes, BLOCK):
        z, broken, offs, mask = load_block(
            z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
        )
        bad += broken
        z = tl.where(mask, z, LOWEST)
        place = tl.where(z > peak, offs, place)
        higher = tl.maximum(peak, z)
        total = total * tl.exp(peak - higher) + tl.where(mask, tl.exp(z - higher), 0.0)
        peak = higher
    largest = tl.max(peak, 0)
    lanes = tl.arange(0, BLOCK)
    # A logit may be the lowest number there is: the first class, then.
    best = tl.min(tl.where((peak == largest) & (lanes < num_classes), place, num_classes), 0)
    return largest, best, tl.sum(total * tl.exp(peak - largest), 0), tl.sum(bad, 0) == 0


@triton.jit
def take_in(old, mass, joint):
    """The running mixture with one clone more, of a_n + logp_n `joint`: its maximum and sum, by what to scale the sums
    so far and the clone's term, and -log of the mixture."""
    infinity = float("inf")
    peak = tl.maximum(old, joint)
    possible = peak > -infinity
    shift = tl.where(possible, peak, 0.0)
    keep = tl.exp(old - shift)
    add = tl.exp(joint - shift)
    mass = mass * keep + add
    mix = tl.where(possible, -peak - tl.log(tl.where(possible, mass, 1.0)), infinity)
    return peak, mass, keep, add, mix


@triton.jit(do_not_specialize=["clone", "first_sample", "num_samples", "ignore_index"])
def mixture_row_kernel(
    z_ptr,
    bias_ptr,
    log_posterior_ptr,
    target_ptr,
    norm_ptr,
    g_ptr,
    nll_ptr,
    score_ptr,
    mix_ptr,
    dead_ptr,
    state_ptr,
    clone,
    first_sample,
    num_samples,
    num_classes,
    ignore_index,
    inv_sigma2: tl.float64,
    log_normaliser: tl.float64,
    row_weight_ptr,
    class_weight_ptr,
    soft_ptr,
    smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    FIRST: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    OPTIONS: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    SOFT: tl.constexpr,
    CAPPED: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_G: tl.constexpr,
    FOLD: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample of one clone. state [4, B]: m, s, and by what to scale the old sum and the new term."""
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    infinity = float("inf")
    local = tl.program_id(0).to(tl.int64)
    sample = first_sample + local
    z_ptr += local * num_classes
    g_ptr += local * num_classes
    bias_ptr += clone.to(tl.int64) * num_classes
    inverse = tl.full([], inv_sigma2, ACC)
    if OPTIONS:
        loss_weight, weight = load_weight(
            row_weight_ptr, norm_ptr, sample, ACC, FOLD, HAS_ROW_WEIGHT
        )
    if GAUSSIAN:
        target_ptr += sample * num_classes
        counted = sample < num_samples
        squared = tl.zeros([BLOCK], ACC)
        bad = tl.zeros([BLOCK], tl.int32)
        for base in range(0, num_classes, BLOCK):
            z, broken, offs, mask = load_block(
                z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
            )
            bad += broken
            error = z - widen(tl.load(target_ptr + offs, mask=mask, other=0.0), ACC)
            squared += tl.where(mask, error * error, 0.0)
        distance = tl.sum(squared, 0)
        logp = -0.5 * distance * inverse - tl.full([], log_normaliser, ACC)
        alive = (tl.sum(bad, 0) == 0) & (distance < infinity)
        score = tl.where(alive & (tl.abs(logp) < infinity), distance, infinity)
    else:
        target = tl.load(target_ptr + sample)
        counted = target != ignore_index
        largest, best, total, alive = row_statistics(
            z_ptr, bias_ptr, num_classes, softcap, HAS_BIAS, CAPPED, LOWEST, ACC, BLOCK
        )
        # A target that is no class is impossible for every clone: the loss shows it.
        is_class = (target >= 0) & (target < num_classes)
        at_target, _absent = load_logits(
            z_ptr, bias_ptr, tl.where(is_class, target, 0), is_class, softcap, HAS_BIAS, CAPPED, ACC
        )
        if OPTIONS:
            soft_ptr += sample * num_classes
            one = tl.full([], 1.0, ACC)
            class_weight = one
            dot = at_target - largest
            weighted_dot = dot
            q_mass = one
            weighted_mass = one
            if HAS_CLASS_WEIGHT:
                if not SOFT:
                    class_weight = tl.load(class_weight_ptr + tl.where(is_class, target, 0))
            sum_w = tl.zeros([BLOCK], ACC)
            sum_q = tl.zeros([BLOCK], ACC)
            sum_wq = tl.zeros([BLOCK], ACC)
            mass_q = tl.zeros([BLOCK], ACC)
            mass_wq = tl.zeros([BLOCK], ACC)
            if SUMS:
                for base in range(0, num_classes, BLOCK):
                    z, _, offs, mask = load_block(
                        z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
                    )
                    below = tl.where(mask, z - largest, 0.0)
                    w = tl.full([BLOCK], 1.0, ACC)
                    if HAS_CLASS_WEIGHT:
                        w = tl.load(class_weight_ptr + offs, mask=mask, other=0.0)
                    sum_w += w * below
                    if SOFT:
                        q = tl.load(soft_ptr + offs, mask=mask, other=0.0)
                        sum_q += q * below
                        sum_wq += w * q * below
                        mass_q += q
                        mass_wq += w * q
            if SOFT:
                dot = tl.sum(sum_q, 0)
                weighted_dot = tl.sum(sum_wq, 0)
                q_mass = tl.sum(mass_q, 0)
                weighted_mass = tl.sum(mass_wq, 0)
            likelihood, logp, scale, spread, own = option_terms(
                tl.sum(sum_w, 0),
                dot,
                weighted_dot,
                q_mass,
                weighted_mass,
                largest,
                total,
                class_weight,
                weight,
                num_classes,
                smoothing,
                z_loss,
                ACC,
            )
            alive = alive & (tl.abs(likelihood) < infinity)
        else:
            logp = at_target - largest - tl.log(total)
            likelihood = logp
        alive = alive & is_class
        score = tl.where(alive & (tl.abs(logp) < infinity) & (best == target), 1.0, 0.0)
    alive = alive & (tl.abs(logp) < infinity)

    if GAUSSIAN:
        likelihood = logp
    if HAS_ROW_WEIGHT:
        counted = counted & (loss_weight != 0.0)
    cell = clone.to(tl.int64) * num_samples + sample
    tl.store(nll_ptr + cell, tl.where(counted, tl.where(alive, -likelihood, infinity), 0.0))
    tl.store(score_ptr + cell, tl.where(counted, score, 0.0))
    # Every program stores the same 1: no order matters.
    if counted & (alive == 0):
        tl.store(dead_ptr + clone, 1)

    # The running mixture.
    a = tl.load(log_posterior_ptr + clone).to(ACC)
    joint = tl.where(alive & counted, a + logp, -infinity)
    if FIRST:
        old = tl.full([], -infinity, ACC)
        mass = tl.full([], 0.0, ACC)
    else:
        old = tl.load(state_ptr + sample)
        mass = tl.load(state_ptr + num_samples + sample)
    peak, mass, keep, add, mix = take_in(old, mass, joint)
    tl.store(state_ptr + sample, peak)
    tl.store(state_ptr + num_samples + sample, mass)
    tl.store(state_ptr + 2 * num_samples + sample, keep)
    tl.store(state_ptr + 3 * num_samples + sample, add)
    if OPTIONS:
        mix *= loss_weight
    tl.store(mix_ptr + sample, tl.where(counted, mix, 0.0))

    if NEED_G:
        norm = tl.full([], 1.0, ACC)
        if FOLD:
            norm = tl.load(norm_ptr)
        flows = alive & counted
        for base in range(0, num_classes, BLOCK):
            z, _, offs, mask = load_block(
                z_ptr, bias_ptr, base, num_classes, softcap, HAS_BIAS, CAPPED, ACC, BLOCK
            )
            if GAUSSIAN:
                g = (z - widen(tl.load(target_ptr + offs, mask=mask, other=0.0), ACC)) * inverse
                if OPTIONS:
                    norm = weight
                g = g * norm
            elif OPTIONS:
                w = tl.full([BLOCK], 1.0, ACC)
                if HAS_CLASS_WEIGHT:
                    w = tl.load(class_weight_ptr + offs, mask=mask, other=0.0)
                g = tl.exp(z - largest) * scale - w * spread
                if SOFT:
                    g -= w * tl.load(soft_ptr + offs, mask=mask, other=0.0) * own
                else:
                    g -= tl.where(offs == target, own, 0.0)
                if CAPPED:
                    g *= cap_derivative(z, softcap, ACC)
            else:
                g = (tl.exp(z - largest) / total - tl.where(offs == target, 1.0, 0.0)) * norm
            g = tl.where(flows, g, 0.0)
            tl.store(g_ptr + offs, round_to(g, g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_sample", "num_samples"])
def combine_kernel(
    term_ptr,
    sum_ptr,
    out_ptr,
    state_ptr,
    norm_ptr,
    first_sample,
    num_samples,
    num_features,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum = keep * sum + add * term over a chunk's features; after the last clone out = sum / s."""
    ACC: tl.constexpr = sum_ptr.dtype.element_ty
    local = tl.program_id(0).to(tl.int64)
    sample = first_sample + local
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_features
    keep = tl.load(state_ptr + 2 * num_samples + sample)
    add = tl.load(state_ptr + 3 * num_samples + sample)
    # Left out, not multiplied by 0: the term of a dead clone may be NaN.
    taken = offs < tl.where(add > 0, num_features, 0)
    term = tl.load(term_ptr + local * num_features + offs, mask=taken, other=0.0)
    value = add * term.to(ACC)
    if not FIRST:
        value += keep * tl.load(sum_ptr + sample * num_features + offs, mask=mask, other=0.0)
    if LAST:
        mass = tl.load(state_ptr + num_samples + sample)
        value = value / tl.where(mass > 0, mass, 1.0)
        if SCALE:
            value *= tl.load(norm_ptr)
        value = round_to(value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + sample * num_features + offs, value, mask=mask)
    else:
        tl.store(sum_ptr + sample * num_features + offs, value, mask=mask)


def combine(
    term: Tensor,
    total: Tensor,
    out: Tensor,
    state: Tensor,
    norm: Tensor | None,
    start: int,
    clone: int,
    num_clones: int,
) -> None:
    """Take one clone's term [chunk, D] into the running sum [B, D]; the last clone completes `out [B, D]`."""
    num_samples, num_features = total.shape
    launch(
        combine_kernel,
        (term.size(0), max(triton.cdiv(num_features, 1024), 1)),
        term,
        total,
        out,
        state,
        state if norm is None else norm,
        start,
        num_samples,
        num_features,
        num_warps=4,
        FIRST=clone == 0,
        LAST=clone == num_clones - 1,
        SCALE=norm is not None,
        BLOCK=1024,
    )


def mixture_stream(loss: Loss) -> None:
    inputs, need_dx, need_dw = loss.inputs, loss.need_dx, loss.need_dw
    x, weight = inputs.x, inputs.weight
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    need_g, in_place = need_dx or need_dw, x.dtype == inputs.dtype
    narrow = 0 if in_place or not need_g else x.element_size()
    block, warps = row_block(num_classes, x.dtype, loss.options["OPTIONS"])
    # Whether the loss looks at other classes than the target's.
    sums = loss.options["SOFT"] or loss.options["smoothing"] != 0
    norm = None if loss.folds else loss.norm
    samples = finite(x) if need_dw else x
    state = loss.norm.new_empty((4, num_samples))
    total = torch.empty_like(loss.dx)
    for clone in range(num_clones):
        for part in inputs.chunks(
            num_classes * (inputs.dtype.itemsize + narrow), loss.memory_budget
        ):
            z, *others = inputs.logits(part, clone)
            g = torch.empty_like(z, dtype=x.dtype) if narrow else z
            launch(
                mixture_row_kernel,
                (z.size(0),),
                z,
                *others,
                loss.target,
                loss.norm,
                g,
                *loss.statistics,
                state,
                clone,
                part.start,
                num_samples,
                num_classes,
                num_warps=warps,
                FIRST=clone == 0,
                HAS_BIAS=inputs.bias is not None,
                NEED_G=need_g,
                FOLD=loss.folds,
                LOWEST=lowest(x.dtype),
                BLOCK=block,
                SUMS=sums,
                **loss.likelihood,
                **loss.options,
            )
            if need_dw:
                loss.add_weight_gradient(g, samples[part], part, clone)
            if need_dx:
                term = z.new_empty((z.size(0), num_features))
                matmul(g, weight[clone], term)
                combine(term, total, loss.dx, state, norm, part.start, clone, num_clones)
    # The features' gradient was scaled when it was completed.
    settle(loss.dweight, loss.dbias, loss.dead, norm)
