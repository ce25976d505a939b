"""What an optimizer's steps work on: calls of its op on tensors that stay, and the objects they were made of.

To gather tensors costs Python work for each, so it is done once and kept. What stands in the optimizer is what runs:
before each step `Binding` looks whether every parameter, state dict and state is still the object that was gathered,
at some microseconds per hundred tensors; a plan notices by itself where the memory behind an object has changed.
"""

import math
from array import array
from collections.abc import Callable, Collection, Mapping
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import _extension
from alrao_fast.arguments import FLOATS
from alrao_fast.ops.checks import LOW_PRECISION
from alrao_fast.ops.feature import FeatureOp, Lists, Options, Scalars
from alrao_fast.ops.plan import ListPlan, make_plan
from alrao_fast.optim.layouts import Layout, memory_rates


class Call:
    """One op on tensors of one device and dtype; `positions` says which of a group's gradients are theirs (None: all).

    Raises RuntimeError where the tensors do not fit together.
    """

    def __init__(
        self, op: FeatureOp, lists: Lists, impl: str, positions: list[int] | None = None
    ) -> None:
        self.lists, self.impl, self.positions = lists, impl, positions
        op.check_data(lists)
        self._listed = ListPlan(op, lists, impl)
        self._plan = make_plan(op, lists, impl)
        self._versions = [p._version for p in lists.params] if lists.masters else []

    def step(self, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        """One step; False, with nothing written, where a parameter's memory, strides or dtype has changed."""
        if self.positions is not None:
            grads = [grads[k] for k in self.positions]
        plan = self._listed if torch.compiler.is_compiling() else self._plan
        scalars = self._there(scalars)
        if not self.lists.masters:
            return plan.step(grads, options, scalars)
        if not self._listed.unchanged():
            return False
        self.follow_changes()
        updated = plan.step(grads, options, scalars)
        self.note_versions()
        return updated

    def _there(self, scalars: Scalars) -> Scalars:
        """Scalars in tensors must be where the parameters are. A learning rate on the CPU needs no waiting."""
        lr, maximize, grad_scale, found_inf = scalars
        if not isinstance(lr, Tensor) and grad_scale is None and found_inf is None:
            return scalars
        device = self.lists.steps.device
        if isinstance(lr, Tensor):
            if lr.device != device:
                lr = float(lr) if lr.device.type == "cpu" else lr.to(device)
            elif lr.dtype not in (torch.float32, torch.float64):
                lr = lr.double()
        grad_scale = None if grad_scale is None else grad_scale.to(device)
        found_inf = None if found_inf is None else found_inf.to(device)
        return Scalars(lr, maximize, grad_scale, found_inf)

    # Version counters are Python's business: torch.compile breaks its graph here, with master weights only.
    @torch.compiler.disable
    def follow_changes(self) -> None:
        """Take into the master weights what was written into the parameters since the last step."""
        params = self.lists.params
        if self.lists.masters and self._versions != [p._version for p in params]:
            for param, master in zip(params, self.lists.masters):
                if master.numel():
                    _reconcile(master, param)

    @torch.compiler.disable
    def note_versions(self) -> None:
        """Remember the parameters as this step has left them."""
        if self.lists.masters:
            self._versions = [p._version for p in self.lists.params]


# In Python these loops over all tensors take half as long as the update of small ones.
_compiled_comparison = _extension.function("same_objects")
_compiled_gradients = _extension.function("gradients")


class Objects:
    """What sequences hold, and mappings as values: the objects themselves, however equal others may be."""

    def __init__(self, *containers: Any) -> None:
        # Of a mapping a view, which shows what it holds later on.
        self._values = [c.values() if isinstance(c, Mapping) else c for c in containers]
        # Keeps the objects alive: their ids stay theirs.
        self._held = held = [list(values) for values in self._values]
        self.count = sum(map(len, held))
        self._containers = containers
        self._plain = all(isinstance(c, list | dict) for c in containers)
        self._ids = array("Q", [i for objects in held for i in (*map(id, objects), 0)]).tobytes()

    def are_same(self) -> bool:
        """Whether the containers still hold exactly these, in this order."""
        if self._plain and _compiled_comparison is not None:
            return _compiled_comparison(self._containers, self._ids)
        for values, held in zip(self._values, self._held):
            if len(values) != len(held) or not all(map(is_, values, held)):
                return False
        return True


class GroupBinding:
    """The calls that update a param group's parameters with gradients; `key` is what else decided how they are made."""

    def __init__(
        self, calls: list[Call], params: list[Tensor], mask: list[bool], key: Any, state: Any
    ) -> None:
        self.calls = calls
        self._params, self._mask, self._count, self._key = params, mask, sum(mask), key
        own = [state[param] for param, has_grad in zip(params, mask) if has_grad]
        self._objects = Objects(params, *own)

    def holds(self, params: list[Tensor], count: int, key: Any) -> bool:
        """Whether the calls still serve a step in which `count` of `params` have gradients."""
        if self._count != count or self._params is not params or self._key != key:
            return False
        # torch.compile guards the objects that it has traced.
        if not torch.compiler.is_compiling() and not self._objects.are_same():
            return False
        return count == len(params) or self._mask == [p.grad is not None for p in params]


class Binding:
    """The bindings of an optimizer's param groups, by the group's number, dropped where its state is another."""

    def __init__(self) -> None:
        self.groups: dict[int, GroupBinding] = {}
        self._state: Any = {}
        self._objects = Objects(self._state)

    def follow(self, state: Any) -> None:
        """Before the groups' steps: forget everything if `state`, or the dict of a parameter in it, was exchanged."""
        if self._state is state and (
            self._objects.count == len(state)
            if torch.compiler.is_compiling()
            else self._objects.are_same()
        ):
            return
        self.groups.clear()
        self._state, self._objects = state, Objects(state)

    def step(
        self,
        number: int,
        params: list[Tensor],
        grads: list[Tensor],
        key: Any,
        options: Options,
        scalars: Scalars,
        make: Callable[[Collection[int]], GroupBinding],
    ) -> None:
        """Update the parameters of group `number` by `grads`, those that are there.

        `make(done)` binds the parameters that have a gradient and whose id is not in `done`.
        """
        group = self.groups.get(number)
        if group is None or not group.holds(params, len(grads), key):
            group = self._keep(number, make(()))
        for place, call in enumerate(group.calls):
            if call.step(grads, options, scalars):
                continue
            # Something has moved: bind anew and make all calls from this one on; those before have had this step.
            done = {id(p) for before in group.calls[:place] for p in before.lists.params}
            rest = [p.grad for p in params if p.grad is not None and id(p) not in done]
            for again in self._keep(number, make(done)).calls:
                if not again.step(rest, options, scalars):
                    raise RuntimeError(
                        "internal error: an update plan is stale right after it was made"
                    )
            if done:
                del self.groups[number]
            return

    def _keep(self, number: int, group: GroupBinding) -> GroupBinding:
        self.groups[number] = group
        # Binding may have added to it.
        self._objects = Objects(self._state)
        return group


class Needs(NamedTuple):
    """What decides which tensors a group's update takes: its states, how it rounds, and which implementation runs."""

    states: tuple[str, ...]
    float32_states: bool
    master_weights: bool
    rounding: str | None
    impl: str


def bind(
    op: FeatureOp,
    params: list[Tensor],
    layouts: dict[Tensor, Layout],
    state: Any,
    needs: Needs,
    seed: int,
    done: Collection[int],
) -> GroupBinding:
    """The calls for those of `params` that have a gradient and whose id is not in `done`; creates or moves their states
    where needed."""
    mask = [p.grad is not None and id(p) not in done for p in params]
    with_grad = [k for k, has_grad in enumerate(mask) if has_grad]
    for k in with_grad:
        name = _name(params[k], layouts)
        check_gradient(params[k], name)
        for key, value in state[params[k]].items():
            if isinstance(value, Tensor) and value.is_meta:
                raise RuntimeError(
                    f"state {key!r} of parameter {name!r} is on meta: expected a tensor with data"
                )
    calls = []
    for positions in by_device_and_dtype([params[k] for k in with_grad]):
        numbers = with_grad if positions is None else [with_grad[k] for k in positions]
        seeds = [(seed + k) % 2**63 for k in numbers]
        lists = _lists([params[k] for k in numbers], seeds, layouts, state, needs)
        calls.append(Call(op, lists, needs.impl, positions))
    return GroupBinding(calls, params, mask, needs, state)


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients that are there."""
    if _compiled_gradients is not None and isinstance(params, list):
        if not torch.compiler.is_compiling():
            return _compiled_gradients(params)
    return [g for g in [p.grad for p in params] if g is not None]


def by_device_and_dtype(params: list[Tensor]) -> list[list[int] | None]:
    """The positions of the parameters that one call can take; None for all of them."""
    parts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, param in enumerate(params):
        parts.setdefault((param.device, param.dtype), []).append(position)
    return [*parts.values()] if len(parts) > 1 else [None] * len(parts)


def check_gradient(param: Tensor, name: str) -> None:
    """Raises where the ops cannot use a parameter or its gradient."""
    if param.dtype not in FLOATS:
        raise TypeError(
            f"parameter {name!r} has dtype {param.dtype}; expected float32, float64, bfloat16 or float16"
        )
    if param.is_meta and param.grad is not None:
        raise RuntimeError(
            f"parameter {name!r} is on meta: expected one with data, which module.to_empty(device=...) makes room for"
        )
    if param.grad is not None and param.grad.layout != torch.strided:
        raise RuntimeError(
            f"parameter {name!r} has a gradient of layout {param.grad.layout}: sparse gradients are not supported; "
            "use sparse=False in nn.Embedding and nn.EmbeddingBag"
        )


def _lists(
    params: list[Tensor],
    seeds: list[int],
    layouts: dict[Tensor, Layout],
    state: Any,
    needs: Needs,
) -> Lists:
    low_precision = params[0].dtype in LOW_PRECISION
    with_masters = needs.master_weights and low_precision
    state_dtype = params[0].dtype
    if with_masters or (needs.float32_states and low_precision):
        state_dtype = torch.float32
    rates, inners = [], []
    for param in params:
        name, own = _name(param, layouts), state[param]
        own["rate"] = own["rate"].to(param.device)
        _check_shape(param, layouts[param], own, needs)
        # Without entries there are no features either; the ops expect at least one rate.
        rate = own["rate"] if own["rate"].numel() else own["rate"].new_ones(1)
        rate, inner = memory_rates(rate, param, layouts[param].dims, name)
        rates.append(rate)
        inners.append(inner)
        for key in needs.states:
            own[key] = _like(own.get(key), param, state_dtype)
        if with_masters:
            own["master"] = _like(own.get("master", param), param, torch.float32)
            _reconcile(own["master"], param)
    stochastic = low_precision and not with_masters and needs.rounding != "nearest"
    return Lists(
        params=params,
        states=[[state[p][key] for p in params] for key in needs.states],
        masters=[state[p]["master"] for p in params] if with_masters else [],
        rates=rates,
        inners=inners,
        seeds=seeds if stochastic else [],
        steps=_steps(params, state),
    )


def _check_shape(param: Tensor, layout: Layout, own: dict[str, Any], needs: Needs) -> None:
    """Raises where a parameter has another shape than the rates and states were made for."""
    size = math.prod(param.size(d) for d in layout.dims if d < param.dim())
    rates = own["rate"].numel()
    fits = size == rates or (len(layout.dims) == 1 and rates and size % rates == 0)
    kept = [own[key] for key in (*needs.states, "master") if key in own]
    if not fits or any(state.shape != param.shape for state in kept):
        raise RuntimeError(
            f"parameter {layout.name!r} has shape {list(param.shape)}, which its learning rates and states were not "
            "made for: construct a new optimizer after changing a parameter's shape"
        )


def _name(param: Tensor, layouts: dict[Tensor, Layout]) -> str:
    if param not in layouts:
        raise RuntimeError(
            f"a parameter of shape {list(param.shape)} was put into param_groups without a learning rate: use "
            "add_param_group, which draws one"
        )
    return layouts[param].name


def _like(stored: Tensor | None, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A state with the parameter's shape, strides and device: the stored one, moved if it must be, or zeros."""
    if stored is not None and (stored.dtype, stored.device, stored.stride()) == (
        dtype,
        param.device,
        param.stride(),
    ):
        return stored
    state = torch.empty_strided(param.size(), param.stride(), dtype=dtype, device=param.device)
    return state.zero_() if stored is None else state.copy_(stored)


def _reconcile(master: Tensor, param: Tensor) -> None:
    """Take the entries that were written into the parameter since its master was rounded into it."""
    with torch.no_grad():
        value = param.detach()
        master.copy_(torch.where(master.to(param.dtype) == value, master, value.float()))


def _steps(params: list[Tensor], state: Any) -> Tensor:
    """The step counts as one int64 vector; each parameter's state has its own entry as a view."""
    device = params[0].device
    steps = torch.zeros(len(params), dtype=torch.int64, device=device)
    counted = [k for k, p in enumerate(params) if "step" in state[p]]
    if counted:
        steps[counted] = torch.stack([as_count(state[params[k]]["step"], device) for k in counted])
    for param, step in zip(params, steps.unbind()):
        state[param]["step"] = step
    return steps


def as_count(step: Any, device: torch.device) -> Tensor:
    """A step count, which others keep as a number or in float32."""
    return torch.as_tensor(step, dtype=torch.int64, device=device)
