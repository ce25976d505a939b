"""The mixture streamed over the clones without logits in memory: large output layers in bfloat16, without a bias.

The product's own epilogue turns a tile of logits z into E = 2^(z log2(e) - k) and sums its rows, so that one bfloat16
per logit is written once and read by the two products of the backward, where `stream` writes a float32 logit, reads it
twice and writes its gradient. With S the sum of a row the gradient is v E, v = norm / S, but at the target, where it is
-v times the sum of the others: that is written over E there, and v goes into the small factor of dweight = E^T (v x)
and into dx = v (E weight). The target's own exponential comes from its logit alone, so that a probability of 1 is one.
Sums, likelihoods and responsibilities are float32, from float32 logits; E has the relative precision that a bfloat16
gradient has.

The offset k of a row is the largest of the target's logit and of those of one class in 64. Where the row's largest is
40 above it (a clone that has diverged), or below, a second pass over the clone takes the largest itself. Else its
launches return at once.

Bytes, per logit: 2 written and 4 read in training, none in evaluation. The first product ran at 498 TFLOP/s on an
H200 (8192 x 768 x 50304, Triton 3.6), of 788 for a large one; without the place of the largest 574, and 664 where E was
not stored either.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import INTERPRETED, INTERPRETED_BF16, launch, round_to, widen
from .gemm import matmul, multiply, only_finite, settle
from .offsets import LOG2_E, largest_kernel, offset_kernel
from .problem import Loss
from .stream import combine, take_in

# Tiles of the first product; smaller under the interpreter, for its time.
TILE = (32, 32, 16) if INTERPRETED else (128, 256, 64)
# One in so many classes is looked at for a row's offset.
SAMPLED = 64
LN_2 = tl.constexpr(0.6931471805599453)
# Largest sum of a row that the first pass stands by: factors of 2^-60 and bfloat16's range leave room for any norm.
LIMIT = tl.constexpr(2.0**60)


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, GROUP rows of tiles after the other: their weights stay in L2."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + tile % per_group % size, tile % per_group // size


@triton.jit(do_not_specialize=["first_sample", "num_rows", "programs"])
def exponential_kernel(
    x_desc,
    weight_desc,
    e_desc,
    offset_ptr,
    sum_ptr,
    largest_ptr,
    place_ptr,
    guard_ptr,
    target_ptr,
    first_sample,
    num_rows,
    num_classes,
    num_features,
    programs,
    STORE: tl.constexpr,
    MAXIMA: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """E of all tiles; of their rows the sums, the largest and its place, [tiles of columns, num_rows] each.

    MAXIMA: the largest logits alone.
    """
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_classes, BLOCK_N)
    tiles = tiles_m * tiles_n
    if GUARDED:
        tiles = tl.where(tl.load(guard_ptr) != 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m, n = tile_of(tile, tiles_m, tiles_n, GROUP)
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, num_features, BLOCK_K):
            x = x_desc.load([m * BLOCK_M, d])
            weight = weight_desc.load([n * BLOCK_N, d])
            if INTERPRETED_BF16:
                z += multiply(x, tl.trans(weight), False)
            else:
                z = tl.dot(x, tl.trans(weight), z)
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = rows < num_rows
        mask_n = columns < num_classes
        at = n * num_rows + rows
        if MAXIMA:
            largest = tl.max(tl.where(mask_n[None, :], z, -float("inf")), 1)
            tl.store(largest_ptr + at, largest, mask=mask_m)
        else:
            offset = tl.load(offset_ptr + rows, mask=mask_m, other=float("inf"))
            # NaN for what is not finite: the clone is dead. A row that does not count is 0 whatever it holds.
            z = tl.where(tl.abs(z) < float("inf"), z, float("nan"))
            e = tl.exp2(z * LOG2_E - offset[:, None])
            e = tl.where(mask_n[None, :] & (offset < float("inf"))[:, None], e, 0.0)
            largest = tl.max(e, 1)
            first = tl.min(tl.where(e == largest[:, None], columns[None, :], num_classes), 1)
            tl.store(largest_ptr + at, largest, mask=mask_m)
            tl.store(place_ptr + at, first, mask=mask_m)
            # The target's own is added from its logit: that of the sum must be the same to the bit.
            target = tl.load(target_ptr + first_sample + rows, mask=mask_m, other=-1).to(tl.int32)
            e = tl.where(columns[None, :] == target[:, None], 0.0, e)
            tl.store(sum_ptr + at, tl.sum(e, 1), mask=mask_m)
            if STORE:
                e_desc.store([m * BLOCK_M, n * BLOCK_N], round_to(e, tl.bfloat16))


@triton.jit(do_not_specialize=["clone", "first_sample", "num_rows", "num_samples", "ignore_index"])
def merge_kernel(
    e_ptr,
    sum_ptr,
    largest_ptr,
    place_ptr,
    at_target_ptr,
    offset_ptr,
    log_posterior_ptr,
    target_ptr,
    norm_ptr,
    nll_ptr,
    score_ptr,
    mix_ptr,
    dead_ptr,
    old_state_ptr,
    state_ptr,
    factor_ptr,
    guard_ptr,
    clone,
    first_sample,
    num_rows,
    num_samples,
    num_classes,
    num_tiles,
    row_stride,
    ignore_index,
    FIRST: tl.constexpr,
    STORE: tl.constexpr,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a clone's sums say of the samples, the running mixture (`stream`), the factors v, and E at the targets.

    Unguarded it sets the guard where a sum has overflowed.
    """
    wanted = 1
    if GUARDED:
        wanted = tl.load(guard_ptr)
    if wanted != 0:
        infinity = float("inf")
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = rows < num_rows
        sample = first_sample + rows
        others = tl.zeros([BLOCK], tl.float32)
        largest = tl.full([BLOCK], -1.0, tl.float32)
        place = tl.zeros([BLOCK], tl.int32)
        for _ in range(num_tiles):
            others += tl.load(sum_ptr + rows, mask=mask, other=0.0)
            here = tl.load(largest_ptr + rows, mask=mask, other=0.0)
            place = tl.where(here > largest, tl.load(place_ptr + rows, mask=mask, other=0), place)
            largest = tl.maximum(largest, here)
            sum_ptr += num_rows
            largest_ptr += num_rows
            place_ptr += num_rows
        at_target = tl.load(at_target_ptr + rows, mask=mask, other=0.0)
        offset = tl.load(offset_ptr + rows, mask=mask, other=0.0)
        target = tl.load(target_ptr + sample, mask=mask, other=ignore_index)
        counted = mask & (target != ignore_index)
        is_class = (target >= 0) & (target < num_classes)
        below = at_target * LOG2_E - offset
        own = tl.where(is_class, tl.exp2(below), 0.0)
        total = others + own
        # So far off, either way, that the factors would lose digits.
        over = counted & ((total >= LIMIT) | (total < 1 / LIMIT))
        if not GUARDED:
            if tl.max(tl.where(over, 1, 0), 0) != 0:
                tl.store(guard_ptr, 1)
        logp = (below - tl.log2(total)) * LN_2
        alive = counted & is_class & (tl.abs(logp) < infinity)
        dead = counted & (alive == 0)
        if not GUARDED:
            # Of a sum that is so far off the second pass tells.
            dead = dead & (over == 0)
        cell = clone.to(tl.int64) * num_samples + sample
        nll = tl.where(counted, tl.where(alive, -logp, infinity), 0.0)
        tl.store(nll_ptr + cell, nll, mask=mask)
        tl.store(score_ptr + cell, tl.where(alive & (place == target), 1.0, 0.0), mask=mask)
        if tl.max(tl.where(dead, 1, 0), 0) != 0:
            tl.store(dead_ptr + clone, 1)

        a = tl.load(log_posterior_ptr + clone).to(tl.float32)
        joint = tl.where(alive, a + logp, -infinity)
        if FIRST:
            old = tl.full([BLOCK], -infinity, tl.float32)
            mass = tl.zeros([BLOCK], tl.float32)
        else:
            old = tl.load(old_state_ptr + sample, mask=mask, other=-infinity)
            mass = tl.load(old_state_ptr + num_samples + sample, mask=mask, other=0.0)
        peak, mass, keep, add, mix = take_in(old, mass, joint)
        tl.store(mix_ptr + sample, tl.where(counted, mix, 0.0), mask=mask)
        factor = tl.where(alive, tl.load(norm_ptr) / total, 0.0)
        tl.store(state_ptr + sample, peak, mask=mask)
        tl.store(state_ptr + num_samples + sample, mass, mask=mask)
        tl.store(state_ptr + 2 * num_samples + sample, keep, mask=mask)
        tl.store(
            state_ptr + 3 * num_samples + sample, tl.where(alive, add * factor, 0.0), mask=mask
        )
        if STORE:
            tl.store(factor_ptr + rows, factor, mask=mask)
            entry = rows.to(tl.int64) * row_stride + tl.where(is_class, target, 0)
            value = round_to(-others, tl.bfloat16)
            tl.store(e_ptr + entry, value, mask=alive)


