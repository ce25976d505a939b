"""What backbones return: features alone, a sequence (features, *extras), or a mapping, as Hugging Face's models do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from alrao_fast.arguments import shown
from alrao_fast.tracing import hint

# How to take the features from what a backbone returns: by name, by place, or by a function; None by `find`.
Features = str | int | Callable[[Any], Tensor] | None
# Of a mapping, where nothing was said: one vector per sample comes before one per token.
NAMES = ("pooler_output", "last_hidden_state")


def check_features(features: Any) -> Features:
    """TypeError unless it says how to take features."""
    if features is None or isinstance(features, str) or callable(features):
        return features
    if isinstance(features, int) and not isinstance(features, bool):
        return features
    raise TypeError(
        f"features: got {shown(features)}, expected the name or the number of the features in what the backbone "
        "returns, or a function that takes them from it"
    )


def find(backbone: nn.Module, out: Any, features: Features) -> tuple[Tensor, Any]:
    """The features in what the backbone returned, and the key by which they are found there again.

    The key is a name, a number, a function, or None for a tensor. TypeError where nothing is found.
    """
    if features is None and isinstance(out, Tensor):
        return out, None
    key = _key(backbone, out) if features is None else features
    try:
        found = key(out) if callable(key) else out[key]
    except (KeyError, IndexError, TypeError) as problem:
        if callable(key):
            raise
        raise TypeError(_message(backbone, out, f"which has no features {key!r}")) from problem
    if not isinstance(found, Tensor):
        where = "features(output)" if callable(key) else repr(key)
        raise TypeError(_message(backbone, out, f"where {where} is {shown(found)}"))
    return found, key


def _key(backbone: nn.Module, out: Any) -> str | int:
    if isinstance(out, Mapping):
        tensors = [name for name, value in out.items() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
        for name in NAMES:
            if name in tensors:
                return name
        raise TypeError(_message(backbone, out, ""))
    if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        return 0
    raise TypeError(_message(backbone, out, ""))


def _message(backbone: nn.Module, out: Any, but: str) -> str:
    return (
        f"backbone: the {type(backbone).__name__} returned {_described(out)}{', ' + but if but else ''}, expected "
        "features [..., D], a sequence (features, *extras), or a mapping with one tensor, pooler_output or "
        "last_hidden_state; AlraoModel(backbone, head, features=...) names others, or takes a function"
        + hint(out)
    )


def _described(out: Any) -> str:
    if isinstance(out, Mapping):
        entries = ", ".join(f"{name}: {shown(value)}" for name, value in out.items())
        return f"a {type(out).__name__} of {entries or 'nothing'}"
    if isinstance(out, tuple | list) and out:
        return f"a {type(out).__name__} of {shown(out[0])}, ..."
    return shown(out)
