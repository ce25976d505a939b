"""Param groups: what `params` may be, and the options that all optimizers share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.arguments import (
    Choice,
    Flag,
    Function,
    Instance,
    Integer,
    Interval,
    Kind,
    Optional,
    shown,
)
from alrao_fast.ops.feature import COMMON, LR
from alrao_fast.optim.binding import Objects

_NOTHING: dict[str, Any] = {}
# What no assignment changes once a group is there, and why.
_FIXED = {
    "lr_range": (
        "between which the rates were drawn: lr multiplies them, another interval needs a new optimizer"
    ),
    "orthogonalize": "by which the states were made: another choice needs a new optimizer",
}
_NAME = Instance(str, "a string, in a pair (name, tensor)")


def as_groups(params: Any) -> list[Any]:
    """`params` of a constructor as a list of param groups."""
    if isinstance(params, nn.Module):
        _check_any(params, [params])
        return [{"params": params}]
    expected = "a module, or an iterable of tensors, (name, tensor) pairs, modules or groups"
    if isinstance(params, Tensor):
        raise TypeError(f"params: got a tensor, expected {expected}")
    _check_ordered(params)
    if not isinstance(params, Iterable):
        raise TypeError(f"params: got {shown(params)}, expected {expected}")
    entries = list(params)
    _check_any(params, entries)
    return entries if isinstance(entries[0], dict) else [{"params": entries}]


def _check_any(params: Any, entries: list[Any]) -> None:
    """Raises ValueError for no entry, and for modules alone that have no parameter."""
    if all(isinstance(e, nn.Module) and next(e.parameters(), None) is None for e in entries):
        got = shown(params) if entries else "none"
        raise ValueError(f"params: got {got}, expected at least one parameter")


def _check_ordered(params: Any) -> None:
    """Raises TypeError for a set: the order of rates and of a checkpoint would change from run to run."""
    if isinstance(params, set | frozenset):
        raise TypeError(
            f"params: got a {type(params).__name__}, expected an ordered collection, such as a list"
        )


def modules_of(groups: list[Any]) -> list[nn.Module]:
    """The modules that the groups name, in order."""
    modules = []
    for group in groups:
        params = group.get("params", ()) if isinstance(group, dict) else ()
        if isinstance(params, nn.Module):
            modules.append(params)
        elif isinstance(params, list | tuple):
            modules += [item for item in params if isinstance(item, nn.Module)]
    return modules


def tensor_of(entry: Any) -> Any:
    """The tensor of an entry of a group: bare, or in a (name, tensor) pair."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def expanded(params: Any) -> list[Any]:
    """Tensors and (name, tensor) pairs; the modules among `params` are replaced by their parameters."""
    _check_ordered(params)
    entries: list[Any] = []
    for item in [params] if isinstance(params, nn.Module | Tensor) else params:
        if isinstance(item, nn.Module):
            known = {id(tensor_of(entry)) for entry in entries}
            entries += [p for p in item.parameters() if id(p) not in known]
            continue
        if isinstance(tensor_of(item), Tensor) and isinstance(item, tuple):
            _NAME.check(f"name of params[{len(entries)}]", item[0])
        entries.append(item)
    return entries


class _Sampler(Function):
    """A function that draws rates; not the class of one, though it can be called."""

    def __init__(self) -> None:
        super().__init__(
            "LogUniform(...), LogTriangular(...), PerWeight(...), Fraction(...), Constant(...) or a function "
            "(n, generator) -> rates"
        )

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, type):
            raise self.refuse(TypeError, name, value)
        return super().check(name, value)


class _Averaging(Optional):
    """The power of an average; False is none, as None is."""

    def check(self, name: str, value: Any) -> Any:
        if value is True:
            raise self.refuse(TypeError, name, value)
        return super().check(name, None if value is False else value)


SAMPLER = Optional(_Sampler())


def check_of_optimizer(group: Mapping[str, Any], **own: Any) -> None:
    """Raises ValueError where a group has another value of what is said of the whole optimizer.

    The same value is no harm: ZeroRedundancyOptimizer gives all arguments to the groups, too.
    """
    for name, value in own.items():
        given = group.get(name)
        if given is not None and given is not value and given != value:
            raise ValueError(
                f"{name}: got {shown(given)} in a param group, expected it as an argument of the optimizer"
            )


