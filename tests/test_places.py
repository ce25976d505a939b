"""Protects that parameters may be put into and taken out of `param_groups` by hand, as torch.optim lets one:

- one in the place of another of its shape goes on with that one's rates, or those that were moved over, and the old one
  is left alone; the numbers are torch.optim's; whole lists and group dicts may be exchanged, before the first step too;
- any other is given rates as add_param_group would, by the group's own sampler, with the same warning;
- parameters that were replaced in their modules, which nothing updates then, are warned of;
- what was taken out is no longer updated, nor saved; the authors' optimizers do alike.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from alrao_fast import AlraoAdam, AlraoMuon, AlraoSGD, Constant, LogUniform
from alrao_fast.compat import AdamAlrao, SGDAlrao
from alrao_fast.compat.optim_spec import AdamSpec, SGDSpec

OURS = {
    "sgd": (AlraoSGD, torch.optim.SGD, {}),
    "momentum": (AlraoSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "adam": (AlraoAdam, torch.optim.Adam, {}),
}
bare = pytest.mark.filterwarnings("ignore:.*bare tensors")


def full(value, *shape):
    return nn.Parameter(torch.full(shape or (3,), value))


def pairs(kind, params):
    ours, theirs, options = OURS[kind]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    return ours(params, sampler=Constant(0.1), **options), theirs(twins, lr=0.1, **options)


def step(*optimizers):
    for opt in optimizers:
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        opt.step()


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def assert_alike(opt, other):
    for a, b in zip(params_of(opt), params_of(other), strict=True):
        torch.testing.assert_close(a, b)


@bare
def test_by_hand():
    old, new = full(1.0), full(5.0)
    opt = AlraoSGD([old], sampler=Constant(0.1))
    old.grad = torch.ones(3)
    opt.step()
    opt.state[new] = opt.state.pop(old)
    opt.param_groups[0]["params"][0] = new
    new.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(new.detach(), torch.full((3,), 4.9))
    torch.testing.assert_close(old.detach(), torch.full((3,), 0.9))


@bare
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("moved", [True, False], ids=["state moved", "state left"])
@pytest.mark.parametrize("steps", [0, 2])
def test_another_in_its_place(kind, moved, steps):
    opt, other = pairs(kind, [full(1.0), full(2.0), full(3.0, 2, 2)])
    for _ in range(steps):
        step(opt, other)
    left = []
    for one in (opt, other):
        params = one.param_groups[0]["params"]
        new = full(5.0, 2, 2)
        if moved and params[2] in one.state:
            one.state[new] = one.state.pop(params[2])
        left.append((params[2], params[2].detach().clone()))
        params[2] = new
    for _ in range(3):
        step(opt, other)
        assert_alike(opt, other)
    for param, before in left:
        assert torch.equal(param, before)


@bare
def test_rates_come_with_the_place_or_with_the_state():
    layer = nn.Linear(4, 3)
    opt = AlraoSGD(layer, momentum=0.9, normalized_momentum=False)
    step(opt)
    rate = opt.state[layer.weight]["rate"]
    replaced = torch.tensor([1.0, 2.0, 3.0])
    opt.state[layer.bias]["rate"] = replaced
    moved = torch.tensor([4.0, 5.0, 6.0])
    weight, bias, third = full(0.0, 3, 4), full(0.0, 3), full(0.0, 3)
    opt.param_groups[0]["params"][:] = [weight, bias]
    step(opt)
    assert opt.state[weight]["rate"] is rate and opt.state[bias]["rate"] is replaced
    assert opt.layout_of(weight).vector is opt.layout_of(bias).vector
    opt.state[third] = {"rate": moved}
    opt.param_groups[0]["params"][1] = third
    before = torch.get_rng_state()
    step(opt)
    torch.testing.assert_close(third.detach(), -moved)
    # Nothing was drawn, and clearing the state forgets nothing of it.
    assert torch.equal(torch.get_rng_state(), before)
    last = opt.state[weight]["rate"] = torch.rand(3)
    step(opt)
    opt.state.clear()
    step(opt)
    assert torch.equal(opt.state[third]["rate"], moved)
    assert torch.equal(opt.state[weight]["rate"], last)


@bare
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("exchange", ["list", "group", "groups"])
def test_whole_lists(exchange, steps):
    opt, other = pairs("momentum", [full(1.0), full(2.0, 2)])
    for _ in range(steps):
        step(opt, other)
    for one in (opt, other):
        fresh = [nn.Parameter(p.detach().clone()) for p in params_of(one)]
        group = one.param_groups[0]
        if exchange == "list":
            group["params"] = fresh
        elif exchange == "group":
            one.param_groups[0] = {**group, "params": fresh}
        else:
            one.param_groups = [{**group, "params": fresh}]
    step(opt, other)
    step(opt, other)
    assert_alike(opt, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda params, new: params.append(new),
        lambda params, new: params.insert(0, new),
        lambda params, new: params.__setitem__(0, full(0.0, 4)),
    ],
    ids=["one more", "in between", "another shape"],
)
def test_others_are_drawn_as_in_add_param_group(change):
    torch.manual_seed(0)
    opt = AlraoSGD(
        [
            {"params": nn.Linear(2, 3)},
            {"params": nn.Linear(2, 3), "sampler": LogUniform(5.0, 6.0)},
        ],
        (1e-3, 1e-2),
    )
    step(opt)
    known = {p: opt.state[p]["rate"].clone() for p in params_of(opt)}
    for number, (lo, hi) in enumerate([(1e-3, 1e-2), (5.0, 6.0)]):
        change(opt.param_groups[number]["params"], full(0.0))
        with pytest.warns(UserWarning, match="1 bare tensors"):
            step(opt)
        for param in opt.param_groups[number]["params"]:
            rate = opt.state[param]["rate"]
            if param in known:
                assert torch.equal(rate, known[param])
            else:
                assert rate.shape == param.shape and lo <= rate.min() < rate.max() <= hi
                torch.testing.assert_close(param.detach(), -rate)


def test_a_parameter_the_model_gave_a_layout():
    layer = nn.Linear(4, 3)
    opt = AlraoSGD([layer.weight], model=layer)
    opt.param_groups[0]["params"].append(layer.bias)
    step(opt)
    assert opt.state[layer.bias]["rate"] is opt.state[layer.weight]["rate"]


def test_a_failed_draw_leaves_everything():
    layer = nn.Linear(4, 3)
    opt = AlraoSGD([layer.weight], model=layer, sampler=lambda n, g: torch.ones(n) / (n < 4))
    values = [p.detach().clone() for p in layer.parameters()]
    opt.param_groups[0]["params"].append(full(0.0, 5))
    for _ in range(2):
        with pytest.raises(ValueError, match="non-finite rate"):
            step(opt)
    del opt.param_groups[0]["params"][1]
    assert all(torch.equal(p, v) for p, v in zip(layer.parameters(), values))
    step(opt)


@bare
@pytest.mark.parametrize("kind", OURS)
def test_what_was_taken_out_stays_and_is_not_saved(kind):
    opt, other = pairs(kind, [full(1.0), full(2.0), full(3.0)])
    step(opt, other)
    out = []
    for one in (opt, other):
        out.append(one.param_groups[0]["params"].pop(0))
    before = out[0].detach().clone()
    out[0].grad = torch.ones(3)
    step(opt, other)
    assert_alike(opt, other)
    assert torch.equal(out[0], before)
    saved = opt.state_dict()
    assert list(saved["state"]) == [0, 1] and out[0] in opt.state
    opt.load_state_dict(saved)
    copied = copy.deepcopy(opt)
    step(opt, other, copied)
    assert_alike(opt, other)
    assert_alike(copied, other)
    # Put back, it goes on.
    opt.param_groups[0]["params"].append(out[0])
    step(opt)
    assert not torch.equal(out[0], before)


@bare
def test_saved_and_copied_before_a_step():
    opt, _ = pairs("momentum", [full(1.0), full(2.0)])
    rate = torch.tensor([0.1, 0.2, 0.3])
    opt.state[opt.param_groups[0]["params"][0]]["rate"] = rate
    opt.param_groups[0]["params"][0] = full(5.0)
    assert torch.equal(opt.state_dict()["state"][0]["rate"], rate)
    opt.param_groups[0]["params"][0] = full(5.0)
    again = copy.deepcopy(opt)
    step(opt, again)
    assert_alike(opt, again)
    assert torch.equal(opt.param_groups[0]["params"][0], 5.0 - rate)


@pytest.mark.parametrize("kind", [SGDSpec, AdamSpec])
def test_the_authors_optimizer(kind):
    rates = torch.tensor([[0.1], [0.2]])
    opt, twin = (kind([full(1.0, 2, 3)], [rates]) for _ in range(2))
    step(opt, twin)
    # Its state moved over, then left behind.
    old = opt.param_groups[0]["params"][0]
    new = opt.param_groups[0]["params"][0] = nn.Parameter(old.detach().clone())
    opt.state[new] = opt.state.pop(old)
    before = old.detach().clone()
    step(opt, twin)
    assert_alike(opt, twin)
    assert torch.equal(old, before)
    opt.param_groups[0]["params"][0] = nn.Parameter(new.detach().clone())
    step(opt)
    assert torch.equal(opt.state[params_of(opt)[0]]["rate"], torch.tensor([0.1, 0.2]))
    opt.param_groups[0]["params"].append(full(1.0, 4))
    with pytest.raises(RuntimeError, match=r"parameter 1 of param group 0, of shape \[4\]"):
        step(opt)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_authors_clones(kind):
    torch.manual_seed(0)
    inner, clones = nn.Linear(2, 2), [nn.Linear(2, 2) for _ in range(2)]
    others = copy.deepcopy(clones)
    ours = {torch.optim.SGD: SGDAlrao, torch.optim.Adam: AdamAlrao}[kind]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    rates = [torch.full_like(p, 0.1) for p in inner.parameters()]
    opt = ours(inner.parameters(), rates, [m.parameters() for m in clones], [0.1, 0.2], **options)
    peers = [kind(m.parameters(), lr=lr, **options) for m, lr in zip(others, (0.1, 0.2))]
    for number in range(4):
        step(*peers)
        for own in opt.opt_last_layers:
            for p in params_of(own):
                p.grad = torch.ones_like(p)
        opt._clones.step()
        for own, peer in zip(opt.opt_last_layers, peers):
            assert_alike(own, peer)
        if number == 1:
            # Other objects over the same memory: their state is empty.
            for one in (*opt.opt_last_layers, *peers):
                group = one.param_groups[0]
                group["params"] = [nn.Parameter(p.detach()) for p in group["params"]]


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def train(net, opt):
    opt.zero_grad()
    net(torch.ones(5, 3)).sum().backward()
    opt.step()


def loaded_by_assignment(net):
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def emptied(net):
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    net.to("meta").to_empty(device="cpu").load_state_dict(weights)


def another_layer(net):
    net[1] = nn.Linear(4, 2)


REPLACED = pytest.mark.parametrize(
    "replace, count",
    [(loaded_by_assignment, 4), (emptied, 4), (another_layer, 2)],
    ids=["assign", "to_empty", "module"],
)


@REPLACED
@pytest.mark.parametrize("make", [AlraoSGD, AlraoAdam, AlraoMuon])
def test_a_warning_of_parameters_replaced_in_their_modules(make, replace, count):
    """Once; put into param_groups they are trained, with the rates of the old ones."""
    net = network()
    opt = make(net)
    # It puts a function around step().
    torch.optim.lr_scheduler.ConstantLR(opt)
    train(net, opt)
    old = list(net.parameters())
    replace(net)
    with pytest.warns(
        UserWarning, match=rf"^{count} parameters of the optimizer .*1\.weight"
    ) as told:
        train(net, opt)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, opt)
        before = net[1].weight.detach().clone()
        rates = [opt.state[p]["rate"] for p in params_of(opt)]
        new = dict(zip(old, net.parameters()))
        for group in opt.param_groups:
            group["params"] = [new[param] for param in group["params"]]
        train(net, opt)
    assert (net[1].weight != before).any()
    assert all(opt.state[p]["rate"] is rate for p, rate in zip(params_of(opt), rates))


@pytest.mark.filterwarnings("error")
def test_no_warning_of_replaced_parameters_that_somebody_trains():
    """Those that are in a group, that are frozen, or whose layer is gone; and of parameters without gradients."""
    net = network()
    opt = AlraoSGD(net)
    train(net, opt)
    net[0].weight.requires_grad_(False)
    train(net, opt)
    net[1] = nn.Linear(4, 2)
    opt.add_param_group({"params": net[1]})
    train(net, opt)
    net[0] = nn.Linear(3, 4).requires_grad_(False)
    train(net, opt)
    net[0] = nn.Identity()
    net(torch.ones(5, 4)).sum().backward()
    opt.step()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [AlraoAdam, lambda net: torch.optim.SGD(net.parameters(), 0.1)])
def test_no_warning_of_replaced_parameters_that_another_optimizer_has(make):
    net = network()
    opt = AlraoSGD(net)
    train(net, opt)
    net[1] = nn.Linear(4, 2)
    other = make(net[1])
    train(net, opt)
    other.step()
