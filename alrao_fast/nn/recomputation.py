"""Activation checkpointing: a forward that runs again in the backward mixes by the posterior of its first run, and on
its backend.

A checkpoint drops the activations of what runs inside it and runs it a second time when the backward needs them. By
then the switch has moved on, and on a GPU another thread may have another backend in use. So inside a checkpoint the
log-posterior and the backend of each forward are kept, on an object that lives as long as the checkpoint does, and the
forwards of the second run take them in the same order:

- `torch.utils.checkpoint(use_reentrant=False)` works by hooks on saved tensors, whose functions hold its frame.
- `use_reentrant=True`, and the checkpoints of other libraries, are autograd functions that call the network in their
  forward, without gradients, and again in their backward: there `ctx` is on Python's stack.

Checkpoints may be nested: the second run of the outer one is the first run of a new inner one.
"""

import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from alrao_fast import backends, compiler
from alrao_fast.ops.mixture import checks

_autograd = torch._C._autograd
_top_hooks = _autograd._top_saved_tensors_default_hooks
_graph_task = torch._C._current_graph_task_id
# Where a checkpoint keeps what was remembered in it.
_ATTRIBUTE = "_alrao_fast_calls"


class First(NamedTuple):
    """What the first run of a forward had: the switch's log-posterior, and the backend in use.

    again: whether this is a further run; in the first the backend is "auto", that is what is in use.
    """

    log_posterior: Tensor
    impl: str = "auto"
    again: bool = False


class _Calls:
    """What a switch's forwards in one checkpoint had, in order, and how far a further run has come."""

    def __init__(self) -> None:
        self.kept: list[First] = []
        self.run: object = None
        self.position = 0

    def next(self, run: object) -> First | None:
        """What the next forward of `run` had; None if the first run had no such forward."""
        if run != self.run:
            self.run, self.position = run, 0
        self.position += 1
        return self.kept[self.position - 1] if self.position <= len(self.kept) else None


class Checkpoints:
    """The checkpoints around the present forward."""

    def __init__(self, first: list[Any], second: tuple[Any, object] | None) -> None:
        """first: those that run for the first time; second: the innermost that runs again, and which run it is."""
        self._first = first
        self._second = second

    def first(self, switch: object, log_posterior: Tensor) -> First:
        """What the first run of this forward had, which is `log_posterior` if this is it."""
        past = None
        if self._second is not None:
            checkpoint, run = self._second
            calls: _Calls | None = getattr(checkpoint, _ATTRIBUTE, {}).get(switch)
            past = None if calls is None else calls.next(run)
        # One copy in every run: checkpoints that keep the results of some ops count their calls.
        copy = (log_posterior if past is None else past.log_posterior).clone()
        impl = backends.in_use(checks.OP, copy.device) if past is None else past.impl
        for checkpoint in self._first:
            if not hasattr(checkpoint, _ATTRIBUTE):
                setattr(checkpoint, _ATTRIBUTE, {})
            calls = getattr(checkpoint, _ATTRIBUTE).setdefault(switch, _Calls())
            calls.kept.append(First(copy, impl, again=True))
        return First(log_posterior) if past is None else First(copy, impl, again=True)


def checkpoints() -> Checkpoints | None:
    """The checkpoints around the present forward; None if there are none, which costs a training step nothing."""
    hooks = _top_hooks(False) is not None
    function = not torch.is_grad_enabled() or _graph_task() != -1
    if not hooks and not function:
        return None
    first: list[Any] = []
    # A run again by hooks stands inside of any function's backward that asked for the saved tensors.
    second = _up_to_second_run(_of_hooks(), first) if hooks else None
    outer = _up_to_second_run(_of_functions(), first) if function else None
    second = second or outer
    return Checkpoints(first, second) if first or second else None


def first_run(switch: object, log_posterior: Tensor) -> First:
    """What the first run of this forward had, which is the switch's `log_posterior` if this is it."""
    if torch.compiler.is_compiling():
        # Which run it is shows at every call anew: in a checkpoint the graph is left for it.
        inside = _is_traced_in_a_checkpoint()
        return _outside_of_the_graph(switch, log_posterior) if inside else First(log_posterior)
    around = checkpoints()
    return First(log_posterior) if around is None else around.first(switch, log_posterior)


@compiler.assume_constant_result
def _is_traced_in_a_checkpoint() -> bool:
    return checkpoints() is not None


@compiler.disable("an activation checkpoint is looked for at every call")
def _outside_of_the_graph(switch: object, log_posterior: Tensor) -> First:
    return first_run(switch, log_posterior)


def _up_to_second_run(
    found: Iterator[tuple[Any, object | None]], first: list[Any]
) -> tuple[Any, object] | None:
    """Collect the checkpoints, the innermost first, until one runs again: return that, and which run it is."""
    for checkpoint, run in found:
        if run is not None:
            return checkpoint, run
        first.append(checkpoint)
    return None


def _of_hooks() -> Iterator[tuple[Any, object | None]]:
    """Checkpoints that work by hooks on saved tensors, the innermost first, with the run if it is a second one."""
    pairs = []
    # Only the innermost hooks can be looked at: take them off one by one, and put them back.
    while (pair := _top_hooks(False)) is not None:
        pairs.append(pair)
        _autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(pairs):
        _autograd._push_saved_tensors_default_hooks(*pair)
    for pack, _unpack in pairs:
        # What torch._dynamo.disable has wrapped.
        function = getattr(pack, "__wrapped__", pack)
        for cell in getattr(function, "__closure__", None) or ():
            value = cell.cell_contents
            # The hooks of the second run hold it weakly.
            again = isinstance(value, weakref.ref)
            value = value() if again else value
            if type(value).__module__ == "torch.utils.checkpoint":
                yield value, pack if again else None


def _of_functions() -> Iterator[tuple[Any, object | None]]:
    """Autograd functions on Python's stack, the innermost first; in a backward with the run of the graph."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_varnames:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, BackwardCFunction):
                yield context, _graph_task() if code.co_name == "backward" else None
        frame = frame.f_back  # type: ignore[assignment]
