"""Protects that a wrong argument is refused at once, by name, and leaves everything as it was.

- Optimizers, when they are made and when a group is added; samplers; feature layouts; heads and the switch.
- What torch.optim takes is taken, with its result: numpy's numbers, tensors of one element, ints, bools.

Beside this file: test_arguments_functions.py has the ops by name, on every backend, test_arguments_step.py what is
assigned between steps, and tensors on meta.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import testing
from alrao_fast.arguments import COUNT, Choice, Flag, Number, shown
from alrao_fast.compat.optim_spec import AdamSpec, SGDSpec

NAN, INF = math.nan, math.inf
KINDS = (TypeError, ValueError)
# What no number may be, and the error.
NO_NUMBER = [("0.1", TypeError), (None, TypeError), ([0.1], TypeError), (1j, TypeError)]
NO_NUMBER += [(torch.tensor(1j), TypeError), (torch.ones(2), KINDS)]
NOT_FINITE = [(NAN, ValueError), (INF, ValueError), (-INF, ValueError), (10**400, ValueError)]
NOT_FINITE += [(torch.tensor(NAN), ValueError), (torch.tensor([INF]), ValueError)]
NEGATIVE = [(-0.1, ValueError), (-1, ValueError), (torch.tensor(-0.1), ValueError)]
NO_FLAG = [("yes", TypeError), (None, TypeError), (2, TypeError), (0.5, TypeError)]
NO_WORD = [("x", ValueError), (3, TypeError)]
NO_COUNT = [
    (0, ValueError),
    (-1, ValueError),
    (2.5, TypeError),
    (True, TypeError),
    ("3", TypeError),
]
NO_COUNT += [(None, TypeError), (NAN, TypeError), (torch.tensor(2.0), TypeError)]
NO_DTYPE = [(torch.int64, ValueError), (torch.complex64, ValueError), ("float32", TypeError)]
NO_DEVICE = [("nowhere", ValueError), (1.5, TypeError), (True, TypeError)]
NO_GENERATOR = [(0, TypeError), ("x", TypeError), (np.random.RandomState, TypeError)]
NO_RANGE = [((1e-60, 1e-55), ValueError), ((1e30, 1e300), ValueError), ((1e-60, 1.0), ValueError)]
NO_RANGE += [((1, 2, 3), ValueError), ("12", ValueError), ({1e-5, 1.0}, ValueError)]
NO_RANGE += [
    (("a", 1), TypeError),
    ((NAN, 1), ValueError),
    ((1.0, 0.1), ValueError),
    (3.0, ValueError),
]
PAIRS = [case for case in NO_RANGE if isinstance(case[0], tuple) and len(case[0]) == 2]
NO_RATE = [*NO_NUMBER, *NOT_FINITE, *NEGATIVE, (1e300, ValueError), (1e-60, ValueError)]

NON_NEGATIVE = [*NO_NUMBER, *NOT_FINITE, *NEGATIVE]
SHARED = {
    "lr": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "lr_range": NO_RANGE,
    "maximize": NO_FLAG,
    "rounding": NO_WORD,
    "master_weights": NO_FLAG,
    "foreach": [("yes", TypeError), (True, ValueError)],
    "fused": [("yes", TypeError), (2, TypeError)],
    "capturable": NO_FLAG,
    "differentiable": [*NO_FLAG, (True, ValueError)],
}
OWN = {
    "sampler": [(0.1, TypeError), ("x", TypeError)],
    "generator": NO_GENERATOR,
    "model": [(3, TypeError), (nn.Linear, TypeError)],
}
SGD_OPTIONS = {
    "momentum": NON_NEGATIVE,
    "dampening": [*NO_NUMBER, *NOT_FINITE, ("a", TypeError)],
    "nesterov": NO_FLAG,
    "momentum_rule": [*NO_WORD, (None, ValueError)],
}
NO_BETAS = [
    (0.9, ValueError),
    ((0.9,), ValueError),
    ((0.9, "x"), TypeError),
    ((0.9, 1.0), ValueError),
]
NO_BETAS += [((-0.1, 0.9), ValueError), ((NAN, 0.9), ValueError), ((None, 0.9), TypeError)]
NO_BETAS += [((0.9, torch.tensor(1.5)), ValueError), (None, ValueError)]
ADAM_OPTIONS = {
    "betas": NO_BETAS,
    "eps": NON_NEGATIVE,
    "amsgrad": NO_FLAG,
    "decoupled_weight_decay": NO_FLAG,
    "eps_rule": [*NO_WORD, (None, ValueError)],
}


def cases(*tables):
    for table in tables:
        for name, bad in table.items():
            for value, error in bad:
                yield pytest.param(name, value, error, id=f"{name}={shown(value)}")


def refused(call, name, error):
    with pytest.raises(error, match=rf"(?s)^{name}(\[\d\])?: got .*expected"):
        call()


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


# Optimizers.


@pytest.mark.parametrize(("name", "value", "error"), list(cases(SHARED, SGD_OPTIONS, OWN)))
def test_sgd(name, value, error):
    refused(lambda: alrao.AlraoSGD(net(), **{name: value}), name, error)


@pytest.mark.parametrize(("name", "value", "error"), list(cases(SHARED, ADAM_OPTIONS, OWN)))
def test_adam(name, value, error):
    refused(lambda: alrao.AlraoAdam(net(), **{name: value}), name, error)


@pytest.mark.parametrize(("name", "value", "error"), list(cases(SHARED, SGD_OPTIONS)))
def test_a_group_that_is_added_or_loaded(name, value, error):
    model, other = net(), net()
    optimizer = alrao.AlraoSGD(model, momentum=0.5)
    before = copy.deepcopy(optimizer.state_dict())
    group = {"params": other, name: value}
    refused(lambda: optimizer.add_param_group(group), name, error)
    assert group["params"] is other and len(optimizer.param_groups) == 1
    saved = copy.deepcopy(before)
    saved["param_groups"][0][name] = value
    refused(lambda: optimizer.load_state_dict(saved), name, error)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("spec", "name", "value", "error"),
    [
        pytest.param(spec, *case.values, id=f"{spec.__name__}-{case.id}")
        for spec, names in (
            (SGDSpec, ("momentum", "dampening", "nesterov", "weight_decay")),
            (AdamSpec, ("betas", "eps", "amsgrad", "weight_decay")),
        )
        for case in cases(SHARED, SGD_OPTIONS, ADAM_OPTIONS)
        if case.values[0] in names
    ],
)
def test_compat(spec, name, value, error):
    p = nn.Parameter(torch.ones(3))
    refused(lambda: spec([p], [0.1], **{name: value}), name, error)


@pytest.mark.parametrize("make", [alrao.AlraoSGD, alrao.AlraoAdam, alrao.AlraoMuon])
def test_parameters_in_no_order_or_given_twice(make):
    model = net()
    first, *others = model.parameters()
    for params in (set(others), frozenset(others), [{"params": set(others)}]):
        with pytest.raises(TypeError, match=r"^params: got a (frozen)?set, expected an ordered"):
            make(params, model=model)
    with pytest.raises(
        ValueError, match=r"^params: got '0.weight' at 0 and again at 4, expected each"
    ):
        make([first, *others, first], model=model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [first]}, {"params": [first, *others]}], model=model)
    for nothing in (3, None, "abc"):
        with pytest.raises(TypeError):
            make(nothing)


ACCEPTED = [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), 0, 1, True]
ACCEPTED += [np.int64(1), np.bool_(True), torch.tensor(1), torch.tensor(0.5, dtype=torch.float64)]


def trained(make, model, steps=3):
    optimizer = make(model.parameters())
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1) * (step + 1) * p.detach().sign()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("value", ACCEPTED, ids=shown)
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
def test_what_torch_sgd_takes(used, name, value):
    options = {"lr": 0.5, "momentum": 0.5, name: value}
    if name == "lr" and not isinstance(value, torch.Tensor):
        options["lr"] = value
    same_as_torch(torch.optim.SGD, alrao.AlraoSGD, options, float(options["lr"]))


@pytest.mark.parametrize("value", ACCEPTED, ids=shown)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_what_torch_adam_takes(used, name, value):
    same_as_torch(torch.optim.Adam, alrao.AlraoAdam, {"lr": 0.5, name: value}, 1.0)


@pytest.mark.parametrize("convert", [float, np.float64, torch.tensor])
def test_betas(used, convert):
    options = {"lr": 0.5, "betas": (convert(0.5), convert(0.75))}
    same_as_torch(torch.optim.Adam, alrao.AlraoAdam, options, 1.0)


@pytest.fixture(params=["cpu", "reference"])
def used(request):
    reason = testing.require("feature_sgd", request.param)
    if reason is not None:
        pytest.skip(reason)
    with alrao.use_backend(request.param):
        yield


def same_as_torch(theirs, ours, options, lr):
    """The result of torch's optimizer, which gets plain numbers."""
    plain = {k: tuple(map(float, v)) if k == "betas" else float(v) for k, v in options.items()}
    torch.manual_seed(0)
    model = net()
    twin = copy.deepcopy(model)
    expected = trained(lambda params: theirs(params, **plain), model)
    for a, b in zip(
        trained(lambda params: ours(twin, sampler=alrao.Constant(1.0), **options), twin), expected
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [True, 1, np.bool_(True), torch.tensor(True)], ids=shown)
def test_flags(value):
    group = alrao.AlraoSGD(net(), momentum=0.9, nesterov=value).param_groups[0]
    assert group["nesterov"] is True


