"""The factors of the samples' losses, and targets that are distributions (ops/mixture/weighting.py): a launch or two.

Of classes one program makes them all: 12 bytes a sample and 4 a class. Distributions have a program a sample, which
reads them twice, the second time from the caches, and writes them once: 8 bytes an entry of float32. What all programs
ask for, the mean of the class weights and the sum of the samples', a launch before leaves to them where there are any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

# Entries at a time.
BLOCK = 1024


@triton.jit
def class_average(class_weight_ptr, num_classes, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for base in range(0, num_classes, BLOCK):
        offs = base + tl.arange(0, BLOCK)
        total += tl.load(class_weight_ptr + offs, mask=offs < num_classes, other=0.0).to(tl.float64)
    return tl.sum(total, 0) / num_classes


@triton.jit
def scale_class_weights(scaled_ptr, class_weight_ptr, average, num_classes, BLOCK: tl.constexpr):
    """Class weights of mean 1."""
    for base in range(0, num_classes, BLOCK):
        offs = base + tl.arange(0, BLOCK)
        weight = tl.load(class_weight_ptr + offs, mask=offs < num_classes, other=0.0)
        scaled = weight.to(tl.float64) / average
        tl.store(scaled_ptr + offs, scaled.to(scaled_ptr.dtype.element_ty), mask=offs < num_classes)


@triton.jit
def smooth(weight, average, smoothing, SMOOTHED: tl.constexpr):
    """What the loss weighs a target with whose own weight is `weight`."""
    if SMOOTHED:
        return (1.0 - smoothing) * weight + smoothing * average
    else:
        return weight


@triton.jit
def divide_by(total, divisor, items_ptr, MEAN: tl.constexpr, HAS_ITEMS: tl.constexpr):
    """The sum `total` where the mean is asked for, 1 where it is 0, or else the divisor; times the items."""
    divided = tl.full([], divisor, tl.float64)
    if MEAN:
        divided = tl.where(total == 0.0, 1.0, total)
    if HAS_ITEMS:
        divided *= tl.load(items_ptr).to(tl.float64)
    return divided


@triton.jit
def load_classes(
    target_ptr,
    sample_weight_ptr,
    class_weight_ptr,
    base,
    num_samples,
    num_classes,
    ignore_index,
    HAS_SAMPLE_WEIGHT: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(offsets, weight of the sample, weight of its class), the weights 0 where it does not count."""
    offs = base + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + offs, mask=offs < num_samples, other=ignore_index)
    # What does not count may have any weight, NaN too.
    counted = (offs < num_samples) & (target != ignore_index)
    given = tl.where(counted, 1.0, 0.0).to(tl.float64)
    if HAS_SAMPLE_WEIGHT:
        given = tl.load(sample_weight_ptr + offs, mask=counted, other=0.0).to(tl.float64)
    of_class = tl.full([BLOCK], 1.0, tl.float64)
    if HAS_CLASS_WEIGHT:
        # A class that does not exist is the loss's to show.
        inside = tl.minimum(tl.maximum(target, 0), num_classes - 1)
        of_class = tl.load(class_weight_ptr + inside, mask=counted, other=0.0).to(tl.float64)
    return offs, given, of_class


