"""Protects what a step and a loss do with what has become wrong since the construction.

- Options assigned to a param group, scheduled, or changed in place in a tensor, are checked before they are used; the
  step raises and leaves everything as it was. Every option that is a tensor is read anew at each step.
- A tensor on meta among others is an error that names it, in every op and optimizer, on every backend.
"""

import copy
import math

import pytest
import torch
from test_arguments import ADAM_OPTIONS, SGD_OPTIONS, SHARED, cases, net, refused
from test_arguments_functions import FUNCTIONS, STATES, feature_arguments
from torch import nn

import alrao_fast as alrao
from alrao_fast import functional, testing
from alrao_fast.compat.optim_spec import AdamSpec, SGDSpec

BACKENDS = ["cpu", "triton", "reference"]
MAKE = {
    "sgd": lambda model, **options: alrao.AlraoSGD(model, **{"momentum": 0.5, **options}),
    "adam": alrao.AlraoAdam,
}


@pytest.fixture(params=BACKENDS)
def impl(request):
    reason = testing.require("feature_sgd", request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def used(impl):
    with alrao.use_backend(impl):
        yield


def stepped(kind, **options):
    model = net()
    optimizer = MAKE[kind](model, **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "name", "value", "error"),
    [
        pytest.param(kind, *case.values, id=f"{kind}-{case.id}")
        for kind, table in (("sgd", {**SHARED, **SGD_OPTIONS}), ("adam", ADAM_OPTIONS))
        for case in cases(table)
    ],
)
@pytest.mark.parametrize("closure", [None, lambda: torch.zeros(())], ids=["plain", "closure"])
def test_an_option_assigned_to_a_group(kind, name, value, error, closure):
    model, optimizer = stepped(kind)
    group = optimizer.param_groups[0]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    valid, group[name] = group[name], value
    refused(lambda: optimizer.step(closure), name, error)
    refused(lambda: optimizer.step(closure), name, error)
    assert str((model.state_dict(), optimizer.state_dict()["state"])) == str(before)
    group[name] = valid
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


def test_options_that_do_not_go_together():
    _, optimizer = stepped("sgd", nesterov=True)
    group = optimizer.param_groups[0]
    for changed in ({"momentum": 0.0}, {"dampening": 0.5}, {"momentum": 0, "nesterov": 1}):
        valid = {name: group[name] for name in changed}
        group.update(changed)
        with pytest.raises(ValueError, match=r"^nesterov: got True with momentum=.*expected"):
            optimizer.step()
        group.update(valid)
        optimizer.step()


def test_what_a_closure_assigns():
    model, optimizer = stepped("sgd")
    before = model[0].weight.detach().clone()

    def closure():
        optimizer.param_groups[0]["lr"] = math.nan

    with pytest.raises(ValueError, match=r"^lr: got nan"):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, before)


def test_a_scheduler_that_goes_below_zero():
    _, optimizer = stepped("sgd")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match=r"^lr: got -1"):
        optimizer.step()


def test_a_group_that_was_not_the_first():
    model = net()
    optimizer = alrao.AlraoSGD([{"params": model[0]}, {"params": model[1]}])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[1]["weight_decay"] = "x"
    refused(optimizer.step, "weight_decay", TypeError)
    assert str(model.state_dict()) == str(before)
    # What was checked belongs to the groups, not to their number.
    optimizer.param_groups.reverse()
    refused(optimizer.step, "weight_decay", TypeError)
    optimizer.param_groups.pop(0)
    optimizer.step()


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda o: o.load_state_dict(o.state_dict()) or o])
def test_after_a_copy_and_a_load(renew):
    _, optimizer = stepped("sgd")
    optimizer = renew(optimizer)
    optimizer.param_groups[0]["momentum_rule"] = "x"
    refused(optimizer.step, "momentum_rule", ValueError)


@pytest.mark.parametrize("spec", [SGDSpec, AdamSpec])
def test_compat(spec):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = spec([p], [0.1])
    optimizer.step()
    before = p.detach().clone()
    for value, error in ((math.nan, ValueError), ("x", TypeError)):
        optimizer.param_groups[0]["weight_decay"] = value
        refused(optimizer.step, "weight_decay", error)
    assert torch.equal(p, before)


# Options in tensors.

IN_TENSORS = [("sgd", name) for name in ("lr", "momentum", "dampening", "weight_decay")] + [
    ("adam", name) for name in ("lr", "betas", "eps", "weight_decay")
]
CHANGES = (0.5, 0.75, 0.3)


