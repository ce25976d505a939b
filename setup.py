"""Builds alrao_fast._C against the LibTorch stable ABI; everything declarative stands in pyproject.toml.

What cannot be built here is left out with one line that says why, and the installed package works without it.
Environment variables:

ALRAO_CUDA            unset: the CUDA kernels are built where a CUDA torch and a toolkit of the same major are present;
                      0: never; 1: an error where they cannot be; force: compiled and linked even under a CPU torch
                      (what continuous integration does on machines without a GPU).
ALRAO_CPP=0           installs pure Python: every op runs through the reference.
TORCH_CUDA_ARCH_LIST  as for torch's own extensions, e.g. "9.0" or "8.0;9.0+PTX".
CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS, MAX_JOBS have their usual meaning.
"""

from __future__ import annotations

import json
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

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WORK = ROOT / "build" / "ext"  # objects and build.ninja: kept between builds, whoever starts them
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
# Without these, loops that call exp or compare floats are not vectorised. NaN and infinity keep their meaning.
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


# ---- what this machine has -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None
    hip: str | None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit; `error` says why its nvcc does not compile here."""

    root: Path
    version: str
    archs: tuple[str, ...]
    error: str | None = None


@dataclass
class Cpp:
    """The C++ side: `missing` says why nothing can be compiled."""

    compiler: list[str] = field(default_factory=list)
    compiler_version: str = ""
    multi_isa: bool = False
    ninja: str = ""
    missing: str | None = None


@lru_cache(None)
def find_torch() -> Torch | None:
    # Importing torch takes seconds; its version stands in a file of its own.
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    facts = runpy.run_path(str(root / "version.py"))
    return Torch(root, str(facts["__version__"]), facts.get("cuda"), facts.get("hip"))


def find_ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    if beside_python.exists():
        return str(beside_python)
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


def compiles(command: list[str], suffix: str, source: str) -> str | None:
    """None if `source` compiles, else the compiler's first complaint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        path.write_text(source)
        done = subprocess.run(
            [*command, "-c", str(path), "-o", str(path.with_suffix(".o"))],
            capture_output=True,
            text=True,
        )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it failed without a message"])[0].replace(str(path), path.name)


@lru_cache(None)
def find_cpp() -> Cpp:
    torch = find_torch()
    if os.environ.get("ALRAO_CPP") == "0":
        return Cpp(missing="ALRAO_CPP=0")
    if sys.platform != "linux":
        return Cpp(missing=f"the C++ kernels are built on Linux, and this is {sys.platform}")
    if torch is None:
        return Cpp(
            missing="torch is not installed in the environment that builds (use --no-build-isolation)"
        )
    if version_tuple(torch.version) < MIN_TORCH:
        return Cpp(missing=f"torch {torch.version} is older than {'.'.join(map(str, MIN_TORCH))}")
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("g++") or shutil.which("clang++") or ""
    ]
    if not compiler[0] or shutil.which(compiler[0]) is None:
        return Cpp(
            missing=f"no C++ compiler found ({compiler[0] or 'g++ or clang++'}; install one or set CXX)"
        )
    ninja = find_ninja()
    if ninja is None:
        return Cpp(missing="ninja is not installed (pip install ninja)")
    include = f"-I{sysconfig.get_path('include')}"
    source = "#include <Python.h>\n#include <optional>\nstd::optional<int> x;\n"
    complaint = compiles([*compiler, *CXX_FLAGS, include], ".cpp", source)
    if complaint:
        hint = "; install Python's development headers" if "Python.h" in complaint else ""
        return Cpp(missing=f"{compiler[0]} does not compile a test file ({complaint}{hint})")
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True
    ).stdout.splitlines()[0]
    multi_isa = platform.machine() == "x86_64" and not any(
        compiles([*compiler, march], ".cpp", "int x;\n") for march in ISAS.values()
    )
    return Cpp(compiler, version, multi_isa, ninja)


