"""The states that an optimizer keeps of a parameter: made at construction, and again where one is missing.

They are all there from the start, as in torch.optim.Adagrad: whoever loads a checkpoint into the tensors of a fresh
optimizer, as torch.distributed.checkpoint does, finds every one of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alrao_fast import sharding
from alrao_fast.ops.checks import LOW_PRECISION
from alrao_fast.ops.feature import FeatureOp

# What a state has with one entry per feature: the rates of now, those that were drawn, and the most that they may be.
RATES = ("rate", "drawn_rate", "rate_limit")


def rates_in(own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a state, what it has with one entry per feature."""
    return {key: own[key] for key in RATES if isinstance(own.get(key), Tensor)}


def state_dtype(param: Tensor, float32_states: bool, masters: bool) -> torch.dtype:
    """The dtype of a parameter's states."""
    low_precision = param.dtype in LOW_PRECISION
    return torch.float32 if low_precision and (float32_states or masters) else param.dtype


def complete(
    op: FeatureOp,
    params: list[Tensor],
    state: Any,
    names: tuple[str, ...],
    float32_states: bool = False,
    masters: bool = False,
    averages: bool = False,
) -> None:
    """Make what the states of these parameters lack of `names`, the counts of steps, and the masters and averages if
    there are any.

    Whether a step is the first for `op.first_state` follows that state, as in torch.optim: made anew it restarts the
    count, and one that no step has begun is dropped where it is not needed any more.
    """
    first, owns = op.first_state, [state[param] for param in params]
    for param, own in zip(params, owns):
        device = torch.device("cpu") if param.is_meta else param.device
        if first in own and first not in names and _is_unbegun(own, first):
            del own[first]
        if first in names and _is_missing(own, first, param):
            own["step"] = torch.zeros((), dtype=torch.int64, device=device)
        elif own.get("step") is None:
            # Put there by hand, without a count: it is not the first step that comes.
            count = int(first in names)
            own["step"] = torch.full((), count, dtype=torch.int64, device=device)
    # One state of all parameters after the other: a step walks through them like that.
    for name in names:
        for param, own in zip(params, owns):
            if _is_missing(own, name, param):
                own[name] = like(None, param, state_dtype(param, float32_states, masters))
    for param, own in zip(params, owns) if masters else ():
        if param.dtype in LOW_PRECISION and _is_missing(own, "master", param):
            own["master"] = like(param.detach(), param, torch.float32)
    for param, own in zip(params, owns) if averages else ():
        if _is_missing(own, "average", param):
            own["average"] = copy_of(param, average_dtype(param))


def average_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's running average."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _is_missing(own: dict[str, Any], name: str, param: Tensor) -> bool:
    """Whether a state has to be made: also one that was made for a parameter on the meta device, when it has left that
    before its first step."""
    value = own.get(name)
    if not (isinstance(value, Tensor) and value.is_meta and not param.is_meta):
        return value is None
    step = own.get("step")
    return step is None or (not (isinstance(step, Tensor) and step.is_meta) and int(step) == 0)


def _is_unbegun(own: dict[str, Any], name: str) -> bool:
    """Whether a state is as it was made, with no step since. Asks the device only before the first step."""
    step, state = own.get("step"), own[name]
    if state is None:
        return True
    if not (isinstance(step, Tensor) and isinstance(state, Tensor)) or step._is_view():
        return False
    return state.is_meta or (int(step) == 0 and not bool(sharding.local(state).any()))


def copy_of(param: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter's values in memory of its own."""
    if sharding.is_sharded(param):
        return sharding.like(param.detach(), param, dtype, copy=True)
    copy = torch.empty_strided(param.size(), param.stride(), dtype=dtype, device=param.device)
    return copy.copy_(param.detach())


def like(stored: Tensor | None, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A state with the parameter's shape, strides and device, of a DTensor its placements too: the stored one, moved if
    it must be, or zeros."""
    if sharding.is_sharded(param):
        return sharding.like(stored, param, dtype)
    if stored is not None and (stored.dtype, stored.device, stored.stride()) == (
        dtype,
        param.device,
        param.stride(),
    ):
        return stored
    state = torch.empty_strided(param.size(), param.stride(), dtype=dtype, device=param.device)
    return state.zero_() if stored is None else state.copy_(stored)


def steps_of(owns: list[dict[str, Any]], device: torch.device, first: str) -> Tensor:
    """The step counts as one int64 vector; each parameter's state has its own entry as a view.

    A state `first` that holds something although no step has been counted was loaded by hand: the next step is not
    its first. Once a count is an entry of such a vector, the steps themselves keep it right.
    """
    steps = torch.stack([as_count(own["step"], device) for own in owns])
    for number, own in enumerate(owns if first else ()):
        if not (isinstance(own["step"], Tensor) and own["step"]._is_view()):
            steps[number] += (steps[number] == 0) & sharding.local(own[first]).any()
    for own, step in zip(owns, steps.unbind()):
        own["step"] = step
    return steps


def as_count(step: Any, device: torch.device) -> Tensor:
    """A step count, which others keep as a number or in float32."""
    return torch.as_tensor(step, dtype=torch.int64, device=device)
