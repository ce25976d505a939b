"""torch.compile's decorators without its import: the compiler takes longer to import than torch, and few need it."""

import functools
import sys
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def assume_constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result`: a graph takes what the function returns while traced as a constant."""
    # The attribute is all that torch's function sets.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_loaded() -> bool:
    """Whether the process has the compiler: without it nothing is compiled, or comes from what is."""
    return "torch._dynamo" in sys.modules


def disable(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`torch.compiler.disable(reason=reason)`, asked for at the first call in a process that has the compiler.

    A graph that meets the function is left for it, and fullgraph=True refuses it with this reason.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        # A module: what stands in it a graph looks up while it is traced.
        made = ModuleType(f"{__name__}.{function.__qualname__}")

        @assume_constant_result
        def is_made() -> bool:
            if not is_loaded():
                return False
            if not hasattr(made, "disabled"):
                from torch._dynamo.eval_frame import skip_code

                made.disabled = torch.compiler.disable(function, reason=reason)  # type: ignore[attr-defined]
                # Or these would be compiled by themselves where a graph was left for them.
                for own in (call, is_made):
                    skip_code(own.__code__)  # type: ignore[union-attr]
            return True

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (made.disabled if is_made() else function)(*args, **kwargs)

        return call

    return decorate


def without_import(method: Callable[P, R]) -> Callable[P, R]:
    """A bound method; while there is no compiler, without torch's wrapper that imports it to be left alone by it."""
    function: Any = getattr(method, "__func__", None)
    if is_loaded() or getattr(function, "__globals__", {}).get("__name__") != "torch._compile":
        return method
    return MethodType(function.__wrapped__, method.__self__)  # type: ignore[attr-defined]
