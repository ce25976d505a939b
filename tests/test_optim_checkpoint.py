"""Optimizer checkpoints and copies. Protects:

- stop, save through torch.save / torch.load(weights_only=True), resume into new objects: the same bits as without
  stopping (momentum, Adam, amsgrad, float64, bfloat16 with stochastic rounding and with master weights, schedulers);
- rates stay float32 and shared under bfloat16 parameters, steps int64, masters float32; lr and seeds come along;
- loading copies; it tells the clones' head its rates; frozen parameters and clones are part of it;
- state_dict hooks; copy.deepcopy and pickle of model and optimizer together.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from checkpoint_harness import assert_same_state, build, generator, train
from torch import nn

from alrao_fast.optim import AlraoAdam, AlraoMuon, AlraoSGD, LogUniform, PerWeight


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CASES = {
    "sgd": (AlraoSGD, {}, torch.float32),
    "momentum": (AlraoSGD, {"momentum": 0.9, "weight_decay": 0.01}, torch.float32),
    "per weight": (AlraoSGD, {"sampler": PerWeight(), "momentum": 0.9}, torch.float32),
    "authors": (AlraoSGD, {"momentum": 0.9, "momentum_rule": "authors"}, torch.float32),
    "double": (AlraoSGD, {"momentum": 0.9, "nesterov": True}, torch.float64),
    "bf16 stochastic": (AlraoSGD, {"momentum": 0.9}, torch.bfloat16),
    "bf16 masters": (AlraoSGD, {"momentum": 0.9, "master_weights": True}, torch.bfloat16),
    "fp16 stochastic": (AlraoSGD, {}, torch.float16),
    "adam": (AlraoAdam, {"lr_range": (1e-5, 1e-1)}, torch.float32),
    "amsgrad": (AlraoAdam, {"amsgrad": True, "lr_range": (1e-5, 1e-1)}, torch.float32),
    "muon": (AlraoMuon, {"lr_range": (1e-4, 1e-1), "weight_decay": 0.1}, torch.float32),
    "bf16 muon masters": (AlraoMuon, {"master_weights": True}, torch.bfloat16),
    "bf16 adamw": (
        AlraoAdam,
        {"lr_range": (1e-5, 1e-1), "decoupled_weight_decay": True, "weight_decay": 0.1},
        torch.bfloat16,
    ),
    "bf16 adam masters": (
        AlraoAdam,
        {"master_weights": True, "lr_range": (1e-5, 1e-1)},
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resume(case):
    optimizer_type, options, dtype = CASES[case]
    options = {"lr_range": (1e-5, 1.0), **options}
    model = build(dtype)
    optimizer = optimizer_type(model, generator=generator(0), **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    train(model, optimizer, range(4))
    scheduler.step()
    saved = through_a_file(
        {"net": model.state_dict(), "opt": optimizer.state_dict(), "lr": scheduler.state_dict()}
    )
    train(model, optimizer, range(4, 9))

    # Other values, other rates, other seeds: everything has to come from the file.
    resumed = build(dtype, seed=7)
    other = optimizer_type(resumed, generator=generator(9), **options)
    schedule = torch.optim.lr_scheduler.StepLR(other, 1, 0.9)
    train(resumed, other, range(2))
    resumed.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["lr"])
    assert other.param_groups[0]["lr"] == pytest.approx(0.9)
    train(resumed, other, range(4, 9))
    assert_same_state(optimizer, other)
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(p, q)
    assert resumed.head.clone_lr.equal(model.head.clone_lr)


def test_dtypes_under_bfloat16():
    model = build(torch.bfloat16)
    optimizer = AlraoSGD(model, momentum=0.9, master_weights=True, generator=generator(0))
    train(model, optimizer, range(2))
    rates = {n: optimizer.state[p]["rate"].clone() for n, p in model.named_parameters()}
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert state["rate"].dtype == torch.float32 and torch.equal(state["rate"], rates[name])
        if p.requires_grad:
            assert state["step"].dtype == torch.int64 and int(state["step"]) == 2
            assert state["master"].dtype == torch.float32
    linear = model.backbone[0]
    assert optimizer.state[linear.weight]["rate"] is optimizer.state[linear.bias]["rate"]
    assert set(optimizer.state[model.backbone[1].bias]) == {"rate"}


def test_half_of_a_float32_checkpoint():
    """A float32 state loads into a bfloat16 model: rates keep every bit, momentum is rounded."""
    model, half = build(), build(torch.bfloat16)
    optimizer = AlraoSGD(model, momentum=0.9, generator=generator(0))
    train(model, optimizer, range(2))
    other = AlraoSGD(half, momentum=0.9, generator=generator(1))
    other.load_state_dict(optimizer.state_dict())
    train(half, other, range(2, 4))
    for p, q in zip(model.parameters(), half.parameters()):
        assert torch.equal(optimizer.state[p]["rate"], other.state[q]["rate"])


def test_loading_copies():
    model, other = build(), build()
    optimizer = AlraoSGD(model, momentum=0.9)
    train(model, optimizer, range(2))
    second = AlraoSGD(other, momentum=0.9)
    second.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(other, second, range(3))
    second.state[other.head.weight]["rate"].zero_()
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before[key][name])


def test_head_learns_its_rates():
    model, other = build(), build()
    saved = AlraoSGD(model, (1e-3, 1e-1)).state_dict()
    optimizer = AlraoSGD(other, (1e-5, 10.0))
    optimizer.load_state_dict(saved)
    assert torch.equal(other.head.clone_lr, LogUniform(1e-3, 1e-1).clone_rates(4))
    assert other.head.clone_lr is not optimizer.state[other.head.weight]["rate"]


def test_groups_added_after_loading_share_the_loaded_rates():
    def split(seed):
        torch.manual_seed(0)
        layer = nn.Linear(3, 4)
        return layer, AlraoSGD([layer.weight], model=layer, generator=generator(seed))

    _, first = split(0)
    layer, second = split(1)
    second.load_state_dict(first.state_dict())
    second.add_param_group({"params": [layer.bias]})
    assert second.state[layer.bias]["rate"] is second.state[layer.weight]["rate"]


def test_hooks():
    model = build()
    optimizer = AlraoSGD(model)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre save"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "seen": calls.append("pre")})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["pre save", "pre", "post"] and "seen" not in saved


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_train_alike(optimizer_type, copied):
    model = build(torch.bfloat16)
    optimizer = optimizer_type(model, (1e-5, 0.1), generator=generator(0))
    train(model, optimizer, range(2))
    model2, optimizer2 = copied((model, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is next(model2.parameters())
    for m, o in ((model, optimizer), (model2, optimizer2)):
        train(m, o, range(2, 5))
        o.add_param_group({"params": nn.Linear(2, 3)})
        assert o.state[o.param_groups[-1]["params"][0]]["rate"].shape == (3,)
    linear = [o.param_groups.pop() for o in (optimizer, optimizer2)]
    assert_same_state(optimizer, optimizer2)
    # The generator was copied too: what is drawn later is the same.
    rates = [o.state[g["params"][0]]["rate"] for o, g in zip((optimizer, optimizer2), linear)]
    assert torch.equal(*rates)
