"""What is compared: two tuned methods, those that promise to need no tuning at one fixed setting, and Alrao."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from benchmarks.experiments.methods import Method, Setting, alrao_method, of_torch, package_class

# Half decades.
SGD_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ADAMW_GRID = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
WARMUP = 0.05
# Alrao-Adam's interval, that which serves where rates are not bounded, and those on which a method should not depend.
USUAL, USEFUL = (1e-4, 1.0), (1e-4, 0.1)
INTERVALS = (USEFUL, USUAL, (1e-3, 100.0), (1e-5, 10.0), (1e-6, 1e3))


class Together:
    """Several optimizers, each of its own parameters, called as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for opt in optimizers for group in opt.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {param: state for opt in self.optimizers for param, state in opt.state.items()}

    def zero_grad(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad()

    def step(self) -> None:
        for opt in self.optimizers:
            opt.step()


def _muon(net: nn.Module, setting: Setting) -> Together:
    # As its authors say: the hidden layers' matrices; embeddings, last layer and all else by AdamW.
    embeddings = {m.weight for m in net.modules() if isinstance(m, nn.Embedding)}
    last = set(net.get_submodule("head").parameters())
    matrices = [p for p in net.parameters() if p.dim() == 2 and p not in embeddings | last]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    # The rate that its author trains with; Adam's is the one that serves most of these tasks.
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=3e-3, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn="original"))
    return Together(*optimizers)


def _nadamw(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The one setting that AlgoPerf's baseline without tuning has for all workloads (mlcommons/algorithmic-efficiency).
    return torch.optim.NAdam(
        net.parameters(),
        lr=1.75e-3,
        betas=(0.9327, 0.9955),
        weight_decay=0.0812,
        decoupled_weight_decay=True,
    )


def _prodigy(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # "We recommend using lr=1. (default) for all networks", with no schedule or with cosine annealing.
    return package_class("prodigyopt", "Prodigy")(net.parameters(), lr=1.0)


def _schedule_free(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The package's default rate, with the warm-up that its authors recommend.
    warmup = round(WARMUP * setting.total_steps)
    opt = package_class("schedulefree", "AdamWScheduleFree")(net.parameters(), warmup_steps=warmup)
    opt.train()
    return opt


@contextlib.contextmanager
def _schedule_free_average(opt: Any) -> Iterator[None]:
    params = [param for group in opt.param_groups for param in group["params"]]
    kept = [param.detach().clone() for param in params]
    opt.eval()
    yield
    opt.train()
    # What it computes back is off by roundings.
    with torch.no_grad():
        torch._foreach_copy_(params, kept)


def _dog(net: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    # The default is 1e-6; "unless the model uses batch-normalization, in which case the suggested value is 1e-4".
    normalises = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    return package_class("dog", "DoG")(net.parameters(), reps_rel=1e-4 if normalises else 1e-6)


def _adam(lr: float) -> Any:
    return of_torch(torch.optim.Adam, lr=lr)


_SGD = of_torch(torch.optim.SGD, momentum=0.9)
_RIVALS = (
    Method("sgd", "SGD, best of grid", _SGD, SGD_GRID, schedule=True),
    Method(
        "adamw",
        "AdamW, best of grid",
        of_torch(torch.optim.AdamW),
        ADAMW_GRID,
        warmup=WARMUP,
        schedule=True,
    ),
    Method(
        "nadamw",
        "NAdamW 0.00175, cosine",
        _nadamw,
        warmup=0.02,
        schedule=True,
    ),
    Method("adam", "Adam 0.001", _adam(1e-3)),
    Method("adam-averaged", "Adam 0.003, averaged", _adam(3e-3), averaged=True),
    Method(
        "schedulefree",
        "Schedule-Free AdamW",
        _schedule_free,
        package="schedulefree",
        evaluation=_schedule_free_average,
    ),
    Method("prodigy", "Prodigy, cosine", _prodigy, package="prodigyopt", schedule=True),
    Method("dog", "DoG, averaged", _dog, package="dog-optimizer", averaged=True),
    Method("muon", "Muon 0.02, cosine", _muon, warmup=WARMUP, schedule=True),
)
# The two by whose best rate all others are measured.
TUNED = ("sgd", "adamw")


_ADAM = alrao.AlraoAdam
_UNBOUNDED: dict[str, Any] = {"options": {"rate_bound": None}, "lr_range": USEFUL}
_MOMENTUM = {"momentum": 0.9}
_AVERAGED: dict[str, Any] = {"evaluation": lambda opt: opt.averaged()}


def _warm_averaged(total: int) -> dict[str, Any]:
    return {"warmup_steps": math.ceil(WARMUP * total), "averaging": 8.0}


def _known_length(total: int) -> dict[str, Any]:
    return {"total_steps": total}


# A method of ours is one line: the optimizer's class, a sampler made from the interval, its options, those that depend
# on the length of the run, and what a `Method` can do beside the steps. Runs are found again by the name: another
# setting needs another name.
_OURS = (
    alrao_method("alrao", "Alrao"),
    alrao_method("alrao-momentum", "Alrao, momentum 0.9", options=_MOMENTUM),
    alrao_method(
        "alrao-momentum-averaged",
        "Alrao, momentum 0.9, warm-up, averaged",
        options=_MOMENTUM,
        of_run=_warm_averaged,
        **_AVERAGED,
    ),
    alrao_method("alrao-adam", "Alrao-Adam", _ADAM),
    alrao_method(
        "alrao-adam-averaged",
        "Alrao-Adam, warm-up, averaged",
        _ADAM,
        of_run=_warm_averaged,
        **_AVERAGED,
    ),
    alrao_method(
        "alrao-adam-run",
        "Alrao-Adam, total_steps",
        _ADAM,
        of_run=_known_length,
        lr_range=USUAL,
        **_AVERAGED,
    ),
    alrao_method(
        "alrao-muon-run",
        "Alrao-Muon, total_steps",
        alrao.AlraoMuon,
        of_run=_known_length,
        lr_range=USUAL,
        **_AVERAGED,
    ),
    alrao_method(
        "uniform-run",
        "Alrao-Adam, uniform, total_steps",
        _ADAM,
        alrao.LogUniform,
        of_run=_known_length,
        lr_range=USUAL,
        **_AVERAGED,
    ),
    alrao_method("unbounded", "Alrao-Adam, not bounded", _ADAM, **_UNBOUNDED),
    alrao_method(
        "unbounded-averaged",
        "Alrao-Adam, not bounded, warm-up, averaged",
        _ADAM,
        of_run=_warm_averaged,
        **_UNBOUNDED,
        **_AVERAGED,
    ),
    alrao_method(
        "unbounded-run",
        "Alrao-Adam, not bounded, total_steps",
        _ADAM,
        of_run=_known_length,
        **_UNBOUNDED,
        **_AVERAGED,
    ),
)
METHODS = {method.name: method for method in (*_OURS, *_RIVALS)}
