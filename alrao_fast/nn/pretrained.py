"""Hugging Face models whose output layer is a head of clones (`alrao_fast.wrap`). Nothing of transformers is imported.

The model stays the object that it was, of a subclass made for it, as torch.nn.utils.parametrize makes one. Where the
output layer was stands `Passed`, which holds the clones and passes its input on: what the model's own forward returns
as logits are then the features of whatever it would have returned logits of, pooled or cut out as it does. The clones
take it from there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.arguments import shown
from alrao_fast.nn.clones import ClassifierClones, LinearClones
from alrao_fast.nn.collapse import (
    WHICH,
    best_layer,
    collapsed_head,
    refuse_shards,
    warn_of_hooks,
)
from alrao_fast.nn.regressor import RegressorClones
from alrao_fast.nn.with_clones import WithClones

# What a config says of logits that the model bends itself, by the names of the models' authors.
SOFTCAP = "final_logit_softcapping"


class Passed(nn.Module):
    """In the place of an output layer: returns its input, and holds the clones for the model's forward."""

    def __init__(self, clones: LinearClones) -> None:
        super().__init__()
        self.clones = clones

    def forward(self, features: Tensor) -> Tensor:
        """`features` as they are."""
        return features

    @property
    def weight(self) -> Tensor:
        """The clones' `[N, C, D]`, for whoever asks an output layer for its dtype or device."""
        return self.clones.weight

    @property
    def bias(self) -> Tensor | None:
        """The clones' `[N, C]`."""
        return self.clones.bias


