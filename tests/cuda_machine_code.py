"""Reads the machine code of the CUDA kernels, compiled without a GPU: registers, local and shared memory, and accesses.

`python tests/cuda_machine_code.py` builds and prints the table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "ext"


class Kernel(NamedTuple):
    """One kernel for one architecture. `stack` is what it has in local memory: spilled registers, arrays, calls."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    shared: int


# What the tests compile for; a wheel is made for two more, which takes twice as long.
USUAL_ARCHS = "8.0;9.0"


def build(archs: str = "") -> None:
    """Compile the CUDA kernels, warnings being errors. `archs`: as TORCH_CUDA_ARCH_LIST, empty for those of a wheel."""
    environment = {**os.environ, "ALRAO_CUDA": "force", "TORCH_CUDA_ARCH_LIST": archs}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/machine_code"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout)


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, which also travels in triton's wheel."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if beside.exists():
            return str(beside)
    return shutil.which("cuobjdump")


def sources() -> list[Path]:
    return sorted(CSRC.glob("*/cuda/*.cu"))


def object_of(source: Path) -> Path:
    """What the last build compiled a source to."""
    return OBJECTS / f"{source.relative_to(CSRC)}.o"


def objects() -> list[Path]:
    return [object_of(source) for source in sources()]


def read_resources(objects: Iterable[Path]) -> list[Kernel]:
    """Every kernel in the objects, for every architecture; a source's name is its place in the objects' folder."""
    found: list[tuple[str, str, str, list[int]]] = []
    for path in objects:
        arch = ""
        mangled = ""
        for line in run(cuobjdump(), "-res-usage", path).splitlines():
            if match := re.match(r"arch = (\w+)", line):
                arch = match.group(1)
            elif match := re.match(r"\s*Function (\S+):", line):
                mangled = match.group(1)
            elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
                found.append((_source(path), mangled, arch, [int(x) for x in match.groups()]))
    names = demangle({mangled for _, mangled, _, _ in found})
    return [
        Kernel(source, names[mangled], arch, *numbers) for source, mangled, arch, numbers in found
    ]


def _source(compiled: Path) -> str:
    inside = compiled.is_relative_to(OBJECTS)
    return str((compiled.relative_to(OBJECTS) if inside else compiled).with_suffix(""))


def read_accesses(compiled: Path, arch: str) -> dict[str, list[str]]:
    """For each kernel of an object its reads and writes of global memory, such as LDG.E.128."""
    found: dict[str, list[str]] = {}
    accesses: list[str] = []
    for line in run(cuobjdump(), "-arch", arch, "-sass", compiled).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            accesses = found.setdefault(match.group(1), [])
        elif match := re.search(r"\b(?:LDG|STG)\.E[\w.]*", line):
            accesses.append(match.group())
    names = demangle(found)
    return {names[mangled]: accesses for mangled, accesses in found.items()}


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Kernels' names with their template arguments, without namespaces and parameters."""
    names = list(names)
    said = run("c++filt", input="\n".join(names)).splitlines()
    return {name: _shorten(text) for name, text in zip(names, said, strict=True)}


def _shorten(text: str) -> str:
    text = text.replace("(anonymous namespace)::", "").replace("alrao::cuda::", "")
    text = re.sub(r"^void ", "", text).replace("alrao::", "")
    # Up to the parameters; a cast in the template's arguments has parentheses too.
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:i]
    return text


def table(kernels: Iterable[Kernel]) -> str:
    """Registers per architecture, one line a kernel."""
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.source, kernel.name), {})[kernel.arch] = kernel
    archs = sorted({arch for row in rows.values() for arch in row}, key=lambda arch: int(arch[3:]))
    lines = [" ".join([*(f"{arch:>6}" for arch in archs), " stack shared  kernel"])]
    for (source, name), row in rows.items():
        registers = [f"{row[arch].registers if arch in row else '-':>6}" for arch in archs]
        stack = max(kernel.stack for kernel in row.values())
        shared = max(kernel.shared for kernel in row.values())
        lines.append(" ".join([*registers, f"{stack:>6} {shared:>6}  {source}: {name}"]))
    return "\n".join(lines)


def run(*command: object, input: str | None = None) -> str:
    """The output of a command that must succeed."""
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True, input=input
    ).stdout


if __name__ == "__main__":
    build()
    print(table(read_resources(objects())))
