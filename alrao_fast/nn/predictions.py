"""What the heads' predictions were made of, for as long as they live: a loss that comes later can start from there."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alrao_fast.nn.turns import check_join

if TYPE_CHECKING:
    from alrao_fast.nn.clones import LinearClones


class Origin:
    """The head that made a prediction and, in training mode, the features that it made it of."""

    def __init__(self, head: LinearClones, features: Tensor | None, prediction: Tensor) -> None:
        self.head, self.features = head, features
        self.observed = False
        self._state = _state(prediction, features)

    def describes(self, prediction: Tensor) -> bool:
        """Whether neither the prediction nor the features were written to, or given another graph, since."""
        return self._state == _state(prediction, self.features)


def _state(*tensors: Tensor | None) -> list[Any]:
    return [
        (t.requires_grad, None if t.is_inference() else t._version)
        for t in tensors
        if t is not None
    ]


# By the id of the prediction, whose end takes its entry away. As an attribute of the tensor an origin would be copied
# and saved with it.
_origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}


def remember(head: LinearClones, features: Tensor, prediction: Tensor) -> Tensor:
    """`prediction`, whose origin is known from now on; not under torch.compile."""
    if not torch.compiler.is_compiling():
        if head.training and head.agreement.turns is None and not head.switch.is_alone():
            # A loss of it will come after the model's forward, which is where that can be seen.
            check_join()
        key = id(prediction)
        origin = Origin(head, features if head.training else None, prediction)
        _origins[key] = weakref.ref(prediction, lambda _: _origins.pop(key, None)), origin
    return prediction


def origin_of(prediction: Tensor) -> Origin | None:
    """Where a prediction comes from; None for any other tensor, copies and views of predictions among them."""
    entry = _origins.get(id(prediction))
    return None if entry is None else entry[1]
