"""What arguments may be: kinds of values, each of which says in words what it expects.

Whoever takes arguments declares them in a table, name -> kind. `checked(kinds, values)` raises TypeError for a value of
another type and ValueError for one out of range, naming the argument, what came and what is expected. It returns plain
numbers for those of numpy; a tensor stays a tensor, since it may be changed in place.
"""

import numbers
import operator
import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LARGEST = sys.float_info.max
_FLOAT32 = torch.finfo(torch.float32)


def shown(value: Any) -> str:
    """A value in one line of a message."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.device.type == "cpu" and value.layout == torch.strided:
            return f"a tensor of {value.item()!r}"
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return f"a tensor of shape {list(value.shape)}, {value.dtype}{layout} on {value.device}"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    text = repr(value)
    if ("\n" in text or len(text) > 80) and hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = type(value)
        return f"a {kind.__module__}.{kind.__name__} of shape {list(value.shape)}, {value.dtype}"
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= 80 else f"{text[:77]}..."


def has_value(tensor: Tensor) -> bool:
    """Whether a tensor stands for one number."""
    return tensor.numel() == 1 and not tensor.is_meta and tensor.layout is torch.strided


class Kind:
    """A kind of value; `expected` is what a message says of it."""

    expected: str

    def check(self, name: str, value: Any) -> Any:
        """`value`, normalised; TypeError or ValueError, naming the argument `name`, if it is not of this kind."""
        raise NotImplementedError

    def refuse(self, error: type[Exception], name: str, value: Any) -> Exception:
        return error(f"{name}: got {shown(value)}, expected {self.expected}")


class Number(Kind):
    """A finite number from `low` to `high`, larger than `above`, smaller than `below`; a bool counts as 0 or 1.

    A real tensor of one element is taken, too. live: it stays a tensor, since it may change from step to step; its
    value is looked at on the CPU only, since on another device that would mean to wait.
    """

    # How an op's schema calls it.
    schema = "float"

    def __init__(
        self,
        *,
        low: float = -_LARGEST,
        high: float = _LARGEST,
        above: float | None = None,
        below: float | None = None,
        live: bool = False,
        words: str = "",
    ) -> None:
        self.low = low if above is None else above
        self.high = high if below is None else below
        self.excluded, self.live = (above, below), live
        self.expected = words or "a finite number" + _bounds(low, high, above, below)

    def holds(self, value: Any) -> bool:
        return self.low <= value <= self.high and value not in self.excluded

    def plain(self, name: str, value: Any) -> float:
        """`value` as a number of Python's; TypeError if it is none."""
        kind = type(value)
        if kind is float or kind is int:
            return value
        one = isinstance(value, Tensor) and has_value(value) and not value.is_complex()
        if not one and not _is_number(value):
            raise self.refuse(TypeError, name, value)
        return float(value)

    def check(self, name: str, value: Any) -> Any:
        if self.live and isinstance(value, Tensor):
            self._check_live(name, value)
            return value
        number = self.plain(name, value)
        if not self.holds(number):
            raise self.refuse(ValueError, name, value)
        return number

    def _check_live(self, name: str, value: Tensor) -> None:
        if value.is_complex():
            raise self.refuse(TypeError, name, value)
        if not has_value(value):
            one = "with data and a single element"
            raise ValueError(
                f"{name}: got {shown(value)}, expected {self.expected}, or a tensor {one}"
            )
        unseen = value.device.type != "cpu"
        if not (unseen or torch.compiler.is_compiling() or self.holds(value.item())):
            raise self.refuse(ValueError, name, value)


class Rate(Number):
    """A learning rate that float32 can hold: 0, or a normal number, for a GPU may take the smaller ones for 0."""

    def __init__(self) -> None:
        words = f"a finite number >= 0 that float32 can hold: 0, or {_FLOAT32.tiny:.2g} to {_FLOAT32.max:.2g}"
        super().__init__(low=0.0, high=_FLOAT32.max, words=words)

    def holds(self, value: Any) -> bool:
        return super().holds(value) and (value == 0 or value >= _FLOAT32.tiny)


class Interval(Kind):
    """Two rates (lo, hi), as a tuple of floats."""

    expected = f"0 < lo <= hi, both within float32, {_FLOAT32.tiny:.2g} to {_FLOAT32.max:.2g}"

    def check(self, name: str, value: Any) -> tuple[float, float]:
        ordered = hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)
        if not ordered or len(value) != 2:
            raise ValueError(f"{name}: got {shown(value)}, expected two numbers (lo, hi)")
        bound = Number(low=_FLOAT32.tiny, high=_FLOAT32.max, words=self.expected)
        lo, hi = (float(bound.check(f"{name}[{k}]", value[k])) for k in range(2))
        if lo > hi:
            raise self.refuse(ValueError, name, (lo, hi))
        return (lo, hi)


class Several(Kind):
    """A tuple or list of `count` values of one kind, as a tuple."""

    def __init__(self, kind: Kind, count: int) -> None:
        self.kind, self.count = kind, count
        self.expected = f"a tuple of {count}, each {kind.expected}"

    def check(self, name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, tuple | list) or len(value) != self.count:
            raise self.refuse(ValueError, name, value)
        return tuple([self.kind.check(f"{name}[{k}]", entry) for k, entry in enumerate(value)])


