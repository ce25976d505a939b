"""Checks a loaded optimizer state against the parameters and copies it, before anything is changed."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from alrao_fast import sharding
from alrao_fast.ops.feature import FEATURE_OPS, FeatureOp
from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.states import RATES, rates_in

# The rates of a parameter for which a state_dict has none: (param, its state there, the states read so far).
MissingRates = Callable[
    [Tensor, Mapping[str, Any], Mapping[Any, dict[str, Any]]], Mapping[str, Tensor]
]


def fitted(
    state_dict: Any,
    groups: list[dict[str, Any]],
    ops: Sequence[FeatureOp],
    name_of: Callable[[Tensor], str],
    rates_of: Callable[[Tensor, Mapping[str, Any]], tuple[tuple[int, ...], torch.dtype]],
    missing_rates: MissingRates,
    of_old: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[dict[str, Any]], defaultdict[Any, dict[str, Any]]]:
    """The param groups and the state that `state_dict` means for the parameters of `groups`, as copies.

    ops: those of the groups. name_of, rates_of: the name of a parameter, the shape and dtype of its rates. of_old:
    options that states did not have once, as they were then. State that belongs to no parameter is taken over as it is.
    Raises ValueError or TypeError, naming what does not fit.
    """
    new_groups, saved_ids = _groups(state_dict, groups, of_old)
    saved_state = state_dict["state"]
    _expect("state of state_dict", saved_state, Mapping, "a dict")
    params = [(param, op) for group, op in zip(groups, ops) for param in group["params"]]
    without_rates = []
    copies: dict[tuple[int, torch.device], Tensor] = {}
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for param_id, (param, op) in zip(saved_ids, params):
        saved, name = saved_state.get(param_id, {}), name_of(param)
        _expect(f"state of parameter {name!r} in state_dict", saved, Mapping, "a dict")
        reader = _Reader(op, param, name, *rates_of(param, saved), copies)
        state[param] = {
            key: reader.read(key, value)
            for key, value in saved.items()
            if value is not None or key not in op.states
        }
        _check_op(op, state[param], param, name)
        if "rate" not in saved:
            without_rates.append((param, saved))
    for param, saved in without_rates:
        state[param].update(missing_rates(param, saved, state))
    known = set(saved_ids)
    for key, value in saved_state.items():
        if key not in known:
            state[key] = value
    return new_groups, state


def _check_op(op: FeatureOp, own: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raise ValueError for states of another optimizer: a count of steps would stand beside states that saw none."""
    others = {key for other in FEATURE_OPS.values() for key in other.states}.difference(op.states)
    foreign = sorted(others.intersection(own))
    begun = param.requires_grad and own.get("step")
    lacking = [key for key in op.states[: op.fixed_states] if begun and key not in own]
    if foreign or lacking:
        what = f"has {foreign[0]!r}" if foreign else f"has taken steps without {lacking[0]!r}"
        raise ValueError(
            f"the state of parameter {name!r} in state_dict {what}; expected the states of {op.stem}: it was written "
            "by another optimizer"
        )