# The options that all optimizers have.
SHARED: dict[str, Kind] = {
    "lr": LR,
    "lr_range": Interval(),
    "maximize": Flag(),
    "rounding": Choice(None, "nearest", "stochastic"),
    "master_weights": Flag(),
    "warmup_steps": Integer(low=0, words="a number of steps, 0 for no warm-up"),
    "averaging": _Averaging(COMMON["averaging"]),
    "foreach": Optional(Flag()),
    "fused": Optional(Flag()),
    "capturable": Flag(),
    "differentiable": Flag(),
}


def check_shared(options: Mapping[str, Any]) -> None:
    """Raises ValueError where options, each of which is valid, do not go together."""
    if options["rounding"] == "stochastic" and options["master_weights"]:
        raise ValueError(
            "rounding: got 'stochastic' with master_weights=True, expected one of the two: masters keep every bit"
        )
    if options["foreach"]:
        raise ValueError(
            "foreach: got True, expected None or False: one fused call updates all tensors"
        )
    if options["differentiable"]:
        raise ValueError(
            "differentiable: got True, expected False: the update is done in place and has no gradient"
        )


class OptionChecks:
    """The options of param groups: what each may be, and `together`, which raises where they do not go together."""

    def __init__(
        self, kinds: Mapping[str, Kind], together: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._kinds, self._together = kinds, together
        # The groups that were followed, the values that were checked, and the tensors among them.
        self._groups: Any = None
        self._seen: list[dict[str, Any]] = []
        self._live: list[tuple[str, Any]] = []
        self._objects = Objects()

    def checked(
        self, group: Mapping[str, Any], seen: Mapping[str, Any] = _NOTHING
    ) -> dict[str, Any]:
        """The options of `group`, normalised, without those whose value `seen` has; TypeError or ValueError, naming one
        that is not valid."""
        kinds = self._kinds
        options = {
            name: kinds[name].check(name, value)
            for name, value in group.items()
            if value is not seen.get(name, kinds) and name in kinds
        }
        self._together({**group, **options})
        return options

    def hold(self, group: Mapping[str, Any]) -> bool:
        """Whether the options of `group` are valid."""
        try:
            self.checked(group)
        except (TypeError, ValueError):
            return False
        return True

    def follow(self, groups: list[dict[str, Any]]) -> None:
        """Check what was assigned to `groups` since the last call; TypeError or ValueError, with nothing changed.

        To see that there is nothing new takes a few hundred nanoseconds. A tensor may have been changed in place and is
        checked each time.
        """
        if torch.compiler.is_compiling():
            # Traced once for the values that guard the graph.
            for group in groups:
                for name, kind in self._kinds.items():
                    if name in group:
                        kind.check(name, group[name])
        elif self._groups is groups and self._objects.are_same():
            for name, value in self._live:
                self._kinds[name].check(name, value)
        else:
            self._follow_changes(groups)

    def _follow_changes(self, groups: list[dict[str, Any]]) -> None:
        known = self._seen if len(self._seen) == len(groups) else [_NOTHING] * len(groups)
        changed = [self.checked(group, seen) for group, seen in zip(groups, known)]
        for options, seen in zip(changed, known):
            for name, why in _FIXED.items() if self._groups is groups else ():
                before = seen.get(name)
                if before is not None and options.get(name, before) != before:
                    raise ValueError(f"{name}: got {options[name]}, expected {before}, {why}")
        for group, options in zip(groups, changed):
            group.update(options)
        if self._live or any(_is_live(value) for each in changed for value in each.values()):
            given = [(name, group.get(name)) for group in groups for name in self._kinds]
            self._live = [(name, value) for name, value in given if _is_live(value)]
        self._seen = [dict(group) for group in groups]
        self._groups, self._objects = groups, Objects(groups, *groups)


def _is_live(value: Any) -> bool:
    """Whether an option may be changed in place."""
    if isinstance(value, tuple):
        return any(isinstance(entry, Tensor) for entry in value)
    return isinstance(value, Tensor)
