"""AlraoModel: what it takes as a backbone and as a head, collapse, suggested_lr, posterior and copies."""

from __future__ import annotations

import copy
import io
import pickle
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from campaign import heads, oracles
from campaign.engine import Trial, area
from campaign.oracles import assert_near
from campaign.values import Choice, Integer, Odd


class Plain(nn.Module):
    """A backbone that returns features, or a tuple with extras, or something else."""

    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, heads.D)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        features = self.linear(x).tanh()
        return features if self.wrap is None else self.wrap(features)


def trained(rng: Random, kind: str = "ClassifierClones", steps: int = 3, **options: Any) -> Any:
    """A model after some steps, its optimizer, and a batch."""
    torch.manual_seed(rng.getrandbits(30))
    net = alrao.AlraoModel(Plain(), heads.make_head(kind, **options))
    opt = alrao.AlraoSGD(net, (1e-3, 1.0), generator=torch.Generator().manual_seed(1))
    x, y = batch(net)
    for _ in range(steps):
        opt.zero_grad()
        net(x, targets=y).backward()
        opt.step()
    opt.zero_grad()
    return net, opt, x, y


def batch(net: Any) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 4)
    if isinstance(net.head, alrao.ClassifierClones):
        return x, torch.randint(net.head.num_classes, (6,))
    return x, torch.randn(6, net.head.out_features)


def prediction(net: Any, x: Tensor) -> Tensor:
    """eval() by formula."""
    features = net.backbone.linear(x).tanh()
    right = oracles.log_prob if isinstance(net.head, alrao.ClassifierClones) else oracles.mean
    return right(features, net.head.weight, net.head.bias, net.head.switch.log_posterior)


PARTS: dict[str, tuple[str, Any]] = {
    "backbone: None": ("backbone", lambda: None),
    "backbone: text": ("backbone", lambda: "resnet"),
    "backbone: a class": ("backbone", lambda: nn.Linear),
    "backbone: an object": ("backbone", Odd),
    "head: None": ("head", lambda: None),
    "head: nn.Linear": ("head", lambda: nn.Linear(heads.D, heads.C)),
    "head: a class": ("head", lambda: alrao.ClassifierClones),
    "head: a Switch": ("head", lambda: alrao.Switch(3)),
    "head: a number": ("head", lambda: 10),
}
RETURNS: dict[str, tuple[str, Any]] = {
    "features": ("right", None),
    "(features, extra)": ("right", lambda f: (f, f.sum())),
    "(features, None, 3)": ("right", lambda f: (f, None, 3)),
    "(features,)": ("right", lambda f: (f,)),
    "[features, extra]": ("either", lambda f: [f, f.sum()]),
    "a dict": ("refused", lambda f: {"features": f}),
    "None": ("refused", lambda f: None),
    "()": ("refused", lambda f: ()),
    "a number": ("refused", lambda f: 3.0),
    "(None, features)": ("refused", lambda f: (None, f)),
    "numpy": ("refused", lambda f: f.detach().numpy()),
    "other width": ("refused", lambda f: f[:, :-1]),
    "integers": ("either", lambda f: f.int()),
    "complex": ("refused", lambda f: f.to(torch.complex64)),
}


@area("AlraoModel", weight=2)
def model(rng: Random) -> Trial:
    net, _opt, x, y = trained(rng, rng.choice(["ClassifierClones", "RegressorClones"]))
    if rng.random() < 0.35:
        text = rng.choice(list(PARTS))
        name, make = PARTS[text]
        parts = {"backbone": net.backbone, "head": net.head, name: make()}
        run = lambda: alrao.AlraoModel(**parts)  # noqa: E731
        return Trial(f"AlraoModel({text})", run, "refused", None, (name,), parts[name], [net])
    text = rng.choice(list(RETURNS))
    expect, wrap = RETURNS[text]
    net.backbone.wrap = wrap
    training = rng.random() < 0.5
    targets = y if training or rng.random() < 0.5 else None
    twin = copy.deepcopy(net)

    def right(result: Any) -> None:
        features = twin.backbone.linear(x).tanh()
        out = features if wrap is None else wrap(features)
        first = out if isinstance(out, Tensor) else out[0]
        own = result if isinstance(out, Tensor) else result[0]
        if targets is None:
            twin.backbone.wrap = lambda f: f
            kind = isinstance(twin.head, alrao.ClassifierClones)
            formula = oracles.log_prob if kind else oracles.mean
            expected = formula(
                first, twin.head.weight, twin.head.bias, twin.head.switch.log_posterior
            )
        else:
            expected = heads.oracle(twin.head, first, targets).loss
        assert_near(own, expected, "result")
        if isinstance(out, tuple):
            assert isinstance(result, tuple) and len(result) == len(out)

    net.train(training)
    call = f"AlraoModel, backbone returns {text}, {'train' if training else 'eval'}"
    call += ", targets" if targets is not None else ""
    names = ("backbone", "features", "head", "D", "x")
    run = lambda: net(x, targets=targets)  # noqa: E731
    return Trial(call, run, expect, right, names, None, [net, x, y])


