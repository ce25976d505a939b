"""wrap: a whole model becomes one that is trained by Alrao, by exchanging its output layer for clones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from alrao_fast.arguments import COUNT, Choice, Flag, checked, shown
from alrao_fast.nn.clones import ClassifierClones, LinearClones
from alrao_fast.nn.model import AlraoModel
from alrao_fast.nn.pretrained import (
    SOFTCAP,
    Pretrained,
    check_loss,
    convert,
    forward_names,
    is_pretrained,
    softcap_of,
)
from alrao_fast.nn.regressor import RegressorClones

_KINDS = {"num_clones": COUNT, "start": Choice("layer", "fresh"), "training_logits": Flag()}
# Where models keep their output layer, by the names of torchvision and of many others.
_NAMES = ("fc", "classifier", "head", "heads.head", "output", "out_proj", "lm_head")


def wrap(
    model: nn.Module,
    num_clones: int = 10,
    *,
    output: str | None = None,
    start: str = "layer",
    training_logits: bool = False,
    **head_options: Any,
) -> Any:
    """Exchange the output layer of a model for `num_clones` clones of it.

    Args:
        model: any module that ends in an `nn.Linear` whose outputs are logits of classes: of Hugging Face's
            transformers (causal and masked language models, classification of sequences, tokens and images; regression,
            too), timm, torchvision, or your own.
        num_clones: N.
        output: the name of the output layer, as in `model.named_modules()`; None finds it: what
            `get_output_embeddings()` or timm's `get_classifier()` says, the last linear layer if it has a usual name,
            or the only candidate.
        start: "layer": every clone starts with the weights of the layer that it replaces, so a trained one loses
            nothing; "fresh": each is drawn anew, as `nn.Linear` does.
        training_logits: of Hugging Face's models, whether the output has logits in training mode with labels, too.
        head_options: options of `ClassifierClones` (of a regression `RegressorClones`), such as `label_smoothing`;
            not the sizes, which are the layer's.

    Returns:
        Of a model of Hugging Face's the very object, which now is of a subclass: `model(**inputs, labels=y)` has the
        mixture's loss and log-probabilities, `generate()` draws from the mixture, Trainer, PEFT and Accelerate work as
        before, and `posterior()`, `suggested_lr()`, `clone_metrics()` and `collapse()` are there (`Pretrained`). Tied
        embeddings are untied: the embedding keeps its weights, the clones have their own.
        Of any other model an `AlraoModel` whose backbone is the model with an identity in the place of its output
        layer.

    Raises:
        TypeError, ValueError: an argument of another type or out of range; an output layer that is no `nn.Linear`, that
            is not found, or that is ambiguous; a Hugging Face model whose task has no mixture (several labels per
            sample), whose `loss_function` is the user's own, or which is in PEFT's wrapper already: wrap first, and
            name the layer in `modules_to_save`; a model that was compiled, or prepared by Accelerate for mixed
            precision, before: compile and prepare what this returns.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {shown(model)}, expected a torch.nn.Module")
    if isinstance(model, AlraoModel | Pretrained):
        raise TypeError(f"model: got a {type(model).__name__} that has clones already")
    options = checked(
        _KINDS, {"num_clones": num_clones, "start": start, "training_logits": training_logits}
    )
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        raise TypeError(
            f"model: got a {type(model).__name__}, expected the model without PEFT: wrap it first, then "
            "get_peft_model(model, LoraConfig(..., modules_to_save=[<the output layer's name>]))"
        )
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        raise TypeError(
            f"model: got a {type(compiled).__name__} compiled by torch.compile, expected it before: "
            "torch.compile(wrap(model))"
        )
    pretrained = is_pretrained(model)
    kind: type[LinearClones] = ClassifierClones
    if pretrained:
        kind, head_options = _task(model, head_options)
    name = _output_name(model, pretrained) if output is None else output
    layer = _layer(model, name)
    if output is None and not pretrained:
        _check_alone(model, name, layer)
    if pretrained:
        check_loss(model)
        _check_own_forward(model, layer)
        _check_last(model, name, layer)
    head = _head(kind, layer, options["num_clones"], options["start"], head_options)
    if pretrained:
        return convert(model, name, layer, head, options["training_logits"])
    if name == "":
        return AlraoModel(nn.Identity(), head)
    if _has_softmax(model, name):
        warnings.warn(
            f"wrap: the {type(model).__name__} has a softmax in its forward. If that comes after its output layer, it "
            "now acts on the features of the clones: let the forward return what the layer gives, the clones take the "
            "log_softmax themselves",
            stacklevel=2,
        )
    model.set_submodule(name, nn.Identity())
    return AlraoModel(model, head)


