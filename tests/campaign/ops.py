"""alrao_fast.functional by backend: one argument of a good call exchanged, the results against float64 formulas."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import alrao_fast as alrao
from alrao_fast import functional
from campaign import oracles, tensors
from campaign.engine import Trial, area
from campaign.oracles import assert_near
from campaign.values import Choice, Flag, Integer, Number, Odd

BACKENDS = ("cpu", "reference")
IMPL = Choice(BACKENDS)


def _lists(value: Any) -> Any:
    """Copies of tensors, within lists too."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return [_lists(v) for v in value] if isinstance(value, list) else value


def feature_arguments(rng: Random, kind: str) -> dict[str, Any]:
    dtype = rng.choice([torch.float64, torch.float32])
    generator = torch.Generator().manual_seed(rng.getrandbits(30))

    def make(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes = [(3, 2), (4,), (2, 2, 3)]
    positive = [make(s).square() for s in shapes]
    arguments: dict[str, Any] = {
        "params": [make(s) for s in shapes],
        "grads": [make(s) for s in shapes],
        "rates": [torch.rand(s[0], generator=generator) for s in shapes],
        "steps": torch.tensor([0, 3, 5]),
        "lr": 0.5,
        "weight_decay": rng.choice([0.0, 0.1]),
        "maximize": rng.random() < 0.3,
        "impl": rng.choice(BACKENDS),
    }
    if kind == "SGD":
        arguments |= {"momentum": 0.9, "dampening": rng.choice([0.0, 0.5])}
        arguments |= {"momentum_buffers": [make(s) for s in shapes], "nesterov": rng.random() < 0.3}
    else:
        arguments |= {"exp_avgs": [make(s) for s in shapes], "exp_avg_sqs": positive}
        arguments |= {"betas": (0.9, 0.99), "eps": 1e-8}
        arguments["decoupled_weight_decay"] = rng.random() < 0.5
    return arguments


NUMBERS: dict[str, Any] = {
    "lr": Number((1.0, 0.25, 0.0), finite=False),
    "weight_decay": Number((0.0, 0.5), finite=False),
    "momentum": Number((0.9, 0.5), finite=False),
    "dampening": Number((0.0, 0.5), finite=False),
    "eps": Number((1e-8, 1e-2), finite=False),
    "nesterov": Flag(),
    "maximize": Flag(),
    "decoupled_weight_decay": Flag(),
    "impl": IMPL,
    "ignore_index": Integer((-100, 0, 1), least=None),
    "reduction": Choice(("mean", "sum")),
    "sigma2": Number((0.5, 2.0), outside=(0.0, -1.0)),
    "memory_budget": Integer((1, 10**6), none=True),
    "theta": Number((0.999, 0.5), outside=(0.0, 1.0, -1.0, 2.0)),
}
# Of lists of tensors: what may stand in the place of the list, or of its second entry.
LISTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "None": lambda ts: None,
    "a number": lambda ts: 3,
    "text": lambda ts: "tensors",
    "one missing": lambda ts: ts[:-1],
    "one too many": lambda ts: [*ts, ts[0].clone()],
    "another order": lambda ts: [ts[1], ts[0], *ts[2:]],
    "nested": lambda ts: [ts],
    "entry None": lambda ts: [ts[0], None, *ts[2:]],
    "entry text": lambda ts: [ts[0], "t", *ts[2:]],
    "entry a list": lambda ts: [ts[0], ts[1].tolist(), *ts[2:]],
    "entry numpy": lambda ts: [ts[0], ts[1].detach().numpy(), *ts[2:]],
    "entry meta": lambda ts: [ts[0], ts[1].to("meta"), *ts[2:]],
    "entry sparse": lambda ts: [ts[0], ts[1].to_sparse(), *ts[2:]],
    "entry complex": lambda ts: [ts[0], ts[1].to(torch.complex64), *ts[2:]],
    "entry integers": lambda ts: [ts[0], ts[1].long(), *ts[2:]],
    "entry of another shape": lambda ts: [ts[0], ts[1][:-1].clone(), *ts[2:]],
    "entry bfloat16": lambda ts: [ts[0], ts[1].bfloat16(), *ts[2:]],
}
REPEATED: dict[str, Callable[[list[Tensor]], Any]] = {
    "entry twice": lambda ts: [ts[0], ts[1], ts[1]],
    "entry expanded": lambda ts: [ts[0], ts[1][:1].expand(ts[1].shape), *ts[2:]],
    "entry with gaps": lambda ts: [ts[0], tensors.strided(ts[1]), *ts[2:]],
}
_SCALARS = {"grad_scale", "found_inf"}