class Integer(Kind):
    """An integer from `low` to `high`, as an int; a bool is none."""

    def __init__(self, low: int | None = None, high: int | None = None, words: str = "") -> None:
        self.low, self.high = low, high
        if not words:
            words = "an integer"
            if low is not None:
                words += f" from {low} to {high}" if high is not None else f", at least {low}"
        self.expected = words

    def check(self, name: str, value: Any) -> int:
        if type(value) is not int:
            if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
                raise self.refuse(TypeError, name, value)
            try:
                value = operator.index(value)
            except TypeError:
                raise self.refuse(TypeError, name, value) from None
        low, high = self.low, self.high
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.refuse(ValueError, name, value)
        return value


class Ascending(Kind):
    """One or more integers from `low` to `high`, each larger than the one before it, as a list."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.expected = (
            f"one or more integers from {low} to {high}, each larger than the one before it"
        )

    def check(self, name: str, value: Any) -> list[int]:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise self.refuse(TypeError, name, value)
        number = Integer()
        found = [number.check(f"{name}[{k}]", entry) for k, entry in enumerate(value)]
        bounds = [self.low - 1, *found, self.high + 1]
        if not found or any(a >= b for a, b in pairwise(bounds)):
            raise self.refuse(ValueError, name, found)
        return found


class Flag(Kind):
    """True or False; 1 and 0, numpy's bools and tensors of one bool are taken for these."""

    # How an op's schema calls it.
    schema = "bool"
    expected = "True or False"

    def check(self, name: str, value: Any) -> bool:
        if value is True or value is False:
            return value
        if isinstance(value, Tensor):
            one = value.dtype == torch.bool and has_value(value)
        else:
            one = _is_numpy_bool(value) or (isinstance(value, int) and value in (0, 1))
        if not one:
            raise self.refuse(TypeError, name, value)
        return bool(value)


class Choice(Kind):
    """One of some words, among which None may be."""

    def __init__(self, *words: str | None) -> None:
        self.words = words
        *most, last = map(repr, words)
        self.expected = f"{', '.join(most)} or {last}" if most else last

    def check(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, str):
            if value in self.words:
                return value
            raise self.refuse(ValueError, name, value)
        raise self.refuse(TypeError, name, value)


class Instance(Kind):
    """An object of some types, which `words` describe."""

    def __init__(self, types: type | tuple[type, ...], words: str) -> None:
        self.types, self.expected = types, words

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.types):
            raise self.refuse(TypeError, name, value)
        return value


class Data(Instance):
    """A tensor whose values can be read: an ordinary one, not on meta."""

    def __init__(self, words: str) -> None:
        super().__init__(Tensor, f"{words}, strided and with data")

    def check(self, name: str, value: Any) -> Tensor:
        super().check(name, value)
        if value.is_meta or value.layout is not torch.strided:
            raise self.refuse(ValueError, name, value)
        return value


class Function(Kind):
    """Whatever can be called, which `words` describe."""

    def __init__(self, words: str) -> None:
        self.expected = words

    def check(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise self.refuse(TypeError, name, value)
        return value


class Generator(Kind):
    """A generator of random numbers on the CPU."""

    expected = (
        "a torch.Generator on the CPU: rates are drawn there, so that a seed gives the same ones on every "
        "device"
    )

    def check(self, name: str, value: Any) -> torch.Generator:
        if not isinstance(value, torch.Generator):
            raise self.refuse(TypeError, name, value)
        if value.device.type != "cpu":
            raise ValueError(f"{name}: got one on {value.device}, expected {self.expected}")
        return value


class Device(Kind):
    """What torch.device takes, as it came: a device, its name, or the number of an accelerator."""

    expected = "a torch.device, its name, or the number of an accelerator"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, torch.device | str | int):
            raise self.refuse(TypeError, name, value)
        try:
            torch.device(value)
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise ValueError(f"{name}: got {value!r}, expected {self.expected} ({text})") from None
        return value


class FloatDtype(Kind):
    """One of the dtypes that parameters may have."""

    expected = "torch.float64, float32, bfloat16 or float16"

    def check(self, name: str, value: Any) -> torch.dtype:
        if not isinstance(value, torch.dtype):
            raise self.refuse(TypeError, name, value)
        if value not in FLOATS:
            raise self.refuse(ValueError, name, value)
        return value


class Optional(Kind):
    """What another kind takes, or None."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.expected = f"{kind.expected}, or None"

    def check(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return self.kind.check(name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, or None") from None


def checked(kinds: Mapping[str, Kind], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the arguments that `kinds` names, normalised; raises as `Kind.check` does."""
    return {name: kind.check(name, values[name]) for name, kind in kinds.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or _is_numpy_bool(value)


def _is_numpy_bool(value: Any) -> bool:
    # Without importing numpy.
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")


def _bounds(low: float, high: float, above: float | None, below: float | None) -> str:
    found = [
        (f">= {low:g}", low > -_LARGEST),
        (f"> {above}", above is not None),
        (f"<= {high:g}", high < _LARGEST),
        (f"< {below}", below is not None),
    ]
    text = " and ".join(words for words, given in found if given)
    return f" {text}" if text else ""


# Kinds that several functions take.
COUNT = Integer(low=1)
RULE = Choice("torch", "authors")
