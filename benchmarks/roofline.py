"""What the machine can do at most: the rate at which it copies memory and multiplies matrices, measured.

`python benchmarks gpu_ceilings --out FILE` writes the two ceilings that a GPU's times are held against; on a CPU it
does the same at a small size.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Bytes of the copied tensor, side of the square matrices, by device: large against the caches, quick all the same.
COPIED = {"cuda": 2**30, "cpu": 2**28}
SIDE = {"cuda": 8192, "cpu": 1024}
# By the name in the results; tf32 is float32 under `precision`.
NAMES = ("float64", "float32", "bfloat16", "float16")
DTYPES = {"tf32": torch.float32, **{name: getattr(torch, name) for name in NAMES}}


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


def ceilings(device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    size, side = (4 << 30, 8192) if on_gpu else (64 << 20, 512)
    dtypes = ("float32", "tf32", "bfloat16") if on_gpu else ("float32",)
    return {
        "copy_bytes_per_second": copy_rate(device, size=size),
        **{f"{name}_flops_per_second": matrix_rate(name, device, side=side) for name in dtypes},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks gpu_ceilings", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    result = ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options.out.write_text(json.dumps(result) + "\n")
    for name, value in result.items():
        print(f"{name:<28} {value / 1e12:9.3f} x 10^12")
