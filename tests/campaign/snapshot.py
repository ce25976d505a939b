"""What a call that raised must have left alone: a fingerprint of tensors, modules, optimizers and containers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(value: Any) -> dict[str, Any]:
    """Path -> what stands there; equal for two moments if and only if nothing has changed in between."""
    found: dict[str, Any] = {}
    _visit(value, "", found, set())
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first path at which two fingerprints differ, or None."""
    for path in [*before, *(path for path in after if path not in before)]:
        if path not in after:
            return f"{path} is gone"
        if path not in before:
            return f"{path} is new"
        if before[path] != after[path]:
            return f"{path} was {_short(before[path])}, is {_short(after[path])}"
    return None


def _short(value: Any) -> str:
    return f"{value!r:.120}"


def _visit(value: Any, path: str, found: dict[str, Any], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        found[path] = _tensor(value)
        if value.is_leaf and value.grad is not None:
            found[f"{path}.grad"] = _tensor(value.grad)
        return
    if isinstance(value, nn.Module):
        for name, module in value.named_modules():
            found[f"{path}{name}.training"] = module.training
            for kind in (module._parameters, module._buffers):
                for key, tensor in kind.items():
                    _visit(tensor, f"{path}{name}.{key}", found, seen)
        return
    if isinstance(value, torch.optim.Optimizer):
        names: dict[int, str] = {}
        for number, group in enumerate(value.param_groups):
            for key, option in group.items():
                if key != "params":
                    _visit(option, f"{path}groups[{number}][{key!r}]", found, seen)
            for place, param in enumerate(group["params"]):
                names[id(param)] = f"groups[{number}].params[{place}]"
                found[f"{path}{names[id(param)]} is"] = id(param)
                _visit(param, f"{path}{names[id(param)]}", found, seen)
        for key, own in value.state.items():
            name = names.get(id(key), f"{key!r:.40}")
            _visit(own, f"{path}state[{name}]", found, seen)
        return
    if isinstance(value, torch.Generator):
        found[path] = value.get_state().numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            _visit(item, f"{path}[{key!r:.40}]", found, seen)
        found[f"{path} length"] = len(value)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _visit(item, f"{path}[{number}]", found, seen)
        found[f"{path} length"] = len(value)
    elif isinstance(value, float):
        found[path] = "nan" if math.isnan(value) else value
    elif isinstance(value, int | str | bytes | complex | None):
        found[path] = value
    else:
        found[path] = id(value)


def _tensor(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        return (str(tensor.layout), tuple(tensor.shape), id(tensor))
    described = (str(tensor.dtype), tuple(tensor.shape), tensor.stride(), str(tensor.device))
    if tensor.is_meta:
        return described
    # Bit by bit, so that NaN equals itself and -0.0 is not 0.0.
    data = torch.zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).flatten()
    return (*described, data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