def test_numpy_numbers_become_plain():
    group = alrao.AlraoSGD(net(), lr=np.float32(0.5), momentum=np.float64(0.25)).param_groups[0]
    assert type(group["lr"]) is float and type(group["momentum"]) is float


# Samplers and layouts.

NO_DIM = [(1.5, TypeError), ("0", TypeError), ((0, None), TypeError), (None, TypeError)]
NO_THETA = [*NO_NUMBER, *NOT_FINITE, (0, ValueError), (1, ValueError)]
NO_MODULE_TYPE = [(3, TypeError), (nn.Linear(1, 1), TypeError), (int, TypeError)]


def ruled(value):
    alrao.register_feature_layout(nn.Linear, value)


CALLS = [
    (lambda value: alrao.LogUniform(*value), "lr_range", PAIRS),
    (lambda value: alrao.PerWeight(*value), "lr_range", PAIRS),
    (alrao.Constant, "lr", NO_RATE),
    (lambda value: alrao.Fraction(0.5, value), "lr", NO_RATE),
    (lambda value: alrao.Fraction(value, 0.5), "p", [*NON_NEGATIVE, (1.5, ValueError)]),
    (lambda value: alrao.Feature(kind=value), "kind", [*NO_WORD, (None, ValueError)]),
    (lambda value: alrao.Feature(dim=value), "dim", NO_DIM),
    (lambda value: alrao.Feature(num_features=value), "num_features", NO_COUNT[1:5]),
    (lambda value: alrao.Feature(vector=value), "vector", [(3, TypeError), (None, TypeError)]),
    (lambda value: alrao.Feature(feature_of=value), "feature_of", [([0, 1], TypeError)]),
    (lambda v: alrao.register_feature_layout(v, None), "module_type", NO_MODULE_TYPE),
    (ruled, "rule", [(3, TypeError), ({}, TypeError)]),
    (alrao.Switch, "num_clones", NO_COUNT),
    (lambda value: alrao.Switch(3, value), "theta", NO_THETA),
    (lambda value: alrao.Switch(3, process_group=value), "process_group", [(3, TypeError)]),
    (lambda value: alrao.Switch(3, device=value), "device", NO_DEVICE),
]


