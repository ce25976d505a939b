"""Samplers, feature layouts, describe_rates and the choice of backends."""

from __future__ import annotations

import io
from random import Random
from typing import Any

import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import backends
from campaign.engine import Trial, area
from campaign.oracles import assert_near
from campaign.values import Choice, Kind, Number, Odd, ranges

POSITIVE = Number((1e-3, 0.5), outside=(0.0, -0.1, 1e-60))
LEARNING_RATE = Number((0.0, 0.5, 1e-3), outside=(-0.1,))
SAMPLERS: dict[str, dict[str, Any]] = {
    "LogUniform": {"lo": POSITIVE, "hi": Number((1.0, 2.0), outside=(0.0, -1.0, 1e39, 1e-5))},
    "LogTriangular": {"lo": POSITIVE, "hi": Number((1.0, 2.0), outside=(0.0, -1.0, 1e39, 1e-5))},
    "PerWeight": {"lo": POSITIVE, "hi": Number((1.0, 2.0), outside=(0.0, -1.0, 1e39, 1e-5))},
    "Fraction": {"p": Number((0.0, 0.5, 1.0), outside=(-0.1, 1.1)), "lr": LEARNING_RATE},
    "Constant": {"lr": LEARNING_RATE},
}
GOOD = {"lo": 1e-3, "hi": 1.0, "p": 0.5, "lr": 0.25}


@area("samplers", weight=2)
def samplers(rng: Random) -> Trial:
    kind = rng.choice(list(SAMPLERS))
    name = rng.choice(list(SAMPLERS[kind]))
    expect, value = SAMPLERS[kind][name].kinds(rng)
    arguments = {key: GOOD[key] for key in SAMPLERS[kind]} | {name: value}

    def right(sampler: Any) -> None:
        given = {k: float(v) for k, v in arguments.items()}
        rates = sampler(200, torch.Generator().manual_seed(3))
        assert rates.shape == (200,) and rates.dtype == torch.float32, rates.dtype
        again = sampler(200, torch.Generator().manual_seed(3))
        assert torch.equal(rates, again), "a seed does not give the same rates"
        if "lo" in given:
            low, high = torch.tensor([given["lo"], given["hi"]]).float()
            assert ((rates >= low) & (rates <= high)).all(), "a rate outside"
            clones = sampler.clone_rates(3).double()
            # Of the logarithm: both ends and the middle; of the triangular law the quantiles 1/6, 1/2 and 5/6.
            first = (1 / 12) ** 0.5 if kind == "LogTriangular" else 0.0
            places = torch.tensor([first, 0.5, 1 - first], dtype=torch.float64)
            expected = given["lo"] * (given["hi"] / given["lo"]) ** places
            assert_near(clones / expected, torch.ones(3), "clone_rates", 1e-5)
            return
        allowed = {0.0, given["lr"]} if "p" in given and given["p"] < 1 else {given["lr"]}
        allowed = {0.0} if given.get("p") == 0 else allowed
        found = {round(v, 6) for v in rates.tolist()}
        assert found <= {round(v, 6) for v in allowed}, f"rates {found}"

    names = (name, "lr_range") if name in ("lo", "hi") else (name,)
    got = value if expect == "refused" else None
    make = getattr(alrao, kind)
    run = lambda: make(**arguments)  # noqa: E731
    return Trial(f"{kind}({name}={value!r:.60})", run, expect, right, names, got)


def _raises(n: int, generator: Any) -> Any:
    raise ValueError("my sampler's own error")


