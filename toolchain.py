"""What this machine can compile: the facts, and the decisions, which are functions of the facts alone.

Used by setup.py and its tests; not part of the installed package.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

MIN_TORCH = (2, 11)
CUDA_ARCHS = ("8.0", "9.0", "10.0", "12.0")  # the last one also as PTX, for what comes later
ISAS = {"v2": "-march=x86-64-v2", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DPy_LIMITED_API=0x030a0000",
]


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None = None
    hip: str | None = None


@dataclass(frozen=True)
class Cpp:
    """The C++ side; `missing` says why nothing can be compiled."""

    compiler: list[str] = field(default_factory=list)
    compiler_version: str = ""
    multi_isa: bool = False
    ninja: str = ""
    missing: str | None = None

    @property
    def driver(self) -> str:
        """The compiler itself, where CXX also names a cache or adds options."""
        caches = ("ccache", "sccache", "distcc")
        return next(word for word in self.compiler if Path(word).name not in caches)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit; `archs` is what its nvcc compiles for, `error` why it does not compile here."""

    root: Path
    version: str
    archs: tuple[str, ...] = ()
    libraries: Path | None = None
    error: str | None = None


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def decide_cuda(
    request: str, torch: Torch | None, toolkit: Toolkit | None, cpp_missing: str | None = None
) -> str | None:
    """None to build the CUDA kernels, else why they are left out. `request` is the value of ALRAO_CUDA."""
    if request not in ("", "0", "1", "force"):
        raise SystemExit(f"ALRAO_CUDA is {request!r}; it takes 0, 1 or force, or is left unset")
    if request == "0":
        return "ALRAO_CUDA=0"
    reason = cpp_missing or _cuda_obstacle(request == "force", torch, toolkit)
    if reason and request:
        raise SystemExit(f"ALRAO_CUDA={request}, but the CUDA kernels cannot be built: {reason}")
    return reason


def _cuda_obstacle(force: bool, torch: Torch | None, toolkit: Toolkit | None) -> str | None:
    if not force:
        if torch is None:
            return "torch is not installed in the environment that builds"
        if torch.hip:
            return f"torch {torch.version} is a ROCm build, for which there is no CUDA"
        if not torch.cuda:
            return f"torch {torch.version} is a CPU build; install a CUDA build of torch first"
    if toolkit is None:
        return "no CUDA toolkit found; install one, or set CUDA_HOME to where it is"
    if toolkit.error:
        return f"CUDA {toolkit.version} does not compile here: {toolkit.error}"
    if not force and torch and torch.cuda:
        if version_tuple(toolkit.version)[:1] != version_tuple(torch.cuda)[:1]:
            return (
                f"the toolkit is CUDA {toolkit.version} and torch was built for CUDA {torch.cuda}: "
                "the majors must agree; set CUDA_HOME to a matching toolkit"
            )
    return None


def choose_archs(asked: str, known: tuple[str, ...], present: tuple[str, ...] = ()) -> list[str]:
    """nvcc's -gencode options. `asked` is TORCH_CUDA_ARCH_LIST, `known` a toolkit's `archs`.

    `present`: compute capabilities of this machine's GPUs, for a build that stays here; for a wheel, which may travel,
    only "native" asks for them.
    """
    wanted = [arch for arch in re.split(r"[;,\s]+", asked) if arch]
    if wanted == ["native"] and not present:
        raise SystemExit(
            'TORCH_CUDA_ARCH_LIST is native, and nvidia-smi shows no GPU here; write numbers, as in "8.0;9.0+PTX"'
        )
    if not wanted or wanted == ["native"]:
        # A GPU newer than the toolkit runs the PTX of the list below.
        all_known = all(arch.replace(".", "") in known for arch in present)
        wanted = sorted(set(present)) if all_known else []
    if not wanted:
        usable = [arch for arch in CUDA_ARCHS if arch.replace(".", "") in known]
        if not usable:
            raise SystemExit(
                f"nvcc compiles for none of {', '.join(CUDA_ARCHS)}; set TORCH_CUDA_ARCH_LIST"
            )
        wanted = [*usable[:-1], f"{usable[-1]}+PTX"]
    options = []
    for arch in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: cannot read {arch!r}; write numbers, as in "8.0;9.0+PTX"'
            )
        major, minor, variant, ptx = match.groups()
        if major + minor not in known:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: nvcc does not know {arch}; it knows {', '.join(known)}"
            )
        name = major + minor + variant
        options.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            options.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return options


