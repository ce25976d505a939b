"""Protects: what is built where, and the one line that says what was left out; the contents of sdist and wheel; an
install without a compiler; a binary that does not load; the choice of the CPU instruction set; that the binary uses
only torch's stable ABI, that code for a newer processor stays in its namespace, and that no path of the machine that
built it is in it; that the CUDA kernels compile without warnings and spills, and load on a machine without a driver."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from cuda_machine_code import USUAL_ARCHS

from alrao_fast import _extension

ROOT = Path(__file__).resolve().parent.parent

_spec = importlib.util.spec_from_file_location("toolchain", ROOT / "toolchain.py")
toolchain = importlib.util.module_from_spec(_spec)
sys.modules["toolchain"] = toolchain
_spec.loader.exec_module(toolchain)

CPU_TORCH = toolchain.Torch(Path("torch"), "2.13.0+cpu")
CUDA_TORCH = toolchain.Torch(Path("torch"), "2.11.0+cu130", cuda="13.0")
ROCM_TORCH = toolchain.Torch(Path("torch"), "2.11.0+rocm7.0", hip="7.0")
TOOLKIT = toolchain.Toolkit(Path("cuda"), "13.0", ("80", "90", "100", "120"), Path("lib"))
OLD_TOOLKIT = toolchain.Toolkit(Path("cuda"), "12.8", ("80", "90", "100", "120"), Path("lib"))
BROKEN_TOOLKIT = toolchain.Toolkit(Path("cuda"), "13.0", error="unsupported GNU version")


def run(*arguments, cwd=ROOT, seconds=600, **environment):
    """Run Python in a folder, so long at most; a variable set to None is taken out of the environment."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "request_, torch, toolkit, cpp_missing, expected",
    [
        ("", CUDA_TORCH, TOOLKIT, None, None),
        ("1", CUDA_TORCH, TOOLKIT, None, None),
        ("force", CPU_TORCH, TOOLKIT, None, None),
        ("force", CUDA_TORCH, OLD_TOOLKIT, None, None),
        ("0", CUDA_TORCH, TOOLKIT, None, "ALRAO_CUDA=0"),
        ("", CPU_TORCH, TOOLKIT, None, "torch 2.13.0+cpu is a CPU build"),
        ("", ROCM_TORCH, TOOLKIT, None, "torch 2.11.0+rocm7.0 is a ROCm build"),
        ("", None, TOOLKIT, None, "torch is not installed"),
        ("", CUDA_TORCH, None, None, "no CUDA toolkit found"),
        ("", CUDA_TORCH, BROKEN_TOOLKIT, None, "does not compile here: unsupported GNU version"),
        (
            "",
            CUDA_TORCH,
            OLD_TOOLKIT,
            None,
            "the toolkit is CUDA 12.8 and torch was built for CUDA 13.0",
        ),
        ("", CUDA_TORCH, TOOLKIT, "no C++ compiler found", "no C++ compiler found"),
    ],
)
def test_what_decides_over_cuda(request_, torch, toolkit, cpp_missing, expected):
    reason = toolchain.decide_cuda(request_, torch, toolkit, cpp_missing)
    if expected is None:
        assert reason is None
        return
    assert reason.startswith(expected) or expected in reason
    assert "\n" not in reason
    if request_ == "":
        with pytest.raises(SystemExit, match="ALRAO_CUDA=1, but the CUDA kernels cannot be built"):
            toolchain.decide_cuda("1", torch, toolkit, cpp_missing)


@pytest.mark.parametrize(
    "torch, toolkit, message",
    [(CPU_TORCH, None, "no CUDA toolkit"), (CPU_TORCH, BROKEN_TOOLKIT, "unsupported GNU version")],
)
def test_force_needs_a_toolkit(torch, toolkit, message):
    with pytest.raises(SystemExit, match=message):
        toolchain.decide_cuda("force", torch, toolkit)


def test_unknown_cuda_request():
    with pytest.raises(SystemExit, match="it takes 0, 1 or force"):
        toolchain.decide_cuda("yes", CUDA_TORCH, TOOLKIT)


