"""What is compared: each method as its authors say it is to be used. A rival that is not installed is left out."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

import alrao_fast as alrao
from benchmarks.experiments.tasks import Task
from benchmarks.machine import version_of
from benchmarks.networks import PlainModel


class Setting(NamedTuple):
    """What a run's optimizer is made from.

    lr: a rate of the grid. lr_range: Alrao's interval. seed: of its rates, and of the network's initial values. p: the
    part of the features that learn.
    """

    lr: float | None
    lr_range: tuple[float, float] | None
    seed: int
    p: float | None = None


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
    """One way to train a network.

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
        if self.package is None or version_of(self.package) is not None:
            return None
        return f"{self.package} is not installed: pip install {self.package}"

    def run_name(self, task: Task) -> str:
        """The method whose runs these are: with the task's own interval, that without one."""
        return "alrao" if self.lr_range == task.lr_range else self.name


def package_class(module: str, name: str) -> Any:
    """A class of an optional package."""
    return getattr(importlib.import_module(module), name)


def _alrao(kind: Callable[..., torch.optim.Optimizer] = alrao.AlraoSGD, **options: Any) -> Make:
    def make(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(setting.seed)
        return kind(net, setting.lr_range, generator=generator, **options)

    return make


def _per_weight(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return _alrao(sampler=alrao.PerWeight(*setting.lr_range))(net, setting)


def _fraction(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The last layer always learns: no other part of the network could make up for its classes.
    groups = [
        {"params": net.backbone, "sampler": alrao.Fraction(setting.p, setting.lr)},
        {"params": net.head, "sampler": alrao.Constant(setting.lr)},
    ]
    return alrao.AlraoSGD(groups, generator=torch.Generator().manual_seed(setting.seed))


def _torch(optimizer: Callable[..., torch.optim.Optimizer]) -> Make:
    def make(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
        rate = {} if setting.lr is None else {"lr": setting.lr}
        return optimizer(net.parameters(), **rate, fused=True)

    return make


def _rate_of_one(module: str, name: str) -> Make:
    # Prodigy: "We recommend using lr=1. (default) for all networks", with no schedule or with cosine annealing.
    # D-Adapt: "Set the LR parameter to 1.0. Use the same learning rate scheduler you would normally use."
    return lambda net, setting: package_class(module, name)(net.parameters(), lr=1.0)


def _schedule_free(name: str) -> Make:
    # The package's default rates; its authors say that the method is to be tuned.
    kind = f"{name}ScheduleFree"
    return lambda net, setting: package_class("schedulefree", kind)(net.parameters())


def _dog(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The default is 1e-6; "unless the model uses batch-normalization, in which case the suggested value is 1e-4".
    reps_rel = 1e-4 if normalises(net) else 1e-6
    return package_class("dog", "DoG")(net.parameters(), reps_rel=reps_rel)


def normalises(net: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def _rival(name: str, label: str, make: Make, package: str, **options: Any) -> Method:
    return Method(name, label, make, package=package, **options)


def _ours(name: str, label: str, make: Make, **options: Any) -> Method:
    return Method(name, label, make, is_alrao=True, **options)


_PRODIGY = _rate_of_one("prodigyopt", "Prodigy")
_DADAPT = _rate_of_one("dadaptation", "DAdaptAdam")
_MOMENTUM = _alrao(momentum=0.9)
_COMPARED = (
    _ours("alrao", "Alrao", _alrao()),
    _ours("alrao-momentum", "Alrao, momentum 0.9", _MOMENTUM),
    _ours("alrao-cosine", "Alrao, cosine", _alrao(), schedule=True),
    _ours("alrao-momentum-cosine", "Alrao, momentum 0.9, cosine", _MOMENTUM, schedule=True),
    _ours("alrao-default", "Alrao, (1e-5, 10) everywhere", _alrao(), lr_range=(1e-5, 10.0)),
    Method("sgd", "SGD, best of its grid", _torch(torch.optim.SGD), sgd_grid),
    Method("adamw", "AdamW, cosine, best of its grid", _torch(torch.optim.AdamW), adamw_grid, True),
    Method("adam", "Adam, default", _torch(torch.optim.Adam)),
    _rival("prodigy", "Prodigy", _PRODIGY, "prodigyopt"),
    _rival("prodigy-cosine", "Prodigy, cosine", _PRODIGY, "prodigyopt", schedule=True),
    _rival("dadapt", "D-Adapt Adam", _DADAPT, "dadaptation"),
    _rival("dadapt-cosine", "D-Adapt Adam, cosine", _DADAPT, "dadaptation", schedule=True),
    _rival("schedulefree-adamw", "Schedule-Free AdamW", _schedule_free("AdamW"), "schedulefree"),
    _rival("schedulefree-sgd", "Schedule-Free SGD", _schedule_free("SGD"), "schedulefree"),
    _rival("dog", "DoG, averaged", _dog, "dog-optimizer"),
)
# The rows of the comparison without tuning, and what the paper's experiments train with besides.
COMPARED = {method.name: method for method in _COMPARED}
METHODS = {
    **COMPARED,
    "alrao-adam": _ours("alrao-adam", "Alrao-Adam", _alrao(alrao.AlraoAdam)),
    "alrao-per-weight": _ours("alrao-per-weight", "Alrao, a rate per weight", _per_weight),
    "fraction": Method("fraction", "SGD on a part of the features", _fraction),
}


def build(
    method: Method,
    setting: Setting,
    task: Task,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
    clones: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh network on `device` and its optimizer; the backbone starts the same for every method of a seed.

    Initial values are drawn from torch's global generator, on the CPU. `clones` are Alrao's, by default the task's.
    """
    torch.manual_seed(setting.seed)
    backbone = task.backbone(width, dropout)
    features = int(backbone.out_features)  # type: ignore[arg-type]
    if method.is_alrao:
        head = alrao.ClassifierClones(features, task.classes, clones or task.clones)
        net: nn.Module = alrao.AlraoModel(backbone, head).to(device)
    else:
        net = PlainModel(backbone, features, task.classes, extras=True).to(device)
    return net, method.make(net, setting)
