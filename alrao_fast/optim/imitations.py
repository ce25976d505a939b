"""Wrappers of an optimizer that are of a subclass of its class: those of Lightning's Trainer and Fabric.

They pass isinstance and look up what they lack in the optimizer that they hold; but a method that they inherit has the
wrapper as its `self`, keeps what it assigns there, and finds the defaults of the class before the optimizer's values.
"""

from typing import Any, TypeVar

T = TypeVar("T")


def itself(optimizer: T) -> T:
    """The optimizer that a wrapper holds, or the optimizer."""
    held: Any = optimizer.__dict__.get("_optimizer", optimizer)
    found: T = held
    return found
