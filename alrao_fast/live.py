"""Which heads, models and optimizers are alive, in the order of their entry: nothing here keeps one alive.

A bare parameter does not say which module it belongs to, nor a head which optimizer moves it. Marks on them would not
survive copies and conversions; looking through what is alive does. Heads and models enter when they are constructed,
copied or unpickled; an optimizer, anew, whenever it has drawn or loaded rates.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch import nn
from torch.optim import Optimizer

T = TypeVar("T")


class Live(Generic[T]):
    """Objects by identity, weakly held; iterates over those alive at its start, the last entered last.

    Every access is one operation of a dictionary: threads need no lock, which a fork could find taken.
    """

    def __init__(self) -> None:
        self._entries: dict[int, weakref.ref[T]] = {}
        # How often something has entered.
        self.entered = 0

    def enter(self, entry: T) -> None:
        """Add an object, or make one that is here the last."""
        entries, key = self._entries, id(entry)
        self.entered += 1
        # Without its weak reference an entry that leaves here is not called back.
        entries.pop(key, None)
        entries[key] = weakref.ref(entry, lambda _: entries.pop(key, None))

    def __iter__(self) -> Iterator[T]:
        for reference in list(self._entries.values()):
            entry = reference()
            if entry is not None:
                yield entry


# Instances of nn.clones.LinearClones and nn.model.AlraoModel.
heads: Live[Any] = Live()
models: Live[nn.Module] = Live()
optimizers: Live[Optimizer] = Live()


def instances(kinds: type | tuple[type, ...]) -> list[Any]:
    """What is alive of classes that enter nothing here; looks at every object that there is."""
    # isinstance would ask objects that imitate a class, which may run code of theirs.
    return [entry for entry in gc.get_objects() if issubclass(type(entry), kinds)]
