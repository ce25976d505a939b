"""Which parameter stood where in the param groups: what one that was put there by hand takes over."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """A param group, the parameters it had when rates were last given, and the sampler of its own."""

    group: dict[str, Any]
    params: list[Tensor]
    sampler: Any = None


class Places:
    """The places of all param groups, known by the group's dict, or by its number where that was exchanged."""

    def __init__(self) -> None:
        self._places: list[Place] = []

    def note(self, groups: list[dict[str, Any]], sampler: Any = None) -> None:
        """Remember the groups as they are now; a group that is new has this sampler."""
        known = [self.of(groups, number) for number in range(len(groups))]
        self._places = [
            Place(group, list(group["params"]), place.sampler if place else sampler)
            for group, place in zip(groups, known)
        ]

    def of(self, groups: list[dict[str, Any]], number: int) -> Place | None:
        """The place of group `number`, if there is one."""
        for place in self._places:
            if place.group is groups[number]:
                return place
        if number < len(self._places):
            place = self._places[number]
            if not any(place.group is group for group in groups):
                return place
        return None

    def heirs(self, groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """`(new, old)` for every parameter that stands where one of its shape stood that is in no group any more."""
        present = {param for group in groups for param in group["params"]}
        before = {param for place in self._places for param in place.params}
        for number, group in enumerate(groups):
            place = self.of(groups, number)
            for new, old in zip(group["params"], place.params if place else ()):
                if new not in before and old not in present and new.shape == old.shape:
                    yield new, old
