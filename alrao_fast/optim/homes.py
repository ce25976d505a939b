"""In which module a parameter is, under which name: whoever shards a module puts other parameters there."""

import weakref
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from alrao_fast.optim.layouts import own_parameters
from alrao_fast.sharding import is_sharded


class Homes:
    """The modules that an optimizer has laid out, and the places of their parameters; holds none of the modules."""

    def __init__(self) -> None:
        self._places: dict[Tensor, tuple[weakref.ref[nn.Module], str]] = {}
        self._roots: list[weakref.ref[nn.Module]] = []

    def note(self, root: nn.Module) -> None:
        """Remember where the parameters of a module are."""
        self._roots.append(weakref.ref(root))
        for module in root.modules():
            for name, param in own_parameters(module):
                self._places.setdefault(param, (weakref.ref(module), name))

    def roots(self) -> list[nn.Module]:
        """The modules that are still there."""
        return [root for root in (reference() for reference in self._roots) if root is not None]

    def exchange(self, old: Tensor, new: Tensor) -> None:
        """A parameter that has come into the place of another."""
        if old in self._places:
            self._places[new] = self._places.pop(old)

    def forget(self, param: Tensor) -> None:
        """Keep nothing of a parameter that is not used any more."""
        self._places.pop(param, None)

    def sharded(self, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`(param, its DTensor)` for those of `params` in whose place a DTensor of their shape is now.

        That is what `fully_shard` and `parallelize_module` leave.
        """
        for param in params:
            place = self._places.get(param)
            module = place and place[0]()
            if not place or module is None or is_sharded(param):
                continue
            new = dict(own_parameters(module)).get(place[1])
            if new is not None and is_sharded(new) and new.shape == param.shape:
                self._places[new] = self._places.pop(param)
                yield param, new
