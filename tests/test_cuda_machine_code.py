"""Protects the machine code of the CUDA kernels, made without a GPU.

- Every .cu compiles for sm_80 and sm_90 without a warning; in `make test-all` for all that a wheel is made for.
- No kernel with dynamic shared memory declares more beside it than its launch reckons with.
- No kernel spills registers or keeps anything else in local memory.
- The optimizers move 16 bytes at a time.

`pytest -s` prints the table of registers, and so does `make ptxas`.
"""

import os

import cuda_machine_code as code
import pytest
from cuda_on_cpu.build import toolchain

# What test_packaging compiles, too, is compiled once: by whoever comes first.
pytestmark = [pytest.mark.xdist_group("nvcc"), pytest.mark.long(100)]
ARCHS = {code.USUAL_ARCHS: {"sm_80", "sm_90"}, "": {"sm_80", "sm_90", "sm_100", "sm_120"}}
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 777 + threadIdx.x] = a[i] * a[(i * 7 + 3) % 64];
}
"""


@pytest.fixture(scope="module")
def toolkit():
    toolkit = toolchain.find_toolkit()
    reason = toolchain.find_cpp().missing
    if toolkit is None:
        reason = "no CUDA toolkit (nvcc) on this machine"
    elif reason is None and code.cuobjdump() is None:
        reason = "no cuobjdump on this machine: pip install triton"
    if reason is not None:
        if "nvcc" in os.environ.get("ALRAO_REQUIRE", "").split(","):
            raise AssertionError(f"ALRAO_REQUIRE names nvcc: {reason}")
        pytest.skip(reason)
    return toolkit


@pytest.fixture(
    scope="module",
    params=[code.USUAL_ARCHS, pytest.param("", marks=pytest.mark.slow)],
    ids=["usual", "wheel"],
)
def archs(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(toolkit, archs):
    """Every kernel for every architecture, from the objects that test_packaging links, too."""
    code.build(archs)
    found = code.read_resources(code.objects())
    print("\n" + code.table(found))
    return found


def test_every_source_is_compiled_for_every_architecture(kernels, archs):
    compiled_for = {}
    for kernel in kernels:
        compiled_for.setdefault((kernel.source, kernel.name), set()).add(kernel.arch)
    # A source without a kernel would be in none of the rows.
    expected = {str(source.relative_to(code.CSRC)) for source in code.sources()}
    assert {source for source, _ in compiled_for} == expected
    assert all(found == ARCHS[archs] for found in compiled_for.values()), compiled_for


def test_nothing_is_in_local_memory(kernels):
    spilled = [kernel for kernel in kernels if kernel.stack]
    assert not spilled, code.table(spilled)


def test_dynamic_shared_memory_leaves_room_for_what_is_declared(kernels):
    """A launch asks for more than 48 KiB from 47 on: so much stands beside it at most."""
    # From sm_90 on the number has the kibibyte of the system in it, which does not count.
    dynamic = [
        kernel
        for kernel in kernels
        if kernel.arch == "sm_80"
        and "ALRAO_DYNAMIC_SHARED" in (code.CSRC / kernel.source).read_text()
    ]
    assert dynamic and any(kernel.shared for kernel in dynamic)
    assert all(kernel.shared <= 1024 for kernel in dynamic), code.table(dynamic)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_optimizers_move_16_bytes_at_a_time(kernels, optimizer):
    for arch in ("sm_80", "sm_90"):
        accesses = code.read_accesses(
            code.object_of(code.CSRC / f"feature/cuda/{optimizer}.cu"), arch
        )
        engine = {name for name in accesses if name.startswith("multi_tensor_kernel<")}
        assert engine
        for name in engine:
            for access in ("LDG", "STG"):
                wide = [a for a in accesses[name] if a.startswith(access) and ".128" in a]
                assert wide, f"{arch} {name}: no {access} of 16 bytes"


def test_a_spill_is_seen(toolkit, tmp_path):
    source, compiled = tmp_path / "spills.cu", tmp_path / "spills.cu.o"
    source.write_text(SPILLS)
    code.run(toolkit.root / "bin" / "nvcc", "-arch=sm_90", "-c", source, "-o", compiled)
    [kernel] = code.read_resources([compiled])
    assert (kernel.name, kernel.arch, kernel.registers) == ("spilling_kernel", "sm_90", 32)
    assert kernel.stack > 0 and f"{kernel.stack}" in code.table([kernel])
