"""Checks a loaded optimizer state against the parameters and copies it, before anything is changed."""

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from alrao_fast.optim.layouts import Layout


def fitted(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], layouts: dict[Tensor, Layout]
) -> tuple[list[dict[str, Any]], defaultdict[Any, dict[str, Any]]]:
    """The param groups and the state that `state_dict` means for the parameters of `groups`, as copies.

    Raises ValueError or TypeError, naming what does not fit.
    """
    for key in ("param_groups", "state"):
        if not isinstance(state_dict, dict) or key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}; expected what state_dict() returned")
    saved_groups = deepcopy(state_dict["param_groups"])
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved_groups)} param groups; expected {len(groups)}, as the optimizer"
        )
    new_groups = []
    params_by_id: dict[Any, Tensor] = {}
    for number, (saved, group) in enumerate(zip(saved_groups, groups)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"param group {number} of state_dict has {len(saved['params'])} parameters; expected "
                f"{len(group['params'])}, as the optimizer"
            )
        params_by_id.update(zip(saved["params"], group["params"]))
        # Options that an older state does not have keep their present values.
        new_groups.append({**group, **saved, "params": group["params"]})
    copies: dict[tuple[int, torch.device], Tensor] = {}
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for param_id, param in params_by_id.items():
        saved_state = state_dict["state"].get(param_id, {})
        name = layouts[param].name
        if "rate" not in saved_state:
            raise ValueError(
                f"state_dict has no learning rates for parameter {name!r}: it was not written by an Alrao optimizer"
            )
        for key, value in saved_state.items():
            state[param][key] = _copied(key, value, param, layouts[param], copies)
    for key, value in state_dict["state"].items():
        if key not in params_by_id:
            state[key] = deepcopy(value)
    return new_groups, state


def _copied(
    key: str,
    value: Any,
    param: Tensor,
    layout: Layout,
    copies: dict[tuple[int, torch.device], Tensor],
) -> Any:
    if not isinstance(value, Tensor):
        return deepcopy(value)
    expected, dtype = tuple(param.shape), value.dtype
    if key == "rate":
        expected, dtype = (layout.length(param),), torch.float32
    elif key == "step":
        expected, dtype = (), torch.int64
    if tuple(value.shape) != expected:
        raise ValueError(
            f"state {key!r} of parameter {layout.name!r} in state_dict has shape {list(value.shape)}; expected "
            f"{list(expected)}"
        )
    device = value.device if param.is_meta else param.device
    copy_key = (id(value), device)
    if copy_key not in copies:
        # A vector that several parameters share stays one tensor.
        copies[copy_key] = value.detach().to(device=device, dtype=dtype, copy=True)
    return copies[copy_key]
