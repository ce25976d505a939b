"""The feature layouts of torch.nn's own modules and of our heads: one rule per row of the design's table."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from alrao_fast.nn.clones import LinearClones
from alrao_fast.optim.layouts import Feature, register_builtin


@register_builtin(nn.Linear, nn.Bilinear, _ConvNd, _NormBase, nn.GroupNorm)
def _rows(module: nn.Module) -> dict[str, Feature]:
    return {"weight": Feature(dim=0), "bias": Feature(dim=0)}


@register_builtin(_ConvTransposeNd)
def _transposed_convolution(module: _ConvTransposeNd) -> dict[str, Feature]:
    channels, groups = module.out_channels, module.groups
    if groups == 1:
        return {"weight": Feature(dim=1), "bias": Feature(dim=0)}
    # weight [I, O/groups, ...]: input channel i belongs to group i // (I/groups), and only feeds that group's outputs.
    group = torch.arange(module.in_channels) // (module.in_channels // groups)
    per_group = channels // groups
    index = (group[:, None] * per_group + torch.arange(per_group)).flatten()
    return {
        "weight": Feature(dim=(0, 1), num_features=channels, feature_of=index),
        "bias": Feature(dim=0, num_features=channels),
    }


@register_builtin(nn.Embedding, nn.EmbeddingBag)
def _columns(module: nn.Module) -> dict[str, Feature]:
    return {"weight": Feature(dim=1)}


@register_builtin(RNNBase)
def _recurrent(module: RNNBase) -> dict[str, Feature]:
    features = {}
    for layer in range(module.num_layers):
        for suffix in (f"l{layer}", f"l{layer}_reverse")[: 1 + module.bidirectional]:
            # One rate per unit: dimension 0 lists the gates one after the other, each with all units.
            unit = Feature(dim=0, num_features=module.hidden_size, vector=suffix)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                features[f"{name}_{suffix}"] = unit
            features[f"weight_hr_{suffix}"] = Feature(dim=0, vector=f"hr_{suffix}")
    return features


@register_builtin(RNNCellBase)
def _recurrent_cell(module: RNNCellBase) -> dict[str, Feature]:
    unit = Feature(dim=0, num_features=module.hidden_size, vector="unit")
    return dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), unit)


@register_builtin(nn.MultiheadAttention)
def _attention(module: nn.MultiheadAttention) -> dict[str, Feature]:
    width = module.embed_dim
    packed = Feature(dim=0, num_features=3 * width, vector="in_proj")
    # Separate projections (kdim, vdim) use their third of the vector that in_proj_bias uses whole; bias_k and bias_v
    # [1, 1, E] are one more key and one more value.
    third = [torch.arange(k * width, (k + 1) * width) for k in range(3)]
    return {
        "in_proj_weight": packed,
        "q_proj_weight": packed._replace(feature_of=third[0]),
        "k_proj_weight": packed._replace(feature_of=third[1]),
        "v_proj_weight": packed._replace(feature_of=third[2]),
        "in_proj_bias": packed,
        "bias_k": packed._replace(dim=2, feature_of=third[1]),
        "bias_v": packed._replace(dim=2, feature_of=third[2]),
    }


@register_builtin(nn.LayerNorm, nn.RMSNorm)
def _normalized_entries(module: nn.LayerNorm | nn.RMSNorm) -> dict[str, Feature]:
    # A normalized_shape of several dimensions scales every position on its own.
    every = Feature(dim=tuple(range(len(module.normalized_shape))))
    return {"weight": every, "bias": every}


@register_builtin(nn.PReLU)
def _slopes(module: nn.PReLU) -> dict[str, Feature]:
    return {"weight": Feature(dim=0)}


@register_builtin(LinearClones)
def _clones(module: LinearClones) -> dict[str, Feature]:
    rate = Feature(dim=0, vector="clone", kind="clone")
    tails = [f"tail.{name}" for name, _ in getattr(module, "tail", nn.Module()).named_parameters()]
    return dict.fromkeys(["weight", "bias", *tails], rate)
