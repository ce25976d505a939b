"""The states and options of AlraoMuon. Protects:

- a run of known length, and a checkpoint in its middle, copies;
- a wrong state_dict, of another optimizer or for other matrices, changes nothing;
- wrong arguments.
"""

import copy

import pytest
import torch
from checkpoint_harness import assert_same_state, build, generator, train

from alrao_fast import AlraoAdam, AlraoMuon, AlraoSGD


def test_known_length():
    """Warm-up, averages and rates that narrow, of matrices too; a checkpoint goes on bit for bit."""
    models = [build() for _ in range(2)]
    opt, other = (
        AlraoMuon(m, total_steps=40, generator=generator(k)) for k, m in enumerate(models)
    )
    train(models[0], opt, range(20))
    weight = models[0].backbone[0].weight
    own = opt.state[weight]
    limited = torch.minimum(own["drawn_rate"], own["rate_limit"])
    assert not torch.equal(own["rate"], limited)
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for model, optimizer in zip(models, (opt, other)):
        train(model, optimizer, range(20, 40))
    assert_same_state(opt, other)
    with opt.averaged():
        assert torch.equal(weight, own["average"])
    assert opt.param_groups[0]["warmup_steps"] == 2


def swapped(state_dict):
    for group in state_dict["param_groups"]:
        group["orthogonalize"] = not group["orthogonalize"]
    return state_dict


WRONG = {
    "of AlraoAdam": (lambda m, s: AlraoAdam(m).state_dict(), "has 1 param groups; expected 2"),
    "of AlraoSGD": (
        lambda m, s: s | {"param_groups": s["param_groups"], "state": sgd_states(m, s)},
        "has 'momentum_buffer'",
    ),
    "other matrices": (lambda m, s: swapped(s), "orthogonalize of param group 0 .* is False"),
    "momentum": (
        lambda m, s: s["state"][0].update(exp_avg=torch.zeros(3)) or s,
        "'exp_avg' of parameter 'backbone.0.weight' in state_dict has shape",
    ),
    "second moments": (
        lambda m, s: s["state"][0].update(exp_avg_sq=torch.zeros(8, 6)) or s,
        "has 'exp_avg_sq'",
    ),
}


def sgd_states(model, saved):
    opt = AlraoSGD(model, momentum=0.9)
    train(model, opt, range(1))
    return {**saved["state"], 0: opt.state_dict()["state"][0]}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_state_dict_changes_nothing(case):
    change, message = WRONG[case]
    model, untouched = build(), build()
    opt, twin = (AlraoMuon(m, generator=generator(0)) for m in (model, untouched))
    for m, o in ((model, opt), (untouched, twin)):
        train(m, o, range(2))
    wrong = change(copy.deepcopy(model), copy.deepcopy(opt.state_dict()))
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(wrong)
    for m, o in ((model, opt), (untouched, twin)):
        train(m, o, range(2, 4))
    assert_same_state(opt, twin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum: got 1.0, expected a finite number >= 0 and < 1"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn: got 'rms', expected 'original' or"),
        ({"nesterov": 2}, "nesterov: got 2"),
        ({"orthogonalize": "all"}, "orthogonalize: got 'all'"),
        ({"rate_bound": 0.0}, "rate_bound: got 0.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: got 1.0"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"rounding": "stochastic", "master_weights": True}, "rounding: got 'stochastic'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AlraoMuon(build(), **options)


def test_pickled_and_copied():
    model = build()
    opt = AlraoMuon(model, generator=generator(0))
    train(model, opt, range(2))
    other_model, other = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (other_model, other)):
        train(m, o, range(2, 4))
    assert_same_state(opt, other)
