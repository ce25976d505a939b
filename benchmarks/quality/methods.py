"""What is compared: each method as its authors say it is to be used. A rival that is not installed is left out."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from networks import PlainModel
from paper.tasks import Task
from torch import Tensor, nn

import alrao_fast as alrao

# Batches that a network's running statistics of BatchNorm are measured on anew, as Schedule-Free's authors say.
RECALIBRATION = 50


class Setting(NamedTuple):
    """What a run's optimizer is made from: a rate of the grid (or None), Alrao's interval and the seed of its rates."""

    lr: float | None
    lr_range: tuple[float, float]
    seed: int


Make = Callable[[nn.Module, Setting], torch.optim.Optimizer]


def no_grid(task: Task) -> Iterable[float | None]:
    """For a method without a rate to choose."""
    return (None,)


def sgd_grid(task: Task) -> Iterable[float | None]:
    """A rate for each decade from 1e-5 to 10, or to the end of Alrao's interval on the task where that is higher."""
    return sorted({*(10.0**k for k in range(-5, 2)), *(rate for rate in task.grid if rate > 10)})


def adamw_grid(task: Task) -> Iterable[float | None]:
    """A short grid around Adam's default."""
    return (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the comparison.

    name: in results and on the command line. label: in tables. make: the optimizer of a network. grid: the learning
    rates that are tried on a task, all of them paid for. schedule: whether the rate is annealed to 0 by a cosine over
    the run. package: what pip installs it, where that is not torch. lr_range: in place of the task's own, for Alrao.
    """

    name: str
    label: str
    make: Make
    grid: Callable[[Task], Iterable[float | None]] = no_grid
    schedule: bool = False
    package: str | None = None
    is_alrao: bool = False
    lr_range: tuple[float, float] | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None:
            return None
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed: pip install {self.package}"
        return None

    def run_name(self, task: Task) -> str:
        """The method whose runs these are: with the task's own interval, that without one."""
        return "alrao" if self.lr_range == task.lr_range else self.name


def _package(module: str, name: str) -> Any:
    """A class of an optional package."""
    return getattr(importlib.import_module(module), name)


def _alrao(momentum: float) -> Make:
    def make(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(setting.seed)
        return alrao.AlraoSGD(net, setting.lr_range, momentum=momentum, generator=generator)

    return make


def _torch(optimizer: Callable[..., torch.optim.Optimizer]) -> Make:
    def make(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        rate = {} if setting.lr is None else {"lr": setting.lr}
        return optimizer(net.parameters(), **rate, fused=True)

    return make


def _prodigy(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # "We recommend using lr=1. (default) for all networks", with no schedule or with cosine annealing.
    return _package("prodigyopt", "Prodigy")(net.parameters(), lr=1.0)


def _dadapt(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # "Set the LR parameter to 1.0. Use the same learning rate scheduler you would normally use."
    return _package("dadaptation", "DAdaptAdam")(net.parameters(), lr=1.0)


def _schedule_free(name: str) -> Make:
    # The package's default rates; its authors say that the method is to be tuned.
    return lambda net, setting: _package("schedulefree", name)(net.parameters())


def _dog(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The default is 1e-6; "unless the model uses batch-normalization, in which case the suggested value is 1e-4".
    return _package("dog", "DoG")(net.parameters(), reps_rel=1e-4 if _normalises(net) else 1e-6)


def _normalises(net: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


_ALL = (
    Method("alrao", "Alrao", _alrao(0.0), is_alrao=True),
    Method("alrao-momentum", "Alrao, momentum 0.9", _alrao(0.9), is_alrao=True),
    Method("alrao-cosine", "Alrao, cosine", _alrao(0.0), schedule=True, is_alrao=True),
    Method(
        "alrao-momentum-cosine",
        "Alrao, momentum 0.9, cosine",
        _alrao(0.9),
        schedule=True,
        is_alrao=True,
    ),
    Method(
        "alrao-default",
        "Alrao, (1e-5, 10) everywhere",
        _alrao(0.0),
        is_alrao=True,
        lr_range=(1e-5, 10.0),
    ),
    Method("sgd", "SGD, best of its grid", _torch(torch.optim.SGD), sgd_grid),
    Method(
        "adamw",
        "AdamW, cosine, best of its grid",
        _torch(torch.optim.AdamW),
        adamw_grid,
        schedule=True,
    ),
    Method("adam", "Adam, default", _torch(torch.optim.Adam)),
    Method("prodigy", "Prodigy", _prodigy, package="prodigyopt"),
    Method("prodigy-cosine", "Prodigy, cosine", _prodigy, schedule=True, package="prodigyopt"),
    Method("dadapt", "D-Adapt Adam", _dadapt, package="dadaptation"),
    Method("dadapt-cosine", "D-Adapt Adam, cosine", _dadapt, schedule=True, package="dadaptation"),
    Method(
        "schedulefree-adamw",
        "Schedule-Free AdamW",
        _schedule_free("AdamWScheduleFree"),
        package="schedulefree",
    ),
    Method(
        "schedulefree-sgd",
        "Schedule-Free SGD",
        _schedule_free("SGDScheduleFree"),
        package="schedulefree",
    ),
    Method("dog", "DoG, averaged", _dog, package="dog-optimizer"),
)
METHODS = {method.name: method for method in _ALL}


def build(
    method: Method, lr: float | None, task: Task, width: float, seed: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh network on `device` and its optimizer; the backbone starts the same for every method of a seed."""
    torch.manual_seed(seed)
    backbone = task.backbone(width, 0.0)
    features = int(backbone.out_features)  # type: ignore[arg-type]
    if method.is_alrao:
        head = alrao.ClassifierClones(features, task.classes, task.clones)
        net: nn.Module = alrao.AlraoModel(backbone, head).to(device)
    else:
        net = PlainModel(backbone, features, task.classes, extras=True).to(device)
    setting = Setting(lr, method.lr_range or task.lr_range, seed)
    return net, method.make(net, setting)


class Trained:
    """What is evaluated: the network itself, unless the method keeps another point for that.

    `after_step()` follows every step; `evaluated(batches)` is the network to evaluate, in eval mode, and `resume()`
    goes back to training. Schedule-Free's optimizer moves the parameters to its average and back; DoG has a second
    network.
    """

    def __init__(self, method: Method, net: nn.Module, opt: torch.optim.Optimizer) -> None:
        self.net = net
        self.opt: Any = opt
        self.schedule_free = method.package == "schedulefree"
        self.averager = None
        if method.package == "dog-optimizer":
            self.averager = _package("dog", "PolynomialDecayAverager")(net)

    def after_step(self) -> None:
        if self.averager is not None:
            self.averager.step()

    @torch.no_grad()
    def evaluated(self, batches: Iterator[tuple[Tensor, Tensor]]) -> nn.Module:
        net = self.net if self.averager is None else self.averager.averaged_model
        if self.schedule_free:
            self.opt.eval()
            if _normalises(net):
                for x, _ in itertools.islice(batches, RECALIBRATION):
                    net(x)
        return net.eval()

    def resume(self) -> None:
        if self.schedule_free:
            self.opt.train()
        self.net.train()
