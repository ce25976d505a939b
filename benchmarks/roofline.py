"""What the machine can do at most: the rate at which it copies memory and multiplies matrices, measured."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

# Bytes of the copied tensor, side of the square matrices, by device: large against the caches, quick all the same.
COPIED = {"cuda": 2**30, "cpu": 2**28}
SIDE = {"cuda": 8192, "cpu": 1024}
# By the name in the results; tf32 is float32 under `precision`.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Within the block products of float32 matrices may be rounded to TensorFloat-32 if `dtype` is "tf32"."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of `repeats` calls: the limit is what is looked for."""
    call()
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def copy_rate(device: torch.device, *, size: int | None = None) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones((size or COPIED[device.type]) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, 7)


def matrix_rate(dtype: str, device: torch.device, *, side: int | None = None) -> float:
    """Flops per second of a product of two square matrices."""
    side = side or SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    with precision(dtype):
        return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device, 5)