@area("collapse", weight=2)
def collapse(rng: Random) -> Trial:
    net, _opt, x, _y = trained(rng, rng.choice(["ClassifierClones", "RegressorClones"]))
    net.eval()
    name = rng.choice(["which", "num_extras", "which", "clones"])
    options: dict[str, Any] = {"which": rng.choice(["best", "mixture"])}
    expect = "right"
    if name == "which":
        expect, options["which"] = Choice(("best", "mixture")).kinds(rng)
    elif name == "num_extras":
        expect, options["num_extras"] = Integer((0,), least=0, none=True).kinds(rng)
        # True is one extra, which is not there.
        expect = "refused" if isinstance(options["num_extras"], bool) else expect
    else:
        options["dead"] = rng.choice(["one", "all", "huge weight", "huge bias"])
        damage(net, options["dead"])
        expect = "refused" if options["dead"] == "all" else "right"
    arguments = {k: v for k, v in options.items() if k != "dead"}

    def right(plain: nn.Module) -> None:
        with torch.no_grad():
            result = plain(x)
            if options["which"] == "mixture":
                assert_near(result, net(x), "collapse('mixture') against eval", 1e-4)
                # Where float32 overflows halfway the sum in float64 does not.
                if options.get("dead") != "huge weight":
                    assert_near(result, prediction(net, x), "collapse('mixture')", 1e-4)
                return
            alive = net.head.clone_outputs(net.backbone(x)).isfinite().flatten(1).all(1)
            own = torch.where(alive, net.head.switch.log_posterior, -torch.inf)
            outputs = net.head.clone_outputs(net.backbone(x))[own.argmax()]
            if isinstance(net.head, alrao.ClassifierClones):
                outputs = outputs.log_softmax(-1)
            assert_near(result, outputs, "collapse('best')", 1e-4)

    got = options.get(name) if expect == "refused" else None
    names = (name, "clone") if name == "clones" else (name,)
    call = f"collapse({', '.join(f'{k}={v!r:.60}' for k, v in options.items())}), {net.head.extra_repr()}"
    run = lambda: net.collapse(**arguments)  # noqa: E731
    return Trial(call, run, expect, right, names, got, [net])


def damage(net: Any, how: str) -> None:
    """Kill clones: their weights are no numbers, or their outputs overflow."""
    with torch.no_grad():
        if how == "one":
            net.head.weight[-1, 0, 0] = torch.nan
        elif how == "all":
            net.head.weight.fill_(torch.nan)
        elif how == "huge weight":
            net.head.weight[0] = 3e38
        else:
            net.head.bias[0] = torch.inf


COPIES = {
    "as it is": lambda net, opt: (net, opt),
    "deepcopy": lambda net, opt: copy.deepcopy((net, opt)),
    "pickle": lambda net, opt: pickle.loads(pickle.dumps((net, opt))),
    "bfloat16": lambda net, opt: (net.bfloat16(), opt),
    "double": lambda net, opt: (net.double(), opt),
    "load into a fresh pair": lambda net, opt: _fresh(net, opt),
    "load a net of another interval": lambda net, opt: _foreign(net, opt, 0),
    "load an optimizer of another interval": lambda net, opt: _foreign(net, opt, 1),
    "the same after a deepcopy": lambda net, opt: _foreign(*copy.deepcopy((net, opt)), 1),
}
# After these a step is another than before.
OTHERS = (
    "bfloat16",
    "double",
    "reset_parameters",
    *[text for text in COPIES if "interval" in text],
)
OTHERS += ("the same after a deepcopy",)


def _fresh(net: Any, opt: Any) -> tuple[Any, Any]:
    """Another interval, then the checkpoint."""
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kind = type(net.head).__name__
    other = alrao.AlraoModel(Plain(), heads.make_head(kind))
    other_opt = alrao.AlraoSGD(other, (1e-6, 5e-6))
    first, second = (other, other_opt) if torch.rand(()) < 0.5 else (other_opt, other)
    for target in (first, second):
        target.load_state_dict(saved[0 if target is other else 1])
    return other, other_opt


def _foreign(net: Any, opt: Any, which: int) -> tuple[Any, Any]:
    """Load the state of a model, or of an optimizer, that was made with another interval."""
    other = copy.deepcopy(net)
    other_opt = alrao.AlraoSGD(other, (1e-6, 5e-6))
    (net, opt)[which].load_state_dict((other, other_opt)[which].state_dict())
    return net, opt


@area("copies", weight=3)
def copies(rng: Random) -> Trial:
    """clone_lr, suggested_lr, posterior and the next step of a model and optimizer that were copied."""
    text = rng.choice(list(COPIES))
    kind = rng.choice(["ClassifierClones", "RegressorClones"])
    net, opt, x, y = trained(rng, kind)
    expected = trained_again(net, opt, x, y) if text not in OTHERS else None

    def right(pair: Any) -> None:
        own, own_opt = pair
        rates = own_opt.state[own.head.weight]["rate"].double()
        assert_near(own.head.clone_lr, rates.float(), "clone_lr")
        right_lr = float((own.posterior() * rates.log()).sum().exp())
        assert abs(own.suggested_lr() / right_lr - 1) < 1e-6, f"suggested_lr {own.suggested_lr()}"
        assert own.head.switch.log_posterior.dtype == torch.float64
        assert_near(own.posterior().sum(), 1.0, "sum of the posterior", 1e-9)
        if expected is not None:
            step(own, own_opt, x, y)
            for p, q in zip(own.parameters(), expected):
                assert torch.equal(p, q), "a step after the copy is another than one before"
        own_opt.load_state_dict(own_opt.state_dict())
        assert_near(own.head.clone_lr, rates.float(), "clone_lr after loading")

    run = lambda: COPIES[text](net, opt)  # noqa: E731
    return Trial(f"{kind}, {text}", run, "right", right)


def step(net: Any, opt: Any, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    net(x, targets=y).backward()
    opt.step()


def trained_again(net: Any, opt: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """The parameters after one more step of a twin that was never copied: what a step does is deterministic."""
    saved = [[t.clone() for t in net.state_dict().values()], copy.deepcopy(opt.state_dict())]
    step(net, opt, x, y)
    result = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for tensor, before in zip(net.state_dict().values(), saved[0]):
            tensor.copy_(before)
    opt.load_state_dict(saved[1])
    opt.zero_grad()
    return result
