"""Whose a parameter is: the live models and heads that hold it now."""

import warnings
import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from alrao_fast import live


def owners(params: Iterable[Tensor]) -> list[nn.Module]:
    """The live `AlraoModel`s, and heads outside of any, that together hold all of `params` that such modules hold.

    Of several that hold the same parameter, the one that holds the most of them; of equals the oldest.
    """
    missing = {id(param) for param in params}
    found: list[nn.Module] = []
    for modules in (live.models, live.heads):
        held = [({id(p) for p in module.parameters()} & missing, module) for module in modules]
        for own, module in sorted(held, key=lambda entry: -len(entry[0])):
            if own & missing:
                found.append(module)
                missing -= own
    return found


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_unobserved(params: Iterable[Tensor]) -> None:
    """Warn, once per head, if a step is about to update clones by gradients while their switch has observed nothing."""
    moving = {id(param) for param in params if param.grad is not None}
    for head in live.heads:
        if head.switch.has_observed or head in _warned:
            continue
        if not moving.isdisjoint(map(id, head.parameters())):
            _warned.add(head)
            warnings.warn(
                f"{type(head).__name__} is trained without any observation by its switch: no clone is preferred to "
                "another, and collapse('best') and suggested_lr() will refuse. In training mode, use loss = net(x, "
                "targets=y); or, in a loop that computes the loss of net(x), the criterion "
                "alrao_fast.MixtureLoss(net); or head.clone_loss for any other loss",
                stacklevel=2,
            )
