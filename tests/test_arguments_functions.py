"""Protects that the ops' public functions refuse a wrong argument with the same error on every backend, by name, with
nothing written; that they take targets of the integers that torch takes, and int32; and that heads do alike.
"""

import copy
import math

import pytest
import torch
from test_arguments import ADAM_OPTIONS, SGD_OPTIONS, SHARED, cases, refused

import alrao_fast as alrao
from alrao_fast import functional, testing

NAN, INF = math.nan, math.inf


@pytest.fixture(params=["cpu", "triton", "reference"])
def impl(request):
    reason = testing.require("switch_mixture", request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def mixture():
    inputs = testing.mixture_inputs(4, 3, 5, 2)._asdict()
    inputs.pop("target")
    return inputs


def classes():
    return testing.mixture_inputs(4, 3, 5, 2)._asdict()


def values():
    return {**mixture(), "target": torch.zeros(4, 5)}


def state():
    return {
        "logw": torch.zeros(2, 3, dtype=torch.float64),
        "log_posterior": torch.zeros(3, dtype=torch.float64),
        "t": torch.tensor(1),
        "log_likelihood": torch.zeros(3),
    }


FUNCTIONS = {
    "switch_mixture_nll": classes,
    "switch_mixture_stats": classes,
    "switch_mixture_gaussian_nll": values,
    "switch_mixture_gaussian_stats": values,
    "switch_mixture_log_prob": mixture,
    "switch_mixture_mean": mixture,
    "switch_update_": state,
}
WRONG = {
    "x": [
        (lambda x: x.tolist(), TypeError, r"got \[.*expected a tensor"),
        (lambda x: x[:, :2], RuntimeError, r"got shape \[4, 2\], expected \[B, 3\], D being that"),
        (
            lambda x: x.long(),
            RuntimeError,
            "got dtype Long, expected one of Float, Double, BFloat16",
        ),
        (lambda x: x + 0j, RuntimeError, "got dtype ComplexFloat, expected one of Float, Double"),
        (lambda x: x[0, 0], ValueError, "got a scalar"),
    ],
    "weight": [
        (lambda w: None, TypeError, "got None, expected a tensor"),
        (lambda w: w[0], RuntimeError, r"got shape \[5, 3\], expected \[N, C, D\]"),
        (lambda w: w[:0], RuntimeError, r"got shape \[0, 5, 3\], expected \[N, C, D\]"),
        (lambda w: w.int(), RuntimeError, "got dtype Int, expected one of Float, Double"),
    ],
    "bias": [
        (lambda b: 0.0, TypeError, "got 0.0, expected a tensor"),
        (lambda b: b[0], RuntimeError, r"got shape \[5\], expected \[2, 5\]"),
        (lambda b: b + 0j, RuntimeError, "got dtype ComplexFloat, expected"),
    ],
    "log_posterior": [
        (lambda a: a[:1], RuntimeError, r"got shape \[1\], expected \[(2|3)\]"),
        (lambda a: a.long(), RuntimeError, "got dtype Long, expected"),
    ],
    "log_likelihood": [
        (lambda v: [0.0], TypeError, r"got \[0.0\], expected a tensor"),
        (lambda v: v + 0j, RuntimeError, "got dtype ComplexFloat, expected"),
    ],
    "t": [(lambda t: 1, TypeError, "got 1, expected a tensor")],
}
TARGETS = {
    classes: [
        (lambda y: y.float(), RuntimeError, "got dtype Float, expected Long"),
        (lambda y: y == 1, RuntimeError, "got dtype Bool, expected Long"),
        (lambda y: y.to(torch.int16), RuntimeError, "got dtype Short, expected Long"),
        (lambda y: y + 0j, RuntimeError, "got dtype ComplexFloat, expected Long"),
        (lambda y: y + 9, RuntimeError, "got .* expected a class from 0 to 4 or ignore_index"),
        (lambda y: y[:2], ValueError, r"got shape \[2\], expected \[4\]"),
        (lambda y: y.tolist(), TypeError, r"got \[.*expected a tensor"),
    ],
    values: [
        (lambda y: y + 0j, RuntimeError, "got dtype ComplexFloat, expected real numbers"),
        (lambda y: y[:, 0], ValueError, r"got shape \[4\], expected \[4, 5\]"),
        (lambda y: None, TypeError, "got None, expected a tensor"),
    ],
}
NO_NUMBER = [("1", TypeError), (None, TypeError), (1j, TypeError)]
NO_INTEGER = [(0.5, TypeError), ("x", TypeError), (True, TypeError)]
OPTIONS = {
    "reduction": [("average", ValueError), (None, ValueError), (3, TypeError)],
    "ignore_index": [*NO_INTEGER, (None, TypeError)],
    "memory_budget": [*NO_INTEGER, (0, RuntimeError), (-1, RuntimeError)],
    "sigma2": [*NO_NUMBER, (0, RuntimeError), (INF, RuntimeError), (NAN, RuntimeError)],
    "theta": [*NO_NUMBER, (0, RuntimeError), (NAN, RuntimeError)],
}
TAKES = {
    "switch_mixture_nll": ("reduction", "ignore_index", "memory_budget"),
    "switch_mixture_stats": ("reduction", "ignore_index", "memory_budget"),
    "switch_mixture_gaussian_nll": ("reduction", "sigma2", "memory_budget"),
    "switch_mixture_gaussian_stats": ("reduction", "sigma2", "memory_budget"),
    "switch_mixture_log_prob": ("memory_budget",),
    "switch_update_": ("theta",),
}


def wrong_calls():
    for name, make in FUNCTIONS.items():
        for argument in make():
            wrong = TARGETS[make] if argument == "target" else WRONG.get(argument, [])
            for k, case in enumerate(wrong):
                yield pytest.param(name, argument, *case, id=f"{name}-{argument}{k}")
        for option in TAKES.get(name, ()):
            for value, error in OPTIONS[option]:
                case = (lambda _, value=value: value, error, "got .*, expected")
                yield pytest.param(name, option, *case, id=f"{name}-{option}={value}")


@pytest.mark.parametrize(("name", "argument", "change", "error", "message"), list(wrong_calls()))
def test_functions(impl, name, argument, change, error, message):
    arguments = FUNCTIONS[name]()
    arguments[argument] = change(arguments.get(argument))
    before = copy.deepcopy(arguments)
    with pytest.raises(error, match=f"^{argument}: {message}"):
        getattr(functional, name)(**arguments, impl=impl)
    assert str(arguments) == str(before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("name", ["switch_mixture_nll", "switch_mixture_stats"])
def test_targets_of_other_integers(impl, name, dtype):
    arguments, function = classes(), getattr(functional, name)
    expected = function(**arguments, impl=impl)
    arguments["target"] = arguments["target"].to(dtype)
    assert all(map(torch.equal, function(**arguments, impl=impl), expected))


def test_heads_take_and_refuse_what_the_functions_do():
    head = alrao.ClassifierClones(3, 5, num_clones=2)
    x, target = torch.randn(4, 3), torch.tensor([0, 4, 2, 2])
    twin = copy.deepcopy(head)
    assert torch.equal(head(x, target.to(torch.uint8)), twin(x, target))
    regressor = alrao.RegressorClones(3, 5, num_clones=2).eval()
    for bad in (torch.randn(4, 2), torch.ones(4, 3) + 0j, torch.ones(4, 3).long()):
        for module in (head, regressor):
            with pytest.raises(RuntimeError, match=r"^x: got (shape|dtype) .*expected"):
                module(bad)


TAKEN = {
    "feature_sgd_": {**SHARED, **SGD_OPTIONS},
    "feature_adam_": {**SHARED, **ADAM_OPTIONS},
}
STATES = {"feature_sgd_": ["momentum_buffers"], "feature_adam_": ["exp_avgs", "exp_avg_sqs"]}
NOT_THEIRS = {"lr_range", "rounding", "master_weights", "foreach", "fused", "capturable"}
NOT_THEIRS |= {"differentiable", "amsgrad"}


def feature_cases():
    for name, table in TAKEN.items():
        for case in cases({k: bad for k, bad in table.items() if k not in NOT_THEIRS}):
            option, value, _ = case.values
            # Tensors of another shape are the subject of test_feature_sgd.py.
            if option != "lr" or not isinstance(value, torch.Tensor) or value.numel() == 1:
                yield pytest.param(name, *case.values, id=f"{name}-{case.id}")


def feature_arguments(name):
    one = {"params": [torch.ones(3)], "grads": [torch.ones(3)], "rates": [torch.ones(3)]}
    states = {state: [torch.zeros(3)] for state in STATES[name]}
    return {**one, **states, "steps": torch.zeros(1, dtype=torch.int64)}


@pytest.mark.parametrize(("name", "option", "value", "error"), list(feature_cases()))
def test_feature_functions(impl, name, option, value, error):
    arguments = feature_arguments(name)
    before = copy.deepcopy(arguments)
    options = {"momentum": 0.5} if name == "feature_sgd_" else {}
    options[option] = value
    function = getattr(functional, name)
    refused(lambda: function(**arguments, **options, impl=impl), option, error)
    assert str(arguments) == str(before)
