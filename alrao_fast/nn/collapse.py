"""From a backbone with clones to an ordinary module: a torch.fx graph of torch's own layers, importable without us."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from alrao_fast import fsdp1
from alrao_fast.arguments import Choice
from alrao_fast.nn.adaptive import AdaptiveClassifierClones
from alrao_fast.nn.clone_parameters import largest_outputs
from alrao_fast.nn.clones import ClassifierClones, LinearClones
from alrao_fast.nn.collapse_adaptive import adaptive_layer, log_probs
from alrao_fast.nn.over_ranks import all_clones
from alrao_fast.nn.switch import normalized
from alrao_fast.sharding import is_sharded

WHICH = Choice("best", "mixture")
# What a generated signature can spell out.
_LITERALS = (type(None), bool, int, float, str)


class Output(NamedTuple):
    """How a backbone returns its features: by `key` (a name, a place, a function, None for a tensor alone), in a
    sequence of `length` entries or, where that is None, beside nothing that the model returns.
    """

    key: Any
    length: int | None = None

    @classmethod
    def with_extras(cls, num_extras: Any, key: Any) -> Output:
        """That of a sequence of features and `num_extras` values, 0: of features alone."""
        expected = "expected how many values the backbone returns beside the features, 0 or more"
        if isinstance(num_extras, bool) or not isinstance(num_extras, int):
            raise TypeError(f"num_extras: got {num_extras!r}, {expected}")
        if num_extras < 0:
            raise ValueError(f"num_extras: got {num_extras}, {expected}")
        if num_extras == 0:
            return cls(key)
        return cls((key or 0) % (num_extras + 1), num_extras + 1)


def collapse(backbone: nn.Module, head: LinearClones, which: str, output: Output) -> fx.GraphModule:
    """Backbone and the best clone, or the mixture of all, in eval mode (see `AlraoModel.collapse`)."""
    refuse_shards(backbone, head)
    root: dict[str, Any] = {"backbone": copy.deepcopy(backbone)}
    graph = fx.Graph()
    out = _call_backbone(graph, backbone)
    features = out
    if callable(output.key):
        features = graph.call_function(output.key, (out,))
    elif output.key is not None:
        features = graph.call_function(operator.getitem, (out, output.key))
    result = add_head(graph, root, head, which, features, backbone)
    if output.length is not None:
        places = range(output.length)
        result = tuple(
            result if k == output.key else graph.call_function(operator.getitem, (out, k))
            for k in places
        )
    graph.output(result)
    return fx.GraphModule(root, graph, class_name="CollapsedModel").eval()


def refuse_shards(*modules: nn.Module) -> None:
    """Raise RuntimeError for modules with DTensors: a copy has to be of whole parameters.

    Those of a head over ranks are gathered.
    """
    inside = [m for module in modules for m in module.modules()]
    gathered = {
        id(p)
        for m in inside
        if isinstance(m, LinearClones) and m.over_ranks is not None
        for p in m.parameters()
    }
    own = [p for m in inside for p in m.parameters(recurse=False)]
    flattened = any(fsdp1.is_home(m) for m in inside) or any(map(fsdp1.is_flattened, own))
    if flattened or any(is_sharded(p) and id(p) not in gathered for p in own):
        raise RuntimeError(
            "collapse: got a model that is sharded over ranks, expected a whole one: load its full state, "
            "get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, into a model that was not sharded, and collapse that"
        )


def warn_of_hooks(*modules: nn.Module) -> None:
    """Warn of forward hooks, of one of our modules, that what it is collapsed to does not have."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            warnings.warn(
                f"collapse: got forward hooks on the {type(module).__name__}, which the result does not have: where "
                "they change inputs or outputs, it gives others. Those on the backbone and inside it go along",
                stacklevel=3,
            )


def add_head(
    graph: fx.Graph,
    root: dict[str, Any],
    head: LinearClones,
    which: str,
    features: fx.Node,
    backbone: nn.Module,
) -> Any:
    """Add to `graph` what the head predicts from the backbone's `features`, with its layers in `root`."""
    # The clones' outputs are float32 at least, even where their parameters are not, or the backbone's.
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    if {p.dtype for p in (head.weight, *backbone.parameters())} != {dtype}:
        # By a tensor of the result's own, which follows when that is put into another dtype.
        root["dtype_of_head"] = torch.empty(0, dtype=dtype, device=head.weight.device)
        features = graph.call_method("to", (features, graph.get_attr("dtype_of_head")))
    if isinstance(head, AdaptiveClassifierClones):
        return _add_adaptive(graph, root, head, which, features, dtype)
    weight, bias, log_posterior = _living(head, dtype)
    classify = isinstance(head, ClassifierClones)
    if which == "best":
        best = _best([weight, bias], log_posterior)
        weight, bias = weight[best], None if bias is None else bias[best]
    root["head"] = _linear(weight, bias)
    result = graph.call_module("head", (features,))
    if which == "mixture":
        root["log_posterior"] = log_posterior.to(dtype).unsqueeze(1)
        result = graph.call_method("unflatten", (result, -1, tuple(weight.shape[:2])))
        result = _mixture(graph, result, classify, _softcap(head))
    elif classify:
        result = _capped(graph, result, _softcap(head))
        result = graph.call_method("log_softmax", (result, -1))
    return result


