"""Cases of the ops feature_sgd and feature_adam: one optimizer step over all parameters of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from alrao_fast import backends
from alrao_fast.functional import feature_adam_, feature_sgd_
from alrao_fast.optim.layouts import memory_rates
from alrao_fast.reference.feature_sgd import entry_rates, memory_order
from benchmarks.networks import VGG19, GoogLeNet, LSTMBackbone, MobileNetV2, TransformerLM
from benchmarks.speed import authors
from benchmarks.speed.case import (
    DTYPES,
    Call,
    Candidate,
    Case,
    Missing,
    Target,
    compiled,
    generator_on,
    ours,
)

LR_RANGE, LR = (1e-5, 1e-2), 1e-3
# Entries of a parameter that the outputs are compared by.
POSITIONS = 4096


class Update(NamedTuple):
    """Inputs of an optimizer step: a network whose parameters have gradients, and the momentum."""

    model: nn.Module
    momentum: float


def _with_clones(backbone: nn.Module, classes: int = 10, clones: int = 10) -> nn.Module:
    head = alrao.ClassifierClones(backbone.out_features, classes, clones)
    return alrao.AlraoModel(backbone, head)


# Networks by name, at their own size or `tiny`.
NETWORKS: dict[str, Callable[[bool], nn.Module]] = {
    "GoogLeNet": lambda tiny: _with_clones(GoogLeNet(0.02 if tiny else 1.0)),
    "VGG19": lambda tiny: _with_clones(VGG19(0.02 if tiny else 1.0)),
    "MobileNetV2": lambda tiny: _with_clones(MobileNetV2(0.05 if tiny else 1.0)),
    "LSTM": lambda tiny: LSTMBackbone(50, width=0.05 if tiny else 1.0),
    "256 vectors of 64": lambda tiny: nn.ModuleList(
        nn.LayerNorm(64, bias=False) for _ in range(3 if tiny else 256)
    ),
    "GPT 124M": lambda tiny: (
        TransformerLM(50, 8, 2, 2, 16) if tiny else TransformerLM(50304, 768, 12, 12)
    ),
    "GPT 1.3B": lambda tiny: (
        TransformerLM(50, 16, 2, 2, 16) if tiny else TransformerLM(50304, 2048, 24, 16, 2048)
    ),
}


def linear_network(entries: int) -> Callable[[bool], nn.Module]:
    """Linear layers of 1,000 or fewer features with about `entries` parameters in all."""

    def make(tiny: bool) -> nn.Module:
        width = 10 if tiny else min(1000, int((entries / 4) ** 0.5))
        depth = 2 if tiny else max(1, round(entries / width**2))
        return nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    return make


def inputs(
    make_network: Callable[[bool], nn.Module],
    tiny: bool,
    dtype: torch.dtype,
    momentum: float,
    device: torch.device,
    seed: int,
) -> Update:
    """The network with normal parameters and small normal gradients, drawn on the device."""
    with torch.device("meta"):
        model = make_network(tiny).to(dtype)
    model.to_empty(device=device)
    generator = generator_on(device, seed)
    for param in model.parameters():
        # Not from a wider dtype: the networks may fill half of the memory.
        param.data.normal_(generator=generator)
        param.grad = torch.empty_like(param).normal_(generator=generator).mul_(1e-2)
    return Update(model, momentum)


def _params(update: Update) -> list[nn.Parameter]:
    return list(update.model.parameters())


def _device(update: Update) -> torch.device:
    return _params(update)[0].device


def _positions(param: Tensor) -> Tensor:
    step = max(1, param.numel() // POSITIONS)
    return torch.arange(0, param.numel(), step, device=param.device)


def _read(update: Update) -> Tensor:
    """The compared entries of all parameters, one after the other."""
    return torch.cat([memory_order(p.detach())[_positions(p)].double() for p in _params(update)])


def _rates(update: Update) -> list[tuple[Tensor, int]]:
    """(rates, inner) of each parameter, as every Alrao optimizer of this benchmark draws them."""
    optimizer = _alrao(alrao.AlraoSGD, update)
    return [
        memory_rates(optimizer.state[p]["rate"], p, optimizer.layout_of(p).dims)
        for p in _params(update)
    ]


def _alrao(kind: type, update: Update, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    if kind is alrao.AlraoSGD:
        options["momentum"] = update.momentum
    return kind(update.model, lr_range=LR_RANGE, generator=generator, **options)


def truth(op: str, runs: int, update: Update) -> Mapping[str, Tensor]:
    """The reference in float64 on the compared entries, each with a rate of its own.

    "params" has Alrao's rates, "plain" the one rate of torch's optimizers; "authors" the authors' momentum rule.
    """
    places = [_positions(p) for p in _params(update)]
    rates = [
        entry_rates(rate, inner, p.numel(), torch.float64)[place]
        for (rate, inner), p, place in zip(_rates(update), _params(update), places)
    ]
    results = {}
    for name, vectors in (
        ("params", rates),
        ("plain", [torch.full_like(rate, LR) for rate in rates]),
        ("authors", rates),
    ):
        params = [memory_order(p.detach())[at].double() for p, at in zip(_params(update), places)]
        grads = [memory_order(p.grad)[at].double() for p, at in zip(_params(update), places)]
        states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        common: dict[str, Any] = {"steps": steps, "inners": [1] * len(params), "impl": "reference"}
        for _ in range(runs):
            if op == "feature_adam":
                rule = {"eps_rule": "authors" if name == "authors" else "torch"}
                feature_adam_(params, grads, states[0], states[1], vectors, **common, **rule)
            else:
                feature_sgd_(
                    params,
                    grads,
                    vectors,
                    momentum=update.momentum,
                    momentum_buffers=states[0] if update.momentum else None,
                    momentum_rule="authors" if name == "authors" else "torch",
                    **common,
                )
        results[name] = torch.cat(params)
    return results


def _call(step: Callable[[], object], update: Update, name: str) -> Call:
    return Call(step, lambda: {name: _read(update)})


def _ours(kind: type, backend: str, update: Update) -> Call:
    step = _alrao(kind, update).step

    def run() -> None:
        with backends.use_backend(backend):
            step()

    return _call(step if backend == "auto" else run, update, "params")


def _torch(kind: type, options: dict[str, Any], update: Update) -> Call:
    if kind is torch.optim.SGD:
        options = {**options, "momentum": update.momentum}
    elif _device(update).type == "cuda":
        # Without it Adam counts its steps on the CPU and cannot be captured.
        options = {**options, "capturable": True}
    return _call(kind(_params(update), lr=LR, **options).step, update, "plain")


def _apex(update: Update) -> Call:
    if find_spec("apex") is None or find_spec("amp_C") is None:
        raise Missing("apex with its CUDA extensions is not installed")
    from apex.optimizers import FusedSGD

    return _call(FusedSGD(_params(update), lr=LR, momentum=update.momentum).step, update, "plain")


def _full_rates(update: Update) -> list[Tensor]:
    """A tensor of rates of each parameter's shape, as the authors' code keeps them."""
    return [
        entry_rates(rate, inner, p.numel(), p.dtype).view_as(p)
        for (rate, inner), p in zip(_rates(update), _params(update))
    ]


def _without_momentum(update: Update) -> None:
    if update.momentum:
        raise Missing("this composition is written without momentum")


def _foreach(update: Update) -> Call:
    _without_momentum(update)
    params, rates = _params(update), _full_rates(update)
    grads = [p.grad for p in params]

    @torch.no_grad()
    def run() -> None:
        torch._foreach_add_(params, torch._foreach_mul(grads, rates), alpha=-1)

    return _call(run, update, "params")


def _addcmul(params: list[Tensor], grads: list[Tensor], rates: list[Tensor]) -> None:
    for param, grad, rate in zip(params, grads, rates):
        param.addcmul_(grad, rate, value=-1)


def _compiled(update: Update) -> Call:
    _without_momentum(update)
    params, grads = _params(update), [p.grad for p in _params(update)]
    rates = []
    for param, (rate, inner) in zip(params, _rates(update)):
        rows = param.numel() == rate.numel() * inner and param.size(0) == rate.numel()
        shape = (-1, *[1] * (param.dim() - 1))
        full = entry_rates(rate, inner, param.numel(), param.dtype)
        rates.append(rate.to(param.dtype).view(shape) if rows else full.view_as(param))
    update_all = compiled(_addcmul)

    @torch.no_grad()
    def run() -> None:
        update_all(params, grads, rates)

    return _call(run, update, "params")


def _authors(name: str, update: Update) -> Call:
    spec = authors.load().optim_spec
    # Detached: their step edits the parameters' own gradients where there is weight decay; here there is none.
    options = {"momentum": update.momentum} if name == "SGDSpec" else {}
    optimizer = getattr(spec, name)(_params(update), _full_rates(update), **options)
    return _call(optimizer.step, update, "authors")


def _scaled(make: Callable[[Update], Call], update: Update) -> Call:
    """`make`'s optimizer stepped by a GradScaler, which looks for infinities and hands over the scale."""
    call = make(update)
    optimizer = call.run.__self__
    scaler = torch.amp.GradScaler(_device(update).type, init_scale=1.0)
    scaler.scale(torch.ones((), device=_device(update)))

    def run() -> None:
        scaler.step(optimizer)
        scaler.update(1.0)

    return Call(run, call.outputs)