def _expect(what: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {type(value).__name__}; expected {expected}")


def _groups(
    state_dict: Any, groups: list[dict[str, Any]], of_old: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The saved param groups for these parameters, and the keys of all their states."""
    for key in ("param_groups", "state"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}; expected what state_dict() returned")
    saved_groups = state_dict["param_groups"]
    _expect("param_groups of state_dict", saved_groups, list | tuple, "a list of dicts")
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved_groups)} param groups; expected {len(groups)}, as the optimizer"
        )
    new_groups, ids = [], []
    for number, (saved, group) in enumerate(zip(saved_groups, groups)):
        what = f"param group {number} of state_dict"
        _expect(what, saved, Mapping, "a dict")
        own = saved.get("params")
        _expect(f"params of {what}", own, list | tuple, "a list of the parameters' numbers")
        if len(own) != len(group["params"]):
            raise ValueError(
                f"{what} has {len(own)} parameters; expected {len(group['params'])}, as the optimizer"
            )
        for param_id in own:
            _expect(f"an entry of params of {what}", param_id, int | str, "a number or a name")
        ids += own
        options = {key: deepcopy(value) for key, value in saved.items() if key != "params"}
        for name in ("rounding_seed", "steps_taken"):
            if not isinstance(options.get(name, 0), int):
                raise TypeError(f"{name} of {what} is {options[name]!r}; expected an integer")
        # Options that an older state does not have keep their present values, or what they meant then.
        new_groups.append({**group, **of_old, **options})
    return new_groups, ids


class _Reader:
    """Copies of one parameter's saved states; `copies` keeps a vector that several parameters share one tensor."""

    def __init__(
        self,
        op: FeatureOp,
        param: Tensor,
        name: str,
        rate_shape: tuple[int, ...],
        rate_dtype: torch.dtype,
        copies: dict[tuple[int, torch.device], Tensor],
    ) -> None:
        self._op, self._param, self._name = op, param, name
        self._rate_shape, self._rate_dtype, self._copies = rate_shape, rate_dtype, copies

    def read(self, key: str, value: Any) -> Any:
        if key in RATES:
            return self._rate(key, sharding.whole(value))
        if key == "step":
            return self._step(value)
        if key in self._op.states or key in ("master", "average"):
            return self._placed(self._floats(key, value, tuple(self._param.shape)))
        return self._cast(value)

    def _rate(self, key: str, value: Any) -> Tensor:
        rates = self._floats(key, value, self._rate_shape)
        device = rates.device if self._param.is_meta else self._param.device
        if (id(rates), device) in self._copies:
            return self._copies[id(rates), device]
        copy = self._copies[id(rates), device] = self._copied(rates, self._rate_dtype)
        if not bool((copy.isfinite() & (copy >= 0)).all()):
            raise ValueError(
                f"{self._what(key)} has a negative or non-finite entry; expected finite rates >= 0"
            )
        return copy

    def _step(self, value: Any) -> Tensor:
        count = value
        if isinstance(value, Tensor):
            if value.shape != () or value.is_complex() or value.is_meta:
                raise ValueError(
                    f"{self._what('step')} is {_kind(value)}; expected a count, a number or a tensor of shape []"
                )
            count = value.item()
        if isinstance(count, bool) or not isinstance(count, int | float):
            raise TypeError(f"{self._what('step')} is {count!r}; expected a count")
        # Beyond 2**53 a float counts no single steps.
        if not (0 <= count < 2**63 and count == int(count)):
            raise ValueError(f"{self._what('step')} is {count}; expected an integer >= 0")
        device = torch.device("cpu") if self._param.is_meta else self._param.device
        return torch.full((), int(count), dtype=torch.int64, device=device)

    def _floats(self, key: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        expected = f"a dense tensor of floats of shape {list(shape)}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{self._what(key)} is a {type(value).__name__}; expected {expected}")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{self._what(key)} has shape {list(value.shape)}; expected {list(shape)}"
            )
        on_meta = value.is_meta and not self._param.is_meta
        if not value.is_floating_point() or value.layout != torch.strided or on_meta:
            raise ValueError(f"{self._what(key)} is {_kind(value)}; expected {expected}")
        return value

    def _cast(self, value: Any) -> Any:
        """What others keep with a parameter, as torch's load_state_dict casts it."""
        if isinstance(value, Tensor):
            return self._copied(
                value, self._param.dtype if self._param.is_floating_point() else None
            )
        if isinstance(value, dict):
            return {key: self._cast(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cast(entry) for entry in value)
        return value

    def _placed(self, value: Tensor) -> Tensor:
        """A copy that is placed as the parameter: of what one process has saved, the entries that are here."""
        if not sharding.is_sharded(self._param):
            return self._copied(sharding.whole(value))
        return sharding.like(value.detach(), self._param, value.dtype, copy=True)

    def _copied(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        device = value.device if self._param.is_meta else self._param.device
        return value.detach().to(device=device, dtype=dtype or value.dtype, copy=True)

    def _what(self, key: str) -> str:
        return f"state {key!r} of parameter {self._name!r} in state_dict"


def _kind(value: Tensor) -> str:
    return f"{value.dtype}, {value.layout}, of shape {list(value.shape)} on {value.device}"


def rates_of_frozen(
    param: Tensor,
    saved: Mapping[str, Any],
    read: Mapping[Any, dict[str, Any]],
    *,
    layouts: Mapping[Tensor, Layout],
    own: Callable[[Tensor], Mapping[str, Tensor]],
) -> Mapping[str, Tensor]:
    """The rates of a frozen parameter without a saved state: those of its vector, if another parameter has loaded it,
    else its own. torch.distributed.checkpoint leaves frozen parameters out.
    """
    layout = layouts[param]
    if saved or param.requires_grad:
        raise ValueError(
            f"state_dict has no learning rates for parameter {layout.name!r}: it was not written by an Alrao optimizer"
        )
    for other, states in read.items():
        shared = "rate" in states and layouts[other].vector is layout.vector
        if shared and layout.feature_of is layouts[other].feature_of is None:
            return rates_in(states)
    return own(param)
