"""Which implementation of an op runs: what is available, why not, and the one function that chooses.

Backends, best first for their device: `cuda` (C++/CUDA) and `triton` for CUDA tensors, `cpu` (C++) for CPU tensors,
`reference` (plain PyTorch) for any. `auto` takes the first that is available for the tensor's device. A backend asked
for by name, by `impl=`, `use_backend` or the environment variable ALRAO_BACKEND, runs or raises; it is never
replaced silently.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch

from alrao_fast import _extension
from alrao_fast.compiler import assume_constant_result

# What users may call; the rest serves the package.
__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "Status",
    "available",
    "in_use",
    "status",
    "use_backend",
]

BACKENDS = ("cuda", "triton", "cpu", "reference")
# Each op's stem and the dispatcher op whose kernel shows that a compiled backend implements it; the modules of the
# ops enter theirs.
OPS: dict[str, str] = {}
_DISPATCH_KEY = {"cuda": "CUDA", "cpu": "CPU"}
# Triton reads the same variable, at its import: its kernels then run on CPU tensors, when asked for by name.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


class Status(NamedTuple):
    """Whether a backend can run an op here, and if not, why and what to do about it."""

    available: bool
    reason: str


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why and what to do."""


def status(op: str, backend: str) -> Status:
    """Can `backend` (one of `BACKENDS`) run `op` (one of `OPS`) on this machine?

    Asking about `cuda` or `triton` initialises no device, but may ask the driver how many there are. ValueError or
    TypeError, naming it, for an op or backend that there is not.
    """
    _check_word("op", op, OPS)
    _check_word("backend", backend, BACKENDS)
    if backend == "reference":
        return Status(True, "plain PyTorch")
    if backend == "triton":
        return _triton_status()
    if _extension.ERROR is not None:
        return Status(False, _extension.ERROR)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"alrao_fast::{OPS[op]}", _DISPATCH_KEY[backend]
    ):
        if backend == "cpu":
            return Status(False, f"the extension has no CPU kernel for {op}: reinstall alrao_fast")
        skipped = _extension.build_info().get("cuda_skipped")
        return Status(
            False, skipped or f"this version has no CUDA kernel for {op}: use impl='auto'"
        )
    if backend == "cuda" and not torch.cuda.is_available():
        return Status(False, "the kernels are built, but torch sees no CUDA device here")
    return Status(True, "built")


def _check_word(argument: str, word: Any, words: Iterable[str], other: str = "") -> None:
    """Raise ValueError unless `word` is one of `words`, TypeError for what is no string."""
    if not isinstance(word, str) or word not in words:
        error = ValueError if isinstance(word, str) else TypeError
        raise error(f"{argument}: got {word!r}, expected {other}one of {', '.join(words)}")


def _triton_status() -> Status:
    if find_spec("triton") is None:
        return Status(False, "triton is not installed: pip install triton (Linux)")
    if INTERPRETED:
        return Status(True, "interpreted on CPU tensors, slowly (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Status(
            False,
            "torch sees no CUDA or HIP device here; TRITON_INTERPRET=1 runs it on CPU tensors",
        )
    return Status(True, "compiled at the first call")


def device_of(backend: str) -> torch.device:
    """The device whose tensors `backend` takes; for `triton` the CPU while its kernels are interpreted."""
    on_gpu = backend == "cuda" or (backend == "triton" and not INTERPRETED)
    return torch.device("cuda" if on_gpu else "cpu")


def available(op: str, device: torch.device | str) -> list[str]:
    """The backends that can run `op` on tensors of `device`, best first."""
    order = _AUTO_ORDER.get(torch.device(device).type, ("reference",))
    return [name for name in order if status(op, name).available]


# What `auto` means for the process: "auto", or the backend that the environment names. `use_backend` says otherwise for
# the thread, or the task of asyncio, that runs its block.
_of_process = os.environ.get("ALRAO_BACKEND") or "auto"
_in_use: ContextVar[str] = ContextVar("alrao_fast.use_backend", default=_of_process)
_chosen: dict[tuple[str, str, str], str] = {}


class _Traced(ModuleType):
    """Shows torch.compile the backend in use: it guards what it reads of a module, and cannot read a ContextVar."""

    @property
    def in_use(self) -> str:
        return _in_use.get()


_traced = _Traced("alrao_fast.backends.traced")


# torch.compile takes the answer as a constant instead of tracing the look-ups.
@assume_constant_result
def _choose(op: str, device_type: str, name: str, impl: str) -> str:
    """What runs where `name` was asked for, by `impl` or, if that is auto, by what is in use."""
    source = "impl"
    if impl == "auto":
        source = "ALRAO_BACKEND" if name == _of_process else "use_backend"
    _check_name(source, name)
    order = _AUTO_ORDER.get(device_type, ("reference",))
    if name == "auto":
        return next(name for name in order if status(op, name).available)
    if name == "triton" and INTERPRETED and device_type == "cpu":
        order = (*order, "triton")
    if name not in order:
        raise ValueError(
            f"{source}: {name!r} does not run on {device_type} tensors, expected one of {', '.join(order)}"
        )
    state = status(op, name)
    if not state.available:
        raise BackendUnavailableError(f"{source}: {name!r} cannot run {op}: {state.reason}")
    return name


def _check_name(source: str, name: str) -> None:
    if not (isinstance(name, str) and name == "auto"):
        _check_word(source, name, BACKENDS, "auto or ")


def select(op: str, device: torch.device, impl: str = "auto") -> str:
    """The implementation that runs `op` on tensors of `device`: the only place where that is decided.

    Raises ValueError for an unknown name or one that does not run on that device (TypeError for what is no name),
    `BackendUnavailableError` for a backend that was asked for and is not available here. All say where the name comes
    from: `impl`, `use_backend` or ALRAO_BACKEND.
    """
    if torch.compiler.is_compiling():
        # A guard on the memory would recompile as soon as an eager call has filled it.
        return _choose(op, device.type, _traced.in_use if impl == "auto" else impl, impl)
    if not isinstance(impl, str):
        _check_name("impl", impl)
    name = _in_use.get() if impl == "auto" else impl
    key = (op, device.type, name)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(op, device.type, name, impl)
    return found


def in_use(op: str, device: torch.device) -> str:
    """The backend that `impl="auto"` means now for `op` on tensors of `device`, by its name; whether or not it runs."""
    name = _in_use.get()
    return available(op, device)[0] if name == "auto" else name


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Within the block `impl="auto"` means the backend `name`; "auto" restores the choice by device.

    It holds for the thread, or the task of asyncio, that runs the block. Threads that it starts have the default of
    the process, ALRAO_BACKEND, and so have functions that a backward pass on a GPU calls, since autograd has threads of
    its own there; but a head that an activation checkpoint runs again there has the backend of its first run. Compiled
    code is compiled anew for another backend.

    Raises ValueError or TypeError for an unknown name.
    """
    _check_name("name", name)
    return _using(name)


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    previous = _in_use.get()
    _in_use.set(name)
    try:
        yield
    finally:
        _in_use.set(previous)
