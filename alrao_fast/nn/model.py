"""AlraoModel: a backbone and its clones, and the way back to an ordinary network."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.arguments import Instance
from alrao_fast.nn.backbone_output import Features, check_features, find
from alrao_fast.nn.clones import LinearClones, Reduction
from alrao_fast.nn.collapse import WHICH, Output, collapse, warn_of_hooks
from alrao_fast.nn.with_clones import WithClones
from alrao_fast.tracing import backbone_arguments, refuse_script

_BACKBONE = Instance(nn.Module, "a torch.nn.Module")


class AlraoModel(WithClones):
    """A network to be trained by Alrao: any backbone, and N clones in place of its last layer.

    Args:
        backbone: any module that returns features `[..., D]`, a sequence (features, *extras) as recurrent ones do, or a
            mapping as Hugging Face's models do.
        head: `ClassifierClones` or `RegressorClones` for D features.
        features: where the features are in what the backbone returns: a name in a mapping, a place in a sequence, or a
            function that takes them from it. None: the tensor itself, the first of a sequence, the only tensor of a
            mapping, or else its "pooler_output" (a vector per sample), or else its "last_hidden_state" (one per token).

    `net(x, targets=y)` returns the mixture's loss and, in training mode, updates the switch; `net(x)` returns the
    mixture's log-probabilities (regression: its mean). Where the backbone returns a sequence, so does the model, with
    the loss or prediction in the features' place; of a mapping only the loss or prediction is returned. With
    `labels=y`, as Hugging Face's Trainer calls it, the result is a dict with "loss" and, in eval mode, "logits", the
    log-probabilities; labels are compared as they are, not shifted as a causal language model's are (see `wrap`).

    `sample_weight`, `reduction` and `num_items_in_batch` go to the head; all other arguments go to the backbone, whose
    signature `forward` has. TypeError for a backbone or head of another type, for a backbone that returns something
    else, and where both `targets` and `labels` are given.
    """

    # For Hugging Face's Trainer: the loss takes num_items_in_batch.
    accepts_loss_kwargs = True

    def __init__(
        self, backbone: nn.Module, head: LinearClones, *, features: Features = None
    ) -> None:
        super().__init__()
        _BACKBONE.check("backbone", backbone)
        if not isinstance(head, LinearClones):
            raise TypeError(
                f"head: got {type(head).__name__}, expected ClassifierClones, "
                "AdaptiveClassifierClones or RegressorClones"
            )
        self.features = check_features(features)
        self.backbone = backbone
        self.head = head
        # What the backbone returned last, and what it did in eval mode, as collapse's copy of it will.
        self._output: Output | None = None
        self._output_in_eval: Output | None = None
        self._enter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enter()

    def __reduce__(self) -> tuple[Any, ...]:
        # The class with the backbone's signature is made anew.
        cls = type(self)
        return _new, (cls.__mro__[1] if "_signed" in vars(cls) else cls,), self.__dict__

    def _enter(self) -> None:
        live.models.enter(self)
        self.__class__ = _with_signature(type(self), self.backbone)

    __prepare_scriptable__ = refuse_script

    def _clones(self) -> LinearClones:
        return self.head

    def _backbone_parameters(self) -> Iterator[nn.Parameter]:
        return self.backbone.parameters()

    def forward(
        self,
        *args: Any,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
        num_items_in_batch: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss or the prediction, as the class says."""
        if type(args) is not tuple or torch.jit.is_tracing():
            args = backbone_arguments(args)
        if labels is not None:
            if targets is not None:
                raise TypeError("labels: got both labels and targets, expected one of the two")
            targets = labels
        out = self.backbone(*args, **kwargs)
        # What attributes are set by goes past nn.Module's __setattr__, which costs microseconds.
        if isinstance(out, Tensor) and self.features is None:
            features, self.__dict__["_output"] = out, _ALONE
        else:
            features, key = find(self.backbone, out, self.features)
            if isinstance(out, tuple | list) and isinstance(key, int):
                self.__dict__["_output"] = Output(key % len(out), len(out))
            else:
                self.__dict__["_output"] = Output(key)
        if not self.training:
            self.__dict__["_output_in_eval"] = self._output
        options: dict[str, Any] = {}
        if sample_weight is not None:
            options["sample_weight"] = sample_weight
        if reduction is not None:
            options["reduction"] = reduction
        if num_items_in_batch is not None:
            options["num_items_in_batch"] = num_items_in_batch
        try:
            value = self.head(features, targets, **options)
        except ValueError as error:
            if cure := self._other_features(features, targets):
                raise ValueError(f"{error}; {cure}") from error
            raise
        if labels is not None:
            return (
                {"loss": value} if self.training else {"loss": value, "logits": self.head(features)}
            )
        output = self._output
        if output is None or output.length is None:
            return value
        values = [value if k == output.key else entry for k, entry in enumerate(out)]
        return values if isinstance(out, list) else tuple(values)

    def _other_features(self, features: Tensor, targets: Tensor | None) -> str:
        """What to say where targets do not fit to features that were found in a mapping without being named."""
        key = None if self._output is None else self._output.key
        if self.features is not None or not isinstance(key, str) or targets is None:
            return ""
        if features.shape[:-1] == targets.shape:
            return ""
        return (
            f"x is the {key!r} of the {type(self.backbone).__name__}, other features are taken by "
            "AlraoModel(backbone, head, features=<name>)"
        )

    def collapse(
        self, which: Literal["best", "mixture"] = "best", *, num_extras: int | None = None
    ) -> torch.fx.GraphModule:
        """An ordinary module, without a trace of this package, that computes what `net.eval()(x)` does.

        Args:
            which: "mixture" gives the same output as this model in eval mode, for samples on which clones overflow,
                too, at the cost of all last layers; "best" has only the clone of largest posterior, at the cost of one.
                RuntimeError while the switch has observed nothing.
            num_extras: how many values the backbone returns beside the features; None takes it from the last call
                of this model in eval mode, or from the last in training mode if there was none.

        The result holds copies (this model stays as it is), is in eval mode, and takes the arguments that the
        backbone's forward names. Clones with non-finite weights are left out, and "best" is not one that overflows on
        features between -1 and 1. Forward hooks on this model and on its head are left out, with a warning; the
        backbone's go along. ValueError if no clone is finite.
        """
        WHICH.check("which", which)
        output = self._output_in_eval or self._output
        if num_extras is not None:
            output = Output.with_extras(num_extras, self.features)
        if output is None:
            raise RuntimeError(
                "collapse has not seen yet whether the backbone returns features or (features, *extras): run one "
                "batch through the model first, or pass num_extras (0 for features alone)"
            )
        if which == "best":
            self._check_observed("collapse('best')")
        warn_of_hooks(self, self.head)
        return collapse(self.backbone, self.head, which, output)