@area("feature ops", weight=5)
def feature(rng: Random) -> Trial:
    kind = rng.choice(["SGD", "Adam"])
    arguments = feature_arguments(rng, kind)
    function = functional.feature_sgd_ if kind == "SGD" else functional.feature_adam_
    name = rng.choice(
        [n for n in (*arguments, "betas", *_SCALARS) if n != "betas" or kind == "Adam"]
    )
    meant = dict(arguments)
    if name in NUMBERS:
        expect, value = NUMBERS[name].kinds(rng)
        text = f"{name}={value!r:.60}"
        meant[name] = value
    elif name == "betas":
        expect, value = rng.choice(
            [("right", (0.5, 0.9)), ("either", [0.5, 0.9]), ("refused", 0.9), ("refused", ("a", 1))]
            + [("refused", None), ("refused", (0.9,)), ("refused", (1j, 0.5))]
        )
        text, meant[name] = f"betas={value!r}", value
    elif name in _SCALARS:
        good = torch.tensor(2.0) if name == "grad_scale" else torch.tensor(rng.choice([0.0, 1.0]))
        odd = [
            2.0,
            "a",
            Odd(),
            torch.ones(3),
            good.long(),
            good.to("meta"),
            good.to(torch.complex64),
        ]
        expect, value = rng.choice([("right", good), ("right", None), ("refused", rng.choice(odd))])
        text, meant[name] = f"{name}={value!r:.60}", value
    elif name == "steps":
        steps = arguments["steps"]
        odd = [None, [0, 3, 5], "a", steps.float(), steps[:2], steps.int(), steps.to("meta"), 3]
        expect, value = rng.choice([("right", steps), ("refused", rng.choice(odd))])
        text = f"steps={value!r}"
    else:
        table = {**LISTS, **REPEATED} if name not in ("grads", "rates") else LISTS
        text = rng.choice(list(table))
        expect, value = "refused", table[text](arguments[name])
        if text == "entry bfloat16" and name.endswith(("buffers", "avgs", "sqs")):
            text, value = "entry None", LISTS["entry None"](arguments[name])
        text = f"{name}: {text}"
    given = {**arguments, name: value}
    if expect == "refused" and name == "impl":
        text += ", by backend"
    before = {k: _lists(v) for k, v in meant.items()}

    def right(result: None) -> None:
        expected = feature_oracle(kind, before)
        for key, values in expected.items():
            for own, other in zip(given[key], values):
                assert_near(own, other, key)

    got = value if expect == "refused" and (name in NUMBERS or name in ("betas", "steps")) else None
    names = (name, f"{name}[1]", name.replace("betas", "beta1"))
    call = f"{function.__name__}({text}, impl={given['impl']!r:.20})"
    return Trial(call, lambda: function(**given), expect, right, names, got, [arguments, given])


