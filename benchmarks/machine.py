"""What a result was measured on: processor, GPU, versions, and the state of the sources."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# What a measurement of the kernels verifies.
SOURCES = ("csrc", "kernels", "alrao_fast")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


def source_hashes() -> dict[str, str]:
    """SHA-256 of every source file under `SOURCES`, by its path relative to the root."""
    files = sorted(
        path for room in SOURCES for path in (ROOT / room).rglob("*") if path.suffix in SUFFIXES
    )
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def source_state() -> str:
    """One hash for all of `source_hashes`, 16 hexadecimal digits."""
    lines = "".join(f"{digest} {name}\n" for name, digest in source_hashes().items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def describe() -> dict[str, Any]:
    """The machine line that goes with every result; equal on the same machine, versions and sources."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "sources": source_state(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version_of(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with a plus sign where tracked files differ from it; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return None
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode != 0
    return head.stdout.strip() + ("+" if dirty else "")
