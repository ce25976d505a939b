"""Switch, heads and AlraoModel: their arguments, and one training step or prediction against formulas in float64."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alrao_fast as alrao
from campaign import oracles, tensors
from campaign.engine import Trial, area
from campaign.oracles import assert_near
from campaign.values import INF, NAN, Choice, Flag, Integer, Number, Odd

D, C, N, B = 3, 4, 3, 5
OPEN = Number((0.999, 0.5), outside=(0.0, 1.0, -0.5, 2.0))
HEADS: dict[str, dict[str, Any]] = {
    "ClassifierClones": {
        "in_features": Integer((D,)),
        "num_classes": Integer((C, 1)),
        "num_clones": Integer((1, N)),
        "bias": Flag(truth=True),
        "theta": OPEN,
        "evidence": Choice(("mean", "sum")),
        "reduction": Choice(("mean", "sum")),
        "ignore_index": Integer((-100, -1, 0, 255), least=None),
        "memory_budget": Integer((1, 1000), least=1, none=True),
        "dtype": None,
        "device": None,
    },
    "RegressorClones": {
        "in_features": Integer((D,)),
        "out_features": Integer((C, 1)),
        "num_clones": Integer((1, N)),
        "bias": Flag(truth=True),
        "theta": OPEN,
        "sigma2": Number((1.0, 0.1, 7), outside=(0.0, -1.0)),
        "evidence": Choice(("mean", "sum")),
        "reduction": Choice(("mean", "sum")),
        "memory_budget": Integer((1,), least=1, none=True),
        "dtype": None,
        "device": None,
    },
    "Switch": {"num_clones": Integer((1, N)), "theta": OPEN, "device": None},
}
# Of what torch takes as a dtype or device, and what nobody does.
DTYPES = {
    "right": [None, torch.float32, torch.float64],
    # float is float64 to torch's own factories.
    "either": [torch.bfloat16, torch.float16, float],
    "refused": ["float32", 3, Odd(), torch.int64, torch.bool, torch.complex64],
}
DEVICES = {
    "right": [None, "cpu", torch.device("cpu")],
    "either": ["meta"],
    "refused": ["gpu", "", Odd(), 1.5, torch.float32, ["cpu"]],
}


def make_head(kind: str, **options: Any) -> Any:
    sizes = {"num_classes": C} if kind == "ClassifierClones" else {"out_features": C}
    first = {} if kind == "Switch" else {"in_features": D, **sizes}
    return getattr(alrao, kind)(**{**first, "num_clones": N, **options})


@area("heads' arguments", weight=4)
def constructors(rng: Random) -> Trial:
    kind = rng.choice(["ClassifierClones", "RegressorClones", "ClassifierClones", "Switch"])
    name = rng.choice(list(HEADS[kind]))
    kinds = HEADS[kind][name]
    if kinds is None:
        table = DTYPES if name == "dtype" else DEVICES
        expect = rng.choice(["right", "refused", "refused", "either"])
        value = rng.choice(table[expect])
    else:
        expect, value = kinds.kinds(rng)

    def right(head: Any) -> None:
        if value == "meta" or (isinstance(value, str) and name == "device" and value != "cpu"):
            return
        if kind == "Switch":
            n = int(value) if name == "num_clones" else N
            theta = float(value) if name == "theta" else 0.999
            _observe_and_compare(head, oracles.SwitchState(n, theta), [-0.5 * k for k in range(n)])
            return
        assert head.num_clones == (int(value) if name == "num_clones" else N)
        assert (head.bias is not None) == (bool(value) if name == "bias" else True)
        train_and_compare(head, rng, names={name: value})

    return Trial(
        f"{kind}({name}={value!r:.60})",
        lambda: make_head(kind, **{name: value}),
        expect,
        right,
        (name,),
        value,
    )


def _batch(head: Any, rng: Random, features: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rng.getrandbits(30))
    dtype = head.weight.dtype
    x = torch.randn(B, features or head.in_features, generator=generator).to(dtype)
    if isinstance(head, alrao.ClassifierClones):
        return x, torch.randint(head.num_classes, (B,), generator=generator)
    return x, torch.randn(B, head.out_features, generator=generator).to(dtype)


def oracle(head: Any, x: Tensor, y: Tensor, **options: Any) -> oracles.Mixture:
    """The head's loss and gradients by formula."""
    if isinstance(head, alrao.RegressorClones):
        options = {"sigma2": float(head.sigma2), **options}
    else:
        options = {"ignore_index": int(head.ignore_index), **options}
    reduction = str(head.reduction)
    bias, posterior = head.bias, head.switch.log_posterior
    return oracles.mixture(x, head.weight, bias, posterior, y, reduction=reduction, **options)


