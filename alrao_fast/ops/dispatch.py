"""The dispatcher library of the package: an op's schema and fake, and the op that runs it on a backend.

Schemas stand in Python, whether or not the extension is built: one definition for every backend, to which the compiled
ones add their kernels. The Triton kernels are a second op of the same schema, under a name of its own, since a CUDA
extension may hold the CUDA key of the first; their modules are imported, and triton with them, at the first call.
"""

import contextlib
from collections.abc import Callable, Sequence
from importlib import import_module
from operator import itemgetter
from typing import Any

import torch

NAMESPACE = "alrao_fast"
LIB = torch.library.Library(NAMESPACE, "DEF")


def no_result(*args: object, **kwargs: object) -> None:
    """The fake of an op that only writes into its arguments; the kernel checks them."""


def define(schema: str, fake: Callable[..., Any] | None = None) -> str:
    """Define an op by its schema, with its fake implementation; return the qualified name."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"{NAMESPACE}::{schema.split('(', 1)[0].strip()}"
    if fake is not None:
        torch.library.register_fake(qualified, fake, lib=LIB)
    return qualified


def define_twin(schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> str:
    """Define the Triton twin of the op of this schema, which `run` computes; its name ends in `__triton`."""
    name, arguments = schema.split("(", 1)
    qualified = define(f"{name}__triton({arguments}", fake)

    def run_there(*args: Any, **kwargs: Any) -> Any:
        with device_of(args[0]):
            return run(*args, **kwargs)

    LIB.impl(qualified, run_there, "CompositeExplicitAutograd")
    return qualified


def define_triton(
    schema: str, fake: Callable[..., Any], module: str, check: Callable[..., None]
) -> str:
    """The same, run by the op's namesake in `kernels/<module>`; `check` gets the arguments first and may raise."""
    name = schema.split("(", 1)[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return getattr(import_module(f"alrao_fast.kernels.{module}"), name)(*args, **kwargs)

    return define_twin(schema, fake, run)


def outside_graphs(*names: str) -> None:
    """Have ops that are no part of any graph pass autograd by, which would look for tensors that require it."""
    for name in names:
        LIB.impl(name, torch.library.fallthrough_kernel, "Autograd")


def finder(schema: str, *names: str) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that finds the arguments of these names among all of an op's, in the order of its schema."""
    order, _ = arguments_of(schema)
    return itemgetter(*map(order.index, names))


def arguments_of(schema: str) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The names of an op's arguments and their defaults (None without), in the order of its schema."""
    arguments = torch._C.parse_schema(schema).arguments
    return tuple(a.name for a in arguments), tuple(a.default_value for a in arguments)


def overload(name: str, backend: str | None = None) -> Any:
    """The op that runs `name` on `backend`, triton or a compiled one."""
    return getattr(torch.ops.alrao_fast, f"{name}__triton" if backend == "triton" else name).default


def device_of(tensors: Any) -> contextlib.AbstractContextManager[Any]:
    """Triton starts its kernels on the current device: make it that of a tensor, or of the first in a list."""
    first = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else tensors
    if isinstance(first, torch.Tensor) and first.is_cuda:
        return torch.cuda.device(first.device)
    return contextlib.nullcontext()
