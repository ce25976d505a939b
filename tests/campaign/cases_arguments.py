"""Fixed cases: arguments that mean nothing, from the optimizers' to those of rank and of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import functional
from campaign import training
from campaign.engine import case, refuses
from campaign.oracles import assert_near
from campaign.values import INF, NAN


def sgd(**options: Any) -> Any:
    return alrao.AlraoSGD(nn.Linear(2, 3), **options)


def adam(**options: Any) -> Any:
    return alrao.AlraoAdam(nn.Linear(2, 3), **options)


def classifier(**options: Any) -> Any:
    return alrao.ClassifierClones(**{"in_features": 3, "num_classes": 4, **options})


def regressor(**options: Any) -> Any:
    return alrao.RegressorClones(**{"in_features": 3, "out_features": 2, **options})


WRONG: list[tuple[Callable[..., Any], str, Any]] = [
    (sgd, "lr", "0.1"),
    (sgd, "nesterov", "yes"),
    (sgd, "dampening", "a"),
    (sgd, "generator", 0),
    (sgd, "lr_range", (1e-60, 1e-55)),
    (sgd, "lr_range", (1e30, 1e300)),
    *(
        (sgd, name, value)
        for name in ("lr", "dampening", "momentum", "weight_decay")
        for value in (NAN, INF)
    ),
    *((sgd, name, torch.tensor(NAN)) for name in ("lr", "dampening", "momentum", "weight_decay")),
    (adam, "eps", "1e-8"),
    (adam, "eps", NAN),
    (adam, "betas", ("0.9", 0.99)),
    (adam, "weight_decay", INF),
    (classifier, "theta", "0.9"),
    (classifier, "num_clones", 2.5),
    (classifier, "num_classes", "4"),
    (classifier, "ignore_index", 0.5),
    (regressor, "sigma2", "1"),
    (regressor, "sigma2", NAN),
]
for _make, _name, _value in WRONG:
    _says = f"{_make.__name__}({_name}={_value!r})"
    case(f"D {_says}")(
        lambda make=_make, name=_name, value=_value: refuses(
            lambda: make(**{name: value}), name, got=value
        )
    )


@case("D a set of parameters")
def a_set() -> None:
    net = nn.Linear(2, 3)
    for params in (set(net.parameters()), [{"params": set(net.parameters())}]):
        refuses(lambda p=params: alrao.AlraoSGD(p), "params")


@case("D duplicates")
def duplicates() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    try:
        opt = alrao.AlraoSGD([p, q, p], sampler=alrao.Constant(0.1))
    except (ValueError, TypeError, RuntimeError) as problem:
        assert "param" in str(problem), problem
        return
    p.grad = q.grad = torch.ones(3)
    opt.step()
    assert_near(q, torch.full((3,), 0.9), "a parameter")


@case("D Feature(kind='x')")
def kind() -> None:
    class Dense(nn.Linear):
        pass

    alrao.register_feature_layout(Dense, lambda m: {"weight": alrao.Feature(kind="x")})  # type: ignore[arg-type]
    try:
        refuses(lambda: alrao.AlraoSGD(Dense(2, 3)), "kind", got="x")
    finally:
        alrao.register_feature_layout(Dense, None)


@case("D complex inputs and targets")
def complex_data() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 2)
    classes = torch.tensor([0, 1])
    for backend in ("cpu", "reference"):
        with alrao.use_backend(backend):
            for make, target in ((classifier, classes), (regressor, y)):
                head = make()
                z = x.to(torch.complex64)
                refuses(lambda h=head, z=z, t=target: h(z, t), "features", "x", "dtype")
                refuses(lambda h=head, z=z: h.eval()(z), "features", "x", "dtype")
                t = target.to(torch.complex64)
                head.train()
                refuses(lambda h=head, t=t: h(x, t), "targets", "target", watched=[head])


@case("D switch_mixture_mean and a regressor's eval of another width")
def mean() -> None:
    x, w, b, a = torch.randn(2, 3), torch.randn(3, 2, 3), torch.randn(3, 2), torch.zeros(3).double()
    for backend in ("cpu", "reference"):
        mean = functional.switch_mixture_mean
        refuses(lambda: mean(x[:, :2], w, b, a, impl=backend), "x")  # noqa: B023
        refuses(lambda: mean(x, w[0], b, a, impl=backend), "weight")  # noqa: B023
        refuses(lambda: mean(x, w, b[:2], a, impl=backend), "bias")  # noqa: B023
        refuses(lambda: mean(x, w, b, a[:2], impl=backend), "log_posterior")  # noqa: B023
        with alrao.use_backend(backend):
            refuses(lambda: regressor().eval()(x[:, :2]), "x", "features")


@case("D uint8 and int32 targets")
def narrow_targets() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 3, 1, 2])
    for backend in ("cpu", "reference"):
        for dtype in (torch.uint8, torch.int32):
            torch.manual_seed(0)
            head = classifier()
            right = classifier()
            right.load_state_dict(head.state_dict())
            with alrao.use_backend(backend):
                assert_near(head(x, y.to(dtype)), right(x, y), f"loss, {backend}, {dtype}")
                with torch.no_grad():
                    assert_near(head.eval()(x, y.to(dtype)), right.eval()(x, y), "loss in eval")


@case("D messages hold no path of the machine that built them")
def no_path() -> None:
    head = classifier()
    with alrao.use_backend("cpu"):
        for x, y in (
            (torch.ones(2, 5), torch.zeros(2).long()),
            (torch.ones(2, 3), torch.full((2,), 9)),
            (torch.ones(2, 3), torch.zeros(2)),
        ):
            refuses(lambda x=x, y=y: head(x, y), "x", "features", "target", "targets")
        likelihoods = torch.zeros(3).double()
        refuses(lambda: head.switch.update(likelihoods), "log_likelihood")


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@case("D ALRAO_BACKEND=foo")
def environment() -> None:
    code = "import torch, alrao_fast; alrao_fast.Switch(2).update(torch.zeros(2))"
    said = _python("-c", code, ALRAO_BACKEND="foo")
    last = said.stderr.strip().splitlines()[-1]
    assert said.returncode and "ALRAO_BACKEND" in last and "foo" in last, last


def _rank(**options: Any) -> Any:
    arguments = {"models": {"a": training.narrow, "b": training.narrow}, "num_classes": 2}
    arguments |= {"train": training.batches(0), "valid": training.batches(1), "epochs": 1}
    return alrao.rank(**{**arguments, "progress": False, "device": "cpu", **options})


for _name, _value in (
    ("optimizer", torch.optim.SGD),
    ("clip_grad_norm", -1),
    ("clip_grad_norm", NAN),
    ("patience", NAN),
    ("epochs", 2.5),
    ("epochs", "3"),
):
    case(f"E rank({_name}={_value!r:.40})")(
        lambda name=_name, value=_value: refuses(lambda: _rank(**{name: value}), name, got=value)
    )


@case("E rank(seeds=[2**32])")
def large_seed() -> None:
    try:
        _rank(seeds=[2**32])
    except (ValueError, TypeError) as problem:
        assert "seeds" in str(problem) and str(2**32) in str(problem), problem


@case("E names that are no text")
def names() -> None:
    try:
        ranking = _rank(models={1: training.narrow, ("a", 2): training.narrow})
    except (ValueError, TypeError) as problem:
        assert "models" in str(problem), problem
        return
    assert "1" in str(ranking)


def _before_training(**options: Any) -> None:
    """What is wrong with the data shows before any candidate has finished an epoch."""
    steps = []

    def make(net: Any, generator: Any) -> Any:
        opt = alrao.AlraoSGD(net, generator=generator)
        opt.register_step_post_hook(lambda *_: steps.append(1))
        return opt

    names = [name for name in options if name in ("train", "valid")]
    # The error may quote the backbone's own.
    refuses(lambda: _rank(optimizer=make, epochs=3, **options), *names, quotes=True)
    # At most one step of each candidate, of a model that is thrown away.
    assert len(steps) <= 2, f"{len(steps)} steps were taken before it showed"


_X, _Y = training.X, training.Y
for _name, _batches in {
    "dicts": [{"x": _X, "y": _Y}],
    "no samples": [(_X[:0], _Y[:0])],
    "no batches": training.Empty(),
    "float targets": [(_X, _Y.float())],
    "another width": [(_X[:, :2], _Y)],
    "a class too many": [(_X, _Y + 5)],
    "tensors alone": [_X],
}.items():
    for _loader in ("train", "valid"):
        case(f"E {_loader} of {_name}")(
            lambda loader=_loader, given=_batches: _before_training(**{loader: given})
        )


@case("E python -m alrao_fast rank")
def command() -> None:
    said = _python("-m", "alrao_fast", "rank", "--help")
    text = said.stdout + said.stderr
    assert "Traceback" not in text, text
    assert "rank" in text and (not said.returncode or "alrao_fast.rank" in text), text[-400:]
