"""The feature layouts of modules of transformers, timm, torchvision and peft that torch.nn's rules do not cover.

None of these packages is imported: a rule goes by the class's name and package, and by its parameters' names and
shapes. First the rules by class, in `_BY_CLASS`; what they leave out goes by name and shape, in `_by_shape`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from alrao_fast.optim.layouts import Feature, own_parameters, register_library

_PACKAGES = {"transformers", "transformers_modules", "timm", "torchvision", "peft"}
Own = Mapping[str, Tensor]
ClassRule = Callable[[Any, Own], dict[str, Feature]]
_BY_CLASS: list[tuple[re.Pattern[str], ClassRule]] = []


def _named(pattern: str) -> Callable[[ClassRule], ClassRule]:
    """Decorator: the rule for library classes, subclasses included, whose whole name matches `pattern`."""

    def register(rule: ClassRule) -> ClassRule:
        _BY_CLASS.append((re.compile(pattern), rule))
        return rule

    return register


@register_library
def _library(module: nn.Module) -> dict[str, Feature] | None:
    names = [c.__name__ for c in type(module).__mro__ if c.__module__.split(".")[0] in _PACKAGES]
    if not names:
        return None
    own = dict(own_parameters(module))
    for child, held in module._modules.items():
        # The entries of a list or dict are met here: the container's type says nothing of them.
        if isinstance(held, nn.ParameterList | nn.ParameterDict):
            own |= {
                f"{child}.{name}": param
                for name, param in held._parameters.items()
                if param is not None
            }
    features: dict[str, Feature] = {}
    for pattern, rule in _BY_CLASS:
        if any(map(pattern.fullmatch, names)):
            features = {**rule(module, own), **features}
    for name, param in own.items():
        if name in features or name.startswith("parametrizations.") or is_lazy(param):
            continue
        feature = _by_shape(name, param)
        if feature is not None:
            features[name] = feature
    return features


# Parameters of several dimensions whose last one holds what an embedding's does: one rate per column.
TABLES = re.compile(
    r".*(token|embed|embedding|encoding|latent|query|querie|prompt|probe|pos|pos_[hwt]|pos_emb|position_enc|height_rel"
    r"|width_rel|bias_table|position_bias|mask_emb|emb_rel_[kv]|extensor|compress_ape)s?"
    r"(_(win|window|temporal|spatial|table|vlm|[\dxy]d?))?\d*"
    r"|relative_attention_bias|static_weight"
)
# The same of projections [in, out].
_COLUMNS = re.compile(rf"{TABLES.pattern}|.*_projection(_weight)?")
# One rate per row: a head, an output.
_ROWS = re.compile(r"attention_biases|relative_bias_table|fn|hc_fn|.*compress_gate|lora_.*|vera_.*")
# Scales and shifts of every entry of [heads, size]: one rate per entry.
_ENTRIES = re.compile(r"(pos_)?bias_[uv]|scale|alpha")
# Parameters of these names scale or shift the same units, as a LayerNorm's weight and bias do.
_SHARED = re.compile(r"weight|bias|gain|alpha|beta|translate|log_scale")
_CHANNELS = re.compile(r"A_log|D|dt_bias")


def _by_shape(name: str, param: Tensor) -> Feature | None:
    """The feature of a library's parameter by its name and shape; None where they do not tell."""
    last = name.split(".")[-2 if "." in name else -1]
    vector = "out" if _SHARED.fullmatch(last) else "channel" if _CHANNELS.fullmatch(last) else name
    if param.dim() > 1:
        if _ROWS.fullmatch(last):
            return Feature(dim=0, vector=vector)
        if _COLUMNS.fullmatch(last):
            return Feature(dim=_channels(param), vector=name)
    long = tuple(d for d in range(param.dim()) if param.size(d) != 1)
    if len(long) < 2:
        # A vector, however it is shaped: there is one way only.
        return Feature(dim=long, vector=vector if long else name)
    if last == "A_log":
        return Feature(dim=tuple(range(param.dim() - 1)), vector=vector)
    if _ENTRIES.fullmatch(last) or _CHANNELS.fullmatch(last):
        return Feature(dim=tuple(range(param.dim())), vector=name if vector == "out" else vector)
    return Feature(dim=_channels(param), vector=name) if param.size(0) == 1 else None


