"""Clones of an adaptive softmax as layers of torch's, for collapsed networks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from alrao_fast.nn.adaptive import AdaptiveClassifierClones
from alrao_fast.nn.adaptive_losses import pairs


def adaptive_layer(
    head: AdaptiveClassifierClones, n: int, dtype: torch.dtype
) -> nn.AdaptiveLogSoftmaxWithLoss:
    """Clone n, with copies of its parameters."""
    layer = nn.AdaptiveLogSoftmaxWithLoss(
        head.in_features,
        head.num_classes,
        head.cutoffs[:-1],
        div_value=head.div_value,
        head_bias=head.bias is not None,
        device="meta",
    )

    def own(param: Tensor) -> nn.Parameter:
        return nn.Parameter(param.detach()[n].to(dtype, copy=True))

    layer.head.weight = own(head.weight)
    if head.bias is not None:
        layer.head.bias = own(head.bias)
    tails: Any = layer.tail
    for (projection, weight), tail in zip(pairs(head.tails()), tails, strict=True):
        tail[0].weight, tail[1].weight = own(projection), own(weight)
    return layer


def log_probs(
    graph: fx.Graph, root: dict[str, Any], layers: list[Any], several: bool, features: fx.Node
) -> fx.Node:
    """Add the layers to `root`, and to `graph` their log-probabilities `[..., C]`, or `[..., N, C]` of several."""
    width = layers[0].in_features
    rows = graph.call_method("reshape", (features, -1, width))
    found = []
    for n, layer in enumerate(layers):
        name = f"head.{n}" if several else "head"
        root[name] = layer
        # Its forward wants targets.
        found.append(graph.call_method("log_prob", (graph.get_attr(name), rows)))
    result = graph.call_function(torch.stack, (found, -2)) if several else found[0]
    shape = graph.call_function(getattr, (features, "shape"))
    samples = graph.call_function(operator.getitem, (shape, slice(None, -1)))
    rest = (len(layers), layers[0].n_classes) if several else (layers[0].n_classes,)
    return graph.call_method(
        "reshape", (result, graph.call_function(operator.add, (samples, rest)))
    )
