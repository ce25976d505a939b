"""Builds csrc's arithmetic of one element as Python modules (module.cpp), with the host compiler.

`host` is what the oldest processors run and `fused` what newer ones and GPUs do, which contract to fused multiply-adds;
`emulated` is the CUDA kernels' side, as tests/cuda_on_cpu compiles it. Kept in build/element_math by a hash of what
they are made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from cuda_on_cpu import build as cuda_on_cpu

HERE = Path(__file__).resolve().parent
CSRC = cuda_on_cpu.ROOT / "csrc"
WORK = cuda_on_cpu.ROOT / "build" / "element_math"
toolchain = cuda_on_cpu.toolchain

BUILDS = {
    "host": "-O3",
    "fused": "-O3 -march=x86-64-v3 -ffp-contract=fast",
    "emulated": f"{cuda_on_cpu.FLAGS} -I{cuda_on_cpu.HERE}",
}


def obstacle() -> str | None:
    """Why nothing can be built here, or None."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return toolchain.find_cpp().missing


def cannot_run(name: str) -> str | None:
    """Why a build cannot run on this machine, or None."""
    if name != "fused":
        return None
    if platform.machine() != "x86_64":
        return "fused multiply-adds are asked for by the name of an x86-64"
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.exists() and " fma " in cpuinfo.read_text() and " avx2 " in cpuinfo.read_text()
    return None if known else "this processor has no fused multiply-add"


def build() -> dict[str, Path]:
    """Bring every build that runs here up to date, and return the modules' files."""
    names = [name for name in BUILDS if cannot_run(name) is None]
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return dict(zip(names, pool.map(_build, names)))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> str:
    # Not one name for all: Python would take the first for the others.
    return f"element_math_{name}"


def _build(name: str) -> Path:
    import pybind11

    flags = [
        *"-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Werror".split(),
        *BUILDS[name].split(),
        f"-DELEMENT_MATH={_module(name)}",
        f"-I{CSRC}",
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
    ]
    command = [*toolchain.find_cpp().compiler, *flags, "-shared", str(HERE / "module.cpp")]
    made_of = hashlib.sha256("\0".join([sys.version, pybind11.__version__, *command]).encode())
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *cuda_on_cpu.HERE.glob("*.h")]
    for path in sorted([HERE / "module.cpp", *headers]):
        made_of.update(path.read_bytes())
    target = WORK / made_of.hexdigest()[:16] / f"{_module(name)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        unfinished.replace(target)
    return target
