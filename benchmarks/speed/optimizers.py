"""Cases of the ops feature_sgd and feature_adam: one optimizer step over all parameters of a network."""

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
from benchmarks.speed import case as cases
from benchmarks.speed.case import DTYPES, Call, Candidate, Case, Missing, Target

LR_RANGE, LR = (1e-5, 1e-2), 1e-3
# Entries of a parameter that the outputs are compared by.
POSITIONS = 4096


class Update(NamedTuple):
    """Inputs of an optimizer step: a network whose parameters have gradients, and the momentum."""

    model: nn.Module
    momentum: float

    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def device(self) -> torch.device:
        return self.params()[0].device


def _with_clones(backbone: nn.Module, classes: int = 10, clones: int = 10) -> nn.Module:
    head = alrao.ClassifierClones(backbone.out_features, classes, clones)
    return alrao.AlraoModel(backbone, head)


def _gpt(shape: tuple[int, ...], tiny_features: int, tiny: bool) -> nn.Module:
    sizes = (50, tiny_features, 2, 2, 16) if tiny else (50304, *shape)
    return TransformerLM(*sizes)


# Networks by name, at their own size or `tiny`.
NETWORKS: dict[str, Callable[[bool], nn.Module]] = {
    "GoogLeNet": lambda tiny: _with_clones(GoogLeNet(0.02 if tiny else 1.0)),
    "VGG19": lambda tiny: _with_clones(VGG19(0.02 if tiny else 1.0)),
    "MobileNetV2": lambda tiny: _with_clones(MobileNetV2(0.05 if tiny else 1.0)),
    "LSTM": lambda tiny: LSTMBackbone(50, width=0.05 if tiny else 1.0),
    "256 vectors of 64": lambda tiny: nn.ModuleList(
        nn.LayerNorm(64, bias=False) for _ in range(3 if tiny else 256)
    ),
    "GPT 124M": partial(_gpt, (768, 12, 12, 1024), 8),
    "GPT 1.3B": partial(_gpt, (2048, 24, 16, 2048), 16),
}


def linear_network(entries: int) -> Callable[[bool], nn.Module]:
    """Linear layers of 1,000 or fewer features with about `entries` parameters in all."""

    def make(tiny: bool) -> nn.Module:
        width = 10 if tiny else min(1000, int((entries / 4) ** 0.5))
        depth = 2 if tiny else max(1, round(entries / width**2))
        return nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    return make


def inputs(
    make_network: Callable[[], nn.Module], momentum: float, device: torch.device, seed: int
) -> Update:
    """The network with normal parameters and small normal gradients, drawn on the device."""
    with torch.device("meta"):
        model = make_network()
    model.to_empty(device=device)
    generator = cases.generator_on(device, seed)
    for param in model.parameters():
        # Not from a wider dtype: the networks may fill half of the memory.
        param.data.normal_(generator=generator)
        param.grad = torch.empty_like(param).normal_(generator=generator).mul_(1e-2)
    return Update(model, momentum)