@pytest.mark.parametrize(
    "asked, known, expected",
    [
        ("", ("80", "90", "100", "120"), ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]),
        ("", ("75", "80", "90"), ["sm_80", "sm_90", "compute_90"]),
        ("9.0", ("80", "90"), ["sm_90"]),
        ("8.0 9.0a+PTX", ("80", "90"), ["sm_80", "sm_90a", "compute_90a"]),
        ("8.0;8.6+PTX", ("80", "86"), ["sm_80", "sm_86", "compute_86"]),
    ],
)
def test_architectures(asked, known, expected):
    options = toolchain.choose_archs(asked, known)
    assert [option.rpartition("=")[2] for option in options] == expected


@pytest.mark.parametrize(
    "asked, present, expected",
    [
        ("", ("9.0",), ["sm_90"]),
        ("native", ("9.0", "9.0", "8.0"), ["sm_80", "sm_90"]),
        ("8.0", ("9.0",), ["sm_80"]),
        ("", ("13.0",), ["sm_80", "sm_90", "compute_90"]),
        ("native", ("13.0",), ["sm_80", "sm_90", "compute_90"]),
    ],
    ids=["in place", "native", "asked for", "newer than nvcc", "native and newer than nvcc"],
)
def test_architectures_of_the_gpus_present(asked, present, expected):
    options = toolchain.choose_archs(asked, ("80", "90"), present)
    assert [option.rpartition("=")[2] for option in options] == expected


def test_native_without_a_gpu():
    with pytest.raises(SystemExit, match="nvidia-smi shows no GPU"):
        toolchain.choose_archs("native", ("80", "90"))


