"""Plans: an optimizer's tensors, seen once, so that a step passes only the gradients.

Eager mode only; under torch.compile the list ops are the honest graph nodes.
"""

import contextlib
import weakref
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _disable_current_modes

from alrao_fast import _extension
from alrao_fast.ops import dispatch
from alrao_fast.ops.feature import FeatureOp, Lists, Options, Scalars

dispatch.define(
    "_feature_plan(str op, Tensor[] tensors, int num_params, int num_states, bool masters, bool averages, "
    "int[] inners, int[] seeds, Tensor steps) -> int"
)
dispatch.define("_feature_plan_options(int plan, float[] options) -> ()")
dispatch.define("_feature_plan_free(int plan) -> ()")
dispatch.define("_feature_plan_release(int plan) -> ()")
dispatch.outside_graphs(
    dispatch.define(
        "_feature_plan_step_(int plan, Tensor[] grads, Tensor? lr, Tensor? grad_scale, Tensor? found_inf) -> bool"
    ),
    dispatch.define(
        "_feature_plan_gradients(int plan, Tensor[] grads, Tensor(a!) addresses) -> int"
    ),
)
# Of what has the negative bit, as the imaginary part of a conjugate, or is zero without memory, the dispatcher would
# pass on a copy that is gone before a kernel reads it.
_LAZY = -2
for _key in ("Negative", "ZeroTensor"):
    dispatch.LIB.impl("_feature_plan_gradients", lambda *_: _LAZY, _key)
_make = torch.ops.alrao_fast._feature_plan.default
_set_options = torch.ops.alrao_fast._feature_plan_options.default
_step = torch.ops.alrao_fast._feature_plan_step_.default
_gradients = torch.ops.alrao_fast._feature_plan_gradients.default
_release = torch.ops.alrao_fast._feature_plan_release.default
_free_op = torch.ops.alrao_fast._feature_plan_free.default


def _free(number: int) -> None:
    """Called by the garbage collection, at any time: no mode that traces or observes ops just then shall see it."""
    modes = torch._C._len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch()
    with _disable_current_modes() if modes else contextlib.nullcontext():
        _free_op(number)


def _in_memory(grads: list[Tensor]) -> list[Tensor]:
    """The gradients, or what they stand for, as their memory has them."""
    return [g.clone() if torch._is_zerotensor(g) else g.resolve_neg() for g in grads]


def _registered(op: FeatureOp, lists: Lists, owner: object) -> int:
    """The number by which C++ knows tensors that it has found to fit together, for as long as `owner` lives."""
    params, states, masters, rates, inners, seeds, steps, averages = lists
    kept = [*params, *(tensor for state in states for tensor in state)]
    tensors = [*kept, *masters, *averages, *rates]
    counts = len(params), len(states), bool(masters), bool(averages)
    number: int = _make(f"{op.stem}_", tensors, *counts, inners, seeds, steps)
    weakref.finalize(owner, _free, number).atexit = False
    return number


