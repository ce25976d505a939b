"""Builds, with the host compiler, the extension with its CUDA kernels run on the CPU, plain and with sanitizers.

Every build has a copy of the package (links to its files) whose `_C` holds csrc's CUDA folders against the header of
this folder, and a program of kernels that test the header itself. Everything else in `_C` comes from the objects of the
ordinary build. Objects are kept in build/cuda_on_cpu.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "cuda_on_cpu"
EXTENSION = ROOT / "build" / "ext"

_spec = importlib.util.spec_from_file_location("toolchain", ROOT / "toolchain.py")
toolchain = importlib.util.module_from_spec(_spec)
sys.modules["toolchain"] = toolchain
_spec.loader.exec_module(toolchain)

BUILDS = {
    "plain": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all -DCUDA_ON_CPU_ASAN",
    "thread": "-fsanitize=thread -DCUDA_ON_CPU_TSAN",
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Memory is read as whatever type a kernel likes, and a line of it is what a report shows.
FLAGS = (
    "-O1 -g1 -fno-strict-aliasing -fno-omit-frame-pointer -Wno-unknown-pragmas -DALRAO_CUDA_ON_CPU"
)


def obstacle() -> str | None:
    """Why nothing can be built here, or None."""
    cpp = toolchain.find_cpp()
    if cpp.missing:
        return cpp.missing
    if (
        "Free Software Foundation"
        not in subprocess.run([*cpp.compiler, "--version"], capture_output=True, text=True).stdout
    ):
        return f"{cpp.compiler[0]} is not g++, whose attribute keeps shared memory together"
    if not (EXTENSION / "build.ninja").exists():
        return "the extension was not built in this folder: make kernels"
    return None


def missing_runtime(build: str) -> str | None:
    """Why the programs of a build cannot start here, or None."""
    library = RUNTIMES.get(build)
    if library and not _runtime(library).is_absolute():
        return f"{library} is not installed"
    return None


def build(*targets: Path) -> None:
    """Bring libraries and programs up to date."""
    WORK.mkdir(parents=True, exist_ok=True)
    # Of the ordinary build, whose objects go in, and of this one.
    with open(EXTENSION / "lock", "w") as ordinary, open(WORK / "lock", "w") as lock:
        fcntl.flock(ordinary, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (WORK / "build.ninja").write_text(_ninja())
        jobs = toolchain.choose_jobs(
            os.environ.get("MAX_JOBS", ""), len(os.sched_getaffinity(0)), toolchain.free_memory()
        )
        done = subprocess.run(
            [toolchain.find_cpp().ninja, "-C", str(WORK), "-j", str(jobs)]
            + [str(target.relative_to(WORK)) for target in targets],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        for name in BUILDS:
            if library(name) in targets:
                _arrange_package(name)


def library(build: str) -> Path:
    return WORK / build / "_C.abi3.so"


def program(build: str) -> Path:
    return WORK / build / "primitives"


def command(build: str, *arguments: str) -> list[str]:
    """Python's command line for a process that imports a build's package."""
    preload = []
    if build in RUNTIMES:
        # The C++ library too: a sanitizer looks for __cxa_throw when it starts.
        libraries = (RUNTIMES[build], "libstdc++.so.6")
        preload = [f"LD_PRELOAD={' '.join(str(_runtime(library)) for library in libraries)}"]
    path = os.pathsep.join([str(WORK / build / "site"), str(HERE.parent)])
    return [
        "env",
        f"PYTHONPATH={path}",
        "ASAN_OPTIONS=detect_leaks=0",
        "UBSAN_OPTIONS=print_stacktrace=1",
        "TSAN_OPTIONS=halt_on_error=1 ignore_noninstrumented_modules=1",
        *preload,
        sys.executable,
        *arguments,
    ]


def _runtime(library: str) -> Path:
    said = subprocess.run(
        [toolchain.find_cpp().driver, f"-print-file-name={library}"], capture_output=True, text=True
    )
    return Path(said.stdout.strip())


def _ninja() -> str:
    cpp, torch = toolchain.find_cpp(), toolchain.find_torch()
    compiler = " ".join(cpp.compiler)
    standard = " ".join(flag for flag in toolchain.CXX_FLAGS if flag != "-O3")
    folders = f"-I{HERE} -I{ROOT / 'csrc'} -isystem {torch.root / 'include'}"
    python = sysconfig.get_path("include")
    lines = [
        "rule compile",
        f"  command = {compiler} {standard} {FLAGS} {folders} -isystem {python} $flags"
        " -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule library",
        f"  command = {compiler} -shared $in $flags -Wl,--exclude-libs,ALL -Wl,-T,{HERE / 'shared_memory.ld'}"
        f" -L{torch.root / 'lib'} -ltorch_cpu -o $out",
        "rule program",
        f"  command = {compiler} $in $flags -Wl,-T,{HERE / 'shared_memory.ld'} -o $out",
    ]
    listed = (EXTENSION / "build.ninja").read_text()
    names = re.search(r"^build \S+: link (.+)$", listed, re.MULTILINE).group(1).split()
    ordinary = [str(EXTENSION / name) for name in names if "/cuda/" not in name]
    csrc = ROOT / "csrc"
    sources = sorted([*csrc.glob("*/cuda/*.cu"), *csrc.glob("*/cuda/*.cpp")])
    sources.remove(csrc / "common" / "cuda" / "stream.cpp")
    for name, flags in BUILDS.items():
        objects = {}
        for source in [*sources, *HERE.glob("*.cpp"), *HERE.glob("*.cu")]:
            folder = csrc if source.is_relative_to(csrc) else HERE
            objects[source] = target = f"{name}/{source.relative_to(folder)}.o"
            own = flags
            # The scheduler only tells a sanitizer what it does; launches order the host's code, without it.
            if source.name == "cuda_on_cpu.cpp" or (source.suffix == ".cpp" and name == "thread"):
                own = re.sub(r"-f\S+", "", flags)
            if source.suffix == ".cpp" and folder == csrc:
                own += " -O0"  # it is compiled longer than it runs
            lines += [f"build {target}: compile {source}", f"  flags = {own}"]
        scheduler = objects[HERE / "cuda_on_cpu.cpp"]
        parts = [objects[source] for source in sources]
        parts += [objects[HERE / "host.cpp"], scheduler, *ordinary]
        lines += [
            f"build {name}/_C.abi3.so: library {' '.join(parts)} | {HERE / 'shared_memory.ld'}",
            f"  flags = {flags}",
            f"build {name}/primitives: program {objects[HERE / 'primitives.cu']} {scheduler}"
            f" | {HERE / 'shared_memory.ld'}",
            f"  flags = {flags}",
        ]
    return "\n".join(lines) + "\n"


def _arrange_package(build: str) -> None:
    package = WORK / build / "site" / "alrao_fast"
    package.mkdir(parents=True, exist_ok=True)
    links = {
        path.name: path
        for path in (ROOT / "alrao_fast").iterdir()
        if not path.name.startswith(("_C", "__pycache__"))
    }
    links |= {"kernels": ROOT / "kernels", "_C.abi3.so": library(build)}
    # What is right stays: a test in another process may be reading it.
    for path in package.iterdir():
        if path.is_symlink() and links.get(path.name) == path.readlink():
            del links[path.name]
        elif path.is_symlink():
            path.unlink()
    for name, target in links.items():
        (package / name).symlink_to(target)
