"""Options of AlraoSGD and AlraoAdam, given in every way there is; the oracle is torch.optim with the same options."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn

import alrao_fast as alrao
from campaign.engine import Trial, area
from campaign.oracles import assert_near
from campaign.values import Choice, Flag, Kind, Number, ranges

# A power of two: torch's float is then exactly our float32 rate.
RATE = 0.125

_SHARED: dict[str, Any] = {
    "lr": Number((1.0, 0.5, 0.0, 1e-30), outside=(-1.0, -1e-30)),
    "weight_decay": Number((0.0, 0.01), outside=(-0.1, -1e-30)),
    "maximize": Flag(),
    "lr_range": ranges,
    "rounding": Choice((None, "nearest", "stochastic")),
    "master_weights": Flag(),
    "foreach": Flag(none=True, good=(False,)),
    "fused": Flag(none=True),
    "capturable": Flag(),
    "differentiable": Flag(good=(False,)),
}


def pairs_of_betas(rng: Random) -> Kind:
    number = Number((0.0, 0.5, 0.9), outside=(-0.1, 1.0, 1.5))
    other = rng.choice((0.5, 0.99))
    if rng.random() < 0.7:
        expect, beta = number.kinds(rng)
        return expect, ((beta, other) if rng.random() < 0.5 else (other, beta))
    shapes: list[Any] = [0.9, None, "ab", (0.9,), (0.9, 0.99, 0.5), [], {0.9: 1, 0.99: 2}, {0.9}]
    return rng.choice([("either", [0.5, other]), ("refused", rng.choice(shapes))])


OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {
        **_SHARED,
        "momentum": Number((0.0, 0.5, 0.9), outside=(-0.1, -1e-30)),
        # torch bounds it nowhere.
        "dampening": Number((0.0, 0.5)),
        "nesterov": Flag(),
        "momentum_rule": Choice(("torch",)),
    },
    "Adam": {
        **_SHARED,
        "betas": pairs_of_betas,
        "eps": Number((1e-8, 1e-3), outside=(-1e-8, -1.0)),
        "amsgrad": Flag(),
        "decoupled_weight_decay": Flag(),
        "eps_rule": Choice(("torch",)),
    },
}
# What torch.optim has no word for, or where its answer is another.
_OURS = ("lr_range", "rounding", "master_weights", "momentum_rule", "eps_rule")
_IGNORED_BY_RESULT = ("foreach", "fused", "capturable", "differentiable")
_TYPES = {"SGD": (alrao.AlraoSGD, torch.optim.SGD), "Adam": (alrao.AlraoAdam, torch.optim.Adam)}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(3,), (2, 3), (), (2, 2, 2)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def take_steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            if p.is_floating_point() or p.is_complex():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        optimizer.step()


def scaled(lr: Any) -> Any:
    try:
        return RATE * lr
    except TypeError:
        return RATE * float(lr)


def torch_options(options: dict[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in options.items() if k not in _OURS + _IGNORED_BY_RESULT}
    if "lr" in known:
        known["lr"] = scaled(known["lr"])
    return known


class Way:
    """A way to give an optimizer an option: `before` is done in any case, `give` may be refused, `after` is not.

    `optimizer` is None until `give` has made it.
    """

    def __init__(self, kind: str, ours: bool, base: dict[str, Any], dtype: torch.dtype) -> None:
        self.ours, self.dtype = ours, dtype
        self.type = _TYPES[kind][0 if ours else 1]
        self.base = base if ours else {"lr": RATE, **torch_options(base)}
        self.params = parameters(dtype)
        self.optimizer: Any = None

    def make(self, params: Any, options: dict[str, Any]) -> Any:
        options = {**self.base, **options}
        if self.ours and "lr_range" not in options:
            options["sampler"] = alrao.Constant(RATE)
        return self.type(params, **options)

    def value(self, name: str, value: Any) -> dict[str, Any]:
        return {name: value} if self.ours else torch_options({name: value})

    def before(self, name: str) -> None: ...

    def assign(self, name: str, value: Any) -> None: ...

    def give(self, name: str, value: Any) -> None:
        raise NotImplementedError

    def after(self) -> None:
        take_steps(self.optimizer, range(3))

    def run_through(self, name: str, value: Any) -> None:
        self.before(name)
        self.assign(name, value)
        self.give(name, value)
        self.after()

    @property
    def watched(self) -> Any:
        return [self.params, self.optimizer]


class Constructor(Way):
    text = "{type}(params, {option})"

    def give(self, name: str, value: Any) -> None:
        self.optimizer = self.make(self.params, self.value(name, value))


class Group(Way):
    text = "{type}([dict(params=..., {option}), ...])"

    def give(self, name: str, value: Any) -> None:
        one, *rest = self.params
        groups = [{"params": [one], **self.value(name, value)}, {"params": rest}]
        self.optimizer = self.make(groups, {})


class Added(Way):
    text = "{type}(...).add_param_group(dict(params=..., {option}))"

    def before(self, name: str) -> None:
        self.optimizer = self.make(self.params[1:], {})

    def give(self, name: str, value: Any) -> None:
        self.optimizer.add_param_group({"params": self.params[:1], **self.value(name, value)})


class Assigned(Way):
    """The step is what may be refused."""

    text = "{type}(...), a step, group.update({option}), step()"

    def before(self, name: str) -> None:
        self.optimizer = self.make(self.params, {})
        take_steps(self.optimizer, range(1))

    def assign(self, name: str, value: Any) -> None:
        self.optimizer.param_groups[0].update(self.value(name, value))
        for p in self.params:
            p.grad = torch.full_like(p, 0.5)

    def give(self, name: str, value: Any) -> None:
        self.optimizer.step()


class Loaded(Way):
    text = "{type}(...).load_state_dict(with {option})"

    def before(self, name: str) -> None:
        self.optimizer = self.make(self.params, {})
        take_steps(self.optimizer, range(1))

    def give(self, name: str, value: Any) -> None:
        state = copy.deepcopy(self.optimizer.state_dict())
        state["param_groups"][0].update(self.value(name, value))
        self.optimizer.load_state_dict(state)


WAYS = [Constructor, Group, Added, Assigned, Loaded]


@area("options", weight=8)
def option(rng: Random) -> Trial:
    kind = rng.choice(["SGD", "Adam"])
    name = rng.choice(list(OPTIONS[kind]))
    kinds = OPTIONS[kind][name]
    expect, value = kinds(rng) if callable(kinds) else kinds.kinds(rng)
    way = rng.choice(WAYS if name != "lr_range" else WAYS[:3])
    dtype = rng.choice([torch.float64, torch.float32])
    # torch refuses Nesterov's step without momentum, and so it is here.
    base = {"momentum": 0.9} if (kind == "SGD" and rng.random() < 0.7) or name == "nesterov" else {}
    ours = way(kind, True, base, dtype)
    make_theirs = partial(way, kind, False, base, dtype)
    expect, refusal, theirs = _expected(make_theirs, name, value, expect)
    ours.before(name)
    ours.assign(name, value)

    text = way.text.format(type=ours.type.__name__, option=f"{name}={value!r}"[:90])
    return Trial(
        f"{text}, {str(dtype).removeprefix('torch.')}{', momentum=0.9' if base else ''}",
        partial(ours.give, name, value),
        expect,
        partial(_check, ours, theirs, name, value),
        (name,),
        value,
        ours.watched,
        refusal,
    )


def _expected(
    make: Callable[[], Way], name: str, value: Any, expect: str
) -> tuple[str, BaseException | None, Way]:
    """What torch.optim makes of it decides where it has the option."""
    theirs = make()
    if name in _OURS + _IGNORED_BY_RESULT:
        theirs.run_through("maximize", False)
        return expect, None, theirs
    try:
        theirs.run_through(name, value)
    except Exception as problem:
        if expect != "either":
            return "refused", problem, theirs
        # Torch refuses this form of a good value: if ours is taken it means the same.
        theirs = make()
        try:
            theirs.run_through(name, _plain(value))
        except Exception as other:
            return "refused", other, theirs
    # Out of its range, but torch looks at the constructor's only.
    if expect == "refused" and isinstance(theirs, Assigned | Loaded) and _is_finite(value):
        return "either", None, theirs
    return expect, None, theirs


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_plain(entry) for entry in value)
    kind = bool if "bool" in str(getattr(value, "dtype", type(value))) else float
    return False if value is None else kind(value)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, float | int | torch.Tensor)
    try:
        return is_number and math.isfinite(float(value))
    except (TypeError, RuntimeError, ValueError):
        return False


def _check(ours: Way, theirs: Way, name: str, value: Any, result: None) -> None:
    if name == "lr_range":
        bounds = sorted(float(v) for v in value) if not hasattr(value, "__next__") else [0.125, 1]
        rates = ours.optimizer.state[ours.params[0]]["rate"]
        low, high = torch.tensor(bounds, dtype=torch.float64).float()
        assert ((rates >= low) & (rates <= high)).all(), f"rates {rates} outside {bounds}"
        return
    ours.after()
    for number, (own, right) in enumerate(zip(ours.params, theirs.params)):
        assert_near(own, right, f"params[{number}]")


# A text, the parameters' change, and whether it may show only at a step; torch.optim says what is right.
PARAMS: list[tuple[str, Callable[[list[nn.Parameter]], Any]]] = [
    ("a list", lambda ps: ps),
    ("a tuple", tuple),
    ("a generator", lambda ps: (p for p in ps)),
    ("names", lambda ps: [(f"p{k}", p) for k, p in enumerate(ps)]),
    ("dict.values()", lambda ps: dict(enumerate(ps)).values()),
    ("ParameterList", nn.ParameterList),
    ("groups", lambda ps: [{"params": ps[:1]}, {"params": ps[1:]}]),
    ("groups by generator", lambda ps: [{"params": (p for p in ps)}]),
    ("a tensor in a group", lambda ps: [{"params": ps[0]}, {"params": ps[1:]}]),
    ("unknown option", lambda ps: [{"params": ps, "mine": 3}]),
    ("frozen", lambda ps: [ps[0].requires_grad_(False), *ps[1:]]),
    ("transposed", lambda ps: [ps[0], nn.Parameter(ps[1].data.t()), *ps[2:]]),
    ("empty tensor", lambda ps: [*ps, nn.Parameter(torch.zeros(0, 3))]),
    ("gaps", lambda ps: [nn.Parameter(ps[3].data[..., 0]), *ps[:3]]),
    ("duplicates", lambda ps: [*ps, ps[0]]),
    ("names and tensors", lambda ps: [("p0", ps[0]), *ps[1:]]),
    ("complex", lambda ps: [*ps, nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
    ("float8", lambda ps: [*ps, nn.Parameter(torch.ones(2).to(torch.float8_e5m2))]),
    ("expanded", lambda ps: [*ps, nn.Parameter(torch.ones(1).expand(3))]),
    ("duplicates over groups", lambda ps: [{"params": ps}, {"params": ps[:1]}]),
    ("a set", set),
    ("a frozenset", frozenset),
    ("a set in a group", lambda ps: [{"params": set(ps)}]),
    ("a dict", lambda ps: {f"p{k}": p for k, p in enumerate(ps)}),
    ("a dict of params", lambda ps: {"params": ps}),
    ("groups without params", lambda ps: [{"lr": 1.0}]),
    ("group and tensors", lambda ps: [{"params": ps[:1]}, *ps[1:]]),
    ("tensors and group", lambda ps: [*ps[1:], {"params": ps[:1]}]),
    ("None", lambda ps: None),
    ("a number", lambda ps: 3),
    ("text", lambda ps: "params"),
    ("a class", lambda ps: nn.Linear),
    ("a tensor", lambda ps: ps[0]),
    ("[None]", lambda ps: [*ps, None]),
    ("[3]", lambda ps: [3, *ps]),
    ("nested", lambda ps: [ps]),
    ("numpy", lambda ps: [p.detach().numpy() for p in ps]),
    ("nothing", lambda ps: []),
    ("empty generator", lambda ps: (p for p in [])),
    ("not a leaf", lambda ps: [ps[0] * 2]),
    ("a sparse tensor", lambda ps: [nn.Parameter(torch.eye(2).to_sparse())]),
    ("integers", lambda ps: [nn.Parameter(torch.ones(2).int(), requires_grad=False)]),
    ("names twice", lambda ps: [("p", ps[0]), ("p", ps[1])]),
    ("name is a number", lambda ps: [(3, ps[0])]),
    ("(name, None)", lambda ps: [("p", None)]),
    ("module without parameters", lambda ps: nn.ReLU()),
]
# What is found out at a step at the latest.
LATE = ("gaps", "complex", "float8", "expanded", "a sparse tensor")
# torch says of a set in a group that it has no order, of one by itself nothing.
UNORDERED = ("a set", "a frozenset", "a set in a group")


@area("params", weight=3)
def params(rng: Random) -> Trial:
    kind = rng.choice(["SGD", "Adam"])
    text, change = rng.choice(PARAMS)
    ours, theirs = _TYPES[kind]
    own, other = parameters(torch.float64), parameters(torch.float64)
    given = change(own)
    expect, refusal, optimizer = "either", None, None
    try:
        optimizer = theirs(list(other) if text == "ParameterList" else change(other), lr=RATE)
        take_steps(optimizer, range(2))
    except Exception as problem:
        expect, refusal = ("either" if text in LATE else "refused"), problem
    if text in UNORDERED:
        expect = "refused"

    def run() -> Any:
        made = ours(given, sampler=alrao.Constant(RATE))
        if text in LATE:
            for p in (p for group in made.param_groups for p in group["params"]):
                p.grad = torch.ones_like(p)
            made.step()
        return made

    def right(made: Any) -> None:
        assert optimizer is not None and text not in LATE, "accepted; torch.optim refuses it"
        take_steps(made, range(2))
        for group, twin in zip(made.param_groups, optimizer.param_groups, strict=True):
            pairs = zip(group["params"], twin["params"], strict=True)
            for number, (p, q) in enumerate(pairs):
                assert_near(p, q, f"params[{number}]")

    for p in own:
        p.grad = torch.ones_like(p)
    names = ("params", "parameter", "parameters", "param", "param_group", "params[0]", "params[4]")
    watched = [[p.data for p in own]]
    return Trial(f"Alrao{kind}({text})", run, expect, right, names, None, watched, refusal)