@triton.jit(do_not_specialize=["num_samples", "ignore_index"])
def class_factors_kernel(
    target_ptr,
    sample_weight_ptr,
    class_weight_ptr,
    items_ptr,
    factors_ptr,
    scaled_ptr,
    num_samples,
    num_classes,
    ignore_index,
    smoothing: tl.float64,
    divisor: tl.float64,
    MEAN: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    HAS_SAMPLE_WEIGHT: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    average = tl.full([], 1.0, tl.float64)
    if SMOOTHED:
        average = class_average(class_weight_ptr, num_classes, BLOCK)
        scale_class_weights(scaled_ptr, class_weight_ptr, average, num_classes, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    if MEAN:
        for base in range(0, num_samples, BLOCK):
            _, given, of_class = load_classes(
                target_ptr,
                sample_weight_ptr,
                class_weight_ptr,
                base,
                num_samples,
                num_classes,
                ignore_index,
                HAS_SAMPLE_WEIGHT,
                HAS_CLASS_WEIGHT,
                BLOCK,
            )
            sums += given * of_class
    divided = divide_by(tl.sum(sums, 0), divisor, items_ptr, MEAN, HAS_ITEMS)
    for base in range(0, num_samples, BLOCK):
        offs, given, of_class = load_classes(
            target_ptr,
            sample_weight_ptr,
            class_weight_ptr,
            base,
            num_samples,
            num_classes,
            ignore_index,
            HAS_SAMPLE_WEIGHT,
            HAS_CLASS_WEIGHT,
            BLOCK,
        )
        factor = given * smooth(of_class, average, smoothing, SMOOTHED) / divided
        factor = factor.to(factors_ptr.dtype.element_ty)
        tl.store(factors_ptr + offs, factor, mask=offs < num_samples)


@triton.jit(do_not_specialize=["num_samples"])
def totals_kernel(
    sample_weight_ptr,
    class_weight_ptr,
    totals_ptr,
    scaled_ptr,
    num_samples,
    num_classes,
    HAS_SAMPLE_WEIGHT: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of the class weights and the sum of the samples'."""
    average = tl.full([], 1.0, tl.float64)
    if HAS_CLASS_WEIGHT:
        average = class_average(class_weight_ptr, num_classes, BLOCK)
        scale_class_weights(scaled_ptr, class_weight_ptr, average, num_classes, BLOCK)
    tl.store(totals_ptr, average)
    total = tl.full([], 1.0, tl.float64) * num_samples
    if HAS_SAMPLE_WEIGHT:
        sums = tl.zeros([BLOCK], tl.float64)
        for base in range(0, num_samples, BLOCK):
            offs = base + tl.arange(0, BLOCK)
            given = tl.load(sample_weight_ptr + offs, mask=offs < num_samples, other=0.0)
            sums += given.to(tl.float64)
        total = tl.sum(sums, 0)
    tl.store(totals_ptr + 1, total)


@triton.jit(do_not_specialize=["num_samples"])
def distributions_kernel(
    given_ptr,
    sample_weight_ptr,
    class_weight_ptr,
    items_ptr,
    totals_ptr,
    out_ptr,
    factors_ptr,
    likeliest_ptr,
    num_samples,
    num_classes,
    smoothing: tl.float64,
    divisor: tl.float64,
    MEAN: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    HAS_SAMPLE_WEIGHT: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample's distribution, of sum 1 unless that is 0; its factor, and where it is largest."""
    ACC: tl.constexpr = given_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    given_ptr += sample * num_classes
    out_ptr += sample * num_classes
    average = tl.full([], 1.0, tl.float64)
    total = tl.full([], 1.0, tl.float64) * num_samples
    if HAS_TOTALS:
        average = tl.load(totals_ptr)
        total = tl.load(totals_ptr + 1)
    weight = tl.full([], 1.0, tl.float64)
    if HAS_SAMPLE_WEIGHT:
        weight = tl.load(sample_weight_ptr + sample).to(tl.float64)
    # What does not count may be anything.
    num_counted = tl.where(weight != 0.0, num_classes, 0)
    sums = tl.zeros([BLOCK], ACC)
    weighted = tl.zeros([BLOCK], ACC)
    largest = tl.full([BLOCK], -float("inf"), ACC)
    place = tl.full([BLOCK], 0, tl.int32)
    for base in range(0, num_classes, BLOCK):
        offs = base + tl.arange(0, BLOCK)
        mask = offs < num_counted
        q = tl.load(given_ptr + offs, mask=mask, other=0.0)
        sums += q
        if HAS_CLASS_WEIGHT:
            w = tl.load(class_weight_ptr + offs, mask=mask, other=0.0)
            weighted += w * q
        larger = mask & (q > largest)
        place = tl.where(larger, offs, place)
        largest = tl.where(larger, q, largest)
    mass = tl.sum(sums, 0)
    peak = tl.max(largest, 0)
    # The first of the largest; of entries that are all NaN, or do not count, any.
    place = tl.where(largest == peak, place, num_classes)
    tl.store(likeliest_ptr + sample, tl.minimum(tl.min(place, 0), num_classes - 1).to(tl.int64))
    empty = mass == 0.0
    safe = tl.where(empty, 1.0, mass)
    for base in range(0, num_classes, BLOCK):
        offs = base + tl.arange(0, BLOCK)
        mask = offs < num_classes
        q = tl.load(given_ptr + offs, mask=mask, other=0.0)
        tl.store(out_ptr + offs, tl.where(empty, 0.0, q / safe), mask=mask)
    factor = tl.where(empty, 0.0, weight)
    # One that is not finite makes every clone dead for the sample, and its loss inf: it has a weight.
    own = safe.to(tl.float64)
    if HAS_CLASS_WEIGHT:
        of_target = tl.sum(weighted, 0).to(tl.float64) / own
        own *= (1.0 - smoothing) * of_target + smoothing * average
    factor = tl.where(tl.abs(mass) < float("inf"), factor * own, factor)
    factor = factor / divide_by(total, divisor, items_ptr, MEAN, HAS_ITEMS)
    tl.store(factors_ptr + sample, factor.to(factors_ptr.dtype.element_ty))


def switch_mixture_weights(
    target: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    divisor: float,
    num_items: Tensor | None = None,
    copy: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, on checked arguments."""
    target = target.contiguous()
    soft = target.is_floating_point()
    like = next(t for t in (target if soft else None, sample_weight, class_weight) if t is not None)
    num_samples = target.size(0)
    sample_weight = None if sample_weight is None else sample_weight.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    num_classes = target.size(1) if soft else 1 if class_weight is None else class_weight.numel()
    within = class_weight is not None and (soft or label_smoothing != 0)
    factors = like.new_empty(num_samples)
    scaled = like.new_empty(num_classes if within else 0)
    given = (
        target if sample_weight is None else sample_weight,
        target if class_weight is None else class_weight,
    )
    items = like if num_items is None else num_items
    flags = {
        "HAS_SAMPLE_WEIGHT": sample_weight is not None,
        "HAS_CLASS_WEIGHT": class_weight is not None,
    }
    norm = {"MEAN": mean, "HAS_ITEMS": num_items is not None}
    if not soft:
        launch(
            class_factors_kernel,
            (1,),
            target,
            *given,
            items,
            factors,
            scaled,
            num_samples,
            num_classes,
            ignore_index,
            label_smoothing,
            divisor,
            num_warps=4,
            SMOOTHED=within,
            BLOCK=BLOCK,
            **flags,
            **norm,
        )
        return like.new_empty(0), factors, scaled, target.new_empty(0)
    out = torch.empty_like(target)
    likeliest = target.new_empty(num_samples, dtype=torch.int64)
    has_totals = class_weight is not None or (mean and sample_weight is not None)
    totals = like.new_empty(2, dtype=torch.float64) if has_totals else like
    if has_totals:
        launch(
            totals_kernel,
            (1,),
            *given,
            totals,
            scaled,
            num_samples,
            num_classes,
            num_warps=4,
            BLOCK=BLOCK,
            **flags,
        )
    if num_samples > 0:
        launch(
            distributions_kernel,
            (num_samples,),
            target,
            *given,
            items,
            totals,
            out,
            factors,
            likeliest,
            num_samples,
            num_classes,
            label_smoothing,
            divisor,
            num_warps=4,
            HAS_TOTALS=has_totals,
            BLOCK=min(max(triton.next_power_of_2(num_classes), 128), BLOCK),
            **flags,
            **norm,
        )
    return out, factors, scaled, likeliest
