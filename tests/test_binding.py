"""Protects that what stands in an optimizer is what its next step works on:

- a parameter, a state tensor or the dict of a parameter's states that was exchanged by hand between two steps counts,
  as in torch.optim, and is what state_dict() saves; so do entries that were taken out or put in;
- objects are told apart by identity, however equal they are; with the extension and without it;
- nothing is bound anew while nothing changes; a group that stays is not touched by what happens to another;
- a graph of a step on a GPU sends a learning rate that is on the CPU.
"""

import copy
from collections import UserDict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alrao_fast import AlraoAdam, AlraoSGD, Constant, _extension, backends
from alrao_fast.compat import AdamAlrao, SGDAlrao
from alrao_fast.compat.optim_spec import SGDSpec
from alrao_fast.ops import dispatch
from alrao_fast.ops.feature import Lists, Scalars
from alrao_fast.ops.feature_sgd import OP as SGD
from alrao_fast.ops.plan import ListPlan
from alrao_fast.optim import binding
from alrao_fast.optim.binding import Call, Objects


@pytest.fixture(params=["compiled", "python"])
def comparison(request, monkeypatch):
    """Both ways to look at the objects."""
    if request.param == "python":
        monkeypatch.setattr(binding, "_compiled_comparison", None)
        monkeypatch.setattr(binding, "_compiled_gradients", None)
    elif _extension.ERROR is not None:
        pytest.skip(_extension.ERROR)


def pair(count=3, **options):
    """Equal parameters under AlraoSGD with one rate and under torch.optim.SGD."""
    ours = [torch.nn.Parameter(torch.full((4,), 1.0 + k)) for k in range(count)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    with pytest.warns(UserWarning, match="bare tensors"):
        opt = AlraoSGD(ours, sampler=Constant(0.1), **options)
    return opt, torch.optim.SGD(theirs, lr=0.1, **options)


def step(*optimizers):
    for opt in optimizers:
        for group in opt.param_groups:
            for k, param in enumerate(group["params"]):
                param.grad = torch.full_like(param, 1.0 + k)
        opt.step()


def assert_alike(opt, other):
    for a, b in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"]):
        torch.testing.assert_close(a, b)
        if "momentum_buffer" in other.state[b]:
            buffer = other.state[b]["momentum_buffer"]
            torch.testing.assert_close(opt.state[a]["momentum_buffer"], buffer)


EXCHANGES = {
    "state tensor": lambda states: states.update(momentum_buffer=torch.full((4,), 7.0)),
    "equal state tensor, then written": lambda states: states.update(
        momentum_buffer=states["momentum_buffer"].clone()
    ),
}


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
def test_an_exchanged_state_counts(comparison, exchange):
    opt, other = pair(momentum=0.9)
    step(opt, other)
    for one in (opt, other):
        states = one.state[one.param_groups[0]["params"][1]]
        exchange(states)
        states["momentum_buffer"].add_(0.5)
    step(opt, other)
    step(opt, other)
    assert_alike(opt, other)
    saved = opt.state_dict()["state"][1]["momentum_buffer"]
    torch.testing.assert_close(saved, other.state_dict()["state"][1]["momentum_buffer"])


def test_exchanged_dict_of_states(comparison):
    opt, other = pair(momentum=0.9)
    step(opt, other)
    for one in (opt, other):
        param = one.param_groups[0]["params"][0]
        one.state[param] = copy.deepcopy(one.state[param])
        one.state[param]["momentum_buffer"].mul_(3)
    step(opt, other)
    assert_alike(opt, other)


def test_exchanged_rates_count(comparison):
    opt, _ = pair()
    step(opt)
    param = opt.param_groups[0]["params"][2]
    opt.state[param]["rate"] = torch.full((4,), 2.0)
    before = param.detach().clone()
    step(opt)
    assert torch.equal(param, before - 2.0 * 3)


def test_states_taken_out_begin_anew(comparison):
    with pytest.warns(UserWarning, match="bare tensors"):
        opt = AlraoAdam([torch.nn.Parameter(torch.ones(4))], sampler=Constant(0.1))
    step(opt)
    [param] = opt.param_groups[0]["params"]
    old = opt.state[param].pop("exp_avg")
    step(opt)
    new = opt.state[param]["exp_avg"]
    assert new is not old and torch.equal(new, torch.full((4,), 0.1))


def test_parameters_exchanged_for_each_other(comparison):
    opt, other = pair(momentum=0.9)
    step(opt, other)
    for one in (opt, other):
        params = one.param_groups[0]["params"]
        params[0], params[2] = params[2], params[0]
    step(opt, other)
    assert_alike(opt, other)


def test_nothing_is_bound_anew_while_nothing_changes(comparison, monkeypatch):
    opt, _ = pair(momentum=0.9)
    step(opt)
    bound = opt._binding.groups[0]
    for _ in range(3):
        step(opt)
        opt.param_groups[0]["lr"] *= 0.5
        assert opt._binding.groups[0] is bound
    opt.state[opt.param_groups[0]["params"][0]]["note"] = "mine"
    step(opt)
    assert opt._binding.groups[0] is not bound


def test_a_group_is_bound_apart_from_the_others(comparison):
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(4)]
    with pytest.warns(UserWarning, match="bare tensors"):
        opt = AlraoSGD([{"params": params[:2]}, {"params": params[2:]}], momentum=0.9)
    step(opt)
    first, second = opt._binding.groups[0], opt._binding.groups[1]
    opt.state[params[3]]["momentum_buffer"] = torch.zeros(4)
    step(opt)
    assert opt._binding.groups[0] is first and opt._binding.groups[1] is not second