@pytest.mark.parametrize(
    ("call", "name", "value", "error"),
    [
        pytest.param(call, name, value, error, id=f"{name}={shown(value)}")
        for call, name, bad in CALLS
        for value, error in bad
    ],
)
def test_samplers_layouts_and_the_switch(call, name, value, error):
    refused(lambda: call(value), name, error)


def test_a_rule_that_returns_something_else():
    class Mine(nn.Linear):
        pass

    for returned in (None, [alrao.Feature()], {"weight": 0}):
        alrao.register_feature_layout(Mine, lambda module, returned=returned: returned)
        with pytest.raises(TypeError, match=r"registered for Mine returned .* expected a dict"):
            alrao.AlraoSGD(Mine(2, 3))
    alrao.register_feature_layout(Mine, None)


# Heads.

NO_INDEX = [(0.5, TypeError), (None, TypeError), (True, TypeError)]
HEAD = {
    "in_features": NO_COUNT,
    "num_clones": NO_COUNT,
    "bias": NO_FLAG,
    "theta": [*NO_NUMBER, *NOT_FINITE, (0.0, ValueError), (1, ValueError)],
    "evidence": [*NO_WORD, (None, ValueError)],
    "reduction": [("average", ValueError), (None, ValueError), (3, TypeError)],
    "memory_budget": [(0, ValueError), (2.5, TypeError), ("1", TypeError), (True, TypeError)],
    "process_group": [(3, TypeError)],
    "device": NO_DEVICE,
    "dtype": NO_DTYPE,
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    list(cases(HEAD, {"num_classes": NO_COUNT, "ignore_index": NO_INDEX})),
)
def test_classifier(name, value, error):
    arguments = {"in_features": 4, "num_classes": 3, name: value}
    refused(lambda: alrao.ClassifierClones(**arguments), name, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    list(cases(HEAD, {"out_features": NO_COUNT, "sigma2": [*NON_NEGATIVE, (0, ValueError)]})),
)
def test_regressor(name, value, error):
    arguments = {"in_features": 4, "out_features": 3, name: value}
    refused(lambda: alrao.RegressorClones(**arguments), name, error)


def test_numbers_that_heads_take():
    head = alrao.RegressorClones(
        np.int64(4), np.int32(2), num_clones=torch.tensor(3), sigma2=torch.tensor(0.5), bias=0
    )
    assert (head.in_features, head.out_features, head.num_clones, head.sigma2) == (4, 2, 3, 0.5)
    assert type(head.num_clones) is int and type(head.sigma2) is float and head.bias is None
    assert (
        alrao.ClassifierClones(4, 3, theta=np.float64(0.5), ignore_index=np.int64(2)).ignore_index
        == 2
    )


def test_kinds_say_what_they_expect():
    assert Number(low=0, below=1).expected == "a finite number >= 0 and < 1"
    assert COUNT.expected == "an integer, at least 1"
    assert Choice(None, "a", "b").expected == "None, 'a' or 'b'"
    assert Flag().check("x", 0) is False
    assert shown("x" * 200).endswith("...") and len(shown("x" * 200)) == 80
