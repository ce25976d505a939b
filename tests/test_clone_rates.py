"""`head.clone_lr` and `suggested_lr()` are the rates that the optimizer of the clones has. Protects:

- after loading another network's state, loading the optimizer's, copying and pickling the pair in any order,
  replacing or editing a rate in the optimizer, swapping the head; in what `state_dict` saves; of several optimizers;
- without an optimizer, or after its end, the loaded values count.
"""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.optim import AlraoAdam, AlraoMuon, AlraoSGD, LogUniform

WIDE, NARROW = (1e-5, 10.0), (1e-3, 1e-2)


def build(num_clones=5):
    return AlraoModel(nn.Linear(3, 4), ClassifierClones(4, 2, num_clones))


def rates(lr_range, num_clones=5, sampler=LogUniform):
    return sampler(*lr_range).clone_rates(num_clones)


def assert_rates(net, expected):
    assert torch.equal(net.head.clone_lr, expected)
    assert torch.equal(net.state_dict()["head.clone_lr"], expected)
    net(torch.randn(4, 3), targets=torch.randint(2, (4,)))
    hint = torch.xlogy(net.posterior(), expected.double()).sum().exp()
    assert net.suggested_lr() == pytest.approx(float(hint))


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
def test_loading_another_networks_state(optimizer_type):
    other = build()
    optimizer_of_other = AlraoSGD(other, NARROW)
    net = build()
    optimizer = optimizer_type(net, WIDE)
    net.load_state_dict(other.state_dict())
    own = rates(WIDE, sampler=optimizer_type._from_interval)
    assert_rates(net, own)
    assert torch.equal(optimizer.state[net.head.weight]["rate"], own)
    # The rates of the other's optimizer come with the optimizer's state.
    if optimizer_type is AlraoSGD:
        optimizer.load_state_dict(optimizer_of_other.state_dict())
        assert_rates(net, rates(NARROW))
    # In what is saved the buffer follows although nobody has asked for it.
    optimizer.state[net.head.weight]["rate"].fill_(0.5)
    assert torch.equal(net.state_dict()["head.clone_lr"], torch.full((5,), 0.5))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("order", ["net first", "optimizer first"])
def test_a_copied_pair(duplicate, order):
    net = build()
    optimizer = AlraoSGD(net, WIDE)
    pair = {"net": net, "opt": optimizer}
    if order == "optimizer first":
        pair = {"opt": optimizer, "net": net}
    pair = duplicate(pair)
    twin, other = pair["net"], pair["opt"]
    assert_rates(twin, rates(WIDE))
    saved = AlraoSGD(build(), NARROW).state_dict()
    other.load_state_dict(saved)
    assert_rates(twin, rates(NARROW))
    assert_rates(net, rates(WIDE))
    # Each follows its own.
    optimizer.state[net.head.weight]["rate"].fill_(2.0)
    assert_rates(net, torch.full((5,), 2.0))
    assert_rates(twin, rates(NARROW))


def test_a_copied_net_has_the_rates_and_no_optimizer():
    net = build()
    optimizer = AlraoSGD(net, WIDE)
    twin = copy.deepcopy(net)
    optimizer.state[net.head.weight]["rate"].fill_(2.0)
    assert_rates(twin, rates(WIDE))
    saved = build()
    AlraoSGD(saved, NARROW)
    twin.load_state_dict(saved.state_dict())
    assert_rates(twin, rates(NARROW))


def test_a_replaced_rate():
    net = build()
    optimizer = AlraoSGD(net)
    optimizer.state[net.head.weight]["rate"] = rates(NARROW)
    assert_rates(net, rates(NARROW))
    optimizer.state[net.head.weight]["rate"].mul_(2)
    assert_rates(net, rates(NARROW) * 2)


def test_a_swapped_head():
    net = build()
    optimizer = AlraoSGD(net, WIDE)
    old, net.head = net.head, ClassifierClones(4, 2, 3)
    assert net.head.clone_lr.isnan().all()
    assert torch.equal(old.clone_lr, rates(WIDE))
    optimizer.add_param_group({"params": net.head, "lr_range": NARROW})
    assert_rates(net, rates(NARROW, 3))
    net.head = old
    assert_rates(net, rates(WIDE))


def test_of_several_the_last_counts():
    net = build()
    first, second = AlraoSGD(net, WIDE), AlraoSGD(net, NARROW)
    assert_rates(net, rates(NARROW))
    first.load_state_dict(first.state_dict())
    assert_rates(net, rates(WIDE))
    # Its end does not bring back another's.
    del first
    gc.collect()
    assert_rates(net, rates(WIDE))
    second.load_state_dict(second.state_dict())
    assert_rates(net, rates(NARROW))


def test_without_an_optimizer_loaded_values_count():
    trained, served = build(), build()
    optimizer = AlraoSGD(trained, NARROW)
    served.load_state_dict(trained.state_dict())
    assert_rates(served, rates(NARROW))
    # After its end, too.
    other = build()
    AlraoSGD(other, WIDE)
    del optimizer
    gc.collect()
    assert_rates(trained, rates(NARROW))
    trained.load_state_dict(other.state_dict())
    assert_rates(trained, rates(WIDE))


def test_assigned_tensors_stay_the_callers():
    net, other = build(), build()
    optimizer = AlraoSGD(net, WIDE)
    AlraoSGD(other, NARROW)
    state = other.state_dict()
    net.load_state_dict(state, assign=True)
    # The optimizer has the clones that were there before.
    assert optimizer.state[net.head.weight] == {}
    assert torch.equal(net.head.clone_lr, rates(NARROW))
    assert torch.equal(state["head.clone_lr"], rates(NARROW))


def test_emptied_state():
    net = build()
    optimizer = AlraoSGD(net, WIDE)
    optimizer.state.clear()
    assert_rates(net, rates(WIDE))