def feature_oracle(kind: str, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    """One step of torch's equations with r(i) in float64, by hand."""
    result: dict[str, list[Tensor]] = {"params": []}
    found = arguments.get("found_inf")
    if found is not None and float(found):
        return {"params": [p.double() for p in arguments["params"]]}
    for t, p in enumerate(arguments["params"]):
        step = int(arguments["steps"][t])
        p, g = p.double(), arguments["grads"][t].double()
        rate = float(arguments["lr"]) * arguments["rates"][t].double().view(
            -1, *[1] * (p.dim() - 1)
        )
        g = -g if arguments["maximize"] else g
        if arguments.get("grad_scale") is not None:
            g = g / float(arguments["grad_scale"])
        decay = float(arguments["weight_decay"])
        if kind == "SGD":
            g = g + decay * p
            momentum, buf = float(arguments["momentum"]), arguments["momentum_buffers"][t].double()
            buf = momentum * buf + (1 - float(arguments["dampening"])) * g if step else g
            d = g + momentum * buf if arguments["nesterov"] else buf
            result["params"].append(p - rate * d)
            result.setdefault("momentum_buffers", []).append(buf)
            continue
        if arguments["decoupled_weight_decay"]:
            p = p * (1 - rate * decay)
        else:
            g = g + decay * p
        one, two = (float(beta) for beta in arguments["betas"])
        m = one * arguments["exp_avgs"][t].double() + (1 - one) * g
        v = two * arguments["exp_avg_sqs"][t].double() + (1 - two) * g * g
        root = (v / (1 - two ** (step + 1))).sqrt() + float(arguments["eps"])
        result["params"].append(p - rate / (1 - one ** (step + 1)) * m / root)
        result.setdefault("exp_avgs", []).append(m)
        result.setdefault("exp_avg_sqs", []).append(v)
    return result


MIXTURE = {
    "switch_mixture_nll": ("x", "weight", "bias", "log_posterior", "target"),
    "switch_mixture_stats": ("x", "weight", "bias", "log_posterior", "target"),
    "switch_mixture_gaussian_nll": ("x", "weight", "bias", "log_posterior", "target"),
    "switch_mixture_gaussian_stats": ("x", "weight", "bias", "log_posterior", "target"),
    "switch_mixture_log_prob": ("x", "weight", "bias", "log_posterior"),
    "switch_mixture_mean": ("x", "weight", "bias", "log_posterior"),
}


@area("mixture ops", weight=6)
def mixture(rng: Random) -> Trial:
    op = rng.choice(list(MIXTURE))
    generator = torch.Generator().manual_seed(rng.getrandbits(30))
    dtype = rng.choice([torch.float64, torch.float32])
    b, d, c, n = rng.choice([(5, 3, 4, 3), (1, 1, 1, 1), (6, 2, 3, 1)])
    classes = "gaussian" not in op
    good: dict[str, Any] = {
        "x": torch.randn(b, d, generator=generator, dtype=dtype),
        "weight": torch.randn(n, c, d, generator=generator, dtype=dtype),
        "bias": torch.randn(n, c, generator=generator, dtype=dtype),
        "log_posterior": torch.randn(n, generator=generator, dtype=torch.float64).log_softmax(0),
    }
    options: dict[str, Any] = {"impl": rng.choice(BACKENDS)}
    if "target" in MIXTURE[op]:
        good["target"] = (
            torch.randint(c, (b,), generator=generator)
            if classes
            else torch.randn(b, c, generator=generator, dtype=dtype)
        )
        options |= {"reduction": rng.choice(["mean", "sum"])}
        options |= {"ignore_index": -100} if classes else {"sigma2": 2.0}
    others = [*options] if op == "switch_mixture_mean" else [*options, "memory_budget"]
    name = rng.choice([*MIXTURE[op], *MIXTURE[op], *MIXTURE[op], *others])
    given, meant = {**good, **options}, dict(good)
    if name in NUMBERS:
        expect, value = NUMBERS[name].kinds(rng)
        text = f"{name}={value!r:.60}"
    else:
        without = ("None",) if name == "bias" else ()
        # One row more or less is another shape of x alone; more dimensions of it are samples.
        without += ("a dimension more",) if name == "x" and "target" not in good else ()
        without += ("one too short", "one too long") if d == 1 and name in ("x", "weight") else ()
        text, (expect, value) = tensors.kinds(rng, good[name], *without, odds=0.6)
        if expect == "right":
            meant[name] = value
        text = f"{name}: {text}"
    given[name] = value
    for key in ("x", "weight", "bias"):
        if key != name and expect == "right":
            given[key] = given[key].clone().requires_grad_()

    def right(result: Any) -> None:
        mixture_oracle(op, given, meant, result)

    watched = [good, given]
    # Where x has other dimensions it may be the target that does not fit; a backend refuses devices by itself.
    got = value if expect == "refused" and name != "x" else None
    names = (name, "target") if name == "x" else (name,)
    names += ("impl",) if text.endswith("meta") else ()
    call = f"{op}({text}, impl={given['impl']!r:.20}), {str(dtype)[6:]}, B={b} D={d} C={c} N={n}"
    function = getattr(functional, op)
    run = lambda: function(**given)  # noqa: E731
    return Trial(call, run, expect, right, names, got, watched)


def mixture_oracle(op: str, given: dict[str, Any], meant: dict[str, Any], result: Any) -> None:
    inputs = [meant[key] for key in ("x", "weight", "bias", "log_posterior")]
    if op in ("switch_mixture_log_prob", "switch_mixture_mean"):
        right = oracles.log_prob if op.endswith("log_prob") else oracles.mean
        assert_near(result, right(*inputs), op)
        return
    options: dict[str, Any] = {"reduction": str(given["reduction"])}
    if "sigma2" in given:
        options["sigma2"] = float(given["sigma2"])
    else:
        options["ignore_index"] = int(given["ignore_index"])
    expected = oracles.mixture(*inputs, meant["target"], **options)
    loss, second = result
    assert_near(loss, expected.loss, "loss")
    stats = expected.stats if op.endswith("stats") else expected.stats[0] / expected.stats[2]
    assert_near(second, stats, "statistics", 2e-5)
    leaves = [given[key] for key in ("x", "weight", "bias")]
    if all(leaf.requires_grad and leaf.is_leaf for leaf in leaves):
        loss.backward()
        for key, leaf, own in zip(("x", "weight", "bias"), leaves, expected[2:]):
            assert_near(leaf.grad, own, f"gradient to {key}")


@area("switch op", weight=2)
def switch(rng: Random) -> Trial:
    n = rng.choice([1, 3])
    plain = alrao.Switch(n)
    plain.update(torch.linspace(-1, 0, n))
    good: dict[str, Any] = {
        "logw": plain.logw.clone(),
        "log_posterior": plain.log_posterior.clone(),
        "t": plain.t.clone(),
        "log_likelihood": -torch.rand(n, dtype=torch.float64),
    }
    name = rng.choice([*good, *good, "theta", "impl"])
    given = {**good, "theta": 0.999, "impl": rng.choice(BACKENDS)}
    meant = dict(given)
    if name in NUMBERS:
        expect, value = NUMBERS[name].kinds(rng)
        text = f"{name}={value!r:.60}"
        meant[name] = value
    elif name == "log_likelihood":
        without = () if n > 1 else ("one too short",)
        text, (expect, value) = tensors.kinds(rng, good[name], *without)
        text = f"{name}: {text}"
    else:
        text, change = tensors.nonsense(rng)
        expect, value = "refused", change(good[name])
        text = f"{name}: {text}"
    given[name] = value
    state = oracles.SwitchState.of(
        good["logw"], good["t"], 0.5 if expect == "refused" else float(meant["theta"])
    )
    seen = good["log_likelihood"].tolist()

    def right(result: None) -> None:
        state.update(seen)
        assert_near(given["log_posterior"], state.log_posterior, "log_posterior", 1e-8)
        assert_near(given["logw"], torch.tensor(state.logw, dtype=torch.float64), "logw", 1e-8)
        assert int(given["t"]) == state.t

    got = value if expect == "refused" else None
    call = f"switch_update_({text}, impl={given['impl']!r:.20}), N={n}"
    run = lambda: functional.switch_update_(**given)  # noqa: E731
    names = (name, "impl") if text.endswith("meta") else (name,)
    return Trial(call, run, expect, right, names, got, [good, given])


@area("plain loss", weight=1)
def plain_loss(rng: Random) -> Trial:
    """One clone is F.cross_entropy, or F.mse_loss, on every backend and for every dtype and shape."""
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    shape = rng.choice([(4,), (2, 3), (0,), (1, 2, 2), ()])
    backend = rng.choice(BACKENDS)
    x = torch.randn(*shape, 3).to(dtype).requires_grad_()
    y = torch.randint(5, shape)
    with torch.device("cpu"):
        head = alrao.ClassifierClones(3, 5, 1, reduction="sum", dtype=dtype)

    def run() -> Tensor:
        with alrao.use_backend(backend):
            return head(x, y)

    def right(loss: Tensor) -> None:
        loss.backward()
        leaf, weight = oracles.double(x).requires_grad_(), oracles.double(head.weight[0])
        logits = F.linear(leaf, weight, oracles.double(head.bias[0]))
        plain = F.cross_entropy(logits.reshape(-1, 5), y.reshape(-1), reduction="sum")
        plain.backward()
        low = dtype in (torch.bfloat16, torch.float16)
        assert_near(loss, plain, "loss", 2e-2 if low else None)
        assert_near(x.grad, leaf.grad, "gradient", 3e-2 if low else None)

    return Trial(f"one clone, {dtype}, shape {shape}, {backend}", run, "right", right)
