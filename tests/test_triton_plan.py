"""Protects the Triton kernels' plan that an optimizer's binding keeps:

- the bits of the list op, while gradients move, with strides of their own, and rates change in place;
- gradients with the negative bit, and those of zeros without memory, which no address tells;
- the same with and without the compiled extension, which looks after the tensors where it is there;
- a parameter or state that is no longer what the plan saw is noticed, and nothing is written;
- gradients, scalars and options that do not fit are refused; an optimizer's step goes through the plan.
"""

import pytest
import torch

from alrao_fast import AlraoSGD, Constant, _extension, backends, testing
from alrao_fast.ops.feature import Lists, Scalars
from alrao_fast.ops.feature_adam import OP as ADAM
from alrao_fast.ops.feature_sgd import OP as SGD
from alrao_fast.ops.plan import TritonPlan

REASON = testing.require("feature_sgd", "triton")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}"),
    pytest.mark.device,
    pytest.mark.interpreted,
]
DEVICE = backends.device_of("triton")
# Flags are no numbers: Triton compiles no `if` for a float, and takes one that equals a known flag for that.
PLAIN = {"nesterov": False, "authors_momentum": False}
MOMENTUM = dict.fromkeys(SGD.options, 0.0) | {"momentum": 0.5} | PLAIN
PLAIN_SGD = MOMENTUM | {"momentum": 0.0}
AMSGRAD = {"amsgrad": True, "decoupled": False, "authors_eps": False}
MOMENTS = dict.fromkeys(ADAM.options, 0.5) | AMSGRAD


@pytest.fixture(autouse=True, params=["extension", "python"])
def watched_by(request, monkeypatch):
    """Who looks after the tensors: the compiled extension, or Python where there is none."""
    if request.param == "python":
        monkeypatch.setattr(_extension, "ERROR", "not built")
    elif _extension.ERROR:
        pytest.skip(_extension.ERROR)
    return request.param


def lists_of(op, options):
    problem = testing.feature_problem(device=DEVICE)
    params = problem.params
    states = [[torch.full_like(p, 0.25) for p in params] for _ in range(op.num_states(options))]
    steps = torch.arange(len(params), device=DEVICE) % 2
    lists = Lists(params, states, [], problem.rates, problem.inners, [], steps)
    return lists, problem.grads


@pytest.mark.parametrize("op, options", [(SGD, MOMENTUM), (ADAM, MOMENTS)], ids=["sgd", "adam"])
def test_the_bits_of_the_list_op(op, options, watched_by):
    if op is ADAM and watched_by == "python":
        pytest.skip("who watches does not depend on the op")
    (lists, grads), (others, other_grads) = lists_of(op, options), lists_of(op, options)
    plan = TritonPlan(op, lists)
    for step in range(3):
        scalars = Scalars(lr=0.5 + step)
        assert plan.step(grads, options, scalars)
        op(others, other_grads, options, scalars, "triton")
        # Other memory, and of the matrices other strides.
        grads = [g.mT.clone().mT if g.dim() > 1 else g.clone() for g in grads]
        for rates in (lists.rates, others.rates):
            rates[0].mul_(0.5)
    assert torch.equal(lists.steps, others.steps)
    for got, want in ((lists.params, others.params), *zip(lists.states, others.states)):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gradients_that_are_not_in_memory():
    problem = testing.feature_problem(device=DEVICE)
    param = problem.params[0]
    steps = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rates = [torch.ones(1, device=DEVICE)]
    plan = TritonPlan(SGD, Lists([param], [], [], rates, [1], [], steps))
    for step in range(3):
        before = param.clone()
        grad = torch.full_like(param, 1.0 + step)
        assert plan.step([torch._neg_view(grad)], PLAIN_SGD, Scalars())
        assert torch.equal(param, before + grad)
        zero = torch._efficientzerotensor(param.shape, dtype=param.dtype, device=DEVICE)
        assert plan.step([zero], PLAIN_SGD, Scalars())
        assert torch.equal(param, before + grad)


