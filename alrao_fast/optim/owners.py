"""Whose a bare parameter is: the live models and heads that hold it now."""

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
