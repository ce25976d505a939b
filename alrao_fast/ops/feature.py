"""A feature optimizer's op, whichever it is: the one table of its states and options, and the call of the list op.

From the table follow the schema, the names of all arguments and what a plan is told; the C++ struct of the options
(csrc/feature/<optimizer>.h) has a table of its own, which is compared with this one when the extension is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import _extension, backends
from alrao_fast.arguments import Data, Flag, Number, Optional, checked
from alrao_fast.ops import dispatch, feature_checks
from alrao_fast.sharding import is_sharded

# An optimizer's own options by name.
Options = Mapping[str, float | bool]
# Every optimizer's op by its stem.
FEATURE_OPS: dict[str, FeatureOp] = {}
LR = Number(low=0, live=True, words="a finite multiplier >= 0 of the rates")
# What every optimizer can do besides its equation.
COMMON = {"warmup_steps": Number(low=0), "averaging": Number(low=0)}
_SCALARS = {
    "lr": LR,
    "maximize": Flag(),
    **COMMON,
    "grad_scale": Optional(Data("a tensor of one element")),
    "found_inf": Optional(Data("a tensor of one element")),
}


class Lists(NamedTuple):
    """The tensors of a call that stay from step to step, as `feature_sgd_` and `feature_adam_` describe them.

    One entry per parameter in each list; `states` holds a list for each state that the options need, `masters`, `seeds`
    and `averages` may be empty.
    """

    params: list[Tensor]
    states: list[list[Tensor]]
    masters: list[Tensor]
    rates: list[Tensor]
    inners: list[int]
    seeds: list[int]
    steps: Tensor
    averages: Sequence[Tensor] = ()


class Scalars(NamedTuple):
    """What every step takes besides its options: the multiplier of all rates and the sign, what AMP hands over, the
    steps of the warm-up and the power by which later values count more in the averages.

    lr_factor multiplies lr, which may be a tensor.
    """

    lr: float | Tensor = 1.0
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    warmup_steps: float = 0.0
    averaging: float = 0.0
    lr_factor: float = 1.0

    def checked(self) -> Scalars:
        """The same; TypeError or ValueError, naming the argument, where one is of another type or out of range.

        Of a tensor that is not one number the ops themselves say so.
        """
        one = not isinstance(self.lr, Tensor) or self.lr.numel() == 1
        kinds = {name: kind for name, kind in _SCALARS.items() if one or name != "lr"}
        return self._replace(**checked(kinds, self._asdict()))

    def arguments(self) -> dict[str, Any]:
        """The same as the ops take them: a multiplier in a tensor is an argument of its own, besides the number."""
        lr, in_tensor = self.lr, isinstance(self.lr, Tensor)
        return {
            "lr": self.lr_factor if isinstance(lr, Tensor) else lr * self.lr_factor,
            "lr_tensor": lr if in_tensor else None,
            "maximize": self.maximize,
            "warmup_steps": self.warmup_steps,
            "averaging": self.averaging,
            "grad_scale": self.grad_scale,
            "found_inf": self.found_inf,
        }


@dataclass(frozen=True, eq=False)
class FeatureOp:
    """An optimizer with one learning rate per feature, as all of its implementations know it.

    stem: the op is `<stem>_`, its reference reference/<stem>.py; without "feature_" it names the files of the kernels.
    states: what is kept per parameter, by its name in an optimizer's state; the op's argument has the plural.
    options: name and kind, a number or a flag, of what the update depends on besides lr, maximize and AMP's scalars.
    fixed_states, states_option: the first `fixed_states` states are there always, the others where the option named
        `states_option`, if there is one, is on or not 0.
    first_state: the state, if there is one, that the first update (count 0) sets whatever it holds.
    """

    stem: str
    states: tuple[str, ...]
    options: dict[str, Number | Flag]
    fixed_states: int
    reference: Callable[..., None]
    states_option: str = ""
    first_state: str = ""

    def __post_init__(self) -> None:
        FEATURE_OPS[self.stem] = self
        backends.OPS[self.stem] = f"{self.stem}_"
        self._compare_with_extension()
        lists = "".join(
            f"Tensor({letter}!)[] {state}s, " for letter, state in zip("bcdef", self.states)
        )
        options = "".join(f"{kind.schema} {name}, " for name, kind in self.options.items())
        schema = (
            f"{self.stem}_(Tensor(a!)[] params, Tensor[] grads, {lists}Tensor(x!)[] masters, "
            "Tensor(z!)[] averages, Tensor[] rates, int[] inners, int[] seeds, Tensor(y!) steps, *, float lr, "
            "Tensor? lr_tensor, bool maximize, float warmup_steps, float averaging, "
            f"{options}Tensor? grad_scale, Tensor? found_inf) -> ()"
        )
        dispatch.outside_graphs(
            dispatch.define(schema, dispatch.no_result),
            dispatch.define_twin(schema, dispatch.no_result, self._run_triton),
        )

    def _compare_with_extension(self) -> None:
        """A binary of other sources would take one option for another; one that lacks the op is no harm."""
        if _extension.ERROR is not None:
            return
        tables = _extension.function("feature_tables")
        options = "".join(f", {kind.schema} {name}" for name, kind in self.options.items())
        own = f"{self.stem}_:{''.join(f' {state}s' for state in self.states)}{options}"
        found = [] if tables is None else tables().splitlines()
        if tables is None or any(
            line.startswith(f"{self.stem}_:") and line != own for line in found
        ):
            _extension.reject(f"its options of {self.stem}_ are others")

    @property
    def kernels(self) -> Any:
        """The optimizer's Triton kernels."""
        return import_module(f"alrao_fast.kernels.feature.{self.stem.removeprefix('feature_')}")

    def num_states(self, options: Options) -> int:
        """How many of `states`, from the first on, the options need."""
        return len(self.states) if options.get(self.states_option) else self.fixed_states

    def numbers(self, options: Options) -> Options:
        """The options as plain numbers: one in a tensor as its value of now."""
        return {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }

    def select(self, params: Sequence[Tensor], impl: str = "auto") -> str:
        """The implementation that runs the op on these tensors."""
        return backends.select(self.stem, params[0].device, impl)

    def check(
        self,
        lists: Lists,
        grads: Sequence[Tensor],
        options: Options,
        scalars: Scalars,
    ) -> None:
        """Raise RuntimeError, naming the argument, unless all fit together: for the implementations in Python."""
        count, on = self.num_states(options), bool(options.get(self.states_option))
        is_flag = isinstance(self.options.get(self.states_option), Flag)
        why = ("on" if on else "off") if is_flag else ("not 0" if on else "0")
        because = f"{self.states_option} is {why}"
        states = {}
        for number, state in enumerate(self.states):
            given = lists.states[number] if number < len(lists.states) else []
            needed = None if number < self.fixed_states else (number < count, because)
            states[f"{state}s"] = feature_checks.State(given, needed)
        lr = scalars.lr if isinstance(scalars.lr, Tensor) else None
        tensors = {"lr": lr, "grad_scale": scalars.grad_scale, "found_inf": scalars.found_inf}
        feature_checks.check_inputs(f"{self.stem}_", lists, grads, states, tensors)

    def check_data(self, lists: Lists, grads: Sequence[Tensor] = ()) -> None:
        """Raise RuntimeError for a tensor on meta, for which the dispatcher would call the op's fake that does nothing,
        and for a DTensor, which has only a part of its entries here."""
        kept = {f"{name}s": tensors for name, tensors in zip(self.states, lists.states)}
        named = {"params": lists.params, "grads": grads, **kept, "masters": lists.masters}
        named |= {"averages": lists.averages, "rates": lists.rates, "steps": [lists.steps]}
        for name, tensors in named.items():
            for t, tensor in enumerate(tensors):
                if tensor.is_meta:
                    where = name if name == "steps" else f"{name}[{t}]"
                    raise RuntimeError(
                        f"{self.stem}_: {where} is on meta, expected a tensor with data"
                    )
                if is_sharded(tensor):
                    raise RuntimeError(
                        f"{self.stem}_: {name}[{t}] is a DTensor, expected an ordinary tensor: AlraoSGD and AlraoAdam "
                        "update DTensors"
                    )

    def __call__(
        self, lists: Lists, grads: list[Tensor], options: Options, scalars: Scalars, impl: str
    ) -> None:
        """One step by the list op on the backend `impl`."""
        missing: list[list[Tensor]] = [[] for _ in self.states[len(lists.states) :]]
        args = (
            *(lists.params, grads, *lists.states, *missing, lists.masters, [*lists.averages]),
            *(lists.rates, lists.inners, lists.seeds, lists.steps),
        )
        options = self.numbers(options)
        values = {**scalars.arguments(), **options}
        self.check_data(lists, grads)
        with torch.no_grad():
            if impl == "reference":
                self.check(lists, grads, options, scalars)
                self.reference(*args, **values)
            else:
                dispatch.overload(f"{self.stem}_", impl)(*args, **values)
                _bump_versions(lists)

    def _run_triton(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *rest: Any,
        lr: float,
        lr_tensor: Tensor | None,
        maximize: bool,
        warmup_steps: float,
        averaging: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        **options: float | bool,
    ) -> None:
        """The list op by the Triton kernels, which keep a plan of tensors that they have seen."""
        kinds = len(self.states)
        states = [state for k, state in enumerate(rest[:kinds]) if state or k < self.fixed_states]
        masters, averages, rates, inners, seeds, steps = rest[kinds:]
        lists = Lists(params, states, masters, rates, inners, seeds, steps, averages)
        given = (lr, 1.0) if lr_tensor is None else (lr_tensor, lr)
        amp = grad_scale, found_inf
        scalars = Scalars(given[0], maximize, *amp, warmup_steps, averaging, given[1])
        frame = import_module("alrao_fast.kernels.feature.frame")
        frame.run(
            self.kernels.UPDATE,
            lists,
            grads,
            options,
            **scalars.arguments(),
            check=partial(self.check, lists, grads, options, scalars),
        )


