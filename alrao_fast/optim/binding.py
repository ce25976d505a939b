"""What an optimizer's steps work on: calls of its op on tensors that stay, and the objects they were made of.

To gather tensors costs Python work for each, so it is done once and kept. What stands in the optimizer is what runs:
before each step `Binding` looks whether every parameter, state dict and state is still the object that was gathered,
at some microseconds per hundred tensors; a plan notices by itself where the memory behind an object has changed.
"""

import math
from array import array
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import chain
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import _extension, compiler
from alrao_fast.arguments import FLOATS
from alrao_fast.flat_shards import check_whole
from alrao_fast.ops.checks import LOW_PRECISION
from alrao_fast.ops.feature import FeatureOp, Lists, Options, Scalars
from alrao_fast.ops.plan import ListPlan, Plan, make_plan, params_are_swapped
from alrao_fast.optim.flat_layouts import FlatLayout
from alrao_fast.optim.flat_parts import FlatParts, flat_lists
from alrao_fast.optim.layouts import Layout, memory_rates
from alrao_fast.optim.states import average_dtype, like, state_dtype, steps_of
from alrao_fast.sharding import LocalParts, check_parts, is_sharded, local, local_rates, local_seed

# What makes the rates of a parameter anew from those in its state.
MakeRates = Callable[[], Tensor]


