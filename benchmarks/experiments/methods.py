"""How networks are trained: methods and what they make, each as its authors say it is to be used.

A rival that is not installed is left out.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

import alrao_fast as alrao
from benchmarks.experiments.tasks import Task
from benchmarks.machine import version_of
from benchmarks.networks import PlainModel, PlainRegressor


class Setting(NamedTuple):
    """What a run's optimizer is made from.

    lr: a rate of the grid. lr_range: Alrao's interval, None for the optimizer's own. seed: of its rates, and of the
    network's initial values. p: the part of the features that learn. total_steps: of the run.
    """

    lr: float | None
    lr_range: tuple[float, float] | None
    seed: int
    p: float | None = None
    total_steps: int = 1

    def generator(self) -> torch.Generator:
        """For Alrao's rates."""
        return torch.Generator().manual_seed(self.seed)

    def interval(self) -> dict[str, Any]:
        """The optimizer's argument for Alrao's interval, none where it is the optimizer's own."""
        return {} if self.lr_range is None else {"lr_range": self.lr_range}


Make = Callable[[nn.Module, Setting], Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train a network.

    name: in results and on the command line. label: in tables. make: the optimizer of a network. grid: the learning
    rates that are tried on a task, all of them paid for; none where there is no rate to choose. package: what pip
    installs it, where that is not torch. lr_range: Alrao's interval where it is neither the task's nor the optimizer's.

    What happens beside the optimizer's steps: warmup: the part of the run over which the rate grows from 0. schedule:
    whether it is annealed to 0 by a cosine over the run. after_step: called with the `Trainer` after every step, which
    knows the network, the optimizer, and how many steps of how many are done. averaged: evaluated at the average of the
    weights. evaluation: a context of the optimizer in which the parameters are those to evaluate.
    """

    name: str
    label: str
    make: Make
    grid: Iterable[float | None] = (None,)
    package: str | None = None
    is_alrao: bool = False
    lr_range: tuple[float, float] | None = None
    warmup: float = 0.0
    schedule: bool = False
    after_step: Callable[[Any], object] | None = None
    averaged: bool = False
    evaluation: Callable[[Any], AbstractContextManager[object]] | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None or version_of(self.package) is not None:
            return None
        return f"{self.package} is not installed: pip install {self.package}"


def package_class(module: str, name: str) -> Any:
    """A class of an optional package."""
    return getattr(importlib.import_module(module), name)


def alrao_method(
    name: str,
    label: str,
    kind: Callable[..., Any] = alrao.AlraoSGD,
    sampler: Callable[[float, float], Any] | None = None,
    options: dict[str, Any] | None = None,
    of_run: Callable[[int], dict[str, Any]] | None = None,
    **more: Any,
) -> Method:
    """Alrao's optimizer `kind` with `options`, those `of_run` made from its number of steps, and a `sampler` made from
    the interval; `more` are a Method's fields."""

    def make(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        chosen = {**setting.interval(), **(options or {})}
        if sampler is not None:
            assert setting.lr_range is not None, f"{name}: a sampler needs an interval"
            chosen["sampler"] = sampler(*setting.lr_range)
        if of_run is not None:
            chosen |= of_run(setting.total_steps)
        return kind(net, generator=setting.generator(), **chosen)

    return Method(name, label, make, is_alrao=True, **more)


def _fraction(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The last layer always learns: no other part of the network could make up for its classes.
    groups = [
        {"params": net.backbone, "sampler": alrao.Fraction(setting.p, setting.lr)},
        {"params": net.head, "sampler": alrao.Constant(setting.lr)},
    ]
    return alrao.AlraoSGD(groups, generator=setting.generator())


def of_torch(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Make:
    """An optimizer of torch at the setting's rate, where that has one."""

    def make(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        rate = {} if setting.lr is None else {"lr": setting.lr}
        return optimizer(net.parameters(), **rate, **options, fused=True)

    return make


# What the paper's experiments and the demonstration train with.
_METHODS = (
    alrao_method("alrao", "Alrao"),
    alrao_method("alrao-momentum", "Alrao, momentum 0.9", options={"momentum": 0.9}),
    alrao_method("alrao-adam", "Alrao-Adam", alrao.AlraoAdam),
    alrao_method("alrao-per-weight", "Alrao, a rate per weight", sampler=alrao.PerWeight),
    Method("sgd", "SGD", of_torch(torch.optim.SGD)),
    Method("adam", "Adam, default", of_torch(torch.optim.Adam)),
    Method("fraction", "SGD on a part of the features", _fraction),
)
METHODS = {method.name: method for method in _METHODS}


def build(
    method: Method,
    setting: Setting,
    task: Task,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
    clones: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, Any]:
    """A fresh network on `device` and its optimizer; the backbone starts the same for every method of a seed.

    Initial values are drawn from torch's global generator, on the CPU. `clones` are Alrao's, by default the task's.
    """
    torch.manual_seed(setting.seed)
    backbone = task.backbone(width, dropout)
    features = int(backbone.out_features)  # type: ignore[arg-type]
    if method.is_alrao:
        kind: Any = alrao.RegressorClones if task.regression else alrao.ClassifierClones
        net: nn.Module = alrao.AlraoModel(
            backbone, kind(features, task.classes, clones or task.clones)
        )
    elif task.regression:
        net = PlainRegressor(backbone, features, task.classes)
    else:
        net = PlainModel(backbone, features, task.classes, extras=True)
    net.to(device)
    return net, method.make(net, setting)
