"""The one place where a kernel is started, and what holds for all of them."""

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter truncates where the hardware rounds float32 to bfloat16, and loses bfloat16's subnormals.
INTERPRETED_BF16 = tl.constexpr(INTERPRETED)

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int = 1,
    fuse: bool = True,
    **named: Any,
) -> None:
    """Start `kernel`; `fuse` lets the compiler contract a * b + c, `named` are its constexpr arguments and any others.

    Nothing is tuned at run time: an in-place kernel must not be tried out on the tensors it updates.
    """
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse, **named)


@triton.jit
def widen(value, DTYPE: tl.constexpr):
    """What was loaded, in the arithmetic's DTYPE."""
    if INTERPRETED_BF16 and value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """`value` in DTYPE, rounded to nearest even."""
    if INTERPRETED_BF16 and DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)