def _channels(param: Tensor) -> int:
    """The dimension of the channels: the last one, but of [1, C, H, W], which is added to a convolution's output."""
    if param.dim() != 4 or param.size(0) != 1:
        return -1
    _, first, second, third = param.shape
    return 1 if second == third != first else -1


@_named(r".*(Linear|Router|Gate)")
def _rows(module: Any, own: Own) -> dict[str, Feature]:
    if "weight" not in own or own["weight"].dim() != 2:
        return {}
    return {"weight": Feature(dim=0), "bias": Feature(dim=0)}


@_named(r".*Embedding")
def _columns(module: Any, own: Own) -> dict[str, Feature]:
    return {"weight": Feature(dim=1)} if "weight" in own and own["weight"].dim() == 2 else {}


@_named("Conv1D")
def _transposed_linear(module: Any, own: Own) -> dict[str, Feature]:
    # The weight is [in, out].
    return {"weight": Feature(dim=1), "bias": Feature(dim=0)}


@_named(r".*")
def _experts(module: Any, own: Own) -> dict[str, Feature]:
    """Fused experts: a feature is one output unit of one expert, in [E, out, in] or [E, in, out]."""
    down = own.get("down_proj")
    names = [n for n in ("gate_up_proj", "up_proj", "gate_proj", "down_proj") if n in own]
    if down is None or len(names) < 2 or any(own[n].dim() != 3 for n in names):
        return {}
    if names[0] == "gate_up_proj" and own["gate_up_proj"].size(2) == 2 * down.size(1):
        transposed = True  # [E, in, 2 F] and [E, F, out], where the other order has [E, 2 F, in] and [E, out, F].
    else:
        transposed = getattr(module, "is_transposed", False)
    weight = (0, 2) if transposed else (0, 1)
    features = {name: Feature(dim=weight, vector=name) for name in names}
    return features | {f"{name}_bias": Feature(dim=(0, 1), vector=name) for name in names}


@_named(r".*Experts")
def _parallel_experts(module: Any, own: Own) -> dict[str, Feature]:
    return {"weight": Feature(dim=(0, 1))} if "weight" in own and own["weight"].dim() == 3 else {}


@_named("DbrxExpertGLU")
def _flat_experts(module: Any, own: Own) -> dict[str, Feature]:
    # [experts * hidden, in]; w2 is [experts * hidden, out], where the experts share the rates of an output, which they
    # add to the same sum: a vector for each would need an index as large as the parameter.
    return {
        "w1": Feature(vector="w1"),
        "v1": Feature(vector="v1"),
        "w2": Feature(dim=1, vector="w2"),
    }


@_named("CondConv2d")
def _mixed_kernels(module: Any, own: Own) -> dict[str, Feature]:
    # The weight [experts, out * in * k * k] is flat in every expert.
    weight, units = own["weight"], len(own["weight"]) * module.out_channels
    index = torch.arange(weight.numel()) // (weight.numel() // units)
    return {
        "weight": Feature(dim=(0, 1), num_features=units, feature_of=index),
        "bias": Feature(dim=(0, 1)),
    }


@_named("XLNetRelativeAttention")
def _heads_of_units(module: Any, own: Own) -> dict[str, Feature]:
    # [in, heads, size] projects to the heads, o [out, heads, size] from them; r_*_bias [heads, size] are q's biases.
    projections = {
        name: Feature(dim=(1, 2), vector=name) for name in ("q", "k", "v", "r", "seg_embed")
    }
    biases = ("r_r_bias", "r_s_bias", "r_w_bias")
    return {**projections, "o": Feature(vector="o")} | dict.fromkeys(
        biases, Feature(dim=(0, 1), vector="q")
    )