def find_toolkit() -> Toolkit | None:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc_on_path = shutil.which("nvcc")
    if nvcc_on_path:
        # It can be a wrapper script whose folder is not the toolkit: ask nvcc itself.
        said = subprocess.run(
            [nvcc_on_path, "--dryrun", "x.cu"], capture_output=True, text=True
        ).stderr
        candidates += re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            root = Path(candidate).resolve()
            break
    else:
        return None
    nvcc = str(root / "bin" / "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = tuple(re.findall(r"compute_(\w+)", known))
    compiler = find_cpp().compiler
    error = (
        compiles([nvcc, *host_compiler(compiler)], ".cu", "__global__ void probe() {}\n")
        if compiler
        else None
    )
    return Toolkit(root, version.group(1) if version else "unknown", archs, error)


def host_compiler(compiler: list[str]) -> list[str]:
    return ["-ccbin", compiler[-1]]


# ---- decisions: functions of the facts alone ------------------------------------------------------------------------


def decide_cuda(request: str, torch: Torch | None, toolkit: Toolkit | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason if not. `request` is the value of ALRAO_CUDA."""
    if request not in ("", "0", "1", "force"):
        raise SystemExit(f"ALRAO_CUDA is {request!r}; it takes 0, 1 or force, or is left unset")
    if request == "0":
        return False, "ALRAO_CUDA=0"
    reason = ""
    if request != "force":
        if torch is None:
            reason = "torch is not installed in the environment that builds"
        elif torch.hip:
            reason = (
                f"torch {torch.version} is a ROCm build; AMD GPUs are served by the Triton kernels"
            )
        elif not torch.cuda:
            reason = f"torch {torch.version} is a CPU build; install a CUDA build of torch first"
    if not reason:
        if toolkit is None:
            reason = "no CUDA toolkit found; install one, or set CUDA_HOME to where it is"
        elif toolkit.error:
            reason = f"nvcc {toolkit.version} does not compile here: {toolkit.error}"
        elif request != "force" and torch and torch.cuda:
            if version_tuple(toolkit.version)[:1] != version_tuple(torch.cuda)[:1]:
                reason = (
                    f"the toolkit is CUDA {toolkit.version} and torch was built for CUDA {torch.cuda}: "
                    "the majors must agree; set CUDA_HOME to a matching toolkit"
                )
    if reason and request in ("1", "force"):
        raise SystemExit(f"ALRAO_CUDA={request}, but the CUDA kernels cannot be built: {reason}")
    return not reason, reason


def choose_archs(asked: str, known: tuple[str, ...]) -> list[str]:
    """nvcc's -gencode flags. `asked` is TORCH_CUDA_ARCH_LIST; `known` is what this nvcc compiles for ("90", ...)."""
    wanted = [a for a in re.split(r"[;,\s]+", asked.strip()) if a]
    if not wanted:
        # Never the GPUs of this machine: it may have none, and the wheel may travel.
        usable = [a for a in CUDA_ARCHS if a.replace(".", "") in known]
        wanted = [*usable[:-1], usable[-1] + "+PTX"] if usable else []
    flags = []
    for arch in wanted:
        number, _, ptx = arch.partition("+")
        if not re.fullmatch(r"\d+\.\d[af]?", number) or ptx not in ("", "PTX"):
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: cannot read {arch!r}; write numbers, as in "8.0;9.0+PTX"'
            )
        name = number.replace(".", "")
        if re.sub(r"\D", "", name) not in known:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not know {number}; it knows {', '.join(known)}"
            )
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    if not flags:
        raise SystemExit(
            f"this nvcc compiles for none of {', '.join(CUDA_ARCHS)}; set TORCH_CUDA_ARCH_LIST"
        )
    return flags


def choose_jobs(asked: str, cpus: int, memory: int) -> int:
    """Parallel compilations: MAX_JOBS if set, else one per CPU with at least 1 GiB of free memory for each."""
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, min(cpus, memory >> 30))


def free_memory() -> int:
    """Bytes this process may still take: the machine's and, in a container, the control group's."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo).group(1)) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, AttributeError, ValueError):
        pass
    return free


# ---- the build ------------------------------------------------------------------------------------------------------


def write_ninja(cpp: Cpp, torch: Torch, cuda: Toolkit | None, gencode: list[str]) -> Path:
    """Writes build.ninja and returns the library it makes. Paths are escaped for ninja, words for the shell."""

    def words(items: list[str]) -> str:
        return " ".join(shlex.quote(item) for item in items).replace("$", "$$")

    def path(item: Path | str) -> str:
        return re.sub(r"([$ :])", r"$\1", str(item))

    csrc = ROOT / "csrc"
    headers = [str(torch.root / "include"), sysconfig.get_path("include")]
    includes = [f"-I{csrc}", *(word for header in headers for word in ("-isystem", header))]
    flags = [*CXX_FLAGS, *(["-DALRAO_MULTI_ISA"] if cpp.multi_isa else []), *includes]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link = ["-shared", f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    if cuda:
        libraries = next(
            (d for d in (cuda.root / "lib64", cuda.root / "lib") if d.exists()), cuda.root / "lib64"
        )
        link += [f"-L{libraries}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        flags.append("-DALRAO_WITH_CUDA")
    link += shlex.split(os.environ.get("LDFLAGS", ""))

    lines = ["ninja_required_version = 1.5", "builddir = ."]
    compiler = words(cpp.compiler)
    lines += [
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d {words(flags)} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} $in {words(link)} -o $out",
        "  description = $out",
    ]
    if cuda:
        nvcc = [
            str(cuda.root / "bin" / "nvcc"),
            *host_compiler(cpp.compiler),
            *NVCC_FLAGS,
            *gencode,
        ]
        nvcc.append(f"-I{csrc}")
        lines += [
            "rule cuda",
            f"  command = {words(nvcc)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
        ]

    objects: list[str] = []

    def compile(source: Path, rule: str, tag: str = "", extra: list[str] | None = None) -> None:
        target = path(f"{source.relative_to(csrc)}{tag}.o")
        objects.append(target)
        lines.append(f"build {target}: {rule} {path(source)}")
        if extra:
            lines.append(f"  extra = {words(extra)}")

    for source in sorted([*csrc.glob("*.cpp"), *csrc.glob("cpu/*_cpu.cpp")]):
        compile(source, "cxx")
    for source in sorted(csrc.glob("cpu/*_kernel.cpp")):
        for isa, march in ISAS.items() if cpp.multi_isa else [("plain", None)]:
            extra = [*KERNEL_FLAGS, f"-DALRAO_ISA={isa}", *([march] if march else [])]
            compile(source, "cxx", f".{isa}", extra)
    if cuda:
        for source in sorted(csrc.glob("cuda/*.cpp")):
            compile(source, "cxx")
        for source in sorted(csrc.glob("cuda/*.cu")):
            compile(source, "cuda")
    library = "_C.abi3.so"
    lines += [f"build {library}: link {' '.join(objects)}", f"default {library}"]
    WORK.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    script = WORK / "build.ninja"
    if not script.exists() or script.read_text() != text:
        script.write_text(text)
    return WORK / library


def say(text: str) -> None:
    """One line that pip shows too: it hides a backend's output, but not what goes to the terminal itself."""
    print(f"alrao_fast: {text}", flush=True)