class Pretrained(WithClones):
    """What `wrap` adds to a model of Hugging Face's: a loss and logits of the clones, and what an `AlraoModel` can say.

    `model(**inputs, labels=y)` returns the model's own kind of output. `loss` is the mixture's loss, of labels shifted
    by one position where the model's own loss shifts them, divided by `num_items_in_batch` where it is given; in
    training mode it is one observation of the switch. `logits` are the mixture's log-probabilities (of a regression the
    mean); with labels in training mode they are None, as all of a large vocabulary's would cost another pass, unless
    the model was wrapped with `training_logits=True`. `sample_weight` and `reduction` go to the head.
    """

    # For Trainer, which then gives num_items_in_batch.
    accepts_loss_kwargs = True
    config: Any

    def _place(self) -> Any:
        """What stands where the output layer was: the `Passed`, or PEFT's wrapper of its copies."""
        return self.get_submodule(self.__dict__["_alrao"]["output"])

    def _clones(self) -> LinearClones:
        # Of several, as PEFT keeps copies, the place itself tells the active one.
        place = self._place()
        clones = getattr(place, "clones", None)
        if not isinstance(clones, LinearClones):
            raise TypeError(
                f"output: got a {type(place).__name__} in the clones' place {self.__dict__['_alrao']['output']!r}, "
                "expected what wrap has put there"
            )
        return clones

    @property
    def clones(self) -> LinearClones:
        """The head."""
        return self._clones()

    def _backbone_parameters(self) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self._place().parameters()}
        return (p for p in self.parameters() if id(p) not in own)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.__dict__["_alrao"]["arguments"]
        kwargs.update(zip(names, args))
        labels = kwargs.pop("labels", None)
        shifted = kwargs.pop("shift_labels", None)
        self._check_labels(labels)
        if labels is not None:
            check_loss(self)
        options = {
            name: kwargs.pop(name)
            for name in ("num_items_in_batch", "sample_weight", "reduction")
            if kwargs.get(name) is not None
        }
        return_dict = kwargs.pop("return_dict", None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        if (
            labels is not None
            and kwargs.get("decoder_input_ids") is None
            and kwargs.get("decoder_inputs_embeds") is None
            and self.__dict__["_alrao"]["generates_labels"]
        ):
            kwargs["decoder_input_ids"] = _decoder_inputs(self, labels)
        out = super().forward(**kwargs, return_dict=True)
        if not isinstance(getattr(out, "logits", None), Tensor):
            raise TypeError(
                f"{type(self).__name__}: its {type(out).__name__} has no logits, which the clones would replace; build "
                "an alrao_fast.AlraoModel of its base model and a head"
            )
        features, head = out.logits, self._clones()
        if features.size(-1) != head.in_features:
            raise RuntimeError(
                f"{type(self).__name__}: its logits without an output layer have {features.size(-1)} entries, expected "
                f"the {head.in_features} features of the clones: the model does more than return what its output layer "
                "does; build an alrao_fast.AlraoModel of its base model and a head"
            )
        results: dict[str, Any] = {}
        if labels is not None:
            loss = head(*self._aligned(features, labels, shifted), **options)
            balance = getattr(out, "aux_loss", None)
            if isinstance(balance, Tensor) and loss.dim() == 0:
                # Of a mixture of experts, as the model adds it where it computes the loss.
                loss = loss + _router_weight(self) * balance.to(loss.device)
            results["loss"] = loss
        if labels is None or not self.training or self.__dict__["_alrao"]["training_logits"]:
            results["logits"] = head(features)
        fields = {**out, **results}
        if "logits" not in results:
            del fields["logits"]
        result: Any = type(out)(**fields)
        return result if return_dict else result.to_tuple()

    def _check_labels(self, labels: Tensor | None) -> None:
        """Floating labels of a classifier are a task of several labels to transformers, unless the config denies it."""
        if labels is None or not labels.is_floating_point():
            return
        settings = self.__dict__["_alrao"]
        if settings["infers_task"] and isinstance(self._clones(), ClassifierClones):
            raise TypeError(
                f"labels: got {labels.dtype}, expected classes of an integer dtype: a {type(self).__name__} takes such "
                "labels for several per sample, which clones have no mixture for; for probabilities of one class set "
                'model.config.problem_type = "single_label_classification" before wrap'
            )

    def _aligned(
        self, features: Tensor, labels: Tensor, shifted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of the same positions; `shifted` are labels that the caller has shifted."""
        head = self._clones()
        if isinstance(head, RegressorClones):
            return features, labels.reshape(*features.shape[:-1], head.out_features)
        if self.__dict__["_alrao"]["shift"]:
            if shifted is not None:
                return features, shifted
            return features[..., :-1, :], labels[..., 1:]
        return features, labels

    def collapse(self, which: str = "best") -> nn.Module:
        """A copy of the model, of its own class, in eval mode, with one ordinary output layer in the clones' place.

        "best" has the clone with the largest posterior: `save_pretrained` saves, and `from_pretrained` loads it without
        this package. "mixture" has all clones, as a module that returns the mixture's log-probabilities; it computes
        what this model does in eval mode, and its class cannot load it. RuntimeError while the switch has observed
        nothing.
        """
        WHICH.check("which", which)
        if which == "best":
            self._check_observed("collapse('best')")
        head = self._clones()
        refuse_shards(self)
        warn_of_hooks(head)
        plain = copy.deepcopy(self)
        settings = plain.__dict__.pop("_alrao")
        layer = best_layer(head) if which == "best" else collapsed_head(head, which, self)
        plain.set_submodule(settings["output"], layer)
        plain.__class__ = settings["class"]
        if settings["softcap"] is not None and which == "best":
            setattr(_bends(plain.config), SOFTCAP, settings["softcap"])
        return plain.eval()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, whose config has the softcap of the logits that the clones have taken over."""
        softcap = self.__dict__["_alrao"]["softcap"]
        if softcap is None:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        setattr(_bends(self.config), SOFTCAP, softcap)
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            setattr(_bends(self.config), SOFTCAP, None)

    def _get_resized_lm_head(
        self, old_lm_head: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """What resize_token_embeddings puts in the clones' place: their weights, and those of new tokens the mean."""
        clones = getattr(old_lm_head, "clones", None)
        if new_num_tokens is None or clones is None or clones.num_classes == new_num_tokens:
            return old_lm_head
        return Passed(resized(clones, new_num_tokens))

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.__dict__["_alrao"]["class"],), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        live.models.enter(self)


def resized(head: LinearClones, num_classes: int) -> LinearClones:
    """A copy of a classifier's head for another number of classes: new ones start at the mean of the others."""
    new = copy.deepcopy(head)
    kept = min(num_classes, new.weight.size(1))
    with torch.no_grad():
        for name in ("weight", "bias"):
            old = getattr(new, name)
            if old is None:
                continue
            tensor = old.new_empty(old.size(0), num_classes, *old.shape[2:])
            tensor[:, :kept] = old[:, :kept]
            tensor[:, kept:] = old.mean(1, keepdim=True)
            setattr(new, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
    new.num_classes = num_classes  # type: ignore[assignment]
    # No optimizer moves the new parameters yet.
    new.clone_lr.fill_(math.nan)
    return new


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.")
        for c in type(model).__mro__
    )


def convert(
    model: Any, name: str, layer: nn.Linear, head: LinearClones, training_logits: bool
) -> Any:
    """Make `model`, with `head` in the place `name` of its output layer, one that is trained by Alrao."""
    settings = {
        "class": type(model),
        "output": name,
        "shift": _shifts(model, name),
        "generates_labels": getattr(model.config, "is_encoder_decoder", False)
        and "Classification" not in type(model).__name__,
        "infers_task": "Classification" in type(model).__name__
        and getattr(model.config, "problem_type", None) is None,
        "training_logits": training_logits,
        "arguments": [*inspect.signature(model.forward).parameters],
        "softcap": softcap_of(model),
    }
    _own_config(model)
    if settings["softcap"] is not None:
        # The clones' business from now on.
        setattr(_bends(model.config), SOFTCAP, None)
    _untie(model, name)
    model.set_submodule(name, Passed(head.to(layer.weight.device)))
    model.__dict__["_alrao"] = settings
    model.__class__ = _subclass(type(model))
    if "_old_forward" in model.__dict__:
        # What a hook of Accelerate's calls.
        model._old_forward = types.MethodType(type(model).forward, model)
    live.models.enter(model)
    return model


def softcap_of(model: Any) -> float | None:
    """The softcap of the model's logits: not all classes heed what their config, or that of their text, says."""
    config = _bends(model.config)
    unheeded = config is not model.config and SOFTCAP not in forward_names(model)
    if unheeded or "Classification" in type(model).__name__:
        return None
    softcap: float | None = getattr(config, SOFTCAP, None)
    return softcap


def _bends(config: Any) -> Any:
    """The config that says how logits are bent: the model's, or that of its text, of several its decoder's."""
    if hasattr(config, SOFTCAP) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config(decoder=True)


def _own_config(model: Any) -> None:
    """Give the model and its parts copies of their configs, which other models may share: `wrap` changes them."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def check_loss(model: Any) -> None:
    """Raise ValueError for a loss function of the user's own: the clones' loss is that of their mixture."""
    own = getattr(model, "_loss_function", None)
    if own is not None and not getattr(own, "__module__", "").startswith("transformers."):
        raise ValueError(
            f"loss_function: the {type(model).__name__} has {shown(own)}, expected transformers' own: clones have the "
            "loss of their mixture, which options of wrap change; for another build an alrao_fast.AlraoModel of the "
            "base model and a head, whose clone_loss takes a criterion"
        )


def _shifts(model: Any, output: str) -> bool:
    """Whether the model's own loss compares the logits of a position with the label of the next.

    transformers gives ForCausalLMLoss to every class that it knows nothing better of; whether a class calls it, or
    compares the labels as they are, is in its forward or in that of a part which holds the output layer.
    """
    loss = getattr(model, "loss_function", None)
    if getattr(loss, "__name__", "") != "ForCausalLMLoss":
        return False
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    path = output.split(".")
    holders = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return any(
        is_pretrained(part) and forward_names(part) & {"loss_function", "shift_labels"}
        for part in holders
    )


def forward_names(model: nn.Module) -> set[str]:
    """The names that the model's forward uses, its own and those of the classes it comes from."""
    names: set[str] = set()
    for cls in type(model).__mro__:
        code = getattr(inspect.unwrap(vars(cls).get("forward", object)), "__code__", None)
        if cls is not nn.Module and code is not None:
            names.update(code.co_names, code.co_varnames)
    return names


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads to give `labels`, as the model makes it of them."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        inputs: Tensor = prepare(labels)
        return inputs
    config, module = model.config, sys.modules[model.__dict__["_alrao"]["class"].__module__]
    shift = getattr(module, "shift_tokens_right", None)
    if shift is None:
        raise TypeError(
            f"decoder_input_ids: expected them beside labels: the {type(model).__name__} cannot make them"
        )
    inputs = shift(labels, config.pad_token_id, config.decoder_start_token_id)
    return inputs


def _router_weight(model: Any) -> float:
    """The factor of the routers' loss in the loss of a mixture of experts."""
    config = model.config
    for owner in (model, config, getattr(config, "text_config", None)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(weight := getattr(owner, name, None), int | float):
                return weight
    return 0.0


def _untie(model: Any, name: str) -> None:
    """Nothing of the output layer is tied any more, nor will be: N clones cannot be one embedding."""
    tied = getattr(model, "_tied_weights_keys", None)
    if isinstance(tied, dict):
        model._tied_weights_keys = {
            target: source for target, source in tied.items() if not target.startswith(f"{name}.")
        }
    expanded = getattr(model, "all_tied_weights_keys", None)
    if isinstance(expanded, dict):
        model.all_tied_weights_keys = {
            target: source
            for target, source in expanded.items()
            if not target.startswith(f"{name}.")
        }
    if getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False


# By the class of transformers.
_subclasses: dict[type, Any] = {}


def _subclass(cls: Any) -> Any:
    """`cls` with the forward of `Pretrained`, under its own name: transformers decides by the names of classes."""

    if cls in _subclasses:
        return _subclasses[cls]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_alrao" not in self.__dict__:
            # A collapsed copy: what was put around this function (autocast, hooks) is around its own forward.
            return cls.forward(self, *args, **kwargs)
        return self._forward(*args, **kwargs)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"{cls.__name__}: got the class of a wrapped model, which makes none (nor does its from_pretrained): make "
            f"one of transformers' {cls.__name__}, wrap it, then load_state_dict"
        )

    functools.update_wrapper(forward, cls.forward)
    # Accelerate unwraps a forward as far as it can, and would leave the clones out.
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    names = {
        "__init__": __init__,
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    _subclasses[cls] = type(cls.__name__, (Pretrained, cls), names)
    return _subclasses[cls]


def _new(cls: type) -> Any:
    """What unpickling and copying start from."""
    subclass = _subclass(cls)
    return subclass.__new__(subclass)
