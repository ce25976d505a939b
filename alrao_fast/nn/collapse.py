"""From a backbone with clones to an ordinary module: a torch.fx graph of torch's own layers, importable without us."""

import copy
import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from alrao_fast.nn.clones import ClassifierClones, LinearClones

_WHICH = ("best", "mixture")
# What a generated signature can spell out.
_LITERALS = (type(None), bool, int, float, str)


def collapse(
    backbone: nn.Module, head: LinearClones, which: str, num_extras: int
) -> fx.GraphModule:
    """Backbone and the best clone, or the mixture of all, in eval mode (see `AlraoModel.collapse`)."""
    if which not in _WHICH:
        raise ValueError(f"which: got {which!r}, expected one of {', '.join(_WHICH)}")
    weight, bias, log_posterior = _living(head)
    # The clones' outputs are float32 at least, even where their parameters are not.
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    classify = isinstance(head, ClassifierClones)
    if which == "best":
        best = log_posterior.argmax()
        weight, bias = weight[best], None if bias is None else bias[best]
    elif not classify:
        # The mean prediction of linear layers is the prediction of the mean layer.
        p = log_posterior.softmax(0)
        weight = torch.einsum("n,ncd->cd", p, weight.double())
        bias = None if bias is None else p @ bias.double()
    mix = classify and which == "mixture"

    root: dict[str, Any] = {
        "backbone": copy.deepcopy(backbone),
        "head": _linear(weight, bias, dtype),
    }
    graph = fx.Graph()
    out = _call_backbone(graph, backbone)
    features = graph.call_function(operator.getitem, (out, 0)) if num_extras else out
    if dtype != head.weight.dtype:
        features = graph.call_method("float", (features,))
    result = graph.call_module("head", (features,))
    if mix:
        root["log_posterior"] = log_posterior.to(dtype).unsqueeze(1)
        num_clones, num_classes = log_posterior.numel(), weight.size(1)
        result = graph.call_method("unflatten", (result, -1, (num_clones, num_classes)))
    if classify:
        result = graph.call_method("log_softmax", (result, -1))
    if mix:
        joint = graph.call_function(torch.add, (result, graph.get_attr("log_posterior")))
        result = graph.call_function(torch.logsumexp, (joint, -2))
    extras = [graph.call_function(operator.getitem, (out, i + 1)) for i in range(num_extras)]
    graph.output((result, *extras) if extras else result)
    return fx.GraphModule(root, graph, class_name="CollapsedModel").eval()


def _living(head: LinearClones) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights, biases and log-posterior of the clones whose parameters are all finite."""
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    finite = weight.isfinite().all((1, 2))
    if bias is not None:
        finite &= bias.isfinite().all(1)
    if not finite.any():
        raise ValueError("every clone has non-finite weights: there is nothing to collapse to")
    log_posterior = head.switch.log_posterior[finite]
    return weight[finite], None if bias is None else bias[finite], log_posterior


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """`nn.Linear` from weights `[..., C, D]` and biases `[..., C]`, stacked if there are several."""
    weight = weight.reshape(-1, weight.size(-1))
    linear = nn.Linear(weight.size(1), weight.size(0), bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype, copy=True))
    if bias is not None:
        linear.bias = nn.Parameter(bias.flatten().to(dtype, copy=True))
    return linear


def _call_backbone(graph: fx.Graph, backbone: nn.Module) -> fx.Node:
    """Placeholders for the arguments that the backbone's forward names, and its call with them."""
    named: list[tuple[inspect.Parameter, bool]] = []
    by_position = True
    for p in inspect.signature(backbone.forward).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        # A default that source text cannot repeat stays the backbone's own business.
        spelled = p.default is p.empty or isinstance(p.default, _LITERALS)
        by_position = by_position and spelled and p.kind is not p.KEYWORD_ONLY
        if spelled:
            named.append((p, by_position))
    if not named:
        raise ValueError(
            f"backbone: {type(backbone).__name__}.forward names no argument, so there is nothing to write into the "
            "collapsed module's signature: give it named arguments in place of *args, **kwargs"
        )
    # A required keyword-only argument may stand behind a default there, but not here.
    named.sort(key=lambda entry: entry[0].default is not inspect.Parameter.empty)
    nodes = {p.name: graph.placeholder(p.name, default_value=p.default) for p, _ in named}
    args = tuple(nodes[p.name] for p, positional in named if positional)
    kwargs: dict[str, Any] = {p.name: nodes[p.name] for p, positional in named if not positional}
    return graph.call_module("backbone", args, kwargs)