def candidates(op: str, scaler: bool) -> tuple[Candidate, ...]:
    """Ours by backend, torch's three ways, apex, and per-feature updates made of torch's own operations."""
    kind = alrao.AlraoSGD if op == "feature_sgd" else alrao.AlraoAdam
    plain = torch.optim.SGD if op == "feature_sgd" else torch.optim.Adam
    fused = partial(_torch, plain, {"fused": True})
    if scaler:
        return (
            Candidate("alrao", partial(_scaled, partial(_ours, kind, "auto")), ("params",)),
            Candidate("torch fused", partial(_scaled, fused), ("plain",)),
        )
    name = "SGDSpec" if op == "feature_sgd" else "AdamSpec"
    only_sgd = (
        Candidate("apex FusedSGD", _apex, ("plain",)),
        Candidate("foreach, rates per weight", _foreach, ("params",)),
        Candidate("torch.compile", _compiled, ("params",), slow=True),
    )
    return (
        *ours(op, partial(_ours, kind), ("params",), slow=("reference",), device_of=_device),
        Candidate("torch fused", fused, ("plain",)),
        Candidate("torch foreach", partial(_torch, plain, {"foreach": True}), ("plain",)),
        Candidate("torch single", partial(_torch, plain, {"foreach": False}), ("plain",)),
        *(only_sgd if op == "feature_sgd" else ()),
        Candidate("authors", partial(_authors, name), ("authors",)),
    )