def train_and_compare(head: Any, rng: Random, names: dict[str, Any] | None = None) -> None:
    x, y = _batch(head, rng)
    compare_step(head, x, y, x, y)
    prediction = head.eval()(x)
    right = oracles.log_prob if isinstance(head, alrao.ClassifierClones) else oracles.mean
    assert_near(prediction, right(x, head.weight, head.bias, head.switch.log_posterior), "eval")


def compare_step(head: Any, x: Any, y: Any, plain_x: Tensor, plain_y: Tensor) -> None:
    """A training forward and backward with x and y, whose meaning is that of the plain ones."""
    expected = oracle(head, plain_x, plain_y)
    state = oracles.SwitchState.of(head.switch.logw, head.switch.t, float(head.switch.theta))
    running = head.running.clone()
    training = head.training
    leaf = x if x.requires_grad and x.is_leaf else x.detach().requires_grad_()
    loss = head(leaf, y)
    compare_loss(head, leaf, loss, expected)
    if training and float(expected.stats[2, 0]):
        own = -expected.stats[0] / (expected.stats[2] if head.evidence == "mean" else 1)
        state.update(own.tolist())
        running = running + expected.stats
    assert int(head.switch.t) == state.t, f"t is {int(head.switch.t)}, right is {state.t}"
    low = head.weight.dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if low else 1e-5
    assert_near(head.switch.log_posterior, state.log_posterior, "log_posterior", tolerance)
    assert_near(head.running, running, "running statistics", tolerance)


def compare_loss(head: Any, leaf: Tensor, loss: Tensor, expected: oracles.Mixture) -> None:
    low = torch.bfloat16 in (leaf.dtype, head.weight.dtype) or head.weight.dtype == torch.float16
    tolerance = 3e-2 if low else None
    head.zero_grad()
    loss.backward()
    assert_near(loss, expected.loss, "loss", tolerance)
    grads = [("x", leaf.grad, expected.dx), ("weight", head.weight.grad, expected.dweight)]
    if head.bias is not None:
        grads.append(("bias", head.bias.grad, expected.dbias))
    for name, own, right in grads:
        assert own is not None or not right.numel(), f"no gradient to {name}"
        if own is not None:
            assert_near(own, right, f"gradient to {name}", tolerance)


def _observe_and_compare(switch: Any, state: oracles.SwitchState, values: list[float]) -> None:
    for scale in (1.0, 0.3):
        seen = [scale * v for v in values]
        switch.update(torch.tensor(seen, dtype=torch.float64))
        state.update(seen)
    assert_near(switch.log_posterior, state.log_posterior, "log_posterior")
    assert int(switch.t) == state.t
    assert_near(switch.posterior().sum(), 1.0, "sum of the posterior", 1e-9)


def trained_head(kind: str, rng: Random, **options: Any) -> Any:
    """A head whose switch has seen something."""
    torch.manual_seed(rng.getrandbits(30))
    head = make_head(kind, **options)
    head(*_batch(head, rng))
    return head


# Text -> (expectation, what is given in place of a good argument).
FEATURES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    **{k: ("right", v) for k, v in tensors.SAME.items()},
    **{k: ("refused", v) for k, v in tensors.NONSENSE.items()},
    "float64": ("right", lambda t: t.double()),
    "bfloat16": ("right", lambda t: t.bfloat16()),
    "integers": ("either", lambda t: t.int()),
    "bool": ("either", lambda t: t > 0),
    "expanded": ("right", lambda t: t[:1].expand_as(t)),
    "a scalar": ("refused", lambda t: t[0, 0]),
}
CLASSES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    **{k: ("right", v) for k, v in tensors.SAME.items()},
    **{k: ("refused", v) for k, v in tensors.NONSENSE.items() if k != "None"},
    "uint8": ("right", lambda t: t.to(torch.uint8)),
    "int32": ("right", lambda t: t.int()),
    "int16": ("either", lambda t: t.short()),
    "bool": ("refused", lambda t: t > 0),
    "float": ("refused", lambda t: t.float()),
    "float with a fraction": ("refused", lambda t: t + 0.5),
    "a class too many": ("refused", lambda t: t.clone().fill_(C)),
    "negative": ("refused", lambda t: t - C),
    "a huge class": ("refused", lambda t: t + 2**40),
    "one hot": ("refused", lambda t: F.one_hot(t, C)),
    "probabilities": ("refused", lambda t: F.one_hot(t, C).float()),
    "one for all": ("refused", lambda t: t[:1]),
    "all ignored": ("right", lambda t: torch.full_like(t, -100)),
    "some ignored": ("right", lambda t: t.clone().index_fill_(0, torch.tensor([0, 2]), -100)),
}
VALUES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    **{k: ("right", v) for k, v in tensors.SAME.items()},
    **{k: ("refused", v) for k, v in tensors.NONSENSE.items() if k != "None"},
    "float64": ("right", lambda t: t.double()),
    "integers": ("either", lambda t: t.long()),
    "bool": ("either", lambda t: t > 0),
    "one output": ("refused", lambda t: t[:, :1]),
    "without outputs": ("refused", lambda t: t[:, 0]),
    "one for all": ("refused", lambda t: t[:1]),
}
_PLAIN = {"bool": lambda t: (t > 0).float(), "integers": lambda t: t.long().float()}