def test_gpus_are_read_from_the_driver(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0; echo 9.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert toolchain.find_gpus() == ("9.0", "9.0")
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert toolchain.find_gpus() == ()


@pytest.mark.parametrize(
    "asked, known, message",
    [
        ("Ampere", ("80",), "cannot read 'Ampere'"),
        ("12.0", ("80", "90"), "does not know 12.0; it knows 80, 90"),
        ("", ("50",), "set TORCH_CUDA_ARCH_LIST"),
    ],
)
def test_unusable_architectures(asked, known, message):
    with pytest.raises(SystemExit, match=message):
        toolchain.choose_archs(asked, known)


def test_jobs_fit_into_memory():
    assert toolchain.choose_jobs("", cpus=16, memory=5 << 30) == 5
    assert toolchain.choose_jobs("", cpus=2, memory=64 << 30) == 2
    assert toolchain.choose_jobs("", cpus=8, memory=0) == 1
    assert toolchain.choose_jobs("3", cpus=8, memory=0) == 3


def test_versions_are_numbers():
    assert toolchain.version_tuple("2.13.0+cpu") == (2, 13, 0)
    assert toolchain.version_tuple("2.9") < toolchain.version_tuple("2.11.0a0+git12")
    assert toolchain.version_tuple("?") == ()


@pytest.fixture
def fresh_search(monkeypatch):
    """find_cpp() and find_toolkit() start anew, from an environment that names nothing."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "ALRAO_CPP"):
        monkeypatch.delenv(name, raising=False)
    toolchain.find_cpp.cache_clear()
    yield monkeypatch
    toolchain.find_cpp.cache_clear()


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def test_no_compiler(fresh_search, tmp_path):
    fresh_search.setenv("PATH", str(tmp_path))
    assert toolchain.find_cpp().missing.startswith("no C++ compiler found (g++ or clang++)")


def test_compiler_that_fails(fresh_search, tmp_path):
    executable(tmp_path / "g++", "echo 'x.cpp: fatal error: Python.h: No such file' >&2; exit 1\n")
    fresh_search.setenv("CXX", str(tmp_path / "g++"))
    assert "install Python's development headers" in toolchain.find_cpp().missing


def test_torch_too_old(fresh_search):
    fresh_search.setattr(toolchain, "find_torch", lambda: toolchain.Torch(Path("torch"), "2.9.1"))
    assert toolchain.find_cpp().missing == "torch 2.9.1 is older than 2.11"


def test_toolkit_behind_a_wrapper_script(fresh_search, tmp_path):
    root = tmp_path / "toolkit"
    executable(
        root / "bin" / "nvcc",
        'case "$1" in --version) echo "release 12.9, V12.9.1";; --list-gpu-arch) echo compute_90;; esac\n',
    )
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart_static.a").touch()
    executable(tmp_path / "path" / "nvcc", f'echo "#$ TOP={root}" >&2\n')
    fresh_search.setenv("PATH", f"{tmp_path / 'path'}:{os.environ['PATH']}")
    fresh_search.setenv("CUDA_HOME", str(tmp_path / "gone"))
    real = os.path.exists
    # A toolkit in the usual place would come first.
    fresh_search.setattr(
        Path, "exists", lambda self: "/usr/local/cuda" not in str(self) and real(self)
    )
    found = toolchain.find_toolkit()
    assert (found.root, found.version, found.archs) == (root, "12.9", ("90",))
    (root / "lib64" / "libcudart_static.a").unlink()
    assert "libcudart_static.a is not under" in toolchain.find_toolkit().error


def sources():
    """The files that a build needs, relative to the root."""
    kept = [*ROOT.glob("alrao_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    for suffix in ("cpp", "h", "cu", "cuh"):
        kept += ROOT.glob(f"csrc/**/*.{suffix}")
    kept += [ROOT / name for name in ("setup.py", "toolchain.py", "pyproject.toml", "README.md")]
    kept += [ROOT / name for name in ("LICENSE", "CHANGELOG.md", "Makefile", "alrao_fast/py.typed")]
    return {str(path.relative_to(ROOT)) for path in kept}


def test_sdist_is_complete(tmp_path):
    run("setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [path for path in ROOT.glob("tests/**/*") if path.is_file() and path.suffix != ".pyc"]
    assert sources() | {str(path.relative_to(ROOT)) for path in needed} <= names
    assert not [name for name in names if name.endswith(".so") or "_build_info" in name]


def build_wheel(folder, **environment):
    """Build a wheel from the source tree (objects compiled before are reused) and return what the build said."""
    said = run(
        *("setup.py", "egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"),
        *("bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "bdist"),
        **environment,
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return said


def wheel_files(folder):
    return {
        str(path.relative_to(folder / "site"))
        for path in folder.glob("site/**/*")
        if path.is_file()
    }


needs_extension = pytest.mark.skipif(
    _extension.ERROR is not None, reason=f"no extension: {_extension.ERROR}"
)


@needs_extension
def test_wheel_is_complete(tmp_path):
    build_wheel(tmp_path)
    files = wheel_files(tmp_path)
    assert {name for name in sources() if name.startswith("alrao_fast/")} <= files
    assert {"alrao_fast/kernels/__init__.py", "alrao_fast/_C.abi3.so"} <= files
    assert "alrao_fast/_build_info.json" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert not [name for name in files if name.startswith(("tests/", "kernels/", "benchmarks/"))]
    assert "-cp310-abi3-linux" in next(tmp_path.glob("*.whl")).name


# The tested package may be installed in editable mode too, whose finder would fill the gaps of this one.
ONLY_HERE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
"""

USE_SWITCH = f"""{ONLY_HERE}
import torch, alrao_fast
from alrao_fast import _extension, backends
from alrao_fast.ops.switch_update import switch_update_
from alrao_fast.reference.switch_update import initial_state
assert alrao_fast.__file__.startswith(sys.argv[1]), alrao_fast.__file__
state = initial_state(3, 0.999)
switch_update_(*state, torch.zeros(3))
assert state[2] == 2
try:
    switch_update_(*state, torch.zeros(3), impl="cpu")
except backends.BackendUnavailableError as error:
    print(error)
"""


def test_install_without_a_compiler(tmp_path):
    (tmp_path / "empty").mkdir()
    said = build_wheel(tmp_path, PATH=str(tmp_path / "empty"), CXX=None, ALRAO_CUDA=None)
    lines = [line for line in said.splitlines() if line.startswith("alrao_fast:")]
    assert len(lines) == 1
    assert "the reference serves every op: no C++ compiler found" in lines[0]
    assert next(tmp_path.glob("*.whl")).name.endswith("-py3-none-any.whl")
    assert "alrao_fast/_C.abi3.so" not in wheel_files(tmp_path)
    site = tmp_path / "site"
    error = run("-c", USE_SWITCH, site, cwd=site, ALRAO_BACKEND=None)
    assert "was not built (no C++ compiler found" in error


def test_cuda_demanded_without_a_compiler(tmp_path):
    environment = {**os.environ, "ALRAO_CUDA": "1", "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ALRAO_CUDA=1, but the CUDA kernels cannot be built" in done.stderr


def test_broken_extension_is_reported_at_first_use(tmp_path):
    shutil.copytree(ROOT / "alrao_fast", tmp_path / "alrao_fast")
    (tmp_path / "alrao_fast" / "_C.abi3.so").write_bytes(b"\x7fELF built for another world")
    (tmp_path / "alrao_fast" / "_build_info.json").write_text('{"torch": "2.99"}')
    error = run("-c", USE_SWITCH, tmp_path, cwd=tmp_path, ALRAO_BACKEND=None)
    assert "built for torch 2.99 and does not load under torch" in error
    assert "reinstall" in error


CPU_ISA = "import torch, importlib; print(importlib.import_module('alrao_fast._C').cpu_isa())"


@needs_extension
def test_instruction_set_can_be_chosen():
    lowest = _extension.build_info()["isas"][0]
    assert run("-c", CPU_ISA, ALRAO_CPU_ISA=lowest).strip() == lowest
    done = subprocess.run(
        [sys.executable, "-c", CPU_ISA],
        cwd=ROOT,
        env={**os.environ, "ALRAO_CPU_ISA": "v9"},
        capture_output=True,
        text=True,
    )
    assert 'ALRAO_CPU_ISA is "v9"; this build on this machine takes one of: ' in done.stderr


def symbols(path, *which):
    """(type, name) of a binary's symbols."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    said = subprocess.run([nm, *which, str(path)], capture_output=True, text=True, check=True)
    return [tuple(line.split()[-2:]) for line in said.stdout.splitlines()]


@needs_extension
def test_only_the_stable_abi_of_torch_is_used():
    names = [
        name for _, name in symbols(ROOT / "alrao_fast" / "_C.abi3.so", "-D", "--undefined-only")
    ]
    # Mangled names in at, c10 and torch are torch's C++ ABI, which changes with every version.
    changing = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert not [name for name in names if name.startswith(changing)]
    assert any(name.startswith(("torch_", "aoti_torch_")) for name in names)


def hold_no_path(binary):
    contents = binary.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent, Path(sysconfig.get_path("include"))):
        assert bytes(folder) not in contents


@needs_extension
def test_the_binary_holds_no_path_of_the_machine():
    hold_no_path(ROOT / "alrao_fast" / "_C.abi3.so")


def test_no_wide_instructions_leak_out_of_a_kernel():
    # The linker keeps one copy of a weak function: perhaps the one compiled for a newer processor.
    objects = sorted((ROOT / "build" / "ext").glob("*/cpu/*_kernel.cpp.v*.o"))
    if not objects:
        pytest.skip("no kernel objects: nothing was compiled in this folder")
    for path in objects:
        weak = [name for kind, name in symbols(path, "--defined-only") if kind in "WVu"]
        assert not weak, path.name


@pytest.mark.long(110)
@pytest.mark.skipif(
    toolchain.find_toolkit() is None, reason="no CUDA toolkit (nvcc) on this machine"
)
def test_cuda_kernels_compile_link_and_load(tmp_path):
    run(
        *("setup.py", "-q", "build_ext", "--build-lib", tmp_path),
        # Three hundred seconds of one slow core, which other tests share.
        seconds=1500,
        ALRAO_CUDA="force",
        TORCH_CUDA_ARCH_LIST=USUAL_ARCHS,
    )
    info = json.loads((tmp_path / "alrao_fast" / "_build_info.json").read_text())
    assert info["cuda_skipped"] is None
    assert {"sm_80", "sm_90"} <= set(info["cuda_archs"])
    hold_no_path(tmp_path / "alrao_fast" / "_C.abi3.so")
    shutil.copytree(
        ROOT / "alrao_fast",
        tmp_path / "alrao_fast",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("_C*", "_build*"),
    )
    code = f"""{ONLY_HERE}
import torch
from alrao_fast import _extension
from alrao_fast.ops import feature_adam, feature_sgd, gradient_clip, plan, switch_update
assert _extension.ERROR is None, _extension.ERROR
ops = ["feature_sgd_", "feature_adam_", "gradient_clip_", "switch_update_"]
ops += ["_feature_plan_step_"]
for op in ops:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("alrao_fast::" + op, key), (op, key)
"""
    run("-c", code, cwd=tmp_path)
