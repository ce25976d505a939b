"""Protects when states are made, and when a step is the first:

- all are there from the construction on, for parameters that are trained; frozen ones cost nothing until unfrozen;
- whether a momentum step is the first follows the buffer, as in torch.optim.SGD: switched on later, popped, switched
  off and on again, put in by hand; amsgrad switched on later does not restart Adam's count; in compat alike;
- rates that are exchanged or filled count, also where the kernels read a copy in memory order;
- keys exchanged under the same values, and states of other strides or dtypes, are seen by every implementation.
"""

import copy

import pytest
import torch
from torch import nn

from alrao_fast import AlraoAdam, AlraoSGD, Constant, PerWeight, backends
from alrao_fast.compat import SGDAlrao
from alrao_fast.compat.optim_spec import AdamSpec, SGDSpec

bare = pytest.mark.filterwarnings("ignore:.*bare tensors")


def pair(**options):
    """One parameter under AlraoSGD and one under torch.optim.SGD."""
    a, b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    return AlraoSGD([a], sampler=Constant(0.1), **options), torch.optim.SGD([b], lr=0.1, **options)


def only(opt):
    [group] = opt.param_groups
    [param] = group["params"]
    return param, group


def step(*optimizers, value=1.0):
    for opt in optimizers:
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, value)
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, options, names",
    [
        (AlraoSGD, {}, set()),
        (AlraoSGD, {"momentum": 0.9}, {"momentum_buffer"}),
        (AlraoSGD, {"momentum": 0.9, "master_weights": True}, {"momentum_buffer", "master"}),
        (AlraoAdam, {}, {"exp_avg", "exp_avg_sq"}),
        (AlraoAdam, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    ],
    ids=["sgd", "momentum", "masters", "adam", "amsgrad"],
)
def test_states_are_there_at_construction(dtype, kind, options, names):
    net = nn.Linear(3, 2).to(dtype).to(memory_format=torch.preserve_format)
    net.bias.requires_grad_(False)
    opt = kind(net, **options)
    low = dtype == torch.bfloat16
    names = names if low else names - {"master"}
    rates = {"rate"} if kind is AlraoSGD else {"rate", "drawn_rate", "rate_limit"}
    assert set(opt.state[net.bias]) == rates
    assert set(opt.state[net.weight]) == {*rates, "step", *names}
    fresh = {key: value.clone() for key, value in opt.state[net.weight].items()}
    for name in names - {"master"}:
        assert not fresh[name].any()
    if "master" in names:
        assert torch.equal(fresh["master"], net.weight.float())
    net.bias.requires_grad_(True)
    step(opt)
    assert set(opt.state[net.bias]) == set(opt.state[net.weight]) == {*rates, "step", *names}
    for key, value in opt.state[net.weight].items():
        assert (value.dtype, value.shape) == (fresh[key].dtype, fresh[key].shape)


def test_meta_and_moved_parameters():
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    opt = AlraoSGD(net, momentum=0.9)
    assert opt.state[net.weight]["momentum_buffer"].is_meta
    assert opt.state[net.weight]["rate"].device.type == "cpu"
    for name, param in net.named_parameters():
        # In place, as torch.utils.swap_tensors does: the optimizer's parameter comes to life.
        torch.utils.swap_tensors(param, nn.Parameter(torch.zeros(param.shape)))
        assert dict(net.named_parameters())[name] is param
    step(opt)
    assert torch.equal(opt.state[net.bias]["momentum_buffer"], torch.ones(2))
    net.double()
    step(opt)
    assert opt.state[net.bias]["momentum_buffer"].dtype == torch.float64


# What a user does to an optimizer after the steps of the list, and the options it was made with.
CHANGES = {
    "switched on": ({"dampening": 0.5}, [lambda s, g: g.update(momentum=0.9)]),
    "popped": (
        {"momentum": 0.9, "dampening": 0.5},
        [lambda s, g: s.pop("momentum_buffer")],
    ),
    "set to None": (
        {"momentum": 0.9, "dampening": 0.5},
        [lambda s, g: s.update(momentum_buffer=None)],
    ),
    "cleared": ({"momentum": 0.9, "dampening": 0.5}, [lambda s, g: s.clear()]),
    "off and on": (
        {"momentum": 0.9, "dampening": 0.5},
        [lambda s, g: g.update(momentum=0.0), lambda s, g: g.update(momentum=0.9)],
    ),
    "zeroed": (
        {"momentum": 0.9, "dampening": 0.5},
        [lambda s, g: s["momentum_buffer"].zero_()],
    ),
    "only the buffer": (
        {"momentum": 0.9, "dampening": 0.5},
        [lambda s, g: [s.clear(), s.update(momentum_buffer=torch.zeros(3))]],
    ),
}