def _bump_versions(lists: Lists) -> None:
    """Tell autograd that a kernel wrote these tensors; a compiled graph does so itself."""
    if not torch.compiler.is_compiling():
        written = lists.params, *lists.states, lists.masters, lists.averages, [lists.steps]
        for tensors in written:
            torch.autograd.graph.increment_version(tensors)


def as_lists(
    op: FeatureOp,
    steps: Any,
    inners: Sequence[int] | None,
    seeds: Sequence[int] | None,
    **tensors: Sequence[Tensor] | None,
) -> tuple[Lists, list[Tensor]]:
    """What a public function was given as its lists, and the gradients; raises as `feature_checks.as_list` does.

    tensors: params, grads, rates, masters, and every state's list by its name. Without `inners` features run along dim
    0, or there is a single rate.
    """
    states = [f"{state}s" for state in op.states]
    names = ("params", "grads", "rates", *states, "masters", "averages")
    may_lack = {"masters", "averages", *states[op.fixed_states :]}
    given = {
        name: feature_checks.as_list(f"{op.stem}_", name, tensors[name], optional=name in may_lack)
        for name in names
    }
    numbers = {
        name: feature_checks.as_list(f"{op.stem}_", name, values, optional=True, integers=True)
        for name, values in (("inners", inners), ("seeds", seeds))
    }
    params, rates = given["params"], given["rates"]
    if inners is None:
        numbers["inners"] = [
            param.stride(0) if param.dim() and rate.numel() != 1 else 1
            for param, rate in zip(params, rates, strict=False)
        ]
    present = [given[name] for k, name in enumerate(states) if k < op.fixed_states or given[name]]
    # Without states that are there always, the caller has steps of its own.
    if steps is not None or op.fixed_states:
        feature_checks.check_entry(f"{op.stem}_", "steps", steps)
    kept = given["masters"], rates, numbers["inners"], numbers["seeds"], steps, given["averages"]
    return Lists(params, present, *kept), given["grads"]
