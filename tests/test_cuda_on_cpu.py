"""Protects the logic of the CUDA kernels (indices, tails, barriers, reductions) without a GPU.

csrc's CUDA sources, bindings included, are compiled by the host compiler against tests/cuda_on_cpu/cuda_on_cpu.h,
which says what this cannot show, and take the place of the CPU's kernels in processes of their own. There the tests of
the ops run as they are, with the backend `cuda`: forwards, where it matters with AddressSanitizer and UBSan, and
backwards with ThreadSanitizer.

The header itself: every operation in both orders and under each sanitizer; a mistake of each kind, planted, is caught.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import build

HERE = Path(__file__).resolve().parent
ORDERS = ("forward", "reverse")
# What runs in which build and order, and how many tests must pass. The sanitizers see every path of a kernel, in both
# orders between them, and a plain build what is left: every dtype.
RUNS = {
    ("plain", "forward"): ("emulated and not sanitized and not many_launches", 1000),
    ("address", "forward"): ("sanitized", 310),
    ("thread", "reverse"): ("sanitized", 310),
}
SLOW_RUNS = {
    ("plain", "reverse"): ("emulated", 460),
    ("address", "reverse"): ("emulated", 460),
    ("thread", "forward"): ("emulated", 460),
}
PRIMITIVES = (
    *("indices", "shuffles", "reductions_float", "reductions_double", "votes", "last_block"),
    *("more_threads", "poison", "limits", "mistakes"),
)
# Mistake: the build that catches it, and its words.
PLANTED = {
    "overrun": ("address", "heap-buffer-overflow.*primitives.cu"),
    "fixed_overrun": ("address", "primitives.cu.*out of bounds"),
    "dynamic_overrun": ("address", "heap-buffer-overflow.*primitives.cu"),
    "misaligned": ("address", "primitives.cu.*misaligned address"),
    "no_barrier": ("plain", "wrong: a thread read before another wrote"),
    "no_barrier ": ("thread", "data race.*primitives.cu"),
    "no_syncwarp": ("thread", "data race.*primitives.cu"),
    "blocks_race": ("thread", "data race.*primitives.cu"),
    "last_blocks_race": ("thread", "data race.*primitives.cu"),
}


def skip(reason):
    if reason is None:
        return
    # The kernels' host compiler is that of the extension.
    if "cpu" in os.environ.get("ALRAO_REQUIRE", "").split(","):
        raise AssertionError(
            f"ALRAO_REQUIRE names cpu, and the CUDA kernels do not run on it: {reason}"
        )
    pytest.skip(reason)


@pytest.fixture(scope="module")
def built():
    skip(build.obstacle())
    build.build(*map(build.program, build.BUILDS))


@pytest.fixture(params=build.BUILDS)
def name(request, built):
    """A build whose programs can start."""
    skip(build.missing_runtime(request.param))
    return request.param


def run(command, **environment):
    done = subprocess.run(
        command,
        cwd=build.WORK,  # Python looks there first, and shall not find the package
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_primitives(name, order):
    code, said = run([build.program(name), *PRIMITIVES], ALRAO_CUDA_ON_CPU_ORDER=order)
    assert code == 0, said


def test_every_primitive_is_named_here(built):
    code, said = run([build.program("plain")])
    assert code == 0
    planted = {f"planted_{mistake.strip()}" for mistake in PLANTED}
    assert set(said.split()) == {*PRIMITIVES, *planted}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_caught(built, mistake):
    name, words = PLANTED[mistake]
    skip(build.missing_runtime(name))
    said = ""
    for order in ORDERS:
        code, output = run(
            [build.program(name), f"planted_{mistake.strip()}"], ALRAO_CUDA_ON_CPU_ORDER=order
        )
        said += output if code else ""
    assert re.search(words, said, re.DOTALL), said


def marked_files():
    files = (path for path in HERE.glob("test_*.py") if path != Path(__file__))
    return sorted(path for path in files if "mark.emulated" in path.read_text())


@pytest.mark.long(150)
@pytest.mark.parametrize(
    "name, order",
    [*reversed(RUNS), *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW_RUNS)],
)
def test_ops(built, name, order):
    skip(build.missing_runtime(name))
    build.build(build.library(name))
    marks, floor = (RUNS | SLOW_RUNS)[name, order]
    code, said = run(
        build.command(
            name,
            *("-m", "pytest", "-q", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider"),
            # A sanitizer ends the process, and what pytest holds back is lost.
            *("--capture=no", "--durations=5", "-m", marks, "--backends", "cuda"),
            *("--at-least", str(floor), *map(str, marked_files())),
        ),
        ALRAO_CUDA_ON_CPU_ORDER=order,
        ALRAO_CUDA_ON_CPU_WATCHED="ends" if (name, order) in RUNS else "all",
        ALRAO_REQUIRE="cuda",
    )
    print(said)
    assert code == 0, said