@bare
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("change", CHANGES)
def test_the_first_step_of_momentum(change, fused):
    options, changes = CHANGES[change]
    ours, theirs = pair(**options)
    only(ours)[1]["fused"] = fused
    step(ours, theirs)
    for change in changes:
        step(ours, theirs, value=2.0)
        for opt in (ours, theirs):
            param, group = only(opt)
            change(opt.state[param], group)
        for _ in range(3):
            step(ours, theirs)
            torch.testing.assert_close(only(ours)[0], only(theirs)[0])


@bare
def test_before_any_step():
    """Switched off before it began, on later; a buffer put in, or written, before the first step."""
    ours, theirs = pair(momentum=0.9, dampening=0.5)
    for momentum in (0.0, 0.9):
        for opt in (ours, theirs):
            only(opt)[1]["momentum"] = momentum
        step(ours, theirs)
        torch.testing.assert_close(only(ours)[0], only(theirs)[0])
    for exchange in (True, False):
        ours, theirs = pair(momentum=0.9, dampening=0.5)
        theirs.state[only(theirs)[0]]["momentum_buffer"] = torch.full((3,), 4.0)
        if exchange:
            ours.state[only(ours)[0]]["momentum_buffer"] = torch.full((3,), 4.0)
        else:
            ours.state[only(ours)[0]]["momentum_buffer"].fill_(4.0)
        for _ in range(2):
            step(ours, theirs)
            torch.testing.assert_close(only(ours)[0], only(theirs)[0])


@bare
def test_amsgrad_switched_on_keeps_the_count():
    for make in (
        lambda p: AlraoAdam([p], sampler=Constant(0.1)),
        lambda p: AdamSpec([p], [torch.tensor(0.1)]),
    ):
        param = nn.Parameter(torch.zeros(3))
        opt = make(param)
        step(opt)
        step(opt)
        opt.param_groups[0]["amsgrad"] = True
        step(opt)
        assert int(opt.state[param]["step"]) == 3


@pytest.mark.parametrize("change", ["switched on", "popped", "off and on", "zeroed"])
def test_the_authors_momentum(change):
    """At a rate of 0 the authors' momentum keeps all of the buffer: a buffer that is there counts in full."""
    options, changes = CHANGES[change]
    param = nn.Parameter(torch.zeros(3))
    opt = SGDSpec([param], [torch.tensor(0.0)], **options)
    step(opt)
    for change in changes:
        change(opt.state[param], opt.param_groups[0])
        before = opt.state[param].get("momentum_buffer")
        before = None if before is None else before.clone()
        momentum = opt.param_groups[0]["momentum"]
        step(opt)
        if momentum:
            expected = torch.ones(3) if before is None else before + 0.5
            torch.testing.assert_close(opt.state[param]["momentum_buffer"], expected)


def test_the_authors_clones_with_momentum_switched_on():
    inner, clones = nn.Linear(2, 2), [nn.Linear(2, 2) for _ in range(2)]
    others = copy.deepcopy(clones)
    rates = [torch.full_like(p, 0.1) for p in inner.parameters()]
    opt = SGDAlrao(inner.parameters(), rates, [m.parameters() for m in clones], [0.1, 0.2])
    peers = [torch.optim.SGD(m.parameters(), lr=lr) for m, lr in zip(others, (0.1, 0.2))]
    for number in range(4):
        if number == 2:
            for one in (*opt.opt_last_layers, *peers):
                one.param_groups[0].update(momentum=0.9, dampening=0.5)
        for net in (*clones, *others):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
        opt._clones.step()
        for peer in peers:
            peer.step()
        for a, b in zip(clones, others):
            torch.testing.assert_close(a.weight, b.weight)