OWN_SAMPLERS: dict[str, tuple[str, Any]] = {
    "a function": ("right", lambda n, g: torch.full((n,), 0.25)),
    "float64": ("right", lambda n, g: torch.full((n,), 0.25, dtype=torch.float64)),
    "expanded": ("right", lambda n, g: torch.tensor(0.25).expand(n)),
    "requires_grad": ("right", lambda n, g: torch.full((n,), 0.25, requires_grad=True)),
    "a number": ("refused", 0.25),
    "text": ("refused", "loguniform"),
    "a class": ("refused", alrao.LogUniform),
    "no arguments": ("refused", lambda: torch.ones(3)),
    "returns None": ("refused", lambda n, g: None),
    "returns a list": ("refused", lambda n, g: [0.25] * n),
    "returns a number": ("refused", lambda n, g: 0.25),
    "too few": ("refused", lambda n, g: torch.ones(n - 1)),
    "a matrix": ("refused", lambda n, g: torch.ones(n, 1)),
    "integers": ("refused", lambda n, g: torch.ones(n, dtype=torch.int64)),
    "complex": ("refused", lambda n, g: torch.ones(n, dtype=torch.complex64)),
    "negative": ("refused", lambda n, g: -torch.ones(n)),
    "NaN": ("refused", lambda n, g: torch.full((n,), torch.nan)),
    "infinite": ("refused", lambda n, g: torch.full((n,), torch.inf)),
    "too large for float32": ("refused", lambda n, g: torch.full((n,), 1e300, dtype=torch.float64)),
    "meta": ("refused", lambda n, g: torch.ones(n, device="meta")),
    "sparse": ("refused", lambda n, g: torch.ones(n).to_sparse()),
    "raises": ("refused", _raises),
}
GENERATORS: list[Kind] = [
    ("right", torch.Generator),
    ("right", lambda: None),
    *(("refused", lambda v=v: v) for v in (0, 1.5, "cpu", Odd(), torch.Generator, [0], True)),
]


@area("drawing", weight=2)
def drawing(rng: Random) -> Trial:
    """sampler=, generator= and model= of the optimizers."""
    net = nn.Linear(3, 4)
    make = rng.choice([alrao.AlraoSGD, alrao.AlraoAdam])
    name = rng.choice(["sampler", "generator", "model", "lr_range"])
    refusal = None
    if name == "sampler":
        text = rng.choice(list(OWN_SAMPLERS))
        expect, value = OWN_SAMPLERS[text]
        refusal = ValueError("my sampler's own error") if text == "raises" else None
    elif name == "generator":
        expect, produce = rng.choice(GENERATORS)
        value = produce()
        text = repr(value) if expect == "refused" else "one" if value else "None"
    elif name == "model":
        odd = [3, "net", nn.Linear, [net], Odd(), {"net": net}]
        expect, value = rng.choice([("right", net), ("right", None), ("refused", rng.choice(odd))])
        text = f"{value!r:.60}"
    else:
        expect, value = ranges(rng)
        text = f"{value!r:.60}"
    own_group = name in ("sampler", "lr_range") and rng.random() < 0.4
    given: Any = [{"params": net, name: value}] if own_group else net
    options = {} if own_group else {name: value}

    def right(opt: Any) -> None:
        rates = [opt.state[p]["rate"] for p in net.parameters()]
        assert torch.equal(*rates), "weight and bias of a unit have other rates"
        if name == "sampler":
            assert_near(rates[0], torch.full((4,), 0.25), "rate")

    got = value if expect == "refused" and not callable(value) else None
    text = f"{make.__name__}({'group, ' if own_group else ''}{name}: {text})"
    run = lambda: make(given, **options)  # noqa: E731
    return Trial(text, run, expect, right, (name, "rates"), got, [net], refusal)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3))
        self.shift = nn.Parameter(torch.zeros(3))


_FEATURE: dict[str, list[Any]] = {
    "dim": ["x", 1.5, None, 2, -3, (1, 0), (0, 0), [0.5], True, 1j, Odd(), torch.tensor([0, 1])],
    "num_features": ["x", 2.5, 0, -3, 2, Odd(), [3]],
    "vector": [3, None, Odd(), ["out"]],
    "feature_of": ["x", 3, [0, 1, 2], torch.ones(3), torch.tensor([0, 1, 3]), torch.arange(2)]
    + [torch.tensor([0, 1, -1]), torch.arange(3, device="meta"), Odd()],
    "kind": ["x", None, "Clone", "weight", 3, Odd(), True],
}
RULES: dict[str, tuple[str, Any]] = {
    "right": ("right", lambda m: {"kernel": alrao.Feature(dim=1), "shift": alrao.Feature()}),
    "a part": ("right", lambda m: {"shift": alrao.Feature(dim=0)}),
    "negative dim": ("right", lambda m: {"kernel": alrao.Feature(dim=-1)}),
    "nothing": ("right", lambda m: {}),
    "returns None": ("refused", lambda m: None),
    "returns a list": ("refused", lambda m: [alrao.Feature(dim=1)]),
    "values are numbers": ("refused", lambda m: {"kernel": 1}),
    "values are None": ("refused", lambda m: {"kernel": None}),
    "names no parameter": ("refused", lambda m: {"weight": alrao.Feature()}),
    "names a number": ("refused", lambda m: {3: alrao.Feature()}),
    "takes no module": ("refused", dict),
}


