"""What the optimizers say of parameters whose rates may not follow their features."""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.rates import Constant, LogUniform, Sampler

# Below this share of the entries it does not matter which way the rates go.
_SHARE = 0.01
# Below it a multiplier of the rates was meant as a learning rate.
_SMALL_LR = 0.02
# Whose frames are not the user's.
_INSIDE = ("alrao_fast", "torch")


def warn_of_bare_tensors(names: Sequence[str], stacklevel: int) -> None:
    """Warn that tensors which no module has laid out have one rate per index of dimension 0."""
    if names:
        warnings.warn(
            f"{len(names)} bare tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) get one learning "
            "rate per index of dimension 0, none of them shared: pass the module itself, or model=, to use the "
            "modules' feature layouts",
            stacklevel=stacklevel + 1,
        )


def warn_of_small_multiplier(lr: float | Tensor, sampler: Sampler, stacklevel: int) -> bool:
    """Warn of a multiplier of the rates that looks like a learning rate, as other optimizers' defaults do; return so.

    Not where the rates are one constant or reach as far with it, nor of one whose value is on a GPU.
    """
    if isinstance(lr, Tensor) and not lr.is_cpu:
        return False
    value = float(lr.detach() if isinstance(lr, Tensor) else lr)
    if not 0 < value < _SMALL_LR or isinstance(sampler, Constant):
        return False
    leaves = ""
    if isinstance(sampler, LogUniform):
        if value * sampler.hi >= _SMALL_LR:
            return False
        low, high = sampler.lo, sampler.hi
        leaves = f", which leaves {value * low:.2g} to {value * high:.2g} of ({low:g}, {high:g})"
    warnings.warn(
        f"lr: got {value:g}, the multiplier of all learning rates{leaves}. The rates are drawn, none is to be "
        "chosen: leave lr at 1, and where a trainer passes a learning rate of its own, set that to 1",
        stacklevel=stacklevel + 1,
    )
    return True


def warn_of_default_rule(
    params: Iterable[Tensor], layouts: Mapping[Tensor, Layout], stacklevel: int
) -> None:
    """Warn, once for all module classes, if no rule covers parameters of several dimensions that hold 1 % of the
    trained entries or more: nothing says that their dimension 0 runs over the features."""
    trained = []
    for param in (p for p in params if p.requires_grad):
        parts = getattr(layouts[param], "slices", ())
        trained += [(part.twin.numel(), part.twin.dim(), part.layout) for part in parts] or [
            (param.numel(), param.dim(), layouts[param])
        ]
    total = sum(entries for entries, _, _ in trained)
    classes: dict[str, int] = {}
    names: dict[str, dict[str, None]] = {}
    for entries, dims, layout in trained:
        if layout.rule == "default" and layout.module and dims > 1 and not layout.per_weight:
            classes[layout.module] = classes.get(layout.module, 0) + entries
            names.setdefault(layout.module, {})[layout.name.rpartition(".")[2]] = None
    uncovered = sum(classes.values())
    if not uncovered or uncovered < _SHARE * total:
        return
    order = sorted(classes, key=lambda name: -classes[name])
    told = [f"{c} ({', '.join(list(names[c])[:3])}; {classes[c] / total:.0%})" for c in order[:5]]
    first, parameter = order[0], next(iter(names[order[0]]))
    warnings.warn(
        f"{uncovered / total:.0%} of the trained entries are in modules without a feature layout and get one learning "
        f"rate per index of dimension 0: {', '.join(told)}{', ...' if len(order) > 5 else ''}. Say which dimension "
        f"runs over the outputs: register_feature_layout({first}, lambda module: {{{parameter!r}: Feature(dim=0)}}); "
        "describe_rates(model) shows all",
        stacklevel=stacklevel + 1,
    )


def _outside() -> int:
    """The `stacklevel` by which the caller warns of the line that has called this package, maybe by way of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level


def warn_of_replaced(names: Sequence[str]) -> None:
    """Warn that parameters are in their modules no more, and what is there is trained by nobody."""
    warnings.warn(
        f"{len(names)} parameters of the optimizer ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) were "
        "replaced in their modules by others, which have gradients and are in no param group: nothing updates them. "
        "load_state_dict(assign=True), to_empty() and assignments do so: construct the optimizer afterwards, or put "
        "the new parameters into the places of the old ones in param_groups, where they take over the rates",
        # What torch puts around step() depends on its compiler and on schedulers.
        stacklevel=_outside(),
    )


def warn_of_no_averages(groups: Iterable[Mapping[str, Any]], stacklevel: int) -> None:
    """Of options that a checkpoint brings into a run that was to have averages."""
    if all(group.get("averaging") is None for group in groups):
        warnings.warn(
            "the checkpoint was written without averages, and its options count: averaged() will refuse. Assign "
            "averaging=8.0 to the param groups to have averages from now on",
            stacklevel=stacklevel + 1,
        )