class BuildKernels(build_ext):
    """Compiles what this machine can compile and records it in alrao_fast/_build_info.json."""

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "alrao_fast" if inplace else Path(self.build_lib) / "alrao_fast"
        package.mkdir(parents=True, exist_ok=True)
        info, library = self.compile()
        if library is None:
            (package / "_C.abi3.so").unlink(missing_ok=True)
        else:
            replace(library, package / "_C.abi3.so")
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def compile(self) -> tuple[dict, Path | None]:
        torch, cpp = find_torch(), find_cpp()
        info = {
            "torch": torch.version if torch else None,
            "compiler": cpp.compiler_version or None,
            "cpp": not cpp.missing,
            "cpp_left_out": cpp.missing,
            "isas": [] if cpp.missing else list(ISAS) if cpp.multi_isa else ["plain"],
            "cuda": False,
            "cuda_left_out": None,
            "cuda_toolkit": None,
            "cuda_archs": [],
        }
        request = os.environ.get("ALRAO_CUDA", "")
        if cpp.missing or torch is None:
            if request in ("1", "force"):
                raise SystemExit(
                    f"ALRAO_CUDA={request}, but nothing can be compiled: {cpp.missing}"
                )
            info["cuda_left_out"] = cpp.missing
            say(
                f"C++ and CUDA kernels left out, ops run through the PyTorch reference: {cpp.missing}"
            )
            return info, None
        toolkit = find_toolkit() if request != "0" else None
        with_cuda, reason = decide_cuda(request, torch, toolkit)
        gencode: list[str] = []
        if with_cuda and toolkit:
            gencode = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), toolkit.archs)
            info |= {
                "cuda": True,
                "cuda_toolkit": toolkit.version,
                "cuda_archs": [flag.rpartition("=")[2] for flag in gencode],
            }
        else:
            info["cuda_left_out"] = reason
            say(f"CUDA kernels left out: {reason}")
        library = write_ninja(cpp, torch, toolkit if with_cuda else None, gencode)
        jobs = choose_jobs(
            os.environ.get("MAX_JOBS", ""), len(os.sched_getaffinity(0)), free_memory()
        )
        command = [
            cpp.ninja,
            "-C",
            str(WORK),
            "-j",
            str(jobs),
            *(["-v"] if self.verbose > 1 else []),
        ]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                "alrao_fast: the kernels did not compile (the compiler's message stands above). "
                "ALRAO_CUDA=0 leaves out the CUDA part, ALRAO_CPP=0 all of it."
            )
        return info, library

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "alrao_fast"
        return [
            str(p) for p in (package / "_C.abi3.so", package / "_build_info.json") if p.exists()
        ]


def replace(source: Path, target: Path) -> None:
    """Puts a new file in place of the old one in one step: a process may have the old one mapped."""
    partial = target.with_suffix(f".{os.getpid()}")
    shutil.copy2(source, partial)
    os.replace(partial, target)


class Build(build):
    # Also without an extension: build_ext writes _build_info.json and says what is missing.
    sub_commands = [
        (name, None if name == "build_ext" else predicate) for name, predicate in build.sub_commands
    ]


if __name__ == "__main__":
    native = not find_cpp().missing
    setup(
        ext_modules=[Extension("alrao_fast._C", [], py_limited_api=True)] if native else [],
        cmdclass={"build": Build, "build_ext": BuildKernels},
        packages=[*find_packages(include=["alrao_fast", "alrao_fast.*"]), "alrao_fast.kernels"],
        package_dir={"alrao_fast.kernels": "kernels"},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
    )
