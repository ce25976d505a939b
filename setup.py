"""Builds alrao_fast._C against the LibTorch stable ABI; what is declarative stands in pyproject.toml.

What cannot be built here is left out with one line that says why (also kept in
alrao_fast/_build_info.json, for `python -m alrao_fast doctor`), and the package works without it.
Environment variables:

ALRAO_CUDA            unset: the CUDA kernels are built where torch is a CUDA build and there is a
                      toolkit of the same major version; 0: never; 1: an error where they cannot be;
                      force: compiled and linked even under a CPU build of torch (for continuous
                      integration without a GPU), warnings being errors.
ALRAO_CPP=0           pure Python: every op runs through the reference.
TORCH_CUDA_ARCH_LIST  as for torch's own extensions: "9.0" or "8.0;9.0+PTX"; "native": the GPUs of this machine, which
                      is also what a build in place (editable) takes where there are any; else, and for a wheel,
                      which may travel, 8.0 to 12.0 and PTX.
CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS and MAX_JOBS have their usual meaning;
NVCC_APPEND_FLAGS=-lineinfo shows a profiler the sources' lines, in a binary of 2.5 times the size.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build frontend leaves the source folder out

from toolchain import (  # noqa: E402
    CXX_FLAGS,
    ISAS,
    Cpp,
    Toolkit,
    Torch,
    choose_archs,
    choose_jobs,
    decide_cuda,
    find_cpp,
    find_gpus,
    find_toolkit,
    find_torch,
    free_memory,
)

WORK = ROOT / "build" / "ext"  # objects and build.ninja: kept between builds, whoever starts them
LIBRARY = "_C.abi3.so"

# Without these, loops that call exp or compare floats are not vectorised; NaN and infinity keep
# their meaning.
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
STRICT_NVCC_FLAGS = ["-Werror=all-warnings"]


def prefix_maps(folders: list[Path | str]) -> list[str]:
    """Options that keep the paths of this machine out of the binary: torch's macros put their file into messages."""
    return [f"-ffile-prefix-map={folder}/=" for folder in folders]