class Call:
    """One op on tensors of one device and dtype; `positions` says which of a group's gradients are theirs (None: all).

    derived: those of the rates that are copies, by number, with what makes them: each step looks what they are now.
    parts: where `lists` holds what is here of DTensors, or runs of flat vectors, those.

    Raises RuntimeError where the tensors do not fit together.
    """

    def __init__(
        self,
        op: FeatureOp,
        lists: Lists,
        impl: str,
        positions: list[int] | None = None,
        derived: Mapping[int, MakeRates] = MappingProxyType({}),
        parts: LocalParts | FlatParts | None = None,
    ) -> None:
        self.lists, self.impl, self.positions = lists, impl, positions
        self._parts = parts
        # As the optimizer has them.
        self.params: list[Tensor] = lists.params if parts is None else parts.params
        op.check_data(lists)
        self._listed = ListPlan(op, lists, impl)
        self._plan = make_plan(op, lists, impl)
        self._derived = [(lists.rates[number], make) for number, make in derived.items()]

    def step(self, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        """One step; False, with nothing written, where a parameter's memory, strides or dtype has changed."""
        if self.positions is not None:
            grads = [grads[k] for k in self.positions]
        if self._parts is not None:
            here = self._parts.gradients(grads)
            if here is None:
                return False
            grads = here
        plan = self._listed if torch.compiler.is_compiling() else self._plan
        scalars = self._there(scalars)
        if self._derived and not self._listed.unchanged():
            return False
        for rates, make in self._derived:
            rates.copy_(make())
        if isinstance(self._parts, FlatParts):
            self._parts.count(self.lists.steps)
        updated = self._run(plan, grads, options, scalars)
        if updated and scalars.grad_scale is not None:
            _unscale(grads, scalars.grad_scale, scalars.found_inf)
        return updated

    def _run(self, plan: Plan, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        """The update of the entries that are here, as `step`."""
        return plan.step(grads, options, scalars)

    def _there(self, scalars: Scalars) -> Scalars:
        """Scalars in tensors must be where the parameters are. A learning rate on the CPU needs no waiting: its value
        is known; a graph does not know it, and sends the tensor."""
        lr, grad_scale, found_inf = scalars.lr, scalars.grad_scale, scalars.found_inf
        if not isinstance(lr, Tensor) and grad_scale is None and found_inf is None:
            return scalars
        device = self.lists.steps.device
        if isinstance(lr, Tensor):
            if lr.device != device:
                known = lr.device.type == "cpu"
                traced = torch.compiler.is_compiling()
                lr = float(lr) if known and not traced else lr.to(device, non_blocking=known)
            if isinstance(lr, Tensor) and lr.dtype not in (torch.float32, torch.float64):
                lr = lr.double()
        grad_scale = None if grad_scale is None else grad_scale.to(device)
        found_inf = None if found_inf is None else found_inf.to(device)
        return scalars._replace(lr=lr, grad_scale=grad_scale, found_inf=found_inf)


@torch.no_grad()
def _unscale(grads: list[Tensor], grad_scale: Tensor, found_inf: Tensor | None) -> None:
    """Leave the gradients as GradScaler.unscale_ and torch's fused optimizers do: divided by their scale, in place,
    unless found_inf is not 0. Waits for no device."""
    inverse = grad_scale.double().reciprocal().float()
    if found_inf is not None:
        inverse = torch.where(found_inf == 0, inverse, torch.ones_like(inverse))
    # In float32, whatever the gradients' dtype: in float16 a scale of 2^16 is infinite.
    torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros_like(inverse), inverse)


# In Python these loops over all tensors take half as long as the update of small ones.
_compiled_comparison = _extension.function("same_objects")
_compiled_gradients = _extension.function("gradients")


class Objects:
    """What sequences hold, and mappings as keys and values: the objects themselves, however equal others may be."""

    def __init__(self, *containers: Any) -> None:
        # Keeps the objects alive: their ids stay theirs.
        self._held = held = [_objects_in(container) for container in containers]
        self._containers = containers
        self._plain = all(isinstance(c, list | dict) for c in containers)
        self._ids = array("Q", [i for objects in held for i in (*map(id, objects), 0)]).tobytes()

    def are_same(self) -> bool:
        """Whether the containers still hold exactly these, in this order."""
        # torch.compile traces the comparison in Python, and its guards watch for what that has seen.
        if not torch.compiler.is_compiling() and self._plain and _compiled_comparison is not None:
            return _compiled_comparison(self._containers, self._ids)
        for container, held in zip(self._containers, self._held):
            objects = _objects_in(container)
            if len(objects) != len(held) or not all(map(is_, objects, held)):
                return False
        return True


def _objects_in(container: Any) -> list[Any]:
    if isinstance(container, Mapping):
        return [*chain.from_iterable(container.items())]
    return list(container)


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
        if not self._objects.are_same():
            return False
        return count == len(params) or self._mask == [p.grad is not None for p in params]


class Binding:
    """The bindings of an optimizer's param groups, by the group's number, dropped where its state is another."""

    def __init__(self) -> None:
        self.groups: dict[int, GroupBinding] = {}
        self._state: Any = {}
        self._swapped = False
        self._objects = Objects(self._state)

    def follow(self, state: Any) -> None:
        """Before the groups' steps: forget everything if `state`, or the dict of a parameter in it, was exchanged, or
        the plans have handles that they may not keep."""
        swapped = params_are_swapped()
        if self._swapped is swapped and self._state is state and self._objects.are_same():
            return
        self.groups.clear()
        self._swapped = swapped
        self._look(state)

    @compiler.disable("the optimizer's tensors are bound anew")
    def _look(self, state: Any) -> None:
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
            done = {id(p) for before in group.calls[:place] for p in before.params}
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
        self._look(self._state)
        return group


class Needs(NamedTuple):
    """What decides which tensors a group's update takes: its states, how it rounds, and which implementation runs."""

    states: tuple[str, ...]
    float32_states: bool
    master_weights: bool
    averages: bool
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
    make_call: Callable[..., Call] = Call,
) -> GroupBinding:
    """The calls for those of `params` that have a gradient and whose id is not in `done`; moves their states where
    needed."""
    mask = [p.grad is not None and id(p) not in done for p in params]
    with_grad = [k for k, has_grad in enumerate(mask) if has_grad]
    for k in with_grad:
        name = layouts[params[k]].name
        check_whole(name, params[k])
        check_parts(name, params[k])
        check_gradient(params[k], name)
        for key, value in state[params[k]].items():
            if isinstance(value, Tensor) and value.is_meta:
                raise RuntimeError(
                    f"state {key!r} of parameter {name!r} is on meta: expected a tensor with data"
                )
    calls = []
    for positions in by_device_and_dtype([params[k] for k in with_grad], layouts):
        numbers = with_grad if positions is None else [with_grad[k] for k in positions]
        own = [params[k] for k in numbers]
        seeds = [local_seed((seed + k) % 2**63, params[k]) for k in numbers]
        lists, derived, parts = _lists(op, own, seeds, layouts, state, needs)
        calls.append(make_call(op, lists, needs.impl, positions, derived, parts))
    return GroupBinding(calls, params, mask, needs, state)


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients that are there."""
    if _compiled_gradients is not None and isinstance(params, list):
        if not torch.compiler.is_compiling():
            return _compiled_gradients(params)
    return [g for g in [p.grad for p in params] if g is not None]


def by_device_and_dtype(
    params: list[Tensor], layouts: Mapping[Tensor, Layout] = MappingProxyType({})
) -> list[list[int] | None]:
    """The positions of the parameters that one call can take, DTensors and flat vectors apart from others; None for all
    of them."""
    parts: dict[tuple[torch.device, torch.dtype, bool, bool], list[int]] = {}
    for position, param in enumerate(params):
        is_flat = isinstance(layouts.get(param), FlatLayout)
        kind = param.device, param.dtype, is_sharded(param), is_flat
        parts.setdefault(kind, []).append(position)
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
    op: FeatureOp,
    params: list[Tensor],
    seeds: list[int],
    layouts: dict[Tensor, Layout],
    state: Any,
    needs: Needs,
) -> tuple[Lists, dict[int, MakeRates], LocalParts | FlatParts | None]:
    """The op's tensors, which of the rates are copies, and what they are the parts of if they are."""
    low_precision = params[0].dtype in LOW_PRECISION
    with_masters = needs.master_weights and low_precision
    dtype = state_dtype(params[0], needs.float32_states, needs.master_weights)
    owns, rates, inners = [state[param] for param in params], [], []
    derived: dict[int, MakeRates] = {}
    for number, (param, own) in enumerate(zip(params, owns)):
        layout = layouts[param]
        _check_shape(param, layout, own, needs)
        own["rate"] = own["rate"].to(param.device, torch.float32)
        if not isinstance(layout, FlatLayout):
            in_memory, inner = _in_memory(own["rate"], param, layout)
            rates.append(in_memory)
            inners.append(inner)
            if is_copy(in_memory, own["rate"]):
                derived[number] = partial(_rates_in_memory, own["rate"], param, layout)
        for key in needs.states:
            own[key] = like(own[key], param, dtype)
        if with_masters:
            own["master"] = like(own["master"], param, torch.float32)
        if needs.averages:
            own["average"] = like(own["average"], param, average_dtype(param))
        else:
            # One that steps leave behind would count as if it had followed.
            own.pop("average", None)
    stochastic = low_precision and not with_masters and needs.rounding != "nearest"
    kept = [[own[key] for own in owns] for key in needs.states]
    masters = [own["master"] for own in owns] if with_masters else []
    averages = [own["average"] for own in owns] if needs.averages else []
    steps = steps_of(
        owns, params[0].device, op.first_state if op.first_state in needs.states else ""
    )
    flat = [layout for layout in map(layouts.get, params) if isinstance(layout, FlatLayout)]
    if flat:
        lists, runs = flat_lists(params, flat, owns, seeds, steps, [*kept, masters, averages])
        return lists if stochastic else lists._replace(seeds=[]), runs.derived, runs
    parts = None
    if is_sharded(params[0]):
        names = [layouts[param].name for param in params]
        parts = LocalParts(params, [*chain(*kept, masters, averages)], names)
    lists = Lists(
        params=[*map(local, params)] if parts else params,
        states=[[*map(local, states)] for states in kept] if parts else kept,
        masters=[*map(local, masters)],
        rates=rates,
        inners=inners,
        seeds=seeds if stochastic else [],
        steps=steps,
        averages=[*map(local, averages)],
    )
    return lists, derived, parts