def _positions(param: Tensor) -> Tensor:
    step = max(1, param.numel() // POSITIONS)
    return torch.arange(0, param.numel(), step, device=param.device)


def _read(update: Update) -> Tensor:
    """The compared entries of all parameters, one after the other."""
    return torch.cat([memory_order(p.detach())[_positions(p)].double() for p in update.params()])


def _rates(update: Update) -> list[tuple[Tensor, int]]:
    """(rates, inner) of each parameter, as every Alrao optimizer of this benchmark draws them."""
    optimizer = _alrao(alrao.AlraoSGD, update)
    state, layout = optimizer.state, optimizer.layout_of
    return [memory_rates(state[p]["rate"], p, layout(p).dims) for p in update.params()]


def _alrao(kind: type, update: Update, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    if kind is alrao.AlraoSGD:
        # As torch.optim.SGD, which it is compared with.
        options |= {"momentum": update.momentum, "normalized_momentum": False}
    return kind(update.model, lr_range=LR_RANGE, generator=generator, **options)


def truth(op: str, runs: int, update: Update) -> Mapping[str, Tensor]:
    """The reference in float64 on the compared entries, each with a rate of its own.

    "params" has Alrao's rates, "plain" the one rate of torch's optimizers; "authors" the authors' momentum rule.
    """
    places = [_positions(p) for p in update.params()]
    rates = [
        entry_rates(rate, inner, p.numel(), torch.float64)[place]
        for (rate, inner), p, place in zip(_rates(update), update.params(), places)
    ]
    results = {}
    plain = [torch.full_like(rate, LR) for rate in rates]
    for name, vectors in (("params", rates), ("plain", plain), ("authors", rates)):
        rule = "authors" if name == "authors" else "torch"
        params = [memory_order(p.detach())[at].double() for p, at in zip(update.params(), places)]
        grads = [memory_order(p.grad)[at].double() for p, at in zip(update.params(), places)]
        states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        common: dict[str, Any] = {"steps": steps, "inners": [1] * len(params), "impl": "reference"}
        for _ in range(runs):
            if op == "feature_adam":
                feature_adam_(params, grads, *states, vectors, eps_rule=rule, **common)
            else:
                buffers = states[0] if update.momentum else None
                options = {"momentum": update.momentum, "momentum_rule": rule}
                feature_sgd_(params, grads, vectors, momentum_buffers=buffers, **options, **common)
        results[name] = torch.cat(params)
    return results


def _call(step: Callable[[], object], update: Update, name: str) -> Call:
    return Call(step, lambda: {name: _read(update)})


def _ours(kind: type, backend: str, update: Update, **options: Any) -> Call:
    step = _alrao(kind, update, **options).step

    def run() -> None:
        with backends.use_backend(backend):
            step()

    return _call(step if backend == "auto" else run, update, "params")


def _torch(kind: type, options: dict[str, Any], update: Update) -> Call:
    if kind is torch.optim.SGD:
        options = {**options, "momentum": update.momentum}
    elif update.device().type == "cuda":
        # Without it Adam counts its steps on the CPU and cannot be captured.
        options = {**options, "capturable": True}
    return _call(kind(update.params(), lr=LR, **options).step, update, "plain")


def _apex(update: Update) -> Call:
    if find_spec("apex") is None or find_spec("amp_C") is None:
        raise Missing("apex with its CUDA extensions is not installed")
    from apex.optimizers import FusedSGD

    return _call(FusedSGD(update.params(), lr=LR, momentum=update.momentum).step, update, "plain")


def _full_rates(update: Update) -> list[Tensor]:
    """A tensor of rates of each parameter's shape, as the authors' code keeps them."""
    return [
        entry_rates(rate, inner, p.numel(), p.dtype).view_as(p)
        for (rate, inner), p in zip(_rates(update), update.params())
    ]


def _row_rates(update: Update) -> list[Tensor]:
    """Where each row of a parameter has a rate, that as a column; else a rate for each entry."""
    found = []
    for full, (rate, inner) in zip(_full_rates(update), _rates(update)):
        rows = full.numel() == rate.numel() * inner and full.size(0) == rate.numel()
        shape = (-1, *[1] * (full.dim() - 1))
        found.append(rate.to(full.dtype).view(shape) if rows else full)
    return found


Lists = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]


def _composed(update_all: Lists, rates: list[Tensor], update: Update) -> Call:
    """An update made of torch's operations: `update_all(params, grads, rates)`."""
    if update.momentum:
        raise Missing("this composition is written without momentum")
    params, grads = update.params(), [p.grad for p in update.params()]

    @torch.no_grad()
    def run() -> None:
        update_all(params, grads, rates)

    return _call(run, update, "params")


def _foreach_add(params: list[Tensor], grads: list[Tensor], rates: list[Tensor]) -> None:
    torch._foreach_add_(params, torch._foreach_mul(grads, rates), alpha=-1)


def _addcmul(params: list[Tensor], grads: list[Tensor], rates: list[Tensor]) -> None:
    for param, grad, rate in zip(params, grads, rates):
        param.addcmul_(grad, rate, value=-1)


def _foreach(update: Update) -> Call:
    return _composed(_foreach_add, _full_rates(update), update)


def _compiled(update: Update) -> Call:
    return _composed(cases.compiled(_addcmul), _row_rates(update), update)


def _authors(name: str, update: Update) -> Call:
    spec = authors.load().optim_spec
    # Detached: their step edits the parameters' own gradients where there is weight decay; here there is none.
    options = {"momentum": update.momentum} if name == "SGDSpec" else {}
    optimizer = getattr(spec, name)(update.params(), _full_rates(update), **options)
    return _call(optimizer.step, update, "authors")


def _scaled(make: Callable[[Update], Call], update: Update) -> Call:
    """`make`'s optimizer stepped by a GradScaler, which looks for infinities and hands over the scale."""
    call = make(update)
    optimizer = call.run.__self__
    scaler = torch.amp.GradScaler(update.device().type, init_scale=1.0)
    scaler.scale(torch.ones((), device=update.device()))

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
            Candidate(
                "alrao", partial(_scaled, partial(_ours, kind, "auto", fused=True)), ("params",)
            ),
            Candidate("torch fused", partial(_scaled, fused), ("plain",)),
        )
    name = "SGDSpec" if op == "feature_sgd" else "AdamSpec"
    only_sgd = (
        Candidate("apex FusedSGD", _apex, ("plain",)),
        Candidate("foreach, rates per weight", _foreach, ("params",)),
        Candidate("torch.compile", _compiled, ("params",), slow=True),
    )
    return (
        *cases.ours(
            op, partial(_ours, kind), ("params",), slow=("reference",), device_of=Update.device
        ),
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

    def make() -> nn.Module:
        return make_network(tiny).to(DTYPES[dtype])

    with torch.device("meta"):
        numels = [param.numel() for param in make().parameters()]
    entries, tensors = sum(numels), len(numels)
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
        inputs=partial(inputs, make, momentum),
        truth=partial(truth, op, 2),
        candidates=tuple(chosen),
        bytes=entries * width * (3 + 2 * states),
        flops=entries * (12 if op == "feature_adam" else 2 + 2 * states),
        set_bytes=entries * width * (2 + states),
        check_runs=2,
        targets=targets,
    )