class Plan(Protocol):
    """Tensors of one device that were found to fit together; raises RuntimeError, as the list op does, if not."""

    def step(self, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        """One step; False, with nothing written, where a tensor is no longer what the plan saw.

        That is another memory, shape, strides or dtype (`module.to(...)`, `param.data = ...`): make a new plan then.
        """
        ...


class CompiledPlan:
    """The plan of the C++ kernels: checked once, and cut into pieces for threads or blocks.

    All tensors are on the CPU or a GPU of CUDA's. There the first step puts a table of the tensors into device memory,
    and every step is queued on the current stream; CUDA graphs may capture it, with the gradients' addresses as they
    are then, and stay valid whatever becomes of the plan. The plan keeps the tensors alive.
    """

    __slots__ = ("__weakref__", "_given", "_names", "_number", "_params")

    def __init__(self, op: FeatureOp, lists: Lists) -> None:
        self._number = _registered(op, lists, self)
        self._names = tuple(op.options)
        self._params = [*lists.params]
        # The options that C++ holds: they seldom change, and to parse them costs as much as thousands of entries.
        self._given: tuple[Any, ...] | None = None

    def step(self, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        lr, maximize, grad_scale, found_inf, warmup_steps, averaging, factor = scalars
        lr_tensor = None
        if isinstance(lr, Tensor):
            lr, lr_tensor = 1.0, lr
        given = (lr, factor, maximize, warmup_steps, averaging, options)
        if given != self._given:
            # Numbers: an option that is a tensor may be changed in place.
            values = {name: float(options[name]) for name in self._names}
            shared = lr * factor, maximize, warmup_steps, averaging
            _set_options(self._number, [*map(float, shared), *values.values()])
            self._given = (*given[:-1], values)
        if not _step(self._number, grads, lr_tensor, grad_scale, found_inf):
            return False
        # Autograd has to see that the parameters have changed; the kernels do not tell it.
        increment_version(self._params)
        return True


class TritonPlan:
    """The plan of the Triton kernels: tables of the tensors on their device, which stay for as long as it lives.

    Where there is a compiled extension it looks after the tensors: asked one by one from Python, hundreds of them take
    longer than all else in a step.
    """

    def __init__(self, op: FeatureOp, lists: Lists) -> None:
        self._op, self._lists = op, lists
        self._frame = import_module("alrao_fast.kernels.feature.frame")
        # Made with the first gradients: what is checked are all arguments together.
        self._plan: Any = None
        self._number: int | None = None
        # Written by steps in inference mode and outside of it.
        with torch.inference_mode(False):
            self._addresses = torch.empty(len(lists.params), dtype=torch.int64, device="cpu")

    def step(self, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        op, lists, number = self._op, self._lists, self._number
        check = partial(op.check, lists, grads, options, scalars)
        addresses, copies = None, 0
        if number is None:
            grads = _in_memory(grads)
        if self._plan is None:
            check()
            with dispatch.device_of(lists.steps):
                self._plan = self._frame.Plan(lists)
            if _extension.ERROR is None and not params_are_swapped():
                self._number = _registered(op, lists, self)
        elif number is not None:
            copies = _gradients(number, grads, self._addresses)
            if copies == _LAZY:
                # These live until the launch.
                grads = _in_memory(grads)
                copies = _gradients(number, grads, self._addresses)
            if copies < 0:
                return False
            addresses = self._addresses.tolist()
        elif not self._plan.unchanged(lists):
            return False
        if len(lists.states) != op.num_states(options):
            check()
        try:
            with dispatch.device_of(lists.steps):
                self._frame.run_plan(
                    self._plan,
                    op.kernels.UPDATE,
                    lists,
                    grads,
                    options,
                    **scalars.arguments(),
                    check=check,
                    addresses=addresses,
                )
        finally:
            if copies:
                _release(number)
        increment_version(lists.params)
        return True


class ListPlan:
    """No plan: the list op, called anew at each step."""

    def __init__(self, op: FeatureOp, lists: Lists, impl: str) -> None:
        self._op, self._lists, self._impl = op, lists, impl
        states = (tensor for state in lists.states for tensor in state)
        kept = *lists.masters, *lists.averages, *lists.rates, lists.steps
        self._others = [*states, *kept]
        self._looks = [_look(param) for param in lists.params]
        # Of the first step, in which nothing has changed yet: most of these plans take none.
        self._other_looks: list[tuple[object, ...]] | None = None

    def step(self, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        if not self.unchanged():
            return False
        # torch.compile guards what it has traced.
        if not torch.compiler.is_compiling():
            looks = [_look(tensor) for tensor in self._others]
            if self._other_looks is None:
                self._other_looks = looks
            if looks != self._other_looks:
                return False
        self._op(self._lists, grads, options, scalars, self._impl)
        return True

    def unchanged(self) -> bool:
        """Whether the parameters have the shapes, strides, dtypes and devices that they had."""
        return self._looks == [_look(param) for param in self._lists.params]


def _look(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


# Whether modules convert their parameters by `torch.utils.swap_tensors`: it refuses one on which C++ has a handle.
params_are_swapped = torch.__future__.get_swap_module_params_on_conversion


def make_plan(op: FeatureOp, lists: Lists, impl: str) -> Plan:
    """The plan of `impl` for these tensors."""
    if impl in ("cpu", "cuda") and not params_are_swapped():
        return CompiledPlan(op, lists)
    if impl == "triton":
        return TritonPlan(op, lists)
    return ListPlan(op, lists, impl)