def is_copy(tensor: Tensor, of: Tensor) -> bool:
    """Whether `tensor` has memory of its own."""
    if tensor is of or not of.numel():
        return False
    return tensor.untyped_storage().data_ptr() != of.untyped_storage().data_ptr()


def _in_memory(rate: Tensor, param: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """The rates of the entries that are here, and how many entries one rate is for, as `memory_rates` has them."""
    if is_sharded(param):
        rate = local_rates(rate, param, layout.dims, layout.name)
        param = local(param)
    # Without entries there are no features either; the ops expect at least one rate.
    rate = rate if rate.numel() else rate.new_ones(1)
    return memory_rates(rate, param, layout.dims, layout.name)


def _rates_in_memory(rate: Tensor, param: Tensor, layout: Layout) -> Tensor:
    return _in_memory(rate, param, layout)[0]


def _check_shape(param: Tensor, layout: Layout, own: dict[str, Any], needs: Needs) -> None:
    """Raises where a state is no tensor, or a parameter has another shape than the rates and states were made for."""
    kept = ["rate", *needs.states, *(key for key in ("master", "average") if key in own)]
    for key in kept:
        if not isinstance(own[key], Tensor):
            raise TypeError(
                f"state {key!r} of parameter {layout.name!r} is a {type(own[key]).__name__}; expected a tensor"
            )
    size = math.prod(param.size(d) for d in layout.dims if d < param.dim())
    rates = own["rate"].numel()
    fits = size == rates or (len(layout.dims) == 1 and rates and size % rates == 0)
    if isinstance(layout, FlatLayout):
        fits = param.dim() == 1 and rates == layout.vector.length
    if not fits or any(own[key].shape != param.shape for key in kept[1:]):
        raise RuntimeError(
            f"parameter {layout.name!r} has shape {list(param.shape)}, which its learning rates and states were not "
            "made for: construct a new optimizer after changing a parameter's shape"
        )