def _add_adaptive(
    graph: fx.Graph,
    root: dict[str, Any],
    head: AdaptiveClassifierClones,
    which: str,
    features: fx.Node,
    dtype: torch.dtype,
) -> fx.Node:
    finite = _finite(head)
    log_posterior = normalized(head.switch.log_posterior[finite])
    living: list[int] = finite.nonzero().flatten().tolist()
    if which == "best":
        params = [None if p is None else p.detach()[finite].to(dtype) for p in head.parts()]
        best = living[int(_best(params, log_posterior))]
        return log_probs(graph, root, [adaptive_layer(head, best, dtype)], False, features)
    layers = [adaptive_layer(head, n, dtype) for n in living]
    outputs = log_probs(graph, root, layers, True, features)
    root["log_posterior"] = log_posterior.to(dtype).unsqueeze(1)
    return _mixture(graph, outputs, True, None)


def collapsed_head(head: LinearClones, which: str, backbone: nn.Module) -> fx.GraphModule:
    """The head alone, from the backbone's features to the prediction, in eval mode."""
    refuse_shards(head)
    root: dict[str, Any] = {}
    graph = fx.Graph()
    graph.output(add_head(graph, root, head, which, graph.placeholder("features"), backbone))
    return fx.GraphModule(root, graph, class_name="CollapsedHead").eval()


def best_layer(head: LinearClones) -> nn.Linear:
    """The best clone as a layer of the clones' dtype."""
    refuse_shards(head)
    weight, bias, log_posterior = _living(head, head.weight.dtype)
    best = _best([weight, bias], log_posterior)
    return _linear(weight[best], None if bias is None else bias[best])


def _softcap(head: LinearClones) -> float | None:
    return head.logit_softcap if isinstance(head, ClassifierClones) else None


def _capped(graph: fx.Graph, outputs: fx.Node, softcap: float | None) -> fx.Node:
    """What `head.capped` makes of finite outputs."""
    if softcap is None:
        return outputs
    bounded = graph.call_method(
        "tanh", (graph.call_function(operator.truediv, (outputs, softcap)),)
    )
    return graph.call_function(operator.mul, (bounded, softcap))


def _mixture(graph: fx.Graph, outputs: fx.Node, classify: bool, softcap: float | None) -> fx.Node:
    """The mixture of the outputs `[..., N, C]`, for each sample of the clones whose outputs are finite there."""

    def call(function: Callable[..., Any], *args: Any) -> fx.Node:
        return graph.call_function(function, args)

    finite = call(torch.isfinite, outputs)
    alive = graph.call_method("all", (finite, -1), {"keepdim": True})
    outputs = call(torch.where, alive, outputs, 0.0)
    mass = call(torch.where, alive, graph.get_attr("log_posterior"), -math.inf)
    if not classify:
        p = call(torch.softmax, mass, -2)
        return call(torch.sum, call(torch.mul, p, outputs), -2)
    outputs = _capped(graph, outputs, softcap)
    joint = call(torch.add, call(torch.log_softmax, outputs, -1), call(torch.log_softmax, mass, -2))
    result = call(torch.logsumexp, joint, -2)
    # Where every clone is dead no class has a probability.
    any_alive = graph.call_method("any", (alive, -2))
    return call(torch.where, any_alive, result, -math.inf)


def _finite(head: LinearClones) -> Tensor:
    """Which clones `[N]` have finite parameters."""
    finite = head.finite_clones()
    if not finite.any():
        raise ValueError("every clone has non-finite weights: there is nothing to collapse to")
    return finite


def _living(head: LinearClones, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights and biases in `dtype` and log-posterior of the clones whose parameters are all finite."""
    finite = _finite(head)
    weight, bias = all_clones(head)
    bias = None if bias is None else bias.detach()[finite].to(dtype)
    switch = head.switch
    if isinstance(head, ClassifierClones):
        log_posterior = switch.log_posterior
    else:
        log_posterior = switch.log_posterior_of_means()
    log_posterior = normalized(log_posterior[finite])
    return weight.detach()[finite].to(dtype), bias, log_posterior


def _best(params: Sequence[Tensor | None], log_posterior: Tensor) -> Tensor:
    """The clone of largest posterior; one that overflows on features between -1 and 1 only if all do."""
    weight, *others = params
    assert weight is not None
    finite = largest_outputs(1.0, weight, *others).isfinite()
    return torch.where(finite | ~finite.any(), log_posterior, -math.inf).argmax()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """`nn.Linear` from weights `[..., C, D]` and biases `[..., C]`, stacked if there are several."""
    weight = weight.reshape(-1, weight.size(-1))
    linear = nn.Linear(weight.size(1), weight.size(0), bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.flatten().clone())
    return linear


def _call_backbone(graph: fx.Graph, backbone: nn.Module) -> fx.Node:
    """Placeholders for the arguments that the backbone's forward names, and its call with them."""
    named: list[tuple[inspect.Parameter, bool]] = []
    by_position = True
    for p in inspect.signature(backbone.forward).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        # A default that source text cannot repeat stays the backbone's own business.
        required = p.default is p.empty
        spelled = required or isinstance(p.default, _LITERALS)
        # By position what hooks look at; the rest by name, since decorators of forward add arguments by theirs.
        first = required and p.kind is not p.KEYWORD_ONLY
        by_position = by_position and spelled and (first or p.kind is p.POSITIONAL_ONLY)
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