CONVS = {
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
    "plain": lambda: nn.Conv2d(4, 6, 2, bias=False),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("sampler", [None, PerWeight(1e-2, 1.0)], ids=["features", "weights"])
@pytest.mark.parametrize("conv", CONVS)
def test_rates_written_in_place_count(conv, sampler, impl):
    """In channels_last memory as in contiguous memory."""
    nets = [CONVS[conv]().to(memory_format=torch.channels_last), CONVS[conv]()]
    optimizers = [AlraoSGD(n, sampler=sampler, generator=torch.Generator()) for n in nets]
    with backends.use_backend(impl):
        for write in (
            lambda s: None,
            lambda s: s["rate"].mul_(2),
            lambda s: s["rate"].data.fill_(0.25),
            lambda s: s.update(rate=torch.linspace(0, 1, len(s["rate"]))),
            lambda s: s["rate"].copy_(torch.linspace(1, 2, len(s["rate"]))),
        ):
            for net, opt in zip(nets, optimizers):
                with torch.no_grad():
                    net.weight.zero_()
                write(opt.state[net.weight])
            step(*optimizers)
            assert nets[0].weight.any()
            torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_rates_written_in_place_count_in_the_authors_package():
    param = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    opt = SGDSpec([param], [torch.rand(2, 3, 2, 2)])
    step(opt)
    opt.state[param]["rate"].copy_(torch.rand(2, 3, 2, 2))
    with torch.no_grad():
        param.zero_()
    step(opt)
    torch.testing.assert_close(param.detach(), -opt.state[param]["rate"])


@bare
@pytest.mark.parametrize("fused", [None, False])
def test_keys_exchanged_under_the_same_values(fused):
    a, b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = AlraoAdam([a, b], sampler=Constant(0.1), fused=fused)
    twins = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    other = torch.optim.Adam(twins, lr=0.1)
    for one, params in ((opt, [a, b]), (other, twins)):
        for number, param in enumerate(params):
            param.grad = torch.full((3,), 1.0 + number)
        one.step()
        first, second = one.state.values()
        one.state.clear()
        one.state.update(zip(reversed(params), (first, second)))
        own = list(one.state[params[0]].items())
        keys = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
        one.state[params[0]].clear()
        one.state[params[0]].update({keys.get(key, key): value for key, value in own})
        one.step()
    for p, q in zip((a, b), twins):
        torch.testing.assert_close(p, q)


@bare
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: t.double(),
        lambda t: t.clone(),
    ],
    ids=["strides", "dtype", "memory"],
)
@pytest.mark.parametrize("name", ["momentum_buffer", "rate"])
def test_states_whose_memory_changed(change, name, fused):
    params = [nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2)]
    optimizers = [AlraoSGD([p], momentum=0.9, sampler=Constant(0.1), fused=fused) for p in params]
    step(*optimizers)
    state = optimizers[0].state[params[0]][name]
    state.data = change(state.data)
    step(*optimizers)
    step(*optimizers)
    assert torch.equal(*params)


@bare
@pytest.mark.parametrize("fused", [None, False])
def test_a_momentum_of_none(fused):
    for opt in (pair(momentum=0.9)[0], SGDSpec([nn.Parameter(torch.zeros(3))], [0.1], 0.9)):
        param, group = only(opt)
        group.update(momentum=None, fused=fused)
        before = {
            key: value.clone() for key, value in opt.state[param].items() if key != "rate_dim"
        }
        with pytest.raises(TypeError, match="momentum: got None, expected a finite number >= 0"):
            step(opt)
        assert not param.any()
        assert all(torch.equal(opt.state[param][key], value) for key, value in before.items())


@bare
def test_a_state_that_is_no_tensor():
    ours, _ = pair(momentum=0.9)
    param, _ = only(ours)
    for name in ("rate", "momentum_buffer"):
        ours.state[param][name] = 0.5
        with pytest.raises(
            TypeError, match=rf"state '{name}' of parameter 'params\[0\]' is a float"
        ):
            step(ours)
        assert not param.any()
        ours.state.clear()


def test_rates_set_by_hand_survive_a_new_group():
    layer = nn.Linear(2, 3)
    opt = AlraoSGD(layer)
    opt.state[layer.weight]["rate"] = torch.full((3,), 0.5)
    opt.add_param_group({"params": nn.Linear(2, 3)})
    assert torch.equal(opt.state[layer.weight]["rate"], torch.full((3,), 0.5))
