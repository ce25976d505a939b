"""A pytest plugin under which the backend `cuda` takes CPU tensors: its kernels run on the CPU.

For a process that imports the package of a build (build.py). The tests of the ops then run as they are, those that name
the backend `cuda`. ALRAO_CUDA_ON_CPU_ORDER=reverse runs blocks, warps and lanes backwards.
"""

import torch

from alrao_fast import backends
from alrao_fast.backends import Status

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_libraries = []


def _status(op, backend):
    if backend == "reference":
        return Status(True, "plain PyTorch")
    if backend != "cuda":
        return Status(False, "here the CUDA kernels run on the CPU")
    name = f"alrao_fast::{backends.OPS[op]}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return Status(True, "on the CPU")
    return Status(False, f"there is no CUDA kernel for {op}")


def _give_cpu_tensors_to_cuda_kernels():
    library = torch.library.Library("alrao_fast", "IMPL")
    _libraries.append(library)
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("alrao_fast::"):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        op = getattr(torch.ops.alrao_fast, name.split("::")[1]).default

        def run(*args, op=op, **kwargs):
            return op.redispatch(CUDA, *args, **kwargs)

        for key in ("CPU", "SparseCPU"):
            library.impl(op, run, key)


# Products with a result of another dtype, which torch has for GPUs only.
def _mm_dtype_out(a, b, dtype, *, out):
    return out.copy_(a.to(dtype) @ b.to(dtype))


def _addmm_dtype_out(bias, a, b, dtype, *, beta=1, alpha=1, out):
    return out.copy_(torch.addmm(bias.to(dtype), a.to(dtype), b.to(dtype), beta=beta, alpha=alpha))


def pytest_configure(config):
    backends.status = _status
    backends.device_of = lambda backend: torch.device("cpu")
    backends._AUTO_ORDER["cpu"] = ("cuda", "reference")
    _give_cpu_tensors_to_cuda_kernels()
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    library.impl("mm.dtype_out", _mm_dtype_out, "CPU")
    library.impl("addmm.dtype_out", _addmm_dtype_out, "CPU")