def _has_softmax(model: nn.Module, name: str) -> bool:
    """In the forward's code, or as a module in the model or around its output layer; attention has its own deeper."""
    parents = name.split(".")[:-1]
    around = [model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents) + 1)]
    softmax = nn.Softmax, nn.LogSoftmax
    return bool(forward_names(model) & {"softmax", "log_softmax", "logsoftmax"}) or any(
        isinstance(child, softmax) for module in around for child in module.children()
    )


def _head(
    kind: Any, layer: nn.Linear, num_clones: int, start: str, options: dict[str, Any]
) -> LinearClones:
    for size in ("in_features", "num_classes", "out_features"):
        if size in options:
            raise TypeError(
                f"{size}: got {shown(options[size])}, expected none: the clones have the sizes of the layer that they "
                f"replace, {layer.in_features} and {layer.out_features}; for others exchange that layer before"
            )
    own = {
        "bias": layer.bias is not None,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    head: LinearClones = kind(
        layer.in_features,
        layer.out_features,
        num_clones,
        **{**own, **options},
    )
    if start == "layer":
        with torch.no_grad():
            head.weight.copy_(layer.weight)
            if head.bias is not None and layer.bias is not None:
                head.bias.copy_(layer.bias)
    return head.train(layer.training)


def _layer(model: nn.Module, name: str) -> nn.Linear:
    modules = dict(model.named_modules())
    if not isinstance(name, str) or name not in modules:
        raise ValueError(
            f"output: got {name!r}, expected the name of a module of the {type(model).__name__}, such as "
            f"{', '.join(map(repr, _candidates(model)[-3:])) or 'fc'}"
        )
    layer = modules[name]
    if not _is_linear(layer):
        raise TypeError(
            f"output: {name!r} of the {type(model).__name__} is {shown(layer)}, expected an nn.Linear"
        )
    assert isinstance(layer, nn.Linear)
    return layer


def _is_linear(layer: nn.Module | None) -> bool:
    """An nn.Linear, or one of the subclasses that libraries make of it for compilers: nothing but weight and bias."""
    return (
        isinstance(layer, nn.Linear)
        and not layer._modules
        and set(layer._parameters) <= {"weight", "bias"}
    )


def _candidates(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if _is_linear(module)]


def _output_name(model: Any, pretrained: bool) -> str:
    """The name of the output layer; ValueError where nothing says which it is."""
    names = {id(module): name for name, module in model.named_modules()}
    if pretrained:
        return _pretrained_output(model, names)
    if callable(getattr(model, "get_classifier", None)):
        layer = model.get_classifier()
        if id(layer) in names and _is_linear(layer):
            return names[id(layer)]
    if isinstance(model, nn.Linear):
        return ""
    modules = dict(model.named_modules())
    if isinstance(model, nn.Sequential) and len(model) and _is_linear(model[-1]):
        return str(len(model) - 1)
    candidates = _candidates(model)
    for name in _NAMES:
        found = modules.get(name)
        if isinstance(found, nn.Sequential) and len(found) and _is_linear(found[-1]):
            name = f"{name}.{len(found) - 1}"
        elif not _is_linear(found):
            continue
        # Before linear layers of other sizes it may be hidden, whatever its name.
        sizes = [modules[other].weight.shape for other in candidates[candidates.index(name) :]]
        if len(set(sizes)) == 1:
            return name
    if len(candidates) == 1:
        return candidates[0]
    named = f"name it: wrap(model, output=...), one of its linear layers {_listed(candidates)}"
    raise ValueError(
        f"output: found no output layer in the {type(model).__name__}; "
        + (named if candidates else "it has no linear layer at all")
    )


def _pretrained_output(model: Any, names: dict[int, str]) -> str:
    layer = model.get_output_embeddings()
    if layer is not None and id(layer) in names:
        return names[id(layer)]
    base = model.base_model
    inside = set() if base is model else {id(module) for module in base.modules()}
    outputs = [
        name
        for name, module in model.named_modules()
        if _is_linear(module)
        and id(module) not in inside
        and module.out_features == model.config.num_labels
    ]
    if len(outputs) == 1:
        return outputs[0]
    raise ValueError(
        f"output: the {type(model).__name__} has {_listed(outputs)} as linear layers with the config's "
        f"{model.config.num_labels} labels, expected one; name it: wrap(model, output=...), or build an "
        "alrao_fast.AlraoModel of its base model and a head"
    )


def _task(model: Any, options: dict[str, Any]) -> tuple[type[LinearClones], dict[str, Any]]:
    """The kind of head that a Hugging Face model's loss asks for, and its options."""
    config = model.config
    problem = getattr(config, "problem_type", None)
    labelled = "Classification" in type(model).__name__
    if "QuestionAnswering" in type(model).__name__ or "MultipleChoice" in type(model).__name__:
        raise ValueError(
            f"model: got a {type(model).__name__}, whose output layer does not give a distribution over classes for "
            "each position; expected a language model or one for classification"
        )
    if problem == "multi_label_classification":
        raise ValueError(
            'model: its config has problem_type "multi_label_classification", expected one label per sample: clones '
            "are mixed by the likelihood of one class"
        )
    if labelled and (problem == "regression" or (problem is None and config.num_labels == 1)):
        return RegressorClones, options
    softcap = softcap_of(model)
    if softcap is not None:
        options = {"logit_softcap": softcap, **options}
    return ClassifierClones, options


def _check_alone(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """A second output layer beside the first, for distillation or patches, is no clone's and would be added to them."""
    path, _, _ = name.rpartition(".")
    beside = [
        f"{path}.{child}" if path else child
        for child, module in model.get_submodule(path).named_children()
        if isinstance(module, nn.Linear)
        and (module.in_features, module.out_features) == (layer.in_features, layer.out_features)
    ]
    if isinstance(model.get_submodule(path), nn.Sequential) or len(beside) < 2:
        return
    raise ValueError(
        f"output: the {type(model).__name__} has {_listed(beside)} as output layers, expected one; build an "
        "alrao_fast.AlraoModel of the model without them (of timm: num_classes=0) and a head, or name the only one "
        "that it uses: wrap(model, output=...)"
    )


def _check_own_forward(model: Any, layer: nn.Linear) -> None:
    """What was put in the place of an object's forward calls that of its class as it was, without the clones."""
    name = type(model).__name__
    if "_old_forward" in model.__dict__:
        if layer.weight.is_meta:
            raise ValueError(
                f"model: got a {name} whose output layer is offloaded by a hook of Accelerate's, expected it on a "
                "device: give it one in device_map"
            )
    elif "forward" in model.__dict__:
        raise ValueError(
            f"model: got a {name} with a forward of its own in place of its class's, as accelerator.prepare() puts one "
            "under mixed precision, expected it before: accelerator.prepare(wrap(model))"
        )


def _check_last(model: Any, name: str, layer: nn.Linear) -> None:
    """Nothing may come between the output layer and the logits that would not do the same to the clones' features."""
    parent = model.get_submodule(name.rpartition(".")[0])
    biased = layer.bias is None and isinstance(getattr(parent, "bias", None), torch.Tensor)
    if biased or isinstance(getattr(model, "final_logits_bias", None), torch.Tensor):
        behind = "adds a bias of its own to"
    elif getattr(model, SOFTCAP, None) is not None or any(
        "softcap" in used.replace("_", "") and used != SOFTCAP for used in forward_names(model)
    ):
        behind = "bends by a function of its own"
    else:
        return
    raise ValueError(
        f"model: got a {type(model).__name__}, which {behind} what its output layer gives; build an "
        "alrao_fast.AlraoModel of its base model and a head"
    )


def _listed(names: list[str]) -> str:
    shown_names = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return shown_names or "none"
