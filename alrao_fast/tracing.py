"""torch.fx, torch.jit and the exporters for ONNX: predictions run in their graphs, and what cannot names the cure."""

from typing import Any, NoReturn

import torch
from torch import fx

CURE = "net.collapse() makes a torch.fx.GraphModule of torch's own layers, which they take"


def ops_are_known() -> bool:
    """Whether what runs the present call has this package's ops: a TorchScript graph for ONNX has not."""
    return not (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())


def hint(got: Any) -> str:
    """The end of an error for an argument that torch.fx.symbolic_trace has put there; nothing for others."""
    return (
        f"; torch.fx and torch.jit cannot trace clones symbolically: {CURE}"
        if isinstance(got, fx.Proxy)
        else ""
    )


def backbone_arguments(args: Any) -> tuple[Any, ...]:
    """The positional arguments of an AlraoModel, in which tracers may have put others than the caller."""
    if isinstance(args, fx.Proxy):
        raise TypeError(f"args: got {args}, expected inputs of the backbone{hint(args)}")
    if not ops_are_known():
        # The TorchScript exporter passes defaults of keyword arguments by position.
        while args and args[-1] is None:
            args = args[:-1]
    return tuple(args)


def refuse_script(module: torch.nn.Module) -> NoReturn:
    """What torch.jit.script asks a module before it compiles it."""
    raise RuntimeError(f"torch.jit.script cannot compile {type(module).__name__}: {CURE}")