_ALONE = Output(None)


def _new(cls: type[AlraoModel]) -> AlraoModel:
    return cls.__new__(cls)


# By the class and its signature in words.
_signed: dict[tuple[type, str], type[AlraoModel]] = {}


def _with_signature(cls: type[AlraoModel], backbone: nn.Module) -> type[AlraoModel]:
    """`cls` with a forward whose signature names the backbone's arguments; itself where it has a forward of its own.

    torch.export finds dynamic shapes by these names, Hugging Face's Trainer the columns of a data set that it passes.
    """
    if cls.forward is not AlraoModel.forward:
        return cls
    try:
        own = list(inspect.signature(backbone.forward).parameters.values())
    except (TypeError, ValueError):
        return cls
    ours = inspect.signature(AlraoModel.forward).parameters.values()
    taken = {p.name for p in own}
    added = [p for p in ours if p.kind is p.KEYWORD_ONLY and p.name not in taken]
    last = [p for p in own if p.kind is p.VAR_KEYWORD]
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.Signature(
        [self_, *(p for p in own if p.kind is not p.VAR_KEYWORD), *added, *last]
    )
    key = cls, str(signature)
    if key not in _signed:
        plain = AlraoModel.forward
        forward = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__)
        forward.__kwdefaults__, forward.__doc__ = plain.__kwdefaults__, plain.__doc__
        forward.__signature__ = signature  # type: ignore[attr-defined]
        names = {
            "forward": forward,
            "_signed": True,
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
        }
        _signed[key] = type(cls.__name__, (cls,), names)
    return _signed[key]
