"""The one place where a kernel is started, and what holds for all of them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

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
) -> Any:
    """Start `kernel`, and return what was compiled for it.

    fuse: whether the compiler may contract a * b + c. named: its constexpr arguments, and any others.

    Nothing is tuned at run time: an in-place kernel must not be tried out on the tensors it updates.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse}
    return kernel[grid](*args, **options, **named)


class Prepared:
    """A kernel that is started again and again with the same constexpr arguments: `constants`, all that it has.

    Triton looks at every argument of every launch, constants included, to find the machine code that fits; for dozens
    of them that takes longer than all else that a small step does. Here what was found is kept, by all that it depends
    on: the device, and the dtypes and alignments of the tensors. Numbers have to be of one type in every launch, and
    annotated or not specialised in the kernel.
    """

    def __init__(self, kernel: Any, *, num_warps: int, fuse: bool = True, **constants: Any) -> None:
        self.kernel, self._named = kernel, {"num_warps": num_warps, "fuse": fuse, **constants}
        self._constants = [constants[name] for name in kernel.arg_names if name in constants]
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        if INTERPRETED:
            launch(self.kernel, grid, *args, **self._named)
            return
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        found = (
            driver.active.get_current_device(),
            *map(_dtype, tensors),
            *[address % 16 == 0 for address in map(_address, tensors)],
        )
        compiled = self._compiled.get(found)
        if compiled is None:
            self._compiled[found] = launch(self.kernel, grid, *args, **self._named)
        else:
            compiled[grid](*args, *self._constants)


_address, _dtype = Tensor.data_ptr, Tensor.dtype.__get__


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
