"""Compiles ahead of time what the Triton launchers would start, without a GPU, and reads the machine code's resources.

`record(call)` runs a launcher on CPU tensors with the kernels themselves left out: which kernels it starts, with which
types, alignments and constants, does not depend on data. `compile_all` compiles the distinct ones for every target.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Start(NamedTuple):
    """A kernel as a launcher starts it: what decides its machine code."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def runs_on(self, target: str) -> bool:
        """Tiles that are copied as such are for Hopper alone."""
        return target == "sm_90" or not any("desc" in kind for _, kind in self.signature)

    def __str__(self) -> str:
        flags = [
            f"{self.signature[i][0]}={value}"
            for i, value in self.constants
            if self.signature[i][0].isupper() and value is not False
        ]
        types = [kind for _, kind in self.signature if kind[0] == "*" and kind[1] in "fb"]
        warps = dict(self.options)["num_warps"]
        return f"{self.kernel.__name__} {warps} warps {' '.join(flags)} {','.join(dict.fromkeys(types))}"


class Resources(NamedTuple):
    """Of a compiled kernel. `spills`: for NVIDIA accesses to local memory, for AMD registers."""

    registers: int
    spills: int
    shared: int
    compiled: CompiledKernel


def record(call: Callable[[], object]) -> list[Start]:
    """The kernels that `call` starts."""
    starts: list[Start] = []

    def run(self, *args, grid, warmup, **kwargs):
        options = tuple((key, kwargs.pop(key)) for key in _OPTIONS)
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        signature, constants, aligned = [], [], []
        for i, (param, value) in enumerate(zip(self.params, bound.arguments.values(), strict=True)):
            kind = param.annotation_type
            if param.is_constexpr:
                kind = "constexpr"
                constants.append((i, value))
            elif isinstance(value, torch.Tensor):
                kind = _POINTERS[value.dtype]
                if value.data_ptr() % 16 == 0:
                    aligned.append(i)
            elif isinstance(value, TensorDescriptor):
                element = _POINTERS[value.base.dtype].removeprefix("*")
                kind = f"tensordesc<{element}[{', '.join(map(str, value.block_shape))}]>"
            elif isinstance(value, bool):
                kind = "i1"
            elif isinstance(value, int):
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
                if param.do_not_specialize:
                    pass
                elif value == 1:
                    kind = "constexpr"
                    constants.append((i, value))
                elif value % 16 == 0:
                    aligned.append(i)
            assert kind, f"{self.__name__}: {param.name} is an untyped {type(value).__name__}"
            signature.append((param.name, kind))
        starts.append(Start(self, tuple(signature), tuple(constants), tuple(aligned), options))

    nowhere = SimpleNamespace(get_current_device=lambda: None)
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(driver, "_active", nowhere):
        call()
    return starts


def compile_for(start: Start, target: str) -> Resources:
    source = ASTSource(
        start.kernel,
        dict(start.signature),
        {(i,): value for i, value in start.constants},
        {(i,): [["tt.divisibility", 16]] for i in start.aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(start.options))
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

        return Resources(field("vgpr_count"), field("vgpr_spill_count"), shared, compiled)
    usage = _read(compiled, "cuobjdump", "-res-usage")
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    # Without local memory there is nothing to look for in the code; of what is set aside not all is used.
    code = _code(compiled) if int(stack) + int(local) else ""
    return Resources(int(registers), len(re.findall(r"\b(STL|LDL)\b", code)), shared, compiled)


def wide_accesses(compiled: CompiledKernel) -> tuple[int, int]:
    """How many loads and stores of 16 bytes the machine code for an NVIDIA GPU has."""
    code = _code(compiled)
    loads, stores = (re.findall(rf"\b{name}\.E\.(?:\w+\.)*128\b", code) for name in ("LDG", "STG"))
    return len(loads), len(stores)


def _code(compiled: CompiledKernel) -> str:
    # It takes a third of a second.
    return _read(compiled, "nvdisasm", "-c")


def _read(compiled: CompiledKernel, tool: str, option: str) -> str:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tools / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
