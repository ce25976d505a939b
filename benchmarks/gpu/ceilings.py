"""The two ceilings that times are held against: bytes per second of a copy, operations per second of a matrix product.

`python benchmarks gpu_ceilings --out FILE`; on a CPU it does the same at a small size.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.roofline import copy_rate, matrix_rate


def measure(device: torch.device) -> dict[str, float]:
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
    result = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options.out.write_text(json.dumps(result) + "\n")
    for name, value in result.items():
        print(f"{name:<28} {value / 1e12:9.3f} x 10^12")