def find_gpus() -> tuple[str, ...]:
    """Compute capabilities of the GPUs that the driver shows, as in ("9.0",)."""
    if shutil.which("nvidia-smi") is None:
        return ()
    said = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    lines = [line.strip() for line in said.splitlines()]
    return tuple(line for line in lines if re.fullmatch(r"\d+\.\d", line))


def choose_jobs(asked: str, cpus: int, memory: int) -> int:
    """Parallel compilations: MAX_JOBS if set, else one per CPU with a GiB of free memory for each."""
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, min(cpus, memory >> 30))


def free_memory() -> int:
    """Bytes that can still be taken: on the machine and, in a container, within its limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        free = int(available.group(1)) * 1024 if available else free
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


@lru_cache(None)
def find_torch() -> Torch | None:
    # Importing torch takes seconds, and its version stands in a file of its own.
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    facts = runpy.run_path(str(root / "version.py"))
    return Torch(root, str(facts["__version__"]), facts.get("cuda"), facts.get("hip"))


@lru_cache(None)
def find_cpp() -> Cpp:
    torch = find_torch()
    if os.environ.get("ALRAO_CPP") == "0":
        return Cpp(missing="ALRAO_CPP=0")
    if sys.platform != "linux":
        return Cpp(missing=f"the kernels are built on Linux, and this is {sys.platform}")
    if torch is None:
        return Cpp(missing="torch is not installed in the environment that builds")
    if version_tuple(torch.version) < MIN_TORCH:
        return Cpp(missing=f"torch {torch.version} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}")
    compiler = shlex.split(os.environ.get("CXX", ""))
    if not compiler:
        compiler = [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        sought = compiler[0] if compiler else "g++ or clang++"
        return Cpp(missing=f"no C++ compiler found ({sought}); install one, or set CXX")
    ninja = _find_ninja()
    if ninja is None:
        return Cpp(missing="ninja is not installed; pip install ninja")
    source = "#include <Python.h>\n#include <optional>\nstd::optional<int> x;\n"
    options = [*CXX_FLAGS, f"-I{sysconfig.get_path('include')}"]
    complaint = _complaint([*compiler, *options], ".cpp", source)
    if complaint:
        hint = "; install Python's development headers" if "Python.h" in complaint else ""
        return Cpp(missing=f"{compiler[0]} does not compile a test file: {complaint}{hint}")
    version = _output([*compiler, "--version"]).splitlines()[0]
    multi_isa = platform.machine() == "x86_64" and not any(
        _complaint([*compiler, march], ".cpp", "int x;\n") for march in ISAS.values()
    )
    return Cpp(compiler, version, multi_isa, ninja)


def find_toolkit() -> Toolkit | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc_on_path = shutil.which("nvcc")
    if nvcc_on_path:
        # It can be a wrapper script whose folder is not the toolkit: nvcc itself knows.
        said = _output([nvcc_on_path, "--dryrun", "x.cu"])
        places += re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    found = [Path(place) for place in places if place and (Path(place) / "bin" / "nvcc").exists()]
    if not found:
        return None
    root = found[0].resolve()
    nvcc = str(root / "bin" / "nvcc")
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    archs = tuple(re.findall(r"compute_(\w+)", _output([nvcc, "--list-gpu-arch"])))
    folders = [root / "lib64", root / "lib", *sorted(root.glob("targets/*-linux/lib"))]
    libraries = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
    error = None if libraries else f"libcudart_static.a is not under {root}"
    if not error and not find_cpp().missing:
        command = [nvcc, "-ccbin", find_cpp().driver]
        error = _complaint(command, ".cu", "__global__ void probe() {}\n")
    return Toolkit(root, version.group(1) if version else "?", archs, libraries, error)


def _find_ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    if beside_python.exists():
        return str(beside_python)
    on_path = shutil.which("ninja")
    if on_path:
        return on_path
    try:
        from ninja import BIN_DIR  # its wheel, in a build environment that is not on PATH
    except ImportError:
        return None
    return str(Path(BIN_DIR) / "ninja")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout or "unknown"


def _complaint(command: list[str], suffix: str, source: str) -> str | None:
    """None if the command compiles `source`, else its first error."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / f"probe{suffix}"
        probe.write_text(source)
        done = subprocess.run(
            [*command, "-c", str(probe), "-o", str(probe.with_suffix(".o"))],
            capture_output=True,
            text=True,
        )
        said = (done.stderr + done.stdout).replace(str(probe), probe.name)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it failed without a message"])[0]
