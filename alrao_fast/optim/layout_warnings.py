"""Warnings for rates that may lie along the wrong axis: of bare tensors, and of modules without a rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from alrao_fast.optim.layouts import Layout

# Less than this share of the entries is not worth a word.
_SHARE = 0.01


def warn_of_bare_tensors(names: list[str], stacklevel: int) -> None:
    """Tensors that no module has laid out."""
    if names:
        warnings.warn(
            f"{len(names)} bare tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) get one learning "
            "rate per index of dimension 0, none of them shared: pass the module itself, or model=, to use the "
            "modules' feature layouts",
            stacklevel=stacklevel + 1,
        )


def warn_of_default_rules(layouts: Mapping[Tensor, Layout], stacklevel: int) -> None:
    """Modules whose parameters of several dimensions have no rule, where they hold 1 % of the entries or more."""
    total = sum(param.numel() for param in layouts)
    shares: dict[str, int] = {}
    for param, layout in layouts.items():
        # Bare tensors have no module, and a warning of their own.
        if layout.rule == "default" and layout.module and param.requires_grad:
            shares[layout.module] = shares.get(layout.module, 0) + param.numel()
    if sum(shares.values()) < _SHARE * total:
        return
    largest = sorted(shares, key=lambda module: -shares[module])
    listed = ", ".join(f"{module} ({shares[module] / total:.0%})" for module in largest[:5])
    warnings.warn(
        f"no rule says which dimension of these modules' parameters runs over the features: {listed}"
        f"{', ...' if len(largest) > 5 else ''}; each index of dimension 0 gets one learning rate. If that is not the "
        "output, register the rule: alrao_fast.register_feature_layout(ModuleType, lambda module: {name: "
        "alrao_fast.Feature(dim=...)}); describe_rates(net, details=True) shows all parameters",
        stacklevel=stacklevel + 1,
    )