@_named("RecurrentGemmaRglru")
def _gates(module: Any, own: Own) -> dict[str, Feature]:
    # [heads, in, out] and [heads, out].
    features = {}
    for gate in ("input_gate", "recurrent_gate"):
        features[f"{gate}_weight"] = Feature(dim=(0, 2), vector=gate)
        features[f"{gate}_bias"] = Feature(dim=(0, 1), vector=gate)
    return features


@_named("MultiQueryAttentionV2")
def _multi_query(module: Any, own: Own) -> dict[str, Feature]:
    return {
        "query_proj": Feature(dim=(0, 1), vector="query"),
        "key_proj": Feature(dim=1, vector="key"),
        "value_proj": Feature(dim=1, vector="value"),
        "out_proj": Feature(dim=0, vector="out"),
    }


@_named(r".*AxialPositionEmbeddings")
def _axes(module: Any, own: Own) -> dict[str, Feature]:
    return {name: Feature(dim=-1, vector=name) for name in own}


@_named(r".*Attention")
def _packed_with_biases(module: Any, own: Own) -> dict[str, Feature]:
    """q_bias and v_bias [E] are the first and last third of the bias of `qkv`, a Linear without one."""
    qkv = module._modules.get("qkv")
    names = {"q_bias": 0, "k_bias": 1, "v_bias": 2}.items()
    if type(qkv) is not nn.Linear or not any(name in own for name, _ in names):
        return {}
    width = qkv.out_features // 3
    third = {n: torch.arange(k * width, (k + 1) * width) for n, k in names if n in own}
    packed = Feature(vector="qkv", num_features=qkv.out_features)
    biases = {name: packed._replace(feature_of=index) for name, index in third.items()}
    return {"qkv.weight": packed, "qkv.bias": packed, **biases}


@_named("RelPosBiasTf")
def _images_of_heads(module: Any, own: Own) -> dict[str, Feature]:
    # [heads, height, width].
    return {"relative_position_bias_table": Feature(dim=0)}


@_named(r".*Relative(Logits|PositionBias)")
def _relative_logits(module: Any, own: Own) -> dict[str, Feature]:
    # [in, out].
    return {"proj": Feature(dim=1)} if "proj" in own else {}


@_named("CsmCodebooksHead")
def _codebooks(module: Any, own: Own) -> dict[str, Feature]:
    # [codebooks, in, out].
    return {"weight": Feature(dim=(0, 2))}


@_named("ZambaMambaMixer")
def _heads_of_mixers(module: Any, own: Own) -> dict[str, Feature]:
    # [heads, out, in] and [heads, out].
    step = Feature(dim=(0, 1), vector="dt_proj")
    inputs = Feature(dim=(0, 1), vector="x_proj")
    return {"x_proj_weight": inputs, "dt_proj_weight": step, "dt_proj_bias": step}


@_named("LoraLayer")
def _magnitudes(module: Any, own: Own) -> dict[str, Feature]:
    """DoRA's magnitude of an output shares the rate of the row of B that computes the output's update."""
    features = {}
    magnitudes = module._modules.get("lora_magnitude_vector")
    for adapter, held in magnitudes._modules.items() if magnitudes is not None else ():
        magnitude = held._parameters.get("weight") if held is not None else None
        if magnitude is None:
            continue
        outputs = max(range(magnitude.dim()), key=list(magnitude.shape).__getitem__)
        linear = adapter in module.lora_B
        rows = f"lora_B.{adapter}.weight" if linear else f"lora_embedding_B.{adapter}"
        features[rows] = Feature(vector=f"out.{adapter}")
        path = f"lora_magnitude_vector.{adapter}.weight"
        features[path] = Feature(outputs, vector=f"out.{adapter}")
    return features
