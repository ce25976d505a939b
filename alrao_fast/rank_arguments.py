"""What `rank` is given: checked before anything is trained, and the words of what goes wrong later."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.arguments import (
    COUNT,
    Device,
    Flag,
    Function,
    Integer,
    Interval,
    Number,
    Optional,
    shown,
)
from alrao_fast.nn import AlraoModel
from alrao_fast.optim.base import AlraoOptimizer


class _Head(Function):
    """A function that makes a head; not one that was made, though it can be called."""

    def __init__(self) -> None:
        super().__init__(
            "a function D -> ClassifierClones, AdaptiveClassifierClones or RegressorClones"
        )

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, nn.Module):
            raise self.refuse(TypeError, name, value)
        return super().check(name, value)


class _MakeOptimizer(Function):
    """A function that makes an optimizer; not the class of another package's, whose second argument is a rate."""

    def __init__(self) -> None:
        super().__init__("a function (model, generator) -> AlraoSGD, AlraoAdam or AlraoMuon")

    def check(self, name: str, value: Any) -> Any:
        other = isinstance(value, type) and not issubclass(value, AlraoOptimizer)
        if other and issubclass(value, torch.optim.Optimizer):
            raise self.refuse(TypeError, name, value)
        return super().check(name, value)


KINDS = {
    "num_classes": Optional(COUNT),
    "head": Optional(_Head()),
    "epochs": COUNT,
    "patience": Optional(COUNT),
    "lr_range": Interval(),
    "optimizer": Optional(_MakeOptimizer()),
    "clip_grad_norm": Optional(Number(above=0, high=math.inf, words="a norm > 0")),
    "device": Optional(Device()),
    "progress": Flag(),
}


def as_seeds(seeds: Any) -> list[int]:
    # What is made of a seed and an epoch has 64 bits.
    seed = Integer(low=0, high=2**32 - 1)
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        seeds = range(Integer(low=0, words="how many, or the seeds").check("seeds", seeds))
    seeds = [seed.check(f"seeds[{k}]", value) for k, value in enumerate(seeds)]
    if not seeds:
        raise ValueError("seeds: got none, expected at least one")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {shown(seeds)}, expected each once")
    return seeds


def check_models(models: Any) -> None:
    if not isinstance(models, Mapping) or not models:
        raise TypeError(
            f"models: got {models!r:.80}, expected a dictionary {{name: function that builds a model}}"
        )
    for name, make in models.items():
        if not isinstance(name, str):
            raise TypeError(f"models: got the name {shown(name)}, expected names that are strings")
        if isinstance(make, nn.Module) or not callable(make):
            raise TypeError(
                f"models[{name!r}]: got {type(make).__name__}, expected a function that builds a fresh model, such as "
                "`lambda: MyBackbone()`: every seed starts from new initial values"
            )


def check_batches(**loaders: Any) -> None:
    for name, batches in loaders.items():
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"{name}: got {type(batches).__name__}, expected batches to iterate over"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                f"{name}: got an iterator, which is empty after one epoch; expected a DataLoader or a list of batches"
            )


def check_optimizer(name: str, net: AlraoModel, made: Any) -> None:
    expected = "expected an AlraoSGD, AlraoAdam or AlraoMuon over the model's parameters"
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer: returned {shown(made)} for models[{name!r}], {expected}")
    own = {id(param) for param in net.parameters()}
    if not all(id(param) in own for group in made.param_groups for param in group["params"]):
        raise ValueError(f"optimizer: has parameters that models[{name!r}] has not, {expected}")
    if net.head.clone_lr.isnan().any():
        raise ValueError(f"optimizer: gives the clones of models[{name!r}] no rates, {expected}")


def first_batch(loader: str, batches: Iterable[Sequence[Tensor]]) -> Sequence[Tensor]:
    for batch in batches:
        check_batch(loader, batch)
        return batch
    raise ValueError(f"{loader}: got no batches")


def check_batch(loader: str, batch: Any) -> None:
    expected = "expected (*inputs, targets)"
    if not isinstance(batch, tuple | list):
        raise TypeError(f"{loader}: a batch is a {type(batch).__name__}, {expected}")
    if len(batch) < 2:
        raise TypeError(f"{loader}: a batch has {len(batch)} entries, {expected}")
    if not all(isinstance(part, Tensor) for part in batch):
        kinds = ", ".join(type(part).__name__ for part in batch)
        raise TypeError(f"{loader}: a batch holds {kinds}; expected tensors")
    if any(part.is_meta for part in batch):
        raise ValueError(f"{loader}: a batch holds a tensor on meta, expected tensors with data")
    if not batch[-1].numel():
        raise ValueError(f"{loader}: a batch is empty, expected targets in each")


@contextmanager
def naming(name: str, what: str, loader: str = "") -> Iterator[None]:
    """Says which candidate an error comes from, and from which loader's first batch."""
    try:
        yield
    except Exception as problem:
        where = f" on the first batch of {loader}" if loader else ""
        raise ValueError(f"models[{name!r}]: {what} failed{where}: {problem}") from problem


@contextmanager
def telling(where: str) -> Iterator[None]:
    """Says where in the training an error comes from."""
    try:
        yield
    except Exception as problem:
        raise RuntimeError(f"{where}: {type(problem).__name__}: {problem}") from problem
