"""Protects torch.distributed.checkpoint with the optimizers: `get_state_dict`, `save`, `load` into a fresh model and
optimizer, `set_state_dict`, flattened too, resume as torch.optim does, bit for bit; frozen parameters, of which it
loads nothing, keep the rates of their features.
"""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from alrao_fast import AlraoAdam, AlraoModel, AlraoMuon, AlraoSGD, ClassifierClones

# That there is no process group, and what torch deprecates in its own code.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "sgd": (AlraoSGD, {}, torch.float32),
    "momentum": (AlraoSGD, {"momentum": 0.9, "dampening": 0.5}, torch.float32),
    "momentum bf16": (AlraoSGD, {"momentum": 0.9}, torch.bfloat16),
    "masters": (AlraoSGD, {"momentum": 0.9, "master_weights": True}, torch.bfloat16),
    "adam": (AlraoAdam, {"lr_range": (1e-5, 1e-1)}, torch.float32),
    "amsgrad": (AlraoAdam, {"lr_range": (1e-5, 1e-1), "amsgrad": True}, torch.float32),
    "muon": (AlraoMuon, {"lr_range": (1e-4, 1e-1), "nesterov": False}, torch.float32),
    "torch sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, torch.float32),
    "torch adam": (torch.optim.Adam, {"lr": 0.1}, torch.float32),
}


def made(kind, options, dtype, seed):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
    net = AlraoModel(backbone, ClassifierClones(8, 3, num_clones=4)).to(dtype)
    net.backbone[1].bias.requires_grad_(False)
    return net, kind(
        net if kind in (AlraoSGD, AlraoAdam, AlraoMuon) else net.parameters(), **options
    )


def train(net, opt, steps):
    for step in steps:
        torch.manual_seed(500 + step)
        x = torch.randn(10, 6, dtype=next(net.parameters()).dtype)
        y = torch.randint(3, (10,))
        opt.zero_grad()
        net(x, targets=y).backward()
        opt.step()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_resume(case, flat, steps, tmp_path):
    kind, options, dtype = CASES[case]
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, opt = made(kind, options, dtype, 0)
    train(net, opt, range(steps))
    weights, states = get_state_dict(net, opt, options=how)
    dcp.save({"net": weights, "opt": states}, checkpoint_id=tmp_path)
    resumed, other = made(kind, options, dtype, 1)
    weights, states = get_state_dict(resumed, other, options=how)
    loaded = {"net": weights, "opt": states}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        resumed,
        other,
        model_state_dict=loaded["net"],
        optim_state_dict=loaded["opt"],
        options=how,
    )
    train(net, opt, range(steps, steps + 3))
    train(resumed, other, range(steps, steps + 3))
    for (name, p), q in zip(net.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), name
        assert opt.state[p].keys() == other.state[q].keys(), name
        for key, value in opt.state[p].items():
            assert torch.equal(value, other.state[q][key]), (name, key)


def test_loaded_into_the_tensors_of_a_fresh_optimizer(tmp_path):
    """Without a call of load_state_dict: what stands in the optimizer is what runs."""
    (net, opt), (resumed, other) = (
        made(AlraoSGD, {"momentum": 0.9, "dampening": 0.5}, torch.float32, k) for k in range(2)
    )
    train(net, opt, range(3))
    dcp.save({"net": net.state_dict(), "opt": opt.state_dict()}, checkpoint_id=tmp_path)
    loaded = {"net": resumed.state_dict(), "opt": other.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    train(net, opt, range(3, 6))
    train(resumed, other, range(3, 6))
    for p, q in zip(net.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_frozen_parameters_without_a_saved_state():
    net, opt = made(AlraoSGD, {"momentum": 0.9}, torch.float32, 0)
    net.backbone[0].requires_grad_(False)
    alone = [opt.state[p]["rate"].clone() for p in net.backbone[0].parameters()]
    saved = copy.deepcopy(opt.state_dict())
    # Of the linear layer nothing is saved, of the normalisation's two parameters one.
    for number in (0, 1, 3):
        saved["state"].pop(number)
    saved["state"][2]["rate"].fill_(0.5)
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[net.backbone[1].bias]["rate"], torch.full((8,), 0.5))
    for param, rate in zip(net.backbone[0].parameters(), alone):
        assert torch.equal(opt.state[param]["rate"], rate)
    net.backbone[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"no learning rates for parameter 'backbone\.0\.weight'"):
        opt.load_state_dict(saved)