def write_ninja(cpp: Cpp, torch: Torch, cuda: Toolkit | None, nvcc_flags: list[str]) -> None:
    """Write WORK/build.ninja, which makes LIBRARY from everything under csrc."""
    csrc = ROOT / "csrc"
    headers = [str(torch.root / "include"), sysconfig.get_path("include")]
    flags = [
        *CXX_FLAGS,
        f"-I{csrc}",
        *(word for folder in headers for word in ("-isystem", folder)),
        *prefix_maps([csrc, *headers]),
    ]
    # Names of static libraries stay inside: torch brings its own CUDA runtime into the process.
    link = ["-shared", "-Wl,--exclude-libs,ALL", f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    if cpp.multi_isa:
        flags.append("-DALRAO_MULTI_ISA")
    if cuda:
        link += [f"-L{cuda.libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    compiler = _words(cpp.compiler)
    lines = [
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d {_words(flags)} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {compiler} $in {_words(link)} -o $out",
        "  description = link $out",
    ]
    if cuda:
        maps = [f"-Xcompiler={flag}" for flag in prefix_maps([csrc])]
        nvcc = [str(cuda.root / "bin" / "nvcc"), "-ccbin", cpp.driver, *NVCC_FLAGS, *nvcc_flags]
        lines += [
            "rule cuda",
            f"  command = {_words([*nvcc, f'-I{csrc}', *maps])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
        ]

    objects = []

    def compile_source(
        source: Path, rule: str, tag: str = "", extra: list[str] | None = None
    ) -> None:
        target = _path(f"{source.relative_to(csrc)}{tag}.o")
        objects.append(target)
        lines.append(f"build {target}: {rule} {_path(source)}")
        if extra:
            lines.append(f"  extra = {_words(extra)}")

    # A family's folder holds what all its backends share, its cpu/ and cuda/ the backends.
    kernels = sorted(csrc.glob("*/cpu/*_kernel.cpp"))
    host = {*csrc.glob("*.cpp"), *csrc.glob("*/*.cpp"), *csrc.glob("*/cpu/*.cpp")}
    for source in sorted(host.difference(kernels)):
        compile_source(source, "cxx")
    for source in kernels:
        if cpp.multi_isa:
            for isa, march in ISAS.items():
                extra = [*KERNEL_FLAGS, f"-DALRAO_ISA={isa}", march]
                compile_source(source, "cxx", f".{isa}", extra)
        else:
            compile_source(source, "cxx", "", [*KERNEL_FLAGS, "-DALRAO_ISA=plain"])
    if cuda:
        for source in sorted(csrc.glob("*/cuda/*.cpp")):
            compile_source(source, "cxx", extra=["-isystem", str(cuda.root / "include")])
        for source in sorted(csrc.glob("*/cuda/*.cu")):
            compile_source(source, "cuda")
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}"]
    (WORK / "build.ninja").write_text("\n".join(lines) + "\n")


def _words(items: list[str]) -> str:
    """Words of a command, escaped for the shell and for ninja."""
    return " ".join(shlex.quote(item) for item in items).replace("$", "$$")


def _path(item: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(item))


class BuildKernels(build_ext):
    """Compiles what this machine can compile and records it in alrao_fast/_build_info.json."""

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if inplace else Path(self.build_lib)) / "alrao_fast"
        package.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        with open(WORK / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until closed: builds share WORK
            self._build_into(package, inplace)

    def _build_into(self, package: Path, stays: bool) -> None:
        info = self._compile(stays)
        target = package / LIBRARY
        if info["extension_skipped"]:
            target.unlink(missing_ok=True)
        else:
            # In one step: a running process may have the old file mapped.
            partial = target.with_suffix(f".{os.getpid()}")
            shutil.copy2(WORK / LIBRARY, partial)
            os.replace(partial, target)
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def _compile(self, stays: bool) -> dict[str, Any]:
        torch, cpp, request = find_torch(), find_cpp(), os.environ.get("ALRAO_CUDA", "")
        toolkit = None if request == "0" or cpp.missing else find_toolkit()
        cuda_skipped = decide_cuda(request, torch, toolkit, cpp.missing)
        info: dict[str, Any] = {
            "torch": torch.version if torch else None,
            "extension_skipped": cpp.missing,
            "compiler": cpp.compiler_version or None,
            "isas": [],
            "cuda_skipped": cuda_skipped,
            "cuda_toolkit": None,
            "cuda_archs": [],
        }
        if cpp.missing or torch is None:
            _say(f"C++ and CUDA kernels left out, the reference serves every op: {cpp.missing}")
            return info
        info["isas"] = list(ISAS) if cpp.multi_isa else ["plain"]
        gencode: list[str] = []
        if cuda_skipped:
            _say(f"CUDA kernels left out: {cuda_skipped}")
            toolkit = None
        elif toolkit:
            asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
            here = find_gpus() if stays or asked == "native" else ()
            gencode = choose_archs(asked, toolkit.archs, here)
            info["cuda_toolkit"] = toolkit.version
            info["cuda_archs"] = [option.rpartition("=")[2] for option in gencode]
        strict = STRICT_NVCC_FLAGS if request == "force" else []
        write_ninja(cpp, torch, toolkit, [*gencode, *strict])
        cpus = len(os.sched_getaffinity(0))
        jobs = choose_jobs(os.environ.get("MAX_JOBS", ""), cpus, free_memory())
        if subprocess.run([cpp.ninja, "-C", str(WORK), "-j", str(jobs)]).returncode != 0:
            raise SystemExit(
                "alrao_fast: the kernels did not compile; the compiler's message stands above. "
                "ALRAO_CUDA=0 leaves out the CUDA kernels, ALRAO_CPP=0 all of them."
            )
        return info

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "alrao_fast"
        made = (package / LIBRARY, package / "_build_info.json")
        return [str(path) for path in made if path.exists()]


def _say(text: str) -> None:
    print(f"alrao_fast: {text}", flush=True)


_FIRST = '''"""Finds the package by setuptools' finder where sys.path has the folder for type checkers."""

import os
import sys

import {finder} as own


class First:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "alrao_fast":
            for entry in sys.path:
                if entry == {folder!r}:
                    return own._EditableFinder.find_spec(name, path, target)
                if os.path.isdir(os.path.join(entry, "alrao_fast")):
                    break
        return None


sys.meta_path.insert(0, First)
'''


class Editable(editable_wheel):
    """An editable install that type checkers see: they do not run the finder that setuptools makes, but read paths.

    The path is a folder with nothing but a link to the package: the repository's own would offer `tests` and `kernels`
    to every import. At run time the finder takes the link's place, so that modules keep their own files; what stands
    before it in sys.path, by PYTHONPATH for instance, comes first as ever.
    """

    def _select_strategy(self, *arguments: Any) -> Any:
        strategy = super()._select_strategy(*arguments)
        made = getattr(strategy, "get_implementation", None)
        if made is None:  # a mode that was asked for, with paths of its own
            return strategy
        folder = ROOT / "build" / "editable"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "alrao_fast"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "..", "alrao_fast"))

        def with_path() -> Iterator[tuple[str, bytes]]:
            files = dict(made())
            yield from files.items()
            finder = next(name for name in files if name.endswith(".py")).removesuffix(".py")
            module = f"{finder}_first"
            yield f"{module}.py", _FIRST.format(finder=finder, folder=str(folder)).encode()
            # After the file that installs the finder, since their order is the alphabet's.
            name = next(name for name in files if name.endswith(".pth")).removesuffix(".pth")
            yield f"{name}.types.pth", f"{folder}\nimport {module}\n".encode()

        strategy.get_implementation = with_path
        return strategy


class Build(build):
    # build_ext always runs: without a compiler it still records why nothing was built.
    sub_commands = [
        (name, None if name == "build_ext" else condition) for name, condition in build.sub_commands
    ]


if __name__ == "__main__":
    native = find_cpp().missing is None
    setup(
        packages=[
            *find_packages(include=["alrao_fast", "alrao_fast.*"]),
            "alrao_fast.kernels",
            *(f"alrao_fast.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"alrao_fast.kernels": "kernels"},
        ext_modules=[Extension("alrao_fast._C", [], py_limited_api=True)] if native else [],
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
        cmdclass={"build": Build, "build_ext": BuildKernels, "editable_wheel": Editable},
    )
