"""What a row's exponentials are taken relative to: an offset k near its largest logit, in units of log 2."""

import triton
import triton.language as tl

from ..launch import widen

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first_sample", "ignore_index"])
def offset_kernel(
    x_ptr,
    weight_ptr,
    sampled_ptr,
    target_ptr,
    at_target_ptr,
    offset_ptr,
    first_sample,
    num_sampled,
    num_classes,
    num_features,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """The logit of a sample's target, and its offset; one that does not count has the offset inf."""
    local = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + first_sample + local)
    is_class = (target >= 0) & (target < num_classes)
    row = tl.where(is_class, target, 0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for base in range(0, num_features, BLOCK):
        d = base + lanes
        mask = d < num_features
        x = tl.load(x_ptr + local * num_features + d, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + row * num_features + d, mask=mask, other=0.0)
        total += widen(x, tl.float32) * widen(weight, tl.float32)
    at_target = tl.sum(total, 0)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for base in range(0, num_sampled, BLOCK):
        c = base + lanes
        z = tl.load(
            sampled_ptr + local * num_sampled + c, mask=c < num_sampled, other=-float("inf")
        )
        # What is not finite shows in the sums.
        largest = tl.maximum(largest, tl.where(tl.abs(z) < float("inf"), z, -float("inf")))
    offset = tl.max(largest, 0)
    offset = tl.where(
        (tl.abs(at_target) < float("inf")) & is_class, tl.maximum(offset, at_target), offset
    )
    offset = tl.where(tl.abs(offset) < float("inf"), offset, 0.0) * LOG2_E
    tl.store(at_target_ptr + local, at_target)
    tl.store(offset_ptr + local, tl.where(target != ignore_index, offset, float("inf")))


@triton.jit(do_not_specialize=["num_rows"])
def largest_kernel(
    largest_ptr, at_target_ptr, offset_ptr, guard_ptr, num_rows, num_tiles, BLOCK: tl.constexpr
):
    """The offsets from the largest logits of the tiles."""
    if tl.load(guard_ptr) != 0:
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = rows < num_rows
        largest = tl.full([BLOCK], -float("inf"), tl.float32)
        for _ in range(num_tiles):
            largest = tl.maximum(largest, tl.load(largest_ptr + rows, mask=mask, other=0.0))
            largest_ptr += num_rows
        offset = tl.load(offset_ptr + rows, mask=mask, other=0.0)
        known = (tl.abs(largest) < float("inf")) & (offset < float("inf"))
        at = tl.load(at_target_ptr + rows, mask=mask, other=0.0)
        largest = tl.where(tl.abs(at) < float("inf"), tl.maximum(largest, at), largest)
        tl.store(offset_ptr + rows, tl.where(known, largest * LOG2_E, offset), mask=mask)
