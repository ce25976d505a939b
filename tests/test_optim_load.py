"""Protects `load_state_dict` of AlraoSGD and AlraoAdam, and of the authors' optimizers:

- a state_dict that does not fit names the state, the parameter, what came and what is expected, and leaves optimizer,
  parameters and the head's rates as they were, to the next step's last bit;
- what an older version or another program writes loads; what wrappers keep in the state stays as torch keeps it;
- a state that was cleared.
"""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoint_harness import assert_same_state, build, generator, train
from torch import nn

from alrao_fast.compat import AdamAlrao, SGDAlrao
from alrao_fast.optim import AlraoAdam, AlraoSGD


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
    "rates None": (
        broken(lambda s: s["state"][5].update(rate=None)),
        r"state 'rate' of parameter 'head.bias' .* is a NoneType; expected a dense tensor of floats of shape \[4\]",
    ),
    "rates int": (
        broken(lambda s: s["state"][2].update(rate=torch.ones(8, dtype=torch.int64))),
        r"'rate' .*'backbone.1.weight' in state_dict is torch.int64.*; expected a dense tensor of floats",
    ),
    "rates nan": (
        broken(lambda s: s["state"][5].update(rate=torch.full((4,), torch.nan))),
        "expected finite rates",
    ),
    "rates inf": (
        broken(lambda s: s["state"][5].update(rate=torch.full((4,), torch.inf))),
        "expected finite rates",
    ),
    "rates negative": (
        broken(lambda s: s["state"][5].update(rate=torch.full((4,), -1e-5))),
        "expected finite rates >= 0",
    ),
    "rates too large": (
        broken(lambda s: s["state"][5].update(rate=torch.full((4,), 1e300, dtype=torch.float64))),
        "expected finite rates",
    ),
    "rates sparse": (
        broken(lambda s: s["state"][2].update(rate=torch.ones(8).to_sparse())),
        "is torch.float32, torch.sparse_coo",
    ),
    "rates meta": (
        broken(lambda s: s["state"][2].update(rate=torch.ones(8, device="meta"))),
        "on meta",
    ),
    "step negative": (
        broken(lambda s: s["state"][5].update(step=-1)),
        "is -1; expected an integer",
    ),
    "step half": (broken(lambda s: s["state"][5].update(step=0.5)), "is 0.5; expected an integer"),
    "step nan": (broken(lambda s: s["state"][5].update(step=torch.tensor(torch.nan))), "is nan"),
    "step text": (broken(lambda s: s["state"][5].update(step="2")), "is '2'; expected a count"),
    "step true": (broken(lambda s: s["state"][5].update(step=True)), "is True; expected a count"),
    "step None": (broken(lambda s: s["state"][5].update(step=None)), "is None; expected a count"),
    "step complex": (
        broken(lambda s: s["state"][5].update(step=torch.tensor(1j))),
        "torch.complex64",
    ),
    "momentum of another kind": (
        broken(lambda s: s["state"][5].update(momentum_buffer=3.0)),
        "'momentum_buffer' of parameter 'head.bias' in state_dict is a float; expected a dense tensor",
    ),
    "momentum complex": (
        broken(lambda s: s["state"][4].update(momentum_buffer=torch.ones(4, 3, 8) * 1j)),
        "is torch.complex64",
    ),
    "master of another shape": (
        broken(lambda s: s["state"][5].update(master=torch.ones(1))),
        r"'master' .* has shape \[1\]; expected \[4, 3\]",
    ),
    "lr None": (broken(lambda s: s["param_groups"][0].update(lr=None)), "lr|None"),
    "seed": (
        broken(lambda s: s["param_groups"][0].update(rounding_seed="a")),
        "rounding_seed of param group 0 of state_dict is 'a'; expected an integer",
    ),
    "groups of another kind": (
        broken(lambda s: s.update(param_groups=3)),
        "param_groups of state_dict is a int; expected a list of dicts",
    ),
    "a group of another kind": (
        broken(lambda s: s.update(param_groups=[[0, 1]])),
        "param group 0 of state_dict is a list; expected a dict",
    ),
    "a group without params": (
        broken(lambda s: s["param_groups"][0].pop("params") and None),
        "params of param group 0 of state_dict is a NoneType; expected a list",
    ),
    "params of another kind": (
        broken(lambda s: s["param_groups"][0].update(params=[[k] for k in range(6)])),
        "an entry of params of param group 0 of state_dict is a list; expected a number or a name",
    ),
    "states of another kind": (
        broken(lambda s: s.update(state=[1])),
        "state of state_dict is a list; expected a dict",
    ),
    "a state of another kind": (
        broken(lambda s: s["state"].update({5: torch.ones(3)})),
        "state of parameter 'head.bias' in state_dict is a Tensor; expected a dict",
    ),
    "of Adam": (
        lambda s: AlraoAdam(build()).state_dict(),
        "has 'exp_avg'; expected the states of feature_sgd",
    ),
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
    wrong = change(optimizer.state_dict())
    clone_lr = model.head.clone_lr.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(wrong)
    assert_same_state(optimizer, twin)
    assert torch.equal(model.head.clone_lr, clone_lr)
    for m, o in ((model, optimizer), (untouched, twin)):
        train(m, o, range(2, 4))
    assert_same_state(optimizer, twin)