@area("heads' data", weight=6)
def data(rng: Random) -> Trial:
    """forward of a head in training, of features or targets of every kind."""
    kind = rng.choice(["ClassifierClones", "RegressorClones"])
    options = {"bias": rng.random() < 0.7, "reduction": rng.choice(["mean", "sum"])}
    options |= {"evidence": rng.choice(["mean", "sum"])}
    what = rng.choice(["features", "targets"])
    table = FEATURES if what == "features" else CLASSES if kind[0] == "C" else VALUES
    text = rng.choice(list(table))
    if kind[0] == "C" and "ignored" not in text and rng.random() < 0.5:
        options["ignore_index"] = 1
    head = trained_head(kind, rng, **options)
    backend = rng.choice(["cpu", "reference"])
    x, y = _batch(head, rng)
    expect, change = table[text]
    plain = [x, y]
    given = list(plain)
    place = 0 if what == "features" else 1
    given[place] = change(plain[place])
    if expect != "refused":
        as_meant = _PLAIN.get(text, change)(plain[place])
        plain[place] = as_meant if place == 0 or kind[0] == "R" else as_meant.long()
    training = rng.random() < 0.8
    head.train(training)

    def run() -> Tensor:
        with alrao.use_backend(backend):
            return head(*given)

    def right(loss: Tensor) -> None:
        # Once more from the start, with gradients.
        twin.train(training)
        leaf = given[0] if torch.is_tensor(given[0]) else plain[0]
        if not leaf.is_floating_point():
            expected = oracle(twin, plain[0], plain[1])
            assert_near(loss, expected.loss, "loss")
            return
        with alrao.use_backend(backend):
            compare_step(twin, leaf, given[1], plain[0], plain[1])

    twin = copy.deepcopy(head)
    mode = "train" if training else "eval"
    names = (what, what[:-1], "x", "input", "D", "K", *(("impl",) if text == "meta" else ()))
    got = given[place] if expect == "refused" else None
    if text == "a dimension more":
        # Features of another shape may be said of the targets.
        names, got = (*names, "target", "targets"), None
    call = f"{kind}({options}).{mode}()({what} {text}), {backend}"
    return Trial(call, run, expect, right, names, got, [head, given])


@area("predictions", weight=3)
def predictions(rng: Random) -> Trial:
    """eval() without targets, clone_outputs and posterior after edits of the switch."""
    kind = rng.choice(["ClassifierClones", "RegressorClones"])
    head = trained_head(kind, rng, bias=rng.random() < 0.7).eval()
    backend = rng.choice(["cpu", "reference"])
    x, _ = _batch(head, rng)
    text = rng.choice(list(FEATURES))
    expect, change = FEATURES[text]
    if text == "a dimension more":
        expect = "right"
    given = change(x)
    edit = rng.choice(["none", "fill", "load", "half", "large logits", "unnormalised"])
    with torch.no_grad():
        if edit == "fill":
            head.switch.log_posterior.copy_(torch.tensor([0.7, 0.2, 0.1]).double().log())
        elif edit == "load":
            file = io.BytesIO()
            torch.save(head.state_dict(), file)
            file.seek(0)
            head = make_head(kind, bias=head.bias is not None).eval()
            head.load_state_dict(torch.load(file, weights_only=True))
        elif edit == "half":
            head = head.bfloat16()
        elif edit == "large logits":
            head.weight.mul_(10.0 ** rng.choice([3, 6, 8]))
        elif edit == "unnormalised":
            head.switch.log_posterior.sub_(0.7)
    plain = _PLAIN.get(text, change)(x) if expect != "refused" else x

    def run() -> Tensor:
        with alrao.use_backend(backend):
            return head(given)

    def right(result: Tensor) -> None:
        reference = oracles.log_prob if kind[0] == "C" else oracles.mean
        expected = reference(plain, head.weight, head.bias, head.switch.log_posterior)
        low = head.weight.dtype == torch.bfloat16 or plain.dtype == torch.bfloat16
        if kind[0] == "C":
            total = result.double().exp().sum(-1)
            assert_near(total, torch.ones_like(total), "sum of the probabilities", 1e-4)
        scale = max(1.0, float(expected.abs().max()))
        assert_near(result / scale, expected / scale, "eval", 3e-2 if low else 2e-5)

    got = given if expect == "refused" else None
    names = ("features", "x", "input", "D", *(("impl",) if text == "meta" else ()))
    call = f"{kind}.eval()({text}), switch: {edit}, {backend}"
    return Trial(call, run, expect, right, names, got, [head, given])


