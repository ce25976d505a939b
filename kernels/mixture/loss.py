"""switch_mixture: loss and gradients of the mixture of clones in one pass (reference/switch_mixture.py).

With L = B N C logits (docs/gpu.md has what they take):

* tile (N C up to 4096, both padded to powers of two): the logits of all clones by one product, one kernel that reads
  them once (4 bytes a logit) and writes G and r G (2 to 8 bytes), two products; 6 L D flops. Small problems are bound
  by their 6 launches.
* stream (larger): clone after clone, 4 to 6 launches each. 6 L D flops, 14 to 20 bytes a logit and 12 a sample, clone
  and feature.
* fused (larger, with few features): no logit is written, `fused` counts what it does instead.
* exponential (larger, of many classes in bfloat16, without a bias, on Hopper): 6 L D flops, 6 bytes a logit.

None holds more logits than the memory budget. Logits, their softmax and every sum are float32 (float64 for float64);
TF32 is used where torch.backends.cuda.matmul allows it. Sums have a fixed order; nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alrao_fast.ops.mixture.likelihood import Classes, Values

from ..launch import launch
from .exponential import mixture_exponential
from .fused import mixture_fused
from .problem import Loss, regime
from .stream import mixture_stream
from .tile import mixture_tile


@triton.jit
def load_divisor(items_ptr, divisor, HAS_ITEMS: tl.constexpr):
    """What a sum is divided by."""
    value = tl.full([], divisor, tl.float64)
    if HAS_ITEMS:
        value *= tl.load(items_ptr).to(tl.float64)
    return value


@triton.jit(do_not_specialize=["num_samples", "ignore_index"])
def prepare_kernel(
    target_ptr,
    norm_ptr,
    count_ptr,
    dead_ptr,
    num_samples,
    num_clones,
    ignore_index,
    row_weight_ptr,
    items_ptr,
    divisor: tl.float64,
    MEAN: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    N_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the samples; clears the flags of dead clones, and that of anything not finite behind them.

    The norm is one over the count or the divisor, or the largest size of a weight.
    """
    n = tl.arange(0, N_P)
    tl.store(dead_ptr + n, tl.zeros([N_P], tl.int32), mask=n <= num_clones)
    largest = tl.full([], 0.0, tl.float64)
    if HAS_ROW_WEIGHT:
        counts = tl.zeros([BLOCK], tl.int64)
        sizes = tl.zeros([BLOCK], tl.float64)
        for base in range(0, num_samples, BLOCK):
            offs = base + tl.arange(0, BLOCK)
            mask = offs < num_samples
            weight = tl.load(row_weight_ptr + offs, mask=mask, other=0.0).to(tl.float64)
            counted = weight != 0.0
            if not GAUSSIAN:
                target = tl.load(target_ptr + offs, mask=mask, other=ignore_index)
                counted = counted & (target != ignore_index)
            counts += tl.where(mask & counted, 1, 0).to(tl.int64)
            sizes = tl.maximum(sizes, tl.abs(weight))
        count = tl.sum(counts, 0)
        largest = tl.max(sizes, 0)
    elif GAUSSIAN:
        count = tl.full([], num_samples, tl.int64)
    else:
        counts = tl.zeros([BLOCK], tl.int64)
        for base in range(0, num_samples, BLOCK):
            offs = base + tl.arange(0, BLOCK)
            mask = offs < num_samples
            target = tl.load(target_ptr + offs, mask=mask, other=ignore_index)
            counts += tl.where(mask & (target != ignore_index), 1, 0).to(tl.int64)
        count = tl.sum(counts, 0)
    tl.store(count_ptr, count.to(tl.float64))
    if MEAN:
        norm = 1.0 / tl.where(count > 0, count, 1).to(tl.float64)
    else:
        norm = 1.0 / load_divisor(items_ptr, divisor, HAS_ITEMS)
    if HAS_ROW_WEIGHT:
        norm = tl.where(largest > 0.0, largest, 1.0)
    tl.store(norm_ptr, norm.to(norm_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_samples"])
def finish_kernel(
    nll_ptr,
    score_ptr,
    mix_ptr,
    count_ptr,
    loss_ptr,
    stats_ptr,
    num_samples,
    num_clones,
    items_ptr,
    divisor: tl.float64,
    MEAN: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program n < N: the statistics of clone n; program N: the loss. Sums in float64."""
    clone = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr)
    lanes = tl.arange(0, BLOCK)
    if clone == num_clones:
        total = tl.zeros([BLOCK], tl.float64)
        for base in range(0, num_samples, BLOCK):
            offs = base + lanes
            total += tl.load(mix_ptr + offs, mask=offs < num_samples, other=0.0).to(tl.float64)
        loss = tl.sum(total, 0)
        if MEAN:
            loss = loss / tl.where(count > 0, count, 1.0)
        else:
            loss = loss / load_divisor(items_ptr, divisor, HAS_ITEMS)
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    else:
        nll = tl.zeros([BLOCK], tl.float64)
        score = tl.zeros([BLOCK], tl.float64)
        for base in range(0, num_samples, BLOCK):
            offs = base + lanes
            mask = offs < num_samples
            column = clone * num_samples + offs
            nll += tl.load(nll_ptr + column, mask=mask, other=0.0).to(tl.float64)
            score += tl.load(score_ptr + column, mask=mask, other=0.0).to(tl.float64)
        tl.store(stats_ptr + clone, tl.sum(nll, 0))
        tl.store(stats_ptr + num_clones + clone, tl.sum(score, 0))
        tl.store(stats_ptr + 2 * num_clones + clone, count)


def _mixture(loss: Loss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_samples, _, num_clones, _ = loss.inputs.sizes
    launch(
        prepare_kernel,
        (1,),
        loss.target,
        loss.norm,
        loss.count,
        loss.dead,
        num_samples,
        num_clones,
        loss.likelihood["ignore_index"],
        loss.options["row_weight_ptr"],
        loss.items,
        loss.divisor,
        num_warps=4,
        MEAN=loss.mean,
        HAS_ITEMS=loss.has_items,
        GAUSSIAN=loss.gaussian,
        HAS_ROW_WEIGHT=loss.options["HAS_ROW_WEIGHT"],
        N_P=triton.next_power_of_2(num_clones + 1),
        BLOCK=1024,
    )
    if num_samples == 0:
        loss.dweight.zero_()
        loss.dbias.zero_()
    else:
        runs = {
            "tile": mixture_tile,
            "fused": mixture_fused,
            "exponential": mixture_exponential,
            "stream": mixture_stream,
        }
        runs[regime(loss.inputs, loss.gaussian, loss.options["OPTIONS"])](loss)

    value = loss.norm.new_empty(())
    stats = value.new_empty((3, num_clones), dtype=torch.float64)
    launch(
        finish_kernel,
        (num_clones + 1,),
        loss.nll,
        loss.score,
        loss.mix,
        loss.count,
        value,
        stats,
        num_samples,
        num_clones,
        loss.items,
        loss.divisor,
        num_warps=4,
        MEAN=loss.mean,
        HAS_ITEMS=loss.has_items,
        BLOCK=1024,
    )
    return loss.mix if loss.per_sample else value, stats, loss.dx, loss.dweight, loss.dbias


def switch_mixture_nll(*arguments):
    """The op, on checked arguments."""
    return _mixture(Loss(Classes, *arguments))


def switch_mixture_gaussian_nll(*arguments):
    """The op, on checked arguments."""
    return _mixture(Loss(Values, *arguments))
