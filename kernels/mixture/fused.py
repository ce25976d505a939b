"""Kernels of the mixture fused with their products, for few features and large N C: no logit is ever written.

Every pass makes the logits of a tile anew from the features and the weights, which stay small: 10 B N C D flops
instead of 6, and no traffic per logit. Whoever owns a result computes all of it, in a fixed order and without atomics:

* statistics: a block of samples, one clone, a part of the classes; `mixture_merge_kernel` joins parts and clones;
* a clone's gradient: a block of its classes, over all samples;
* the features' gradient: a block of samples, over a part of all clones' classes; the parts are added in order.

With D_P the features padded to 16 .. 128 it is 10 B N C D_P flops, 3 exponentials a logit, and 7 or 8 launches;
streamed it would be 6 B N C D flops and 18 bytes a logit. For 1400 x 100 features and 6 x 10000 classes in bfloat16:
108 Gflop and 252 million exponentials against 50 Gflop and 1.5 GB. Measured there on an H200 with Triton 3.6: 1.0 ms.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..launch import launch, round_to, widen
from .gemm import multiply, only_finite, tf32
from .problem import Loss

# Programs of a launch that are worth splitting classes for.
PROGRAMS = 512
# Rows of the block that a program owns, and of those that it goes through.
OWNED, STREAMED = 64, 32


@triton.jit
def load_rows(base_ptr, rows, num_rows, num_features, D_P: tl.constexpr):
    """Rows of a matrix [num_rows, num_features], 0 beyond it."""
    d = tl.arange(0, D_P)
    mask = (rows < num_rows)[:, None] & (d < num_features)[None, :]
    return tl.load(
        base_ptr + rows.to(tl.int64)[:, None] * num_features + d[None, :], mask=mask, other=0.0
    )


@triton.jit
def gradient_of(z, peak, inverse, hit):
    """The gradient of -log p to the logits z from their largest and 1 over the sum of exp(z - largest); 0 where that is
    0 and nothing is hit, whatever z is."""
    # Logits are made anew by other tiles: huge ones may come out an ulp above the largest. NaN is not below it.
    return tl.exp(tl.where(z < peak, z - peak, 0.0)) * inverse - tl.where(hit, 1.0, 0.0)


@triton.jit(do_not_specialize=["num_samples", "tiles_per_split"])
def mixture_statistics_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    part_ptr,
    place_ptr,
    num_samples,
    num_clones,
    num_classes,
    num_features,
    tiles_per_split,
    TF32: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    D_P: tl.constexpr,
):
    """Of a block of samples, a clone and a split of the classes: part [S, N, 3, B], the largest logit, the sum of
    exp(z - largest) and the target's logit (0 if elsewhere); place [S, N, B], the largest's class, or -1 if a logit is
    not finite."""
    infinity = float("inf")
    samples = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = samples < num_samples
    clone = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    weight_ptr += clone * num_classes * num_features
    bias_ptr += clone * num_classes
    x = load_rows(x_ptr, samples, num_samples, num_features, D_P)
    target = tl.load(target_ptr + samples, mask=mask_m, other=-1)
    peak = tl.full([BLOCK_M], -infinity, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    at_target = tl.zeros([BLOCK_M], tl.float32)
    place = tl.zeros([BLOCK_M], tl.int32)
    bad = tl.zeros([BLOCK_M], tl.int32)
    first = split * tiles_per_split * BLOCK_C
    last = tl.minimum(first + tiles_per_split * BLOCK_C, num_classes)
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_c = c < num_classes
        z = multiply(x, tl.trans(load_rows(weight_ptr, c, num_classes, num_features, D_P)), TF32)
        if HAS_BIAS:
            z += widen(tl.load(bias_ptr + c, mask=mask_c, other=0.0), tl.float32)[None, :]
        finite = tl.abs(z) < infinity
        bad = tl.maximum(bad, tl.max(tl.where(finite | (mask_c == 0)[None, :], 0, 1), 1))
        z = tl.where(finite, z, 0.0)
        at_target += tl.sum(tl.where(c[None, :] == target[:, None], z, 0.0), 1)
        z = tl.where(mask_c[None, :], z, -infinity)
        largest = tl.max(z, 1)
        best = tl.min(tl.where(z == largest[:, None], c[None, :], num_classes), 1)
        # The first of equal ones, as everywhere.
        place = tl.where(largest > peak, best, place)
        higher = tl.maximum(peak, largest)
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        peak = higher
    cell = split.to(tl.int64) * num_clones + clone
    part_ptr += cell * 3 * num_samples
    tl.store(part_ptr + samples, peak, mask=mask_m)
    tl.store(part_ptr + num_samples + samples, total, mask=mask_m)
    tl.store(part_ptr + 2 * num_samples + samples, at_target, mask=mask_m)
    tl.store(place_ptr + cell * num_samples + samples, tl.where(bad != 0, -1, place), mask=mask_m)


@triton.jit(do_not_specialize=["num_samples", "num_clones", "num_splits", "ignore_index"])
def mixture_merge_kernel(
    part_ptr,
    place_ptr,
    log_posterior_ptr,
    target_ptr,
    nll_ptr,
    score_ptr,
    mix_ptr,
    dead_ptr,
    hit_ptr,
    softmax_ptr,
    joint_ptr,
    num_samples,
    num_clones,
    num_classes,
    num_splits,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Joins the splits and the clones of a block of samples.

    hit [B]: the target, -1 where it does not count. softmax [N, 2, B]: a clone's largest logit, and 1 over the sum of
    exp(z - largest), 0 where nothing flows to it. joint [N + 2, B]: a_n + logp_n, of all clones the largest, 0 where
    all are dead, and 1 over the sum of exp(joint - largest). In one number, largest + log sum, a huge largest would
    swallow the logarithm.
    """
    infinity = float("inf")
    samples = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = samples < num_samples
    target = tl.load(target_ptr + samples, mask=mask, other=ignore_index)
    counted = mask & (target != ignore_index)
    # A target that is no class is impossible for every clone: the loss shows it.
    is_class = (target >= 0) & (target < num_classes)
    tl.store(hit_ptr + samples, tl.where(counted & is_class, target, -1).to(tl.int32), mask=mask)
    top = tl.full([BLOCK], -infinity, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for clone in range(num_clones):
        peak = tl.full([BLOCK], -infinity, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        at_target = tl.zeros([BLOCK], tl.float32)
        best = tl.zeros([BLOCK], tl.int32)
        finite = mask
        for split in range(num_splits):
            cell = split * num_clones.to(tl.int64) + clone
            here = part_ptr + cell * 3 * num_samples + samples
            largest = tl.load(here, mask=mask, other=0.0)
            place = tl.load(place_ptr + cell * num_samples + samples, mask=mask, other=0)
            finite = finite & (place >= 0)
            best = tl.where(largest > peak, place, best)
            higher = tl.maximum(peak, largest)
            total = total * tl.exp(peak - higher)
            total += tl.load(here + num_samples, mask=mask, other=0.0) * tl.exp(largest - higher)
            at_target += tl.load(here + 2 * num_samples, mask=mask, other=0.0)
            peak = higher
        logp = at_target - peak - tl.log(total)
        alive = finite & is_class & (tl.abs(logp) < infinity)
        cell = clone * num_samples.to(tl.int64) + samples
        nll = tl.where(alive, -logp, infinity)
        score = tl.where(alive & (best == target), 1.0, 0.0)
        tl.store(nll_ptr + cell, tl.where(counted, nll, 0.0), mask=mask)
        tl.store(score_ptr + cell, tl.where(counted, score, 0.0), mask=mask)
        # Every program stores the same 1: no order matters.
        if tl.max(tl.where(counted & (alive == 0), 1, 0), 0) != 0:
            tl.store(dead_ptr + clone, 1)
        joint = tl.load(log_posterior_ptr + clone).to(tl.float32) + logp
        joint = tl.where(alive & counted, joint, -infinity)
        tl.store(joint_ptr + cell, joint, mask=mask)
        softmax = softmax_ptr + clone * 2 * num_samples.to(tl.int64) + samples
        tl.store(softmax, peak, mask=mask)
        inverse = tl.where(alive & counted, 1.0 / total, 0.0)
        tl.store(softmax + num_samples, inverse, mask=mask)
        higher = tl.maximum(top, joint)
        shift = tl.where(higher > -infinity, higher, 0.0)
        mass = mass * tl.exp(top - shift) + tl.exp(joint - shift)
        top = higher
    possible = top > -infinity
    top = tl.where(possible, top, 0.0)
    mass = tl.where(possible, mass, 1.0)
    joint_ptr += num_clones * num_samples.to(tl.int64)
    tl.store(joint_ptr + samples, top, mask=mask)
    tl.store(joint_ptr + num_samples + samples, 1.0 / mass, mask=mask)
    mix = tl.where(possible, -top - tl.log(mass), infinity)
    tl.store(mix_ptr + samples, tl.where(counted, mix, 0.0), mask=mask)


@triton.jit(do_not_specialize=["num_samples"])
def clone_gradient_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hit_ptr,
    norm_ptr,
    softmax_ptr,
    dead_ptr,
    dweight_ptr,
    dbias_ptr,
    num_samples,
    num_classes,
    num_features,
    width,
    TF32: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    D_P: tl.constexpr,
):
    """dweight [N, C, width] and, with a bias, dbias [N, C] of a block of a clone's classes: sum_b G[b, n, c] x_b, and
    of G."""
    clone = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < num_classes
    weight_ptr += clone * num_classes * num_features
    softmax_ptr += clone * 2 * num_samples
    weight = load_rows(weight_ptr, c, num_classes, num_features, D_P)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias += widen(
            tl.load(bias_ptr + clone * num_classes + c, mask=mask_c, other=0.0), tl.float32
        )
    total = tl.zeros([BLOCK_C, D_P], tl.float32)
    row_sum = tl.zeros([BLOCK_C], tl.float32)
    # Nothing for a dead clone.
    num_living = tl.where(tl.load(dead_ptr + clone) != 0, 0, num_samples)
    for start in range(0, num_living, BLOCK_M):
        samples = start + tl.arange(0, BLOCK_M)
        mask_m = samples < num_samples
        x = load_rows(x_ptr, samples, num_samples, num_features, D_P)
        hit = tl.load(hit_ptr + samples, mask=mask_m, other=-1)
        peak = tl.load(softmax_ptr + samples, mask=mask_m, other=0.0)
        inverse = tl.load(softmax_ptr + num_samples + samples, mask=mask_m, other=0.0)
        # The classes in rows: so G is the left factor of the next product as it stands.
        z = multiply(weight, tl.trans(x), TF32) + bias[:, None]
        g = gradient_of(z, peak[None, :], inverse[None, :], c[:, None] == hit[None, :])
        row_sum += tl.sum(g, 1)
        g = round_to(g, x.dtype)
        total += multiply(g, only_finite(x), TF32)
    norm = tl.load(norm_ptr)
    row = clone * num_classes + c
    if HAS_BIAS:
        tl.store(dbias_ptr + row, row_sum * norm, mask=mask_c)
    d = tl.arange(0, D_P)
    tl.store(
        dweight_ptr + row[:, None] * width + d[None, :],
        round_to(total * norm, dweight_ptr.dtype.element_ty),
        mask=mask_c[:, None] & (d < width)[None, :],
    )


@triton.jit(do_not_specialize=["num_samples", "num_clones", "tiles_per_split"])
def features_gradient_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hit_ptr,
    norm_ptr,
    softmax_ptr,
    joint_ptr,
    part_ptr,
    num_samples,
    num_clones,
    num_classes,
    num_features,
    width,
    tiles_per_split,
    TF32: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    D_P: tl.constexpr,
):
    """part [S, B, width] of a block of samples and a split of the tiles of all clones' classes: sum r G W."""
    samples = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = samples < num_samples
    split = tl.program_id(1)
    x = load_rows(x_ptr, samples, num_samples, num_features, D_P)
    hit = tl.load(hit_ptr + samples, mask=mask_m, other=-1)
    mixture_ptr = joint_ptr + num_clones.to(tl.int64) * num_samples
    top = tl.load(mixture_ptr + samples, mask=mask_m, other=0.0)
    scale = tl.load(mixture_ptr + num_samples + samples, mask=mask_m, other=0.0)
    total = tl.zeros([BLOCK_M, D_P], tl.float32)
    tiles_per_clone = tl.cdiv(num_classes, BLOCK_C)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_clones * tiles_per_clone)
    for tile in range(first, last):
        clone = (tile // tiles_per_clone).to(tl.int64)
        c = (tile % tiles_per_clone) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = c < num_classes
        cell = clone * num_samples + samples
        softmax = softmax_ptr + clone * 2 * num_samples + samples
        peak = tl.load(softmax, mask=mask_m, other=0.0)
        inverse = tl.load(softmax + num_samples, mask=mask_m, other=0.0)
        joint = tl.load(joint_ptr + cell, mask=mask_m, other=-float("inf"))
        weight = load_rows(
            weight_ptr + clone * num_classes * num_features, c, num_classes, num_features, D_P
        )
        z = multiply(x, tl.trans(weight), TF32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + clone * num_classes + c, mask=mask_c, other=0.0)
            z += widen(bias, tl.float32)[None, :]
        g = gradient_of(z, peak[:, None], inverse[:, None], c[None, :] == hit[:, None])
        # Beyond the last class the weights are 0.
        g *= (tl.exp(joint - top) * scale)[:, None]
        total += multiply(round_to(g, weight.dtype), only_finite(weight), TF32)
    d = tl.arange(0, D_P)
    row = split * num_samples.to(tl.int64) + samples
    tl.store(
        part_ptr + row[:, None] * width + d[None, :],
        total * tl.load(norm_ptr),
        mask=mask_m[:, None] & (d < width)[None, :],
    )


def splits_of(tiles: int, programs: int) -> tuple[int, int]:
    """(splits, tiles per split) where `programs` others run beside each split."""
    per_split = max(triton.cdiv(tiles * programs, PROGRAMS), 1)
    return triton.cdiv(tiles, per_split), min(per_split, tiles)


def mixture_fused(loss: Loss) -> None:
    """B > 0, D <= 128; all in float32."""
    x, weight, bias, log_posterior = loss.inputs
    num_samples, width, num_clones, num_classes = loss.inputs.sizes
    # Rows on 16-byte addresses, or every load would be narrow.
    if width % 16:
        x, weight = (F.pad(tensor, (0, -width % 16)) for tensor in (x, weight))
    num_features = x.size(1)
    padded = max(triton.next_power_of_2(num_features), 16)
    common = (x, weight, x if bias is None else bias)
    sizes = (num_samples, num_clones, num_classes, num_features)
    constants = {"TF32": tf32(x.dtype), "HAS_BIAS": bias is not None, "D_P": padded}
    constants["num_stages"] = 2
    blocks = triton.cdiv(num_samples, OWNED)

    splits, per_split = splits_of(triton.cdiv(num_classes, OWNED), blocks * num_clones)
    part = x.new_empty((splits, num_clones, 3, num_samples), dtype=torch.float32)
    place = x.new_empty((splits, num_clones, num_samples), dtype=torch.int32)
    launch(
        mixture_statistics_kernel,
        (blocks, num_clones, splits),
        *common,
        loss.target,
        part,
        place,
        *sizes,
        per_split,
        num_warps=4,
        BLOCK_M=OWNED,
        BLOCK_C=OWNED,
        **constants,
    )
    hit = x.new_empty(num_samples, dtype=torch.int32)
    softmax = x.new_empty((num_clones, 2, num_samples), dtype=torch.float32)
    joint = x.new_empty((num_clones + 2, num_samples), dtype=torch.float32)
    launch(
        mixture_merge_kernel,
        (triton.cdiv(num_samples, 128),),
        part,
        place,
        log_posterior,
        loss.target,
        *loss.statistics,
        hit,
        softmax,
        joint,
        num_samples,
        num_clones,
        num_classes,
        splits,
        loss.likelihood["ignore_index"],
        num_warps=2,
        BLOCK=128,
    )
    if loss.need_dw:
        launch(
            clone_gradient_kernel,
            (triton.cdiv(num_classes, OWNED), num_clones),
            *common,
            hit,
            loss.norm,
            softmax,
            loss.dead,
            loss.dweight,
            loss.dbias,
            num_samples,
            num_classes,
            num_features,
            width,
            num_warps=8 if padded == 128 or x.dtype == torch.float32 else 4,
            BLOCK_M=STREAMED,
            BLOCK_C=OWNED,
            **constants,
        )
    if loss.need_dx:
        tiles = triton.cdiv(num_classes, STREAMED) * num_clones
        splits, per_split = splits_of(tiles, blocks)
        parts = loss.dx if splits == 1 else loss.dx.new_empty((splits, *loss.dx.shape))
        launch(
            features_gradient_kernel,
            (blocks, splits),
            *common,
            hit,
            loss.norm,
            softmax,
            joint,
            parts,
            *sizes,
            width,
            per_split,
            num_warps=4,
            BLOCK_M=OWNED,
            BLOCK_C=STREAMED,
            **constants,
        )
        if splits > 1:
            torch.sum(parts, 0, out=loss.dx)
