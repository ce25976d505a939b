"""rank and GraphedStep: their arguments. compat: its constructors, where the contract is clear."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alrao_fast as alrao
from alrao_fast import compat
from campaign import heads, models, oracles
from campaign.engine import Trial, area
from campaign.oracles import assert_near
from campaign.values import INF, NAN, Choice, Integer, Number, Odd, ranges


def batches(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator)
    return list(zip(x.split(6), (x[:, 0] > 0).long().split(6)))


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh())


class Empty:
    """Batches to iterate over, of which there are none."""

    def __iter__(self) -> Any:
        return iter(())


X, Y = batches(0)[0]
DATA: dict[str, Any] = {
    "None": None,
    "a number": 3,
    "nothing": [],
    "no batches": Empty(),
    "text": "train",
    "a list of text": ["ab", "cd"],
    "a generator": (b for b in ()),
    "a list of numbers": [1, 2],
    "a tensor": X,
    "dicts": [{"x": X, "y": Y}],
    "one tensor each": [(X,)],
    "numpy": [(X.numpy(), Y.numpy())],
    "no samples": [(X[:0], Y[:0])],
    "targets of another length": [(X, Y[:2])],
    "targets of a class too many": [(X, Y + 5)],
    "float targets": [(X, Y.float())],
    "inputs of another width": [(X[:, :2], Y)],
    "meta": [(X.to("meta"), Y.to("meta"))],
    "a batch of another kind later": [(X, Y), (X, Y.float())],
    "a batch of dicts later": [(X, Y), {"x": X}],
}
MODELS: dict[str, Any] = {
    "None": None,
    "nothing": {},
    "a list": [narrow],
    "a function": narrow,
    "a module": {"a": narrow()},
    "a name that is a number": {3: narrow},
    "a name that is None": {None: narrow},
    "None in it": {"a": None},
    "text in it": {"a": "narrow"},
    "a function of an argument": {"a": lambda width: narrow()},
    "a function that returns None": {"a": lambda: None},
    "a function that returns a class": {"a": lambda: nn.Linear},
    "features of one dimension": {"a": lambda: nn.Sequential(narrow(), nn.Flatten(0))},
    "a backbone that fails": {"a": lambda: nn.Linear(7, 3)},
    "the second fails": {"a": narrow, "b": lambda: nn.Linear(7, 3)},
    "without parameters": {"a": lambda: nn.Flatten()},
}


def _sgd(net: Any, generator: Any) -> Any:
    return alrao.AlraoSGD(net, (1e-3, 1.0), generator=generator)


OPTIMIZERS: dict[str, tuple[str, Any]] = {
    "a function": ("right", _sgd),
    "None": ("right", None),
    "torch.optim.SGD": ("refused", torch.optim.SGD),
    "text": ("refused", "sgd"),
    "a number": ("refused", 3),
    "AlraoSGD": ("refused", alrao.AlraoSGD),
    "returns None": ("refused", lambda net, g: None),
    "returns the net": ("refused", lambda net, g: net),
    "of one argument": ("refused", lambda net: _sgd(net, None)),
    "torch's own": ("either", lambda net, g: torch.optim.SGD(net.parameters(), 0.1)),
}
HEADS: dict[str, tuple[str, Any]] = {
    "a function": ("right", lambda d: alrao.ClassifierClones(d, 2)),
    "text": ("refused", "classifier"),
    "a head": ("refused", alrao.ClassifierClones(3, 2)),
    "returns None": ("refused", lambda d: None),
    "returns nn.Linear": ("refused", lambda d: nn.Linear(d, 2)),
    "of another width": ("refused", lambda d: alrao.ClassifierClones(d + 1, 2)),
    "of no argument": ("refused", lambda: alrao.ClassifierClones(3, 2)),
}
RANK: dict[str, Any] = {
    "epochs": Integer((1, 2)),
    "patience": Integer((1, 3), none=True),
    "num_classes": Integer((2, 3)),
    "clip_grad_norm": Number((1.0, 0.1), outside=(-1.0, -1e-9), none=True, finite=False),
    "lr_range": ranges,
    "device": {"right": ["cpu", torch.device("cpu")], "refused": heads.DEVICES["refused"]},
    "seeds": {
        "right": [1, 2, [0], (3, 1), range(1), [2**31]],
        "either": [[2**32], [2**64], [-1], {3, 1}, iter([2])],
        "refused": [0, -1, [], "ab", ["a"], [1.5], None, 2.5, NAN, Odd(), [None]]
        + [[True, "x"], {}, 1j],
    },
}


@area("rank", weight=3)
def rank(rng: Random) -> Trial:
    name = rng.choice([*RANK, "models", "train", "valid", "train", "valid", "optimizer", "head"])
    arguments: dict[str, Any] = {"models": {"a": narrow}, "train": batches(0), "valid": batches(1)}
    arguments |= {"num_classes": 2, "epochs": 1, "device": "cpu", "progress": False}
    if name in ("train", "valid"):
        text = rng.choice(list(DATA))
        expect, value = "refused", DATA[text]
    elif name == "models":
        text = rng.choice(list(MODELS))
        lenient = text.startswith("a name") or text == "without parameters"
        expect, value = ("either" if lenient else "refused"), MODELS[text]
    elif name in ("optimizer", "head"):
        table = OPTIMIZERS if name == "optimizer" else HEADS
        text = rng.choice(list(table))
        expect, value = table[text]
        if name == "head":
            arguments["num_classes"] = None
    elif isinstance(RANK[name], dict):
        expect = rng.choice([*RANK[name], "refused"])
        value = rng.choice(RANK[name][expect])
        text = f"{value!r:.60}"
    else:
        kinds = RANK[name]
        expect, value = kinds(rng) if callable(kinds) else kinds.kinds(rng)
        text = f"{value!r:.60}"
        if name == "num_classes" and value is None:
            expect = "refused"
        if name == "patience" and isinstance(value, float) and value == INF:
            # For ever is a patience.
            expect = "either"
        # One class is too few for the targets.
        if name == "num_classes" and expect == "either" and isinstance(value, bool):
            expect = "refused"
    arguments[name] = value
    state = torch.get_rng_state()

    def right(ranking: Any) -> None:
        assert torch.equal(state, torch.get_rng_state()), "the random state was not left as it was"
        assert [row.name for row in ranking] == list(arguments["models"])
        assert str(ranking).count("\n") == 1
        run = ranking[0].runs[0]
        assert len(run.valid_loss) == int(arguments["epochs"])
        assert all(map(math.isfinite, run.valid_loss)), run.valid_loss
        if name not in ("models", "lr_range", "optimizer", "num_classes", "head"):
            assert abs(run.valid_loss[0] - _first_epoch(run.seed, arguments)) < 1e-5

    got = value if expect == "refused" and name in RANK else None
    names = (name, "models['a']", "models['b']") if name in ("models", "head") else (name,)
    run = lambda: alrao.rank(**arguments)  # noqa: E731
    quotes = name in ("models", "train", "valid", "optimizer", "head")
    return Trial(f"rank({name}: {text})", run, expect, right, names, got, quotes=quotes)


def _clip(net: nn.Module, bound: float) -> None:
    """The backbone's gradient, and each clone's, by a norm of its own."""
    nn.utils.clip_grad_norm_(net.backbone.parameters(), bound)
    own = [p.grad for p in net.head.parameters()]
    norms = sum(g.flatten(1).square().sum(1) for g in own).sqrt()
    factors = (bound / (norms + 1e-6)).clamp(max=1)
    for grad in own:
        grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))


def _first_epoch(seed: int, arguments: dict[str, Any]) -> float:
    """The validation loss after an epoch by a loop written out."""
    clip = arguments.get("clip_grad_norm")
    torch.manual_seed(seed)
    net = alrao.AlraoModel(narrow(), alrao.ClassifierClones(3, 2))
    opt = alrao.AlraoSGD(net, generator=torch.Generator().manual_seed(seed))
    for x, y in arguments["train"]:
        opt.zero_grad()
        net(x, targets=y).backward()
        if clip is not None:
            _clip(net, float(clip))
        opt.step()
    net.eval()
    with torch.no_grad():
        losses = [float(F.nll_loss(net(x), y)) for x, y in arguments["valid"]]
    return sum(losses) / len(losses)


GRAPHED: dict[str, list[Any]] = {
    "net": [None, 3, "net", nn.Linear, Odd()],
    "opt": [None, 3, "sgd", torch.optim.SGD, Odd()],
    "example_inputs": [None, 3, "x", Odd(), [X], {"x": X}, ()],
    "example_targets": [None, 3, "y", Odd(), [Y], (Y,)],
    "scaler": [3, "scaler", Odd(), torch.amp.GradScaler],
    "warmup": [0, -1, 2.5, "3", None, NAN, INF, Odd()],
    "before_step": [3, "clip", Odd(), [print]],
}


@area("GraphedStep", weight=1)
def graphed(rng: Random) -> Trial:
    """Without a GPU there is no right call: every one is refused, and leaves the model and optimizer as they were."""
    net, opt, x, y = models.trained(rng)
    name = rng.choice([*GRAPHED, "nothing", "eval"])
    given: dict[str, Any] = {"net": net, "opt": opt, "example_inputs": x, "example_targets": y}
    names: tuple[str, ...] = ("net",)
    got = None
    if name in GRAPHED:
        given[name] = got = rng.choice(GRAPHED[name])
        # That the model is not on a GPU may be said first.
        names = (name, name.removeprefix("example_"), "net")
    if name == "eval":
        net.eval()
    run = lambda: alrao.GraphedStep(**given)  # noqa: E731
    if name not in ("net", "opt", "warmup"):
        got = None
    return Trial(f"GraphedStep({name}: {got!r:.50})", run, "refused", None, names, got, [net, opt])


def _lossless(output: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(output, target)


class Compat:
    """A callable of compat, a good call, and the kinds of its arguments."""

    def __init__(self, make: Any, good: dict[str, Any], kinds: dict[str, Any]) -> None:
        self.make, self.good, self.kinds = make, good, kinds


COMPAT: dict[str, Compat] = {
    "Switch": Compat(
        compat.Switch,
        {"nb_models": 3, "theta": 0.9999, "task": "classification"},
        {
            "nb_models": Integer((1, 3)),
            "theta": Number((0.9999, 0.5), outside=(0.0, 1.0, -1.0, 2.0)),
            "task": Choice(("classification",)),
        },
    ),
    "L2LossLog": Compat(
        compat.L2LossLog, {"sigma2": 1.0}, {"sigma2": Number((1.0, 0.5), outside=(0.0, -1.0))}
    ),
    "L2LossAdditional": Compat(
        compat.L2LossAdditional, {"sigma2": 1.0}, {"sigma2": Number((2.0,), outside=(0.0, -1.0))}
    ),
    "EarlyStopping": Compat(
        compat.EarlyStopping,
        {"mode": "min", "threshold_mode": "rel"},
        {"mode": Choice(("min", "max")), "threshold_mode": Choice(("rel", "abs"))},
    ),
    "lr_sampler_generic": Compat(
        compat.lr_sampler_generic,
        {"minlr": 1e-3, "maxlr": 1.0},
        {
            "minlr": Number((1e-3, 1.0), outside=(0.0, -1.0, 2.0)),
            "maxlr": Number((1.0, 2.0), outside=(0.0, -1.0, 1e-4)),
        },
    ),
    "AlraoModel": Compat(
        lambda **k: compat.AlraoModel(*k.values(), 3, 2),
        {
            "task": "classification",
            "loss": nn.NLLLoss(),
            "internal_nn": narrow(),
            "n_last_layers": 3,
            "last_layer_gen": compat.LinearClassifier,
        },
        {"task": Choice(("classification",)), "n_last_layers": Integer((1, 3))},
    ),
}


@area("compat's arguments", weight=2)
def compat_arguments(rng: Random) -> Trial:
    text = rng.choice(list(COMPAT))
    entry = COMPAT[text]
    name = rng.choice(list(entry.kinds))
    expect, value = entry.kinds[name].kinds(rng)
    given = {**entry.good, name: value}

    def right(made: Any) -> None:
        if text == "Switch":
            n = int(given["nb_models"])
            outputs = [torch.randn(4, 2).log_softmax(1) for _ in range(n)]
            y = torch.tensor([0, 1, 1, 0])
            made.Supdate(outputs, y)
            state = oracles.SwitchState(n, float(given["theta"]))
            if n > 1:
                state.update([-float(F.nll_loss(out, y)) for out in outputs])
            assert_near(made.logposterior, state.log_posterior, "logposterior", 1e-6)
        elif text == "L2LossLog":
            a, b, sigma2 = torch.randn(3, 2), torch.randn(3, 2), float(given["sigma2"])
            expected = (a - b).square().sum(1).mean() / (2 * sigma2)
            expected += 0.5 * math.log(2 * math.pi * sigma2)
            assert_near(made(a, b), expected, "loss")
        elif text == "lr_sampler_generic":
            rates = made(torch.empty(0), torch.Size([100]))
            low, high = float(given["minlr"]), float(given["maxlr"])
            assert ((rates >= low * 0.999) & (rates <= high * 1.001)).all(), "a rate outside"

    names = (name, "nb_models") if name == "n_last_layers" else (name,)
    got = value if expect == "refused" else None
    call = f"compat.{text}({name}={value!r:.60})"
    return Trial(call, lambda: entry.make(**given), expect, right, names, got)


@area("compat's step", weight=2)
def compat_step(rng: Random) -> Trial:
    """SGDAlrao and AdamAlrao with equal rates are torch.optim's, and the clones get their own losses' gradients."""
    adam = rng.random() < 0.4
    options: dict[str, Any] = {"weight_decay": rng.choice([0.0, 0.1])}
    torch.manual_seed(rng.getrandbits(30))
    loss = _lossless if rng.random() < 0.5 else nn.NLLLoss()
    arguments = ("classification", loss, narrow(), 3, compat.LinearClassifier, 3, 2)
    net = compat.AlraoModel(*arguments).double()
    twin_nn = narrow().double()
    twin_nn.load_state_dict(net.internal_nn.state_dict())
    layers = [compat.LinearClassifier(3, 2).double() for _ in range(3)]
    for layer, other in zip(layers, net.last_layers()):
        layer.load_state_dict(other.state_dict())
    rates = [torch.full_like(p, 0.125) for p in net.parameters_internal_nn()]
    make = compat.AdamAlrao if adam else compat.SGDAlrao
    lrs = [0.125, 0.25, 0.5]
    arguments = (net.parameters_internal_nn(), rates, net.last_layers_parameters_list(), lrs)
    opt = make(*arguments, **options)
    torch_make = torch.optim.Adam if adam else torch.optim.SGD
    parts = [(twin_nn.parameters(), 0.125), *((l.parameters(), lr) for l, lr in zip(layers, lrs))]
    twins = [torch_make(params, lr=lr, **options) for params, lr in parts]
    data = [(x.double(), y) for x, y in batches(3)]

    def run() -> None:
        for x, y in data:
            opt.zero_grad()
            loss(net(x), y).backward()
            compat.alrao_step(net, opt, loss, y)

    def right(result: None) -> None:
        state = oracles.SwitchState(3, 0.9999)
        for x, y in data:
            for twin in twins:
                twin.zero_grad()
            features = twin_nn(x)
            outputs = [layer(features.detach()) for layer in layers]
            own = [F.nll_loss(out, y) for out in outputs]
            with torch.no_grad():
                weights = [l.fc.weight for l in layers], [l.fc.bias for l in layers]
            mixed = [
                F.linear(features, w.detach(), b.detach()).log_softmax(1) for w, b in zip(*weights)
            ]
            prior = state.log_posterior.view(-1, 1, 1)
            F.nll_loss(torch.logsumexp(torch.stack(mixed) + prior, 0), y).backward()
            for value in own:
                value.backward()
            if adam:
                # The authors' rule: the bias correction does not rescale eps.
                twins[0].param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999**state.t)
            for twin in twins:
                twin.step()
            state.update([-float(value) for value in own])
        assert_near(net.switch.logposterior, state.log_posterior, "logposterior", 1e-5)
        pairs = zip(net.parameters_internal_nn(), twin_nn.parameters())
        for p, q in pairs:
            assert_near(p, q, "a parameter of internal_nn")
        for layer, other in zip(layers, net.last_layers()):
            for p, q in zip(other.parameters(), layer.parameters()):
                assert_near(p, q, "a parameter of a last layer")

    return Trial(f"{make.__name__}({options}), alrao_step", run, "right", right)