def run(make, name, values, in_tensor):
    """The parameter after a step with each of the values: assigned anew, or written into one tensor."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    tensor = torch.tensor(values[0])
    option = tensor if in_tensor else values[0]
    optimizer = make(p, **{name: (option, option) if name == "betas" else option})
    for step, value in enumerate(values):
        p.grad = torch.tensor([0.1, 0.2, -0.3]) * (step + 1)
        if in_tensor:
            tensor.fill_(value)
        else:
            optimizer.param_groups[0][name] = (value, value) if name == "betas" else value
        optimizer.step()
    return p.detach()


@pytest.mark.filterwarnings("ignore:1 bare tensors")
@pytest.mark.parametrize(("kind", "name"), IN_TENSORS)
def test_tensors_are_read_at_each_step(used, kind, name):
    def make(p, **options):
        return MAKE[kind]([p], sampler=alrao.Constant(0.5), **options)

    numbers = run(make, name, CHANGES, False)
    assert torch.equal(run(make, name, CHANGES, True), numbers)
    assert not torch.equal(run(make, name, CHANGES[:1] * 3, True), numbers)


@pytest.mark.parametrize("spec", [SGDSpec, AdamSpec])
@pytest.mark.parametrize("name", ["momentum", "dampening", "weight_decay", "betas", "eps"])
def test_tensors_are_read_at_each_step_by_compat(used, spec, name):
    more = {"momentum": 0.5} if spec is SGDSpec else {}
    if name not in spec([nn.Parameter(torch.ones(1))], [0.1]).defaults:
        pytest.skip("an option of the other optimizer")

    def make(p, **options):
        return spec([p], [0.5], **{**more, **options})

    numbers = run(make, name, CHANGES, False)
    assert torch.equal(run(make, name, CHANGES, True), numbers)


@pytest.mark.parametrize(("kind", "name"), IN_TENSORS)
def test_a_tensor_that_becomes_wrong(kind, name):
    tensor = torch.tensor(0.5)
    model, optimizer = stepped(kind, **{name: (tensor, tensor) if name == "betas" else tensor})
    before = copy.deepcopy(model.state_dict())
    tensor.fill_(math.nan)
    refused(optimizer.step, name, ValueError)
    assert str(model.state_dict()) == str(before)
    tensor.fill_(0.25)
    optimizer.step()


# Tensors on meta.


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, make in FUNCTIONS.items() for argument in make()]
    + [(name, argument) for name in STATES for argument in feature_arguments(name)],
)
def test_one_argument_on_meta(impl, name, argument):
    make = FUNCTIONS.get(name)
    arguments = make() if make else feature_arguments(name)
    if name == "feature_sgd_":
        arguments["momentum"] = 0.5
    given = arguments[argument]
    there = [t.to("meta") for t in given] if isinstance(given, list) else given.to("meta")
    arguments[argument] = there
    before = copy.deepcopy({k: v for k, v in arguments.items() if k != argument})
    # The first argument says where the op runs: then another is named, or the backend does not run there.
    named = r"\w+: is on (cpu|meta), expected|does not run on meta|is on meta, expected"
    with pytest.raises((RuntimeError, ValueError), match=named):
        getattr(functional, name)(**arguments, impl=impl)
    assert str({k: v for k, v in arguments.items() if k != argument}) == str(before)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_on_meta(used, kind, first):
    model = net()
    model[1 - first].to("meta")
    optimizer = MAKE[kind](model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model[first].state_dict())
    with pytest.raises(RuntimeError, match=rf"^parameter '{1 - first}.weight' is on meta"):
        optimizer.step()
    assert str(model[first].state_dict()) == str(before)
    for p in model[1 - first].parameters():
        p.grad = None
    optimizer.step()
    assert str(model[first].state_dict()) != str(before)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("sgd", "rate"), ("sgd", "momentum_buffer"), ("adam", "exp_avg"), ("adam", "step")],
)
def test_a_state_on_meta(used, kind, key):
    model, optimizer = stepped(kind)
    state = optimizer.state[model[1].bias]
    state[key] = state[key].to("meta")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"^state '{key}' of parameter '1.bias' is on meta"):
        optimizer.step()
    assert str(model.state_dict()) == str(before)


def test_heads_on_meta(used):
    for head, target in (
        (alrao.ClassifierClones(3, 5, 2), torch.zeros(4, dtype=torch.int64)),
        (alrao.RegressorClones(3, 5, 2), torch.zeros(4, 5)),
    ):
        x = torch.randn(4, 3)
        for given, wanted in ((x.to("meta"), target), (x, target.to("meta")), (x.to("meta"), None)):
            with pytest.raises((RuntimeError, ValueError), match=r"is on \w+, expected|on meta"):
                head(given, wanted)
        head.to("meta")
        with pytest.raises(RuntimeError, match="weight: is on meta, expected cpu, as x"):
            head(x, target)


def test_a_whole_model_on_meta_has_shapes():
    head = alrao.ClassifierClones(3, 5, 2, device="meta")
    x = torch.empty(4, 3, device="meta")
    assert head.eval()(x).shape == (4, 5)
    assert head(x, torch.empty(4, dtype=torch.int64, device="meta")).shape == ()


def test_an_interval_assigned_after_the_draw():
    for kind in ("sgd", "adam"):
        model, optimizer = stepped(kind)
        before = copy.deepcopy(model.state_dict())
        drawn = optimizer.param_groups[0]["lr_range"]
        optimizer.param_groups[0]["lr_range"] = (1e-3, 1e-2)
        with pytest.raises(ValueError, match=r"^lr_range: got \(0.001, 0.01\), expected"):
            optimizer.step()
        assert str(model.state_dict()) == str(before)
        optimizer.param_groups[0]["lr_range"] = drawn
        optimizer.step()


def test_states_of_another_optimizer():
    model, sgd = stepped("sgd")
    adam = alrao.AlraoAdam(model)
    with pytest.raises(
        ValueError, match="has 'momentum_buffer'; expected the states of feature_adam"
    ):
        adam.load_state_dict(sgd.state_dict())
    plain = alrao.AlraoSGD(model)
    plain.step()
    with pytest.raises(ValueError, match="has taken steps without 'exp_avg'; expected the states"):
        adam.load_state_dict(plain.state_dict())
