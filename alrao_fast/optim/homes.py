"""In which module a parameter is, under which name: whoever shards a module puts other parameters there."""

import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from alrao_fast.optim.layouts import own_parameters
from alrao_fast.sharding import is_sharded


class Home(NamedTuple):
    """A parameter's name in its module, and the module's in the root by which the optimizer met it."""

    module: weakref.ref[nn.Module]
    name: str
    root: weakref.ref[nn.Module]
    path: str


class Homes:
    """The modules that an optimizer has laid out, and the places of their parameters; holds none of the modules."""

    def __init__(self) -> None:
        self._places: dict[Tensor, Home] = {}
        self._roots: list[weakref.ref[nn.Module]] = []

    def note(self, root: nn.Module) -> None:
        """Remember where the parameters of a module are."""
        own = weakref.ref(root)
        self._roots.append(own)
        for path, module in root.named_modules():
            for name, param in own_parameters(module):
                self._places.setdefault(param, Home(weakref.ref(module), name, own, path))

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

    def replaced(self, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`(param, what is trained instead)` for those of `params` under whose name in the root another parameter has a
        gradient.

        That is what `load_state_dict(assign=True)`, `to_empty` of modules on meta and assignments leave.
        """
        for param in params:
            home = self._places.get(param)
            root = home and home.root()
            if not home or root is None:
                continue
            try:
                module = root.get_submodule(home.path)
            except AttributeError:
                # Wrapped, or taken out.
                continue
            new = dict(own_parameters(module)).get(home.name)
            if new is not None and new is not param and new.is_leaf and new.grad is not None:
                yield param, new

    def sharded(self, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`(param, its DTensor)` for those of `params` in whose place a DTensor of their shape is now.

        That is what `fully_shard` and `parallelize_module` leave.
        """
        for param in params:
            home = self._places.get(param)
            module = home and home.module()
            if not home or module is None or is_sharded(param):
                continue
            new = dict(own_parameters(module)).get(home.name)
            if new is not None and is_sharded(new) and new.shape == param.shape:
                self._places[new] = self._places.pop(param)
                yield param, new