@area("layouts", weight=2)
def layouts(rng: Random) -> Trial:
    """register_feature_layout, and a rule whose Feature has one field exchanged."""
    kind = rng.choice(["field", "field", "rule", "arguments"])
    net = Dense()
    if kind == "arguments":
        types = [3, None, "Linear", nn.Linear(2, 2), int, [nn.Linear], Odd]
        value = rng.choice(types)
        name = rng.choice(["module_type", "rule"])
        odd = rng.choice([3, "rule", {"kernel": 1}, Odd(), [alrao.Feature()]])
        arguments = (value, lambda m: {}) if name == "module_type" else (Dense, odd)
        run = lambda: alrao.register_feature_layout(*arguments)  # noqa: E731
        got = value if name == "module_type" else odd
        text = f"register_feature_layout({name}: {got!r:.60})"
        return Trial(text, run, "refused", None, (name,), got)
    if kind == "field":
        name = rng.choice(list(_FEATURE))
        value = rng.choice(_FEATURE[name])
        fields: dict[str, Any] = {"dim": 1, "num_features": 3, name: value}
        text, names = f"Feature({name}={value!r:.50})", (name,)
        if name == "num_features":
            names = (name, "features", "dim")
        # As an index True is 1; a list of whole numbers is as good as a tensor of them.
        lenient = (
            value is True or value == [0, 1, 2] if not isinstance(value, torch.Tensor) else False
        )
        lenient = lenient or (name == "vector" and not isinstance(value, list))
        expect = "either" if lenient and name != "kind" else "refused"

        def rule(m: nn.Module) -> Any:
            return {"kernel": alrao.Feature(**fields)}

        got = None
    else:
        text = rng.choice(list(RULES))
        expect, rule = RULES[text]
        names, got = ("Dense", "rule", "weight"), None
    optimize = rng.random() < 0.5

    def run() -> Any:
        alrao.register_feature_layout(Dense, rule)
        try:
            return (
                alrao.AlraoSGD(net) if optimize else alrao.describe_rates(net, file=io.StringIO())
            )
        finally:
            alrao.register_feature_layout(Dense, None)

    def right(result: Any) -> None:
        lengths = {"right": 3, "a part": 4, "negative dim": 3, "nothing": 4}
        rows = {} if optimize else {row.parameter: row.features for row in result}
        found = result.state[net.kernel]["rate"].numel() if optimize else rows["kernel"]
        assert found == lengths.get(text, 3), f"{found} rates"

    return Trial(f"layout: {text}", run, expect, right, names, got, [net])


@area("describe_rates", weight=1)
def describe(rng: Random) -> Trial:
    net = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    odd = [
        3,
        None,
        "net",
        nn.Linear,
        [net],
        torch.ones(2),
        Odd(),
        torch.optim.SGD(net.parameters()),
    ]
    expect, value = rng.choice([("right", None), ("refused", rng.choice(odd))])
    given = value if expect == "refused" else rng.choice([net, alrao.AlraoSGD(net)])

    def right(rows: Any) -> None:
        assert [row.parameter for row in rows] == [n for n, _ in net.named_parameters()]
        assert [row.features for row in rows] == [4, 4, 2, 2, 2, 2]

    run = lambda: alrao.describe_rates(given, file=io.StringIO())  # noqa: E731
    text = f"describe_rates({type(given).__name__} {value!r:.60})"
    return Trial(text, run, expect, right, ("model_or_optimizer",), value, [net])


@area("backends", weight=1)
def backend(rng: Random) -> Trial:
    expect, value = Choice(("auto", "cpu", "reference")).kinds(rng)
    which = rng.choice(["use_backend", "use_backend", "status", "status op", "select"])
    cpu = torch.device("cpu")

    def run() -> Any:
        if which == "status":
            return backends.status("switch_update", value)
        if which == "status op":
            return backends.status(value, "cpu")
        if which == "select":
            return backends.select("switch_update", cpu, value)
        with alrao.use_backend(value):
            return backends.select("switch_update", cpu)

    if which == "status op" or (which == "status" and isinstance(value, str) and value == "auto"):
        expect = "refused"

    def right(result: Any) -> None:
        if which == "status":
            assert result.available
        else:
            assert result == ("cpu" if value == "auto" else value), result

    names = {"use_backend": "name", "status": "backend", "status op": "op", "select": "impl"}
    return Trial(f"{which}({value!r:.60})", run, expect, right, (names[which],), value)