@triton.jit(do_not_specialize=["size"])
def scale_rows_kernel(x_ptr, factor_ptr, out_ptr, num_features, size, BLOCK: tl.constexpr):
    """out = factor x, row by row, with 0 for what is not finite in x."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    factor = tl.load(factor_ptr + offs // num_features, mask=mask, other=0.0)
    x = only_finite(tl.load(x_ptr + offs, mask=mask, other=0.0))
    tl.store(out_ptr + offs, round_to(widen(x, tl.float32) * factor, tl.bfloat16), mask=mask)


class _Pass(NamedTuple):
    """What the launches over one clone and chunk share."""

    descriptors: tuple[TensorDescriptor, ...]
    loss: Loss
    part: slice
    offset: torch.Tensor
    of_tiles: tuple[torch.Tensor, ...]
    guard: torch.Tensor

    def multiply(self, *, store: bool = False, maxima: bool = False, guarded: bool = False) -> None:
        block_m, block_n, block_k = TILE
        programs = 4
        if self.guard.is_cuda:
            device = torch.cuda.get_device_properties(self.guard.device)
            programs = device.multi_processor_count
        _, num_features, _, num_classes = self.loss.inputs.sizes
        launch(
            exponential_kernel,
            (programs,),
            *self.descriptors,
            self.offset,
            *self.of_tiles,
            self.guard,
            self.loss.target,
            self.part.start,
            self.part.stop - self.part.start,
            num_classes,
            num_features,
            programs,
            num_warps=8,
            num_stages=3,
            STORE=store,
            MAXIMA=maxima,
            GUARDED=guarded,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=8,
        )


def mixture_exponential(loss: Loss) -> None:
    """B > 0, classes in bfloat16, no bias and no options."""
    inputs, need_dx, need_dw = loss.inputs, loss.need_dx, loss.need_dw
    x, weight = inputs.x, inputs.weight
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    store = need_dx or need_dw
    ld = -(-num_classes // 8) * 8
    block_m, block_n, block_k = TILE
    num_tiles = triton.cdiv(num_classes, block_n)
    # In whole accesses: the library is slower otherwise.
    num_sampled = max(num_classes // SAMPLED // 8 * 8, 1)
    step = num_classes // num_sampled
    per_sample = (
        12 * num_tiles
        + 4 * num_sampled
        + (2 * ld if store else 0)
        + (4 * num_features if need_dx else 0)
    )
    chunks = inputs.chunks(per_sample, loss.memory_budget)
    largest = max(part.stop - part.start for part in chunks)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return x.new_empty(shape, dtype=dtype)

    # Of every row the tiles' sums, largest entries and the places of those.
    sums, peaks = empty(2, num_tiles * largest)
    of_tiles = sums, peaks, empty(num_tiles * largest, dtype=torch.int32)
    at_target, offset, factor = empty(3, largest)
    # Read by a clone and written by the next: its second pass reads what its first one did.
    states = empty(2, 4, num_samples)
    guard = x.new_zeros(num_clones * len(chunks), dtype=torch.int32)
    buffer = empty(largest if store else 1, ld, dtype=x.dtype)
    scaled = empty(largest if need_dw else 0, num_features, dtype=x.dtype)
    total = torch.empty_like(loss.dx)
    for clone in range(num_clones):
        weight_desc = TensorDescriptor.from_tensor(weight[clone], [block_n, block_k])
        old_state, state = states[(clone + 1) % 2], states[clone % 2]
        for number, part in enumerate(chunks):
            rows, count = x[part], part.stop - part.start
            e = buffer[: count if store else 1, :num_classes]
            descriptors = (
                TensorDescriptor.from_tensor(rows, [block_m, block_k]),
                weight_desc,
                TensorDescriptor.from_tensor(e, [block_m, block_n]),
            )
            sampled = empty(count, num_sampled)
            matmul(rows, weight[clone, : num_sampled * step : step].t(), sampled)
            launch(
                offset_kernel,
                (count,),
                rows,
                weight[clone],
                sampled,
                loss.target,
                at_target,
                offset,
                part.start,
                num_sampled,
                num_classes,
                num_features,
                loss.likelihood["ignore_index"],
                num_warps=4,
                BLOCK=1024,
            )
            here = guard[clone * len(chunks) + number :]
            over = _Pass(descriptors, loss, part, offset, of_tiles, here)
            for guarded in (False, True):
                if guarded:
                    over.multiply(maxima=True, guarded=True)
                    launch(
                        largest_kernel,
                        (triton.cdiv(count, 64),),
                        peaks,
                        at_target,
                        offset,
                        here,
                        count,
                        num_tiles,
                        num_warps=2,
                        BLOCK=64,
                    )
                over.multiply(store=store, guarded=guarded)
                launch(
                    merge_kernel,
                    (triton.cdiv(count, 64),),
                    e,
                    *of_tiles,
                    at_target,
                    offset,
                    inputs.log_posterior,
                    loss.target,
                    loss.norm,
                    *loss.statistics,
                    old_state,
                    state,
                    factor,
                    here,
                    clone,
                    part.start,
                    count,
                    num_samples,
                    num_classes,
                    num_tiles,
                    ld,
                    loss.likelihood["ignore_index"],
                    num_warps=2,
                    FIRST=clone == 0,
                    STORE=store,
                    GUARDED=guarded,
                    BLOCK=64,
                )
            if need_dw:
                launch(
                    scale_rows_kernel,
                    (triton.cdiv(count * num_features, 1024),),
                    rows,
                    factor,
                    scaled,
                    num_features,
                    count * num_features,
                    num_warps=4,
                    BLOCK=1024,
                )
                loss.add_weight_gradient(e, scaled[:count], part, clone)
            if need_dx:
                term = empty(count, num_features)
                matmul(e, weight[clone], term)
                combine(term, total, loss.dx, state, None, part.start, clone, num_clones)
    settle(loss.dweight, loss.dbias, loss.dead, None)