def test_objects_are_told_apart_by_identity(comparison):
    scalar, equal = torch.zeros(()), torch.zeros(())
    sequence, mapping = [scalar, scalar], {"a": scalar, "b": equal}
    objects = Objects(sequence, mapping, [], {})
    assert objects.are_same()
    for change in (
        lambda: sequence.__setitem__(1, equal),
        lambda: sequence.append(scalar),
        sequence.pop,
        lambda: mapping.update(a=equal),
        lambda: mapping.update(c=scalar),
        lambda: mapping.pop("b"),
        lambda: (sequence.pop(), mapping.update(c=scalar)),
    ):
        sequence[:] = [scalar, scalar]
        mapping.clear()
        mapping.update(a=scalar, b=equal)
        objects = Objects(sequence, mapping)
        change()
        assert not objects.are_same()


def test_ids_are_not_taken_again(comparison):
    """The object that was bound stays alive, so no other can have its id."""
    mapping = {"a": torch.zeros(3)}
    objects = Objects(mapping)
    for _ in range(100):
        mapping["a"] = torch.zeros(3)
        assert not objects.are_same()


@pytest.mark.parametrize("kind", [tuple, torch.nn.ParameterList, UserDict], ids=str)
def test_other_containers_than_lists_and_dicts(comparison, kind):
    opt, other = pair(momentum=0.9)
    for one in (opt, other):
        if kind is UserDict:
            one.state = kind(one.state) if one is opt else one.state
        else:
            one.param_groups[0]["params"] = kind(one.param_groups[0]["params"])
    step(opt, other)
    for one in (opt, other):
        states = one.state[one.param_groups[0]["params"][1]]
        states["momentum_buffer"] = torch.full((4,), 3.0)
    step(opt, other)
    assert_alike(opt, other)


@pytest.mark.parametrize("count", [5, 5.0, torch.tensor(5.0), torch.tensor(5)], ids=repr)
def test_step_counts_as_others_keep_them(comparison, count):
    with pytest.warns(UserWarning, match="bare tensors"):
        opt = AlraoAdam([torch.nn.Parameter(torch.ones(4))], sampler=Constant(0.1))
    step(opt)
    [param] = opt.param_groups[0]["params"]
    opt.state[param]["step"] = count
    step(opt)
    assert opt.state[param]["step"].dtype == torch.int64 and int(opt.state[param]["step"]) == 6


def test_options_in_tensors_are_read_at_every_step(comparison):
    decay = torch.tensor(0.5)
    opt, _ = pair(count=1)
    [group] = opt.param_groups
    group["weight_decay"] = decay
    step(opt)
    decay.fill_(0.0)
    before = group["params"][0].detach().clone()
    step(opt)
    torch.testing.assert_close(group["params"][0].detach(), before - 0.1)


def test_a_group_taken_out_is_not_copied():
    opt, _ = pair()
    extra = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="bare tensors"):
        opt.add_param_group({"params": [extra]})
    del opt.param_groups[1]
    again = copy.deepcopy(opt)
    with pytest.warns(UserWarning, match="bare tensors"):
        again.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    step(again)


def authors_pair(kind, **options):
    """Clones under the authors' optimizer and one of torch.optim for each."""
    torch.manual_seed(0)
    inner = torch.nn.Linear(2, 2)
    clones = [torch.nn.Linear(2, 2) for _ in range(2)]
    others = copy.deepcopy(clones)
    ours = {torch.optim.SGD: SGDAlrao, torch.optim.Adam: AdamAlrao}[kind]
    rates = [torch.full_like(p, 0.1) for p in inner.parameters()]
    opt = ours(inner.parameters(), rates, [m.parameters() for m in clones], [0.1, 0.2], **options)
    peers = [kind(m.parameters(), lr=lr, **options) for m, lr in zip(others, (0.1, 0.2))]
    return opt, peers, clones, others