def optimizer_case(
    network: str,
    dtype: str = "float32",
    *,
    op: str = "feature_sgd",
    momentum: float = 0.0,
    scaler: bool = False,
    tiny: bool = False,
    make_network: Callable[[bool], nn.Module] | None = None,
    keep: tuple[str, ...] | None = None,
    targets: tuple[Target, ...] = (),
) -> Case:
    """One step over all parameters of `network`; `keep` names the candidates, all of them where it is None."""
    make_network = make_network or NETWORKS[network]
    with torch.device("meta"):
        entries = sum(p.numel() for p in make_network(tiny).parameters())
        tensors = sum(1 for _ in make_network(tiny).parameters())
    # The parameter and each state are read and written, the gradient is read.
    states = 2 if op == "feature_adam" else int(momentum > 0)
    width = DTYPES[dtype].itemsize
    chosen = [c for c in candidates(op, scaler) if keep is None or c.name in keep]
    rule = "" if op == "feature_adam" else f", momentum {momentum:g}"
    return Case(
        name=f"{op} {network}{rule}{', GradScaler' if scaler else ''}",
        op=op,
        sizes={"entries": entries, "tensors": tensors, "momentum": momentum},
        dtype=dtype,
        inputs=partial(inputs, make_network, tiny, DTYPES[dtype], momentum),
        truth=partial(truth, op, 2),
        candidates=tuple(chosen),
        bytes=entries * width * (3 + 2 * states),
        flops=entries * (12 if op == "feature_adam" else 2 + 2 * states),
        set_bytes=entries * width * (2 + states),
        check_runs=2,
        targets=targets,
    )
