"""Protects the loading of checkpoints with retired clones: where one does not fit, the clones are there again.

- A misfit before the head, in it, of names alone: network, optimizer and the training after it are as they were.
- A head in a module of the user's, or by itself, is not changed where the misfit is known by then.
- What would go on with the parameters that are exchanged is told of: DistributedDataParallel, another optimizer.
- Clones chosen by hand, in ascending order: `kept` in the state_dict knows no other.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from test_retirement import (
    LEFT,
    OPTIMIZERS,
    N,
    adaptive,
    assert_same,
    build,
    everything,
    retired,
    train,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import alrao_fast as alrao

MISFITS = {
    "another backbone": lambda state: state.update({"backbone.0.weight": torch.zeros(3, 3)}),
    "no backbone": lambda state: state.pop("backbone.0.weight"),
    "what is not there": lambda state: state.update({"backbone.7.bias": torch.zeros(3)}),
    "other classes": lambda state: state.update({"head.bias": torch.zeros(len(LEFT), 9)}),
    "another number of clones": lambda state: state.update(
        {"head.switch.logw": torch.zeros(2, 4, dtype=torch.float64)}
    ),
}


@pytest.mark.parametrize("make", ["run", "momentum"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_anywhere_brings_back_the_clones(misfit, make):
    net, opt = retired(make)
    saved = copy.deepcopy([net.state_dict(), opt.state_dict()])
    whole = build()
    its = OPTIMIZERS[make](whole)
    train(whole, its, range(4))
    twin = build()
    twins = OPTIMIZERS[make](twin)
    train(twin, twins, range(4))
    head = list(whole.head.parameters())
    MISFITS[misfit](state := copy.copy(saved[0]))
    with pytest.raises(RuntimeError):
        whole.load_state_dict(state)
    assert whole.head.clone_numbers == tuple(range(N)) and "head.kept" not in whole.state_dict()
    assert whole.head.num_clones == whole.head.switch.num_clones == N
    assert all(p is q for p, q in zip(whole.head.parameters(), head))
    # As torch does, what fits outside of the head has been loaded.
    twin.backbone.load_state_dict(whole.backbone.state_dict())
    assert_same(everything(whole, its), everything(twin, twins))
    train(whole, its, range(4, 8))
    train(twin, twins, range(4, 8))
    assert_same(everything(whole, its), everything(twin, twins))
    # What fits still loads.
    whole.load_state_dict(saved[0])
    its.load_state_dict(saved[1])
    assert whole.head.clone_numbers == tuple(LEFT)


@pytest.mark.parametrize("root", ["head", "a module of the user's"])
def test_a_misfit_of_the_head_is_found_before_it_is_changed(root):
    net, _ = retired()
    given = build(kind=adaptive if root == "head" else alrao.ClassifierClones)
    opt = OPTIMIZERS["run"](given)
    before = everything(given, opt)
    outer = (
        given.head if root == "head" else nn.ModuleDict({"first": nn.Linear(2, 2), "net": given})
    )
    prefix = "" if root == "head" else "net.head."
    state = {f"{prefix}{name}": value for name, value in net.head.state_dict().items()}
    if root != "head":
        state |= {**outer.state_dict(), **state, "first.weight": torch.zeros(3, 3)}
    expected = r"kept: got clones \[0, 1, 3\] of a checkpoint that does not fit.*weight"
    with pytest.raises(RuntimeError, match=expected):
        outer.load_state_dict(state)
    assert_same(everything(given, opt), before)


def test_a_wrapper_or_another_optimizer_that_has_the_clones_is_told_of():
    net, _ = retired()
    saved = net.state_dict()
    given = build()
    before = given.head.weight.detach().clone()
    other = torch.optim.SGD(given.parameters())
    with pytest.raises(ValueError, match="parameters that a SGD has"):
        given.load_state_dict(saved)
    del other
    with pytest.raises(ValueError, match="learning rate") as failed:
        torch.optim.SGD(build().parameters(), lr=-1)
    assert not hasattr(failed.traceback[-1].frame.f_locals["self"], "param_groups")
    copy.deepcopy(given).load_state_dict(saved)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(given)
        inside = {f"module.{name}": value for name, value in saved.items()}
        with pytest.raises(ValueError, match="parameters that a DistributedDataParallel has"):
            given.load_state_dict(saved)
        with pytest.raises(ValueError, match="parameters that a DistributedDataParallel has"):
            wrapped.load_state_dict(inside)
        assert given.head.clone_numbers == tuple(range(N))
        assert torch.equal(given.head.weight, before)
    finally:
        dist.destroy_process_group()
    del wrapped
    given.load_state_dict(saved)
    assert given.head.clone_numbers == tuple(LEFT)


@pytest.mark.parametrize(
    ("places", "error"),
    [
        ([3, 0, 1], ValueError),
        ([0, 0, 1], ValueError),
        ([0, N], ValueError),
        ([-1, 2], ValueError),
        ([], ValueError),
        ([0.5], TypeError),
        (2, TypeError),
    ],
)
def test_clones_chosen_by_hand_have_their_order(places, error):
    net = build()
    opt = OPTIMIZERS["run"](net)
    before = everything(net, opt)
    with pytest.raises(error, match="places"):
        net.head.keep_clones(places)
    assert_same(everything(net, opt), before)


def test_clones_chosen_by_hand():
    net, _ = retired()
    given = build()
    opt = OPTIMIZERS["run"](given)
    given.head.keep_clones(net.head.clone_numbers)
    given.load_state_dict(net.state_dict())
    assert given.head.clone_numbers == tuple(LEFT)
    assert opt.state[given.head.weight]["rate"].shape == (len(LEFT),)
    hook = given.head.weight.register_hook(lambda grad: None)
    with pytest.raises(ValueError, match="hooks on its weight"):
        given.head.keep_clones([0])
    hook.remove()
