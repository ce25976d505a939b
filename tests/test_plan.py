"""Protects the plan of the compiled backends, by which an optimizer's step passes only its gradients, for every op:

- the bits of the list op, with rates that change in place;
- parameters and states that are no longer what the plan saw are noticed, and nothing is written;
- what does not fit is refused; the plan holds its tensors and lets them go, whatever is traced meanwhile.
"""

import gc

import pytest
import torch
from feature_harness import ADAM, SGD
from torch.fx.experimental.proxy_tensor import make_fx

from alrao_fast import backends, testing
from alrao_fast.ops.feature import FEATURE_OPS, Lists, Scalars
from alrao_fast.ops.plan import CompiledPlan

OP = "feature_sgd"
pytestmark = [pytest.mark.emulated, pytest.mark.sanitized]


@pytest.fixture
def device(dispatched):
    return backends.device_of(dispatched)


class Plan:
    """How a plan is made, stepped and known to the kernels: the tests see no more of it than this."""

    def __init__(self, op, params, states, rates, inners, seeds, steps):
        kept = [states[name] for name in op.states if name in states]
        self.op, self.table = op, FEATURE_OPS[op.name.rstrip("_")]
        lists = Lists(params, kept, [], rates, inners, list(seeds), steps)
        self.plan = CompiledPlan(self.table, lists)

    def step(self, grads, **changes):
        """Whether the plan still fits; `changes` to the op's scalars."""
        given = self.op.scalars | changes
        scalars = Scalars(given["lr"], given["maximize"], given["grad_scale"], given["found_inf"])
        return self.plan.step(grads, {name: given[name] for name in self.table.options}, scalars)

    @property
    def number(self):
        return self.plan._number

    def step_of_number(self, number, grads):
        """A step of whatever plan the kernels know by this number."""
        torch.ops.alrao_fast._feature_plan_step_(number, grads, None, None, None)


def planned(op, problem, options, seeds=()):
    """A plan for all of a problem, its states and its steps."""
    states, steps = op.start(problem, options)
    plan = Plan(op, problem.params, states, problem.rates, problem.inners, seeds, steps)
    return plan, states, steps


def one(device):
    """SGD with momentum of one matrix: the plan, parameter, momentum buffer and steps."""
    param, rate, steps = torch.ones(8, 6), torch.ones(8), torch.zeros(1, dtype=torch.int64)
    param, rate, steps = (t.to(device) for t in (param, rate, steps))
    buffer = torch.zeros_like(param)
    plan = Plan(SGD, [param], {"momentum_buffers": [buffer]}, [rate], [6], [], steps)
    return plan, param, buffer, steps


def assert_same_bits(op, device, dtype, options):
    problem, expected = (testing.feature_problem(dtype, device) for _ in range(2))
    seeds = list(range(len(problem.params)))
    plan, states, steps = planned(op, problem, options, seeds)
    others, counted = op.start(expected, options)
    arguments = op.overload_arguments(expected, others, seeds, counted)
    for _ in range(3):
        assert plan.step(problem.grads, **options)
        op.overload(*arguments, **op.scalars | options)
        for rates in (problem.rates, expected.rates):  # shared vectors may change in place
            rates[0].mul_(0.5)
    assert torch.equal(steps, counted)
    for got, want in zip([problem.params, *states.values()], [expected.params, *others.values()]):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    return problem, plan


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_sgd_gives_the_bits_of_the_list_op(device, dtype):
    assert_same_bits(SGD, device, dtype, {"momentum": 0.9})


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_adam_gives_the_bits_of_the_list_op(device, dtype, amsgrad):
    problem, plan = assert_same_bits(ADAM, device, dtype, {"amsgrad": amsgrad})
    with pytest.raises(RuntimeError, match="max_exp_avg_sqs"):
        plan.step(problem.grads, amsgrad=not amsgrad)
    problem.params[0].data = problem.params[0].data.clone()
    assert not plan.step(problem.grads, amsgrad=amsgrad)


CHANGES = {
    "memory": lambda p: setattr(p, "data", p.data.clone()),
    "dtype": lambda p: setattr(p, "data", p.data.double()),
    "dtype in the same memory": lambda p: setattr(p, "data", p.data.view(torch.int32)),
    "strides": lambda p: setattr(p, "data", p.data.as_strided((8, 6), (1, 8))),
    "shape": lambda p: p.resize_(3, 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_that_changed_is_noticed(device, change):
    plan, param, buffer, steps = one(device)
    assert plan.step([torch.ones_like(param)])
    CHANGES[change](param)
    before, state = param.clone(), buffer.clone()
    assert not plan.step([torch.ones_like(param)])
    assert torch.equal(param, before) and torch.equal(buffer, state) and steps.tolist() == [1]


def test_a_state_that_changed_is_noticed(device):
    plan, param, buffer, _ = one(device)
    buffer.data = buffer.data.clone()
    assert not plan.step([torch.ones_like(param)])


def test_what_does_not_fit_is_refused(device):
    names = ["rows of a linear layer", "columns of an embedding"]
    problem = testing.feature_problem(device=device, names=names)
    plan, _, steps = planned(SGD, problem, {"momentum": 0.9})
    before, counted = problem.to(torch.float32), steps.clone()
    sparse = [problem.grads[0].to_sparse(), problem.grads[1]]
    for grads, message in (
        (problem.grads[:1], "grads has 1 entries"),
        (sparse, r"grads\[0\] is sp"),
    ):
        with pytest.raises(RuntimeError, match=message):
            plan.step(grads)
    with pytest.raises(RuntimeError, match="momentum_buffers has entries"):
        plan.step(problem.grads, momentum=0.0)
    with pytest.raises(RuntimeError, match=r"rates\[0\] has 6 entries"):
        param, rate = torch.ones(5, 4, device=device), torch.ones(6, device=device)
        Plan(SGD, [param], {}, [rate], [4], [], steps[:1])
    with pytest.raises(RuntimeError, match="got plan 123456789"):
        plan.step_of_number(123456789, problem.grads)
    assert all(torch.equal(a, b) for a, b in zip(problem.params, before.params))
    assert torch.equal(steps, counted)


def test_the_plan_holds_its_tensors_and_lets_them_go(device):
    freed = []

    class Watched(torch.Tensor):
        def __del__(self):
            freed.append(True)

    problem = testing.feature_problem(device=device, names=["rows of a linear layer"])
    problem.params[0] = problem.params[0].as_subclass(Watched)
    plan, states, _ = planned(SGD, problem, {"momentum": 0.9})
    number, other = plan.number, one(device)[0]
    problem.params.clear()
    gc.collect()
    assert not freed and plan.step(problem.grads)
    del plan, states
    gc.collect()
    assert freed
    with pytest.raises(RuntimeError, match=f"got plan {number}"):
        other.step_of_number(number, problem.grads)


@pytest.mark.parametrize("mode", ["real", "fake", "pre-dispatch"])
def test_a_trace_does_not_see_that_a_plan_goes(device, mode):
    """The garbage collection may come at any time."""
    plans = [one(device)[0] for _ in range(2)]
    number = plans[0].number

    def double(x):
        plans[0] = None
        gc.collect()
        return 2 * x

    options = {"pre_dispatch": True} if mode == "pre-dispatch" else {"tracing_mode": mode}
    graph = make_fx(double, **options)(torch.ones(2, device=device))
    assert "alrao" not in graph.code
    with pytest.raises(RuntimeError, match=f"got plan {number}"):
        plans[1].step_of_number(number, [torch.ones(8, 6, device=device)])