def test_made_in_inference_mode():
    param, buffer = torch.ones(8, 6, device=DEVICE), torch.zeros(8, 6, device=DEVICE)
    rates, steps = torch.ones(8, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lists = Lists([param], [[buffer]], [], [rates], [6], [], steps)
    with torch.inference_mode():
        plan = TritonPlan(SGD, lists)
        assert plan.step([torch.ones(8, 6, device=DEVICE)], MOMENTUM, Scalars())
    assert plan.step([torch.ones(8, 6, device=DEVICE)], MOMENTUM, Scalars())
    # Buffers 1 and 1.5.
    assert torch.equal(param, torch.full_like(param, 1 - 2.5))


def test_who_watches(watched_by):
    plan, *_ = one()
    assert (plan._number is None) == (watched_by == "python")


def test_wrong_addresses_are_refused(watched_by):
    plan, _, grad = one()
    if watched_by == "extension":
        for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(1)):
            with pytest.raises(RuntimeError, match=r"addresses has shape \[\d\]"):
                torch.ops.alrao_fast._feature_plan_gradients(plan._number, [grad], wrong)


def one():
    """SGD with momentum of one matrix: plan, lists and a gradient."""
    param, buffer = torch.ones(8, 6, device=DEVICE), torch.zeros(8, 6, device=DEVICE)
    rates, steps = torch.ones(8, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lists = Lists([param], [[buffer]], [], [rates], [6], [], steps)
    plan, grad = TritonPlan(SGD, lists), torch.ones_like(param)
    assert plan.step([grad], MOMENTUM, Scalars())
    return plan, lists, grad


CHANGES = {
    "memory": lambda p: setattr(p, "data", p.data.clone()),
    "dtype": lambda p: setattr(p, "data", p.data.double()),
    "dtype in the same memory": lambda p: setattr(p, "data", p.data.view(torch.int32)),
    "strides": lambda p: setattr(p, "data", p.data.as_strided((8, 6), (1, 8))),
    "shape": lambda p: setattr(p, "data", p.data.view(6, 8)),
    "smaller": lambda p: p.resize_(3, 4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_parameter_is_noticed(change):
    plan, lists, grad = one()
    [param] = lists.params
    change(param)
    before, buffer = param.clone(), lists.states[0][0].clone()
    assert not plan.step([grad], MOMENTUM, Scalars())
    assert torch.equal(param, before) and torch.equal(lists.states[0][0], buffer)
    assert lists.steps.tolist() == [1]


@pytest.mark.parametrize("which", ["state", "rates", "smaller state"])
def test_changed_others_are_noticed(which):
    plan, lists, grad = one()
    if which == "smaller state":
        lists.states[0][0].resize_(2, 3)
    else:
        tensor = lists.states[0][0] if which == "state" else lists.rates[0]
        tensor.data = tensor.data.clone()
    assert not plan.step([grad], MOMENTUM, Scalars())


def test_what_does_not_fit_is_refused():
    plan, lists, grad = one()
    before = lists.params[0].clone()
    for grads, scalars, options, message in (
        ([], Scalars(), MOMENTUM, "grads has 0 entries"),
        ([grad.double()], Scalars(), MOMENTUM, r"grads\[0\] has dtype float64"),
        ([grad.flatten()], Scalars(), MOMENTUM, r"grads\[0\] has shape \[48\]"),
        ([grad.to_sparse()], Scalars(), MOMENTUM, r"grads\[0\] is sparse"),
        ([grad], Scalars(lr=torch.ones(2, device=DEVICE)), MOMENTUM, "lr has dtype float32 and 2"),
        ([grad], Scalars(found_inf=grad[0]), MOMENTUM, "found_inf has dtype float32 and 6"),
        ([grad], Scalars(), MOMENTUM | {"momentum": 0.0}, "momentum_buffers has entries"),
    ):
        with pytest.raises(RuntimeError, match=message):
            plan.step(grads, options, scalars)
    assert torch.equal(lists.params[0], before) and lists.steps.tolist() == [1]


def test_an_optimizer_steps_by_its_plan():
    param = torch.nn.Parameter(torch.ones(8, 6, device=DEVICE))
    with pytest.warns(UserWarning, match="bare tensors"):
        opt = AlraoSGD([param], sampler=Constant(0.25), momentum=0.5)
    with backends.use_backend("triton"):
        for _ in range(2):
            param.grad = torch.ones_like(param)
            opt.step()
        [call] = opt._binding.groups[0].calls
        assert isinstance(call._plan, TritonPlan)
        version = param._version
        param.data = param.data.clone()
        opt.step()
    assert param._version > version
    # Buffers 1, 1.5 and 1.75.
    assert torch.equal(param, torch.full_like(param, 1 - 0.25 * (1 + 1.5 + 1.75)))