def _cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda out: torch.stack([F.cross_entropy(o, y, reduction="none") for o in out])


def _mine(out: Tensor) -> Tensor:
    raise ValueError("my criterion's own error")


CRITERIA: dict[str, tuple[str, Any]] = {
    "cross entropy": ("right", _cross_entropy),
    "half of it": ("right", lambda y: lambda out: _cross_entropy(y)(out)[:, ::2]),
    "scaled": ("right", lambda y: lambda out: _cross_entropy(y)(out) * 3),
    "None": ("refused", lambda y: None),
    "text": ("refused", lambda y: "mse"),
    "a class": ("refused", lambda y: nn.CrossEntropyLoss),
    "returns a list": ("refused", lambda y: lambda out: [1.0] * N),
    "returns a number": ("refused", lambda y: lambda out: 1.0),
    "returns None": ("refused", lambda y: lambda out: None),
    "reduces": ("refused", lambda y: lambda out: out.sum()),
    "sums over samples": ("refused", lambda y: lambda out: out.flatten(1).sum(1)),
    "complex": ("refused", lambda y: lambda out: _cross_entropy(y)(out).to(torch.complex64)),
    "raises": ("refused", lambda y: _mine),
}


@area("clone_loss", weight=2)
def clone_loss(rng: Random) -> Trial:
    head = trained_head("ClassifierClones", rng, evidence=rng.choice(["mean", "sum"]))
    x, y = _batch(head, rng)
    text = rng.choice(list(CRITERIA))
    expect, make = CRITERIA[text]
    criterion = make(y)
    posterior = head.switch.log_posterior.clone()
    x.requires_grad_()

    def right(loss: Tensor) -> None:
        loss.backward()
        leaf = oracles.double(x).requires_grad_()
        weight = oracles.double(head.weight).requires_grad_()
        bias = oracles.double(head.bias).requires_grad_()

        def losses(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return criterion(torch.stack([F.linear(x, w[n], b[n]) for n in range(N)]))

        mixed = losses(leaf, weight.detach(), bias.detach())
        total = -torch.logsumexp(posterior.unsqueeze(1) - mixed, 0).mean()
        (total + losses(leaf.detach(), weight, bias).sum() / mixed.size(1)).backward()
        assert_near(loss, total, "loss")
        assert_near(x.grad, leaf.grad, "gradient to x")
        assert_near(head.weight.grad, weight.grad, "gradient to weight")
        assert_near(head.bias.grad, bias.grad, "gradient to bias")

    # A criterion's own error passes as it is.
    mine = ValueError("my criterion's own error") if text == "raises" else None
    run = lambda: head.clone_loss(x, criterion)  # noqa: E731
    call = f"clone_loss(x, {text})"
    return Trial(call, run, expect, right, ("criterion",), None, [head, x], mine)


@area("Switch.update", weight=3)
def switch_update(rng: Random) -> Trial:
    n = rng.choice([1, N, 7])
    switch = alrao.Switch(n)
    switch.update(torch.linspace(-1, 0, n))
    values = [-rng.random() * 10 ** rng.choice([-3, 0, 3, 12, 300]) for _ in range(n)]
    for special in (-INF, NAN, INF):
        if rng.random() < 0.15:
            values[rng.randrange(n)] = special
    if rng.random() < 0.1:
        values = [-INF] * n
    given: Any = torch.tensor(values, dtype=torch.float64)
    text, (expect, given) = tensors.kinds(rng, given, odds=0.4)
    if n == 1 and text == "one too short":
        text, given = "a scalar", torch.tensor(0.5)
    odd = rng.choice([None, None, torch.float32, torch.bfloat16, torch.int64, torch.bool])
    if expect == "right" and odd is not None and all(map(math.isfinite, values)):
        given = given.detach().to(odd)
        text = f"{text} {odd}"
        values = given.double().tolist()
        expect = "right" if odd == torch.float32 else "either"
    state = oracles.SwitchState.of(switch.logw, switch.t, 0.999)

    def right(result: None) -> None:
        state.update(values)
        assert int(switch.t) == state.t, f"t is {int(switch.t)}, right is {state.t}"
        assert_near(
            switch.log_posterior, state.log_posterior, f"log_posterior after {values}", 1e-6
        )
        assert_near(switch.posterior().sum(), 1.0, "sum of the posterior", 1e-9)

    backend = rng.choice(["cpu", "reference"])

    def run() -> None:
        with alrao.use_backend(backend):
            switch.update(given)

    got = given if expect == "refused" else None
    call = f"Switch({n}).update({text} {[f'{v:.3g}' for v in values]}), {backend}"
    return Trial(call, run, expect, right, ("log_likelihood",), got, [switch])