def test_cleared_state_and_its_own_state_dict():
    model, untouched = build(), build()
    pairs = [(m, AlraoSGD(m, momentum=0.9, generator=generator(0))) for m in (model, untouched)]
    optimizer, twin = (o for _, o in pairs)
    for m, o in pairs:
        train(m, o, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state.clear()
    # Momentum is forgotten, the rates are not.
    emptied = optimizer.state_dict()["state"][0]
    assert torch.equal(emptied["rate"], saved["state"][0]["rate"]) and int(emptied["step"]) == 0
    optimizer.state.clear()
    optimizer.load_state_dict(saved)
    for m, o in pairs:
        train(m, o, range(2, 4))
    assert_same_state(optimizer, twin)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), torch.tensor(3, dtype=torch.int32)])
def test_step_counts_as_others_save_them(step):
    model = build()
    optimizer = AlraoAdam(model)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = step
    optimizer.load_state_dict(saved)
    assert int(optimizer.state[model.head.bias]["step"]) == 3
    assert optimizer.state[model.head.bias]["step"].dtype == torch.int64


def test_what_others_keep_in_the_state():
    """As torch keeps it: what belongs to no parameter as it is, what belongs to one cast and copied."""
    ours, theirs = build(torch.bfloat16), build(torch.bfloat16)
    optimizer, other = AlraoSGD(ours), torch.optim.SGD(theirs.parameters(), lr=0.1)
    for model, o in ((ours, optimizer), (theirs, other)):
        train(model, o, range(1))
        param = model.head.bias
        kept = {param: torch.ones(3)}
        o.state["wrapper"] = kept
        o.state[param]["note"] = "mine"
        o.state[param]["history"] = [torch.ones(2), {"k": torch.arange(3)}]
        o.state[param]["trace"] = torch.full((5,), 0.1)
        before = o.state[param]["history"][0]
        if o is other:
            # torch takes a text apart.
            del o.state[param]["note"]
        o.load_state_dict(o.state_dict())
        assert o.state["wrapper"] is kept
        assert o.state[param]["history"][0] is not before
    mine, yours = optimizer.state[ours.head.bias], other.state[theirs.head.bias]
    assert mine["note"] == "mine"
    for a, b in (
        (mine["trace"], yours["trace"]),
        (mine["history"][0], yours["history"][0]),
        (mine["history"][1]["k"], yours["history"][1]["k"]),
    ):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_older_state_without_an_option():
    model = build()
    optimizer = AlraoSGD(model, momentum=0.9)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["rounding"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rounding"] is None


def authors(kind):
    torch.manual_seed(0)
    inner, last = nn.Linear(3, 2), [nn.Linear(2, 2) for _ in range(2)]
    rates = [torch.rand_like(p) for p in inner.parameters()]
    opt = kind(inner.parameters(), rates, [m.parameters() for m in last], [0.1, 0.2])
    return opt, [p for m in (inner, *last) for p in m.parameters()]


def authors_step(opt, params):
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()


WRONG_AUTHORS = {
    "rates": (
        lambda s: s["opt_internal_nn"]["state"][0].update(rate=None),
        "state 'rate' of parameter",
    ),
    "rates of another shape": (
        lambda s: s["opt_internal_nn"]["state"][0].update(rate=torch.ones(3)),
        r"has shape \[3\]; expected \[2, 3\]",
    ),
    "dimension": (lambda s: s["opt_internal_nn"]["state"][0].update(rate_dim=2), "rate_dim"),
    "nan": (
        lambda s: s["opt_internal_nn"]["state"][1]["rate"].fill_(torch.nan),
        "expected finite rates",
    ),
    "weight_decay": (
        lambda s: s["opt_internal_nn"]["param_groups"][0].update(weight_decay=-1.0),
        "weight_decay: got -1",
    ),
    "last layer": (
        lambda s: s["opt_last_layers"][1].update(param_groups=[]),
        "different number of parameter groups",
    ),
    "another number of layers": (
        lambda s: s["opt_last_layers"].pop(),
        "has 1 last layers; expected 2",
    ),
}


@pytest.mark.parametrize("kind", [SGDAlrao, AdamAlrao])
@pytest.mark.parametrize("case", WRONG_AUTHORS)
def test_the_authors_optimizers_stay_as_they_were(kind, case):
    change, message = WRONG_AUTHORS[case]
    (opt, params), (twin, others) = authors(kind), authors(kind)
    for _ in range(2):
        authors_step(opt, params)
        authors_step(twin, others)
    wrong = copy.deepcopy(opt.state_dict())
    for state in wrong["opt_last_layers"][0]["state"].values():
        state.update({key: value + 1 for key, value in state.items() if value is not None})
    change(wrong)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(wrong)
    for _ in range(2):
        authors_step(opt, params)
        authors_step(twin, others)
    assert all(torch.equal(p, q) for p, q in zip(params, others))
