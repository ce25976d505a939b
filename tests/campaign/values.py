"""Kinds of values for an argument: each with what it should meet, "right", "refused" or "either".

"either": torch takes some of these where others are as good refused; if it is taken, the result must be right. What is
"refused" has no meaning for the argument.
"""

from __future__ import annotations

import decimal
import fractions
import math
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

INF, NAN = math.inf, math.nan
Kind = tuple[str, Any]


class Odd:
    """A value of no use anywhere, whose repr is the same in every process."""

    def __repr__(self) -> str:
        return "Odd()"


def nothing_numeric() -> list[Any]:
    """Values that are no number in any sense."""
    return ["0.1", "a", "", b"1", [0.1], [], (0.1, 0.2), {}, {"lr": 0.1}, {1.0}, Odd(), Odd, 1j]


def no_number() -> list[Any]:
    tensors = [
        torch.ones(2),
        torch.ones(2, 2).to_sparse(),
        torch.tensor(1j),
        torch.empty((), device="meta"),
        np.ones(2),
        np.array("a"),
    ]
    return [*nothing_numeric(), None, *tensors]


def numpy_twins(value: float) -> list[Any]:
    """The same number in the clothes of other libraries."""
    return [
        np.float64(value),
        np.float32(value),
        np.array(value),
        fractions.Fraction(value),
        decimal.Decimal(value),
        torch.tensor(value, dtype=torch.float64),
        torch.tensor([value], dtype=torch.float64),
    ]


class Number(NamedTuple):
    """A real number: `good` examples, and values `outside` its range."""

    good: tuple[float, ...]
    outside: tuple[float, ...] = ()
    # NaN and infinities, as floats, numpy scalars and tensors.
    finite: bool = True
    none: bool = False

    def kinds(self, rng: Random) -> Kind:
        kind = rng.choices(
            ["good", "twin", "bool", "outside", "not finite", "no number"], [4, 3, 1, 3, 3, 6]
        )[0]
        good = rng.choice(self.good)
        if kind == "twin":
            return "either", rng.choice(numpy_twins(good))
        if kind == "bool":
            value = rng.choice([True, False, np.True_, torch.tensor(True)])
            return ("refused" if float(value) in self.outside else "either"), value
        if kind == "outside" and self.outside:
            value = rng.choice(self.outside)
            return "refused", rng.choice([value, np.float64(value), torch.tensor(value)])
        if kind == "not finite" and self.finite:
            value = rng.choice([NAN, INF, -INF])
            return "refused", rng.choice([value, value, np.float32(value), torch.tensor(value)])
        if kind == "no number":
            value = rng.choice(no_number())
            return ("right" if value is None and self.none else "refused"), value
        return "right", good


class Integer(NamedTuple):
    """An integer of at least `least`."""

    good: tuple[int, ...]
    least: int | None = 1
    none: bool = False

    def kinds(self, rng: Random) -> Kind:
        kind = rng.choices(
            ["good", "twin", "bool", "outside", "fraction", "no number"], [4, 2, 1, 3, 3, 6]
        )[0]
        good = rng.choice(self.good)
        if kind == "twin":
            return "either", rng.choice([np.int64(good), np.int32(good), torch.tensor(good)])
        if kind == "bool":
            return "either", rng.choice([True, np.True_])
        if kind == "outside" and self.least is not None:
            return "refused", rng.choice([self.least - 1, self.least - 7, np.int64(self.least - 1)])
        if kind == "fraction":
            return "refused", rng.choice([good + 0.5, NAN, INF, np.float64(good + 0.5)])
        if kind == "no number":
            value = rng.choice(no_number())
            return ("right" if value is None and self.none else "refused"), value
        return "right", good


class Flag(NamedTuple):
    """True or False. Other values count as torch counts them, or are refused; text and containers are refused."""

    none: bool = False
    good: tuple[bool, ...] = (False, True)
    # Where torch takes the truth of anything, as nn.Linear's bias.
    truth: bool = False

    def kinds(self, rng: Random) -> Kind:
        kind = rng.choices(["good", "twin", "odd", "none"], [3, 2, 4, 1])[0]
        if kind == "twin":
            good = rng.choice(self.good)
            return "either", rng.choice([int(good), np.bool_(good), torch.tensor(good)])
        if kind == "odd" and self.truth:
            return "either", rng.choice(["yes", "", [1], [], 2, NAN, Odd()])
        if kind == "odd":
            odd = ["yes", "a", "False", b"x", [1], {"a": 1}, Odd(), Odd, NAN, 1j, torch.ones(2)]
            return "refused", rng.choice(odd)
        if kind == "none":
            return ("right" if self.none else "either"), None
        return "right", rng.choice(self.good)


class Choice(NamedTuple):
    """One of several strings."""

    good: tuple[Any, ...]

    def kinds(self, rng: Random) -> Kind:
        if rng.random() < 0.3:
            return "right", rng.choice(self.good)
        words = [str(word) for word in self.good]
        odd: list[Any] = [f"{words[-1]} ", words[-1].upper(), words[-1][:2], *nothing_numeric()]
        odd += [None, 0, 1, True, NAN, torch.ones(2), np.array(["a", "b"])]
        return "refused", rng.choice([value for value in odd if not _among(value, self.good)])


def _among(value: Any, good: tuple[Any, ...]) -> bool:
    return any(value is item or (isinstance(value, str) and value == item) for item in good)


def ranges(rng: Random) -> Kind:
    """An interval (lo, hi) of learning rates."""
    kind = rng.choices(["good", "twin", "bad"], [2, 2, 5])[0]
    if kind == "good":
        return "right", rng.choice([(1e-5, 10.0), (1e-3, 1e-3), (0.125, 1), [0.01, 0.1]])
    if kind == "twin":
        twins = [np.array([1e-3, 1.0]), torch.tensor([0.125, 1.0]), (np.float32(0.5), 1)]
        return "either", rng.choice([*twins, (True, 2), iter((0.125, 1.0)), {0.125, 1.0}])
    # Below and above what float32 holds, where rates are kept.
    outside = [(1e-60, 1e-55), (1e30, 1e300), (1e-3, 1e39), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.1)]
    outside += [(NAN, 1.0), (1e-3, NAN), (1e-3, INF), (INF, INF)]
    shapes = [(0.1,), (0.1, 0.2, 0.3), 0.1, None, "ab", "1 2", ("1e-3", "1"), ("a", "b"), [], {}]
    shapes += [(None, 1.0), ([0.1], [1.0]), (1j, 2.0), Odd(), torch.ones(2, 2), torch.ones(3)]
    return "refused", rng.choice(outside + shapes)
