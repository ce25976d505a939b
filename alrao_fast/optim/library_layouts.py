"""Feature layouts of other libraries' modules, by the names of their classes: transformers, timm, torchvision, peft.

Nothing of them is imported: a rule names the package that a class comes from, and a pattern for the class's name.
Modules built of torch.nn's layers, which most are, need no rule; here is what has parameters of its own.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alrao_fast.optim.layouts import Feature, Rule


class _Named(NamedTuple):
    packages: tuple[str, ...]
    pattern: re.Pattern[str]
    rule: Rule


_NAMED: list[_Named] = []


def _named(pattern: str, *packages: str) -> Any:
    """Decorator for the rule of classes of `packages` whose whole name matches."""

    def add(rule: Rule) -> Rule:
        _NAMED.append(_Named(packages, re.compile(pattern), rule))
        return rule

    return add


def library_rule(cls: type) -> Rule | None:
    """The rule for a class of a library, None where there is none."""
    package = cls.__module__.partition(".")[0]
    for packages, pattern, rule in _NAMED:
        if package in packages and pattern.fullmatch(cls.__name__):
            return rule
    return None


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module._parameters.items() if p is not None}


@_named("Conv1D", "transformers")
def _transposed_linear(module: Any) -> dict[str, Feature]:
    """GPT-2's linear layer, whose weight is [in, out]."""
    return {"weight": Feature(dim=1), "bias": Feature(dim=0)}


@_named(r"\w*(Experts|ParallelExperts)", "transformers")
def _experts(module: Any) -> dict[str, Feature]:
    """Linear layers of all experts in one parameter: [E, out, in], or [E, in, out] where the class says or shows so.

    A feature is a unit of one expert; of [E, in, out] it is the unit with the same number in all experts, since one
    rate for each would lie as wide in memory as the parameter.
    """
    own = _own(module)
    transposed = getattr(module, "is_transposed", None)
    if (
        transposed is None
        and {"gate_up_proj", "down_proj"} <= set(own)
        and own["down_proj"].dim() == 3
    ):
        # The units between the two projections; where all sizes are equal, as most have it.
        inner, outer = own["down_proj"].shape[1:]
        transposed = own["gate_up_proj"].size(2) == 2 * inner and inner != outer
    features = {}
    for name, p in own.items():
        vector = name.removesuffix("_bias")
        if p.dim() == 3:
            features[name] = Feature(dim=2 if transposed else (0, 1), vector=vector)
        elif p.dim() == 2 and name.endswith("bias"):
            features[name] = Feature(dim=1 if transposed else (0, 1), vector=vector)
    return features


@_named("XLNetRelativeAttention", "transformers")
def _xlnet(module: Any) -> dict[str, Feature]:
    """q, k, v and r make [heads, size] of their first dimension, o makes its first dimension of them."""
    made = {n: Feature(dim=(1, 2), vector=n) for n in ("q", "k", "v", "r", "seg_embed")}
    biases = {n: Feature(dim=(0, 1), vector=n) for n in ("r_r_bias", "r_s_bias", "r_w_bias")}
    return {**made, "o": Feature(dim=0, vector="o"), **biases}


@_named("RecurrentGemmaRglru", "transformers")
def _gates(module: Any) -> dict[str, Feature]:
    """A square for each head, [heads, in, out]."""
    features = {}
    for gate in ("input_gate", "recurrent_gate"):
        features[f"{gate}_weight"] = Feature(dim=(0, 2), vector=gate)
        features[f"{gate}_bias"] = Feature(dim=(0, 1), vector=gate)
    return features


@_named(r"InterpolateMidPositionEmbeddings", "transformers")
def _positions(module: Any) -> dict[str, Feature]:
    return {name: Feature(dim=-1, vector=name) for name in _own(module)}


@_named("QuantEmbedding", "transformers")
def _quantised_embedding(module: Any) -> dict[str, Feature]:
    return {"weight": Feature(dim=1)}


@_named(
    r"QuantLinear|\w*(Router|Gate|Mixer|MambaLayer|Mamba2Mixer)|SeparableConv1D|LevitAttention\w*",
    "transformers",
)
@_named(r"Attention\w*", "timm", "torchvision")
def _rows(module: Any) -> dict[str, Feature]:
    """Each row of what they have is a feature: routers, Mamba's states, biases by head; with the exceptions below."""
    features = {n: Feature(dim=0, vector=n) for n, p in _own(module).items() if p.dim() > 0}
    return {**features, **_biases_of_attention(module), **_position_tables(module)}


@_named(r"\w*Attention", "timm", "transformers", "torchvision")
@_named(r"RelPosBias|PosEmbedRel|\w*RelativePositionBias\w*", "timm", "transformers")
def _attention(module: Any) -> dict[str, Feature]:
    return {**_biases_of_attention(module), **_position_tables(module)}


def _position_tables(module: nn.Module) -> dict[str, Feature]:
    """A table of biases by relative position has a column for each head; one of embeddings, for each entry."""
    return {
        name: Feature(dim=1, vector=name)
        for name, p in _own(module).items()
        if p.dim() == 2 and re.search(r"relative_position_bias_table|^(height|width)_rel$", name)
    }


def _biases_of_attention(module: nn.Module) -> dict[str, Feature]:
    """q_bias and v_bias kept apart from the joint projection `qkv` belong to its units."""
    projection = module._modules.get("qkv")
    own = _own(module)
    if not isinstance(projection, nn.Linear) or projection.out_features % 3:
        return {}
    width = projection.out_features // 3
    features = {}
    for place, name in enumerate(("q_bias", "k_bias", "v_bias")):
        if name in own and own[name].shape == (width,):
            units = torch.arange(place * width, (place + 1) * width)
            features[name] = Feature(0, 3 * width, "qkv.out", units)
    return features