CLONE_CHANGES = {
    "cleared": lambda o: o.state.clear(),
    "exchanged": lambda o: [
        own.update({k: v + 1 if v.dim() else v for k, v in own.items()}) for own in o.state.values()
    ],
    "switched off": lambda o: o.param_groups[0].update(
        {k: v for k, v in {"momentum": 0.0, "amsgrad": False}.items() if k in o.param_groups[0]}
    ),
}


@pytest.mark.parametrize("change", CLONE_CHANGES.values(), ids=CLONE_CHANGES)
@pytest.mark.parametrize(
    "kind, options",
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})],
    ids=["sgd", "adam"],
)
def test_what_is_done_to_the_clones_optimizers_counts(comparison, kind, options, change):
    opt, peers, clones, others = authors_pair(kind, **options)
    for k in range(4):
        for net in (*clones, *others):
            for p in net.parameters():
                p.grad = torch.full_like(p, 1.0 + k)
        opt._clones.step()
        for peer in peers:
            peer.step()
        if k == 1:
            for one in (*opt.opt_last_layers, *peers):
                change(one)
    for net, other in zip(clones, others):
        for a, b in zip(net.parameters(), other.parameters()):
            torch.testing.assert_close(a, b)


def test_a_cleared_state_of_the_authors_optimizer_keeps_its_rates(comparison):
    param = torch.nn.Parameter(torch.zeros(3))
    opt = SGDSpec([param], [torch.tensor([0.1, 0.2, 0.3])], momentum=0.5)
    for k in range(3):
        param.grad = torch.ones(3)
        opt.step()
        if k == 0:
            opt.state.clear()
        elif k == 1:
            assert torch.equal(opt.state[param]["momentum_buffer"], torch.ones(3))
    saved = copy.deepcopy(opt)
    saved.state.clear()
    [copied] = saved.param_groups[0]["params"]
    copied.grad = torch.ones(3)
    before = copied.detach().clone()
    saved.step()
    torch.testing.assert_close(copied.detach(), before - torch.tensor([0.1, 0.2, 0.3]))


def test_the_authors_optimizers_follow_the_choice_of_a_backend():
    opt, _, clones, _ = authors_pair(torch.optim.SGD, momentum=0.9)
    [weight, _] = opt.opt_internal_nn.param_groups[0]["params"]
    for k in range(2):
        weight.grad = torch.ones_like(weight)
        for net in clones:
            for p in net.parameters():
                p.grad = torch.ones_like(p)
        if k == 0:
            opt.step()
            continue
        with backends.use_backend("cuda"):
            for part in (opt.opt_internal_nn, opt._clones):
                with pytest.raises(ValueError, match="'cuda' does not run on cpu tensors"):
                    part.step()


def test_the_authors_optimizer_sees_it_too(comparison):
    torch.manual_seed(0)
    inner, last = torch.nn.Linear(3, 2), [torch.nn.Linear(2, 2) for _ in range(2)]
    rates = [torch.full_like(p, 0.1) for p in inner.parameters()]
    opt = SGDAlrao(
        inner.parameters(),
        rates,
        [m.parameters() for m in last],
        [0.1, 0.2],
        momentum=0.5,
    )
    weight = inner.weight
    for k in range(2):
        weight.grad = torch.ones_like(weight)
        opt.step()
        if k == 0:
            spec = opt.opt_internal_nn
            spec.state[weight]["momentum_buffer"] = torch.full_like(weight, 100.0)
    keep = 1 - 0.5 * 0.1**0.5
    expected = torch.full_like(weight, 100.0 * keep + 1)
    torch.testing.assert_close(spec.state[weight]["momentum_buffer"], expected)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_graph_sends_a_learning_rate_to_the_gpu(monkeypatch, impl, dtype):
    """To read its value there would be no graph. Tensors that only claim to be on a GPU do for tracing."""
    monkeypatch.setattr(binding, "make_plan", ListPlan)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def update(param, grad, rate, steps, lr):
        lists = Lists([param], [], [], [rate], [6], [], steps)
        options = dict.fromkeys(SGD.options, 0.0) | {"nesterov": False, "authors_momentum": False}
        return Call(SGD, lists, impl).step([grad], options, Scalars(lr))

    with FakeTensorMode():
        param, grad, rate = (torch.ones(n, device="cuda") for n in ((8, 6), (8, 6), 8))
        steps = torch.zeros(1, dtype=torch.int64, device="cuda")
        traced = torch.compile(update, backend=keep, fullgraph=True)
        assert traced(param, grad, rate, steps, torch.tensor(0.5, dtype=dtype))
    [op] = graphs[0].graph.find_nodes(
        op="call_function", target=dispatch.overload("feature_sgd_", impl)
    )
    sent = op.kwargs["lr_tensor"].meta["example_value"]
    assert sent.is_cuda and sent.dtype in (torch.float32, torch.float64)
