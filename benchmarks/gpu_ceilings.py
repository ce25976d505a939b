"""The two ceilings that times are held against: bytes per second of a copy, operations per second of a matrix product.

`python benchmarks/gpu_ceilings.py --out FILE`; on a CPU it does the same at a small size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
COPY_BYTES = (4 << 30) if ON_GPU else (64 << 20)
MATRIX_SIZE = 8192 if ON_GPU else 512


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call: between two events on the GPU, by the clock on a CPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


def matrix_rate(dtype: torch.dtype, tf32: bool = False) -> float:
    """Operations per second of a square product of random matrices."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    left, right = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    out = torch.empty_like(left)
    rate = 2 * MATRIX_SIZE**3 / seconds(lambda: torch.mm(left, right, out=out))
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate


def measure() -> dict[str, float]:
    found = {
        "copy_bytes_per_second": copy_bandwidth(),
        "float32_flops_per_second": matrix_rate(torch.float32),
    }
    if ON_GPU:
        found["tf32_flops_per_second"] = matrix_rate(torch.float32, tf32=True)
        found["bfloat16_flops_per_second"] = matrix_rate(torch.bfloat16)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = measure()
    options.out.write_text(json.dumps(result) + "\n")
    for name, value in result.items():
        print(f"{name:<28} {value / 1e12:9.3f} x 10^12")
