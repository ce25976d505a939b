"""Optimizer checkpoints and copies. Protects:

- stop, save through torch.save / torch.load(weights_only=True), resume into new objects: the same bits as without
  stopping (momentum, Adam, amsgrad, float64, bfloat16 with stochastic rounding and with master weights, schedulers);
- rates stay float32 and shared under bfloat16 parameters, steps int64, masters float32; lr and seeds come along;
- loading copies; it tells the clones' head its rates; frozen parameters and clones are part of it;
- a state_dict that does not fit names what is wrong and leaves optimizer and parameters as they were;
- state_dict hooks; copy.deepcopy and pickle of model and optimizer together.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.optim import AlraoAdam, AlraoSGD, LogUniform, PerWeight


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(dtype=torch.float32, seed=0) -> AlraoModel:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
    model = AlraoModel(backbone, ClassifierClones(8, 3, num_clones=4))
    model.backbone[1].bias.requires_grad_(False)
    return model.to(dtype)


def train(model, optimizer, steps) -> None:
    for step in steps:
        torch.manual_seed(500 + step)
        x, y = torch.randn(10, 6), torch.randint(3, (10,))
        optimizer.zero_grad()
        model(x.to(next(model.parameters())), targets=y).backward()
        optimizer.step()


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(a, b) -> None:
    for group, other in zip(a.param_groups, b.param_groups):
        for key in group:
            if key != "params":
                assert group[key] == other[key], key
        for p, q in zip(group["params"], other["params"]):
            assert torch.equal(p, q)
            assert a.state[p].keys() == b.state[q].keys()
            for key, value in a.state[p].items():
                assert value.dtype == b.state[q][key].dtype, key
                assert torch.equal(value, b.state[q][key]), key


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


def broken(change):
    def apply(state_dict):
        state_dict = copy.deepcopy(state_dict)
        return change(state_dict) or state_dict

    return apply


def without_rates(state_dict):
    for state in state_dict["state"].values():
        del state["rate"]


WRONG = {
    "torch's own": (
        lambda s: torch.optim.SGD(build().parameters(), lr=0.1).state_dict(),
        "has no learning rates for parameter 'backbone.0.weight'",
    ),
    "without rates": (broken(without_rates), "not written by an Alrao optimizer"),
    "groups": (
        broken(lambda s: s["param_groups"].append(s["param_groups"][0])),
        "has 2 param groups; expected 1",
    ),
    "parameters": (
        broken(lambda s: s["param_groups"][0]["params"].remove(5)),
        "param group 0 of state_dict has 5 parameters; expected 6",
    ),
    "rate": (
        broken(lambda s: s["state"][2].update(rate=torch.ones(3))),
        r"state 'rate' of parameter 'backbone.1.weight' in state_dict has shape \[3\]; expected \[8\]",
    ),
    "last momentum": (
        broken(lambda s: s["state"][5].update(momentum_buffer=torch.ones(3))),
        r"'momentum_buffer' of parameter 'head.bias' in state_dict has shape \[3\]",
    ),
    "step": (broken(lambda s: s["state"][0].update(step=torch.ones(2))), "state 'step'"),
    "option": (broken(lambda s: s["param_groups"][0].update(momentum=-1)), "momentum: got -1"),
    "nothing": (lambda s: {}, "state_dict has no 'param_groups'"),
    "no groups": (lambda s: {"state": {}}, "state_dict has no 'param_groups'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_state_dict_changes_nothing(case):
    change, message = WRONG[case]
    model, untouched = build(), build()
    optimizer, twin = (
        AlraoSGD(m, (1e-5, 1.0), momentum=0.9, generator=generator(0)) for m in (model, untouched)
    )
    for m, o in ((model, optimizer), (untouched, twin)):
        train(m, o, range(2))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    assert_same_state(optimizer, twin)
    for m, o in ((model, optimizer), (untouched, twin)):
        train(m, o, range(2, 4))
    assert_same_state(optimizer, twin)


def test_older_state_without_an_option():
    model = build()
    optimizer = AlraoSGD(model, momentum=0.9)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["rounding"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rounding"] is None


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


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam])
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
