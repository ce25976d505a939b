"""Protects the switch as a module (the update's mathematics: test_switch_update.py).

- The state: start, one update by hand, non-finite observations, reset.
- float64 through every dtype conversion, device moves, meta device; state_dict, copies, pickling.
- Invalid arguments and foreign states.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from alrao_fast.nn import Switch


def updated(num_clones=3, steps=5, **arguments):
    switch = Switch(num_clones, **arguments)
    for _ in range(steps):
        switch.update(-torch.rand(num_clones))
    return switch


def assert_same_state(a, b):
    for name in ("logw", "log_posterior", "t"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def test_one_update_by_hand():
    # theta = 3/4, likelihoods 1/2 and 1/4, pi = 1/2. Unstable 3/8 each -> 3/16, 3/32; half of it, 9/64, is pooled.
    # Unstable: 3/32 + 27/512, 3/64 + 27/512; stable: 1/16 + 9/512, 1/32 + 9/512; the sum is 3/8.
    switch = Switch(2, theta=0.75)
    switch.update(torch.tensor([0.5, 0.25]).log())
    expected = torch.tensor([[75, 51], [41, 25]], dtype=torch.float64) / 512 / 0.375
    torch.testing.assert_close(switch.logw.exp(), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(switch.posterior(), expected.sum(0), rtol=1e-7, atol=0)
    assert switch.t.item() == 2


def test_start():
    switch = Switch(4, theta=0.9)
    assert switch.t.item() == 1
    torch.testing.assert_close(switch.posterior(), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(switch.logw.exp().sum(1), torch.tensor([0.9, 0.1]).double())
    assert {b.dtype for b in switch.buffers()} == {torch.float64, torch.int64}


def test_posterior_is_no_view_of_the_state():
    switch = updated()
    before = switch.log_posterior.clone()
    switch.posterior().zero_()
    assert torch.equal(switch.log_posterior, before)
    assert switch.posterior().sum().item() == pytest.approx(1, abs=1e-14)


def test_one_clone_has_all_the_mass():
    switch = updated(num_clones=1)
    assert switch.posterior().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_clone_loses_and_comes_back(bad):
    switch, partner = Switch(3), Switch(3)
    for _ in range(3):
        switch.update(torch.tensor([-1.0, bad, -2.0]))
        partner.update(torch.tensor([-1.0, -math.inf, -2.0]))
    assert_same_state(switch, partner)
    assert switch.posterior().isfinite().all()
    assert switch.posterior().argmin() == 1
    for _ in range(10):
        switch.update(torch.tensor([-3.0, 0.0, -3.0]))
    assert switch.posterior().argmax() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_observed_leaves_the_state(bad):
    switch = updated()
    before = copy.deepcopy(switch)
    switch.update(torch.full((3,), bad))
    assert_same_state(switch, before)


def test_no_gradient_is_kept():
    switch = Switch(3)
    switch.update(torch.zeros(3, requires_grad=True) * 2)
    assert not any(b.requires_grad for b in switch.buffers())


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.float,
        nn.Module.double,
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
    ],
)
def test_dtype_conversion_changes_nothing(convert):
    outer = nn.Sequential(nn.Linear(2, 2), updated())
    before = copy.deepcopy(outer[1])
    convert(outer)
    assert_same_state(outer[1], before)


def test_moves_with_the_module():
    switch = updated().to("meta", torch.float16)
    assert {b.device.type for b in switch.buffers()} == {"meta"}
    assert [b.dtype for b in switch.buffers()] == [torch.float64, torch.float64, torch.int64]


def test_meta_device_then_reset():
    switch = Switch(3, 0.9, device="meta")
    assert switch.logw.is_meta
    switch.to_empty(device="cpu")
    switch.reset_parameters()
    assert_same_state(switch, Switch(3, 0.9))


def test_state_dict_resumes_bit_exactly():
    switch = updated()
    file = io.BytesIO()
    torch.save(switch.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["logw", "log_posterior", "t"]
    other = Switch(3)
    other.load_state_dict(state)
    observation = torch.tensor([-1.0, -0.5, -2.0])
    switch.update(observation)
    other.update(observation)
    assert_same_state(switch, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_independent(duplicate):
    switch = updated()
    other = duplicate(switch)
    assert_same_state(switch, other)
    other.update(torch.zeros(3))
    assert switch.t.item() == 6
    assert other.t.item() == 7


def test_state_of_another_number_of_clones():
    with pytest.raises(RuntimeError, match=r"size mismatch for logw: .*\[2, 4\].*\[2, 3\]"):
        Switch(3).load_state_dict(Switch(4).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clones": 0}, "num_clones: got 0, expected an integer, at least 1"),
        ({"num_clones": 2, "theta": 1.0}, r"theta: got 1.0, expected 0 < theta < 1"),
        ({"num_clones": 2, "theta": 0.0}, "theta: got 0.0"),
        ({"num_clones": 2, "theta": math.nan}, "theta: got nan"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Switch(**arguments)


def test_repr():
    assert repr(Switch(3, 0.9)) == "Switch(num_clones=3, theta=0.9)"


def test_means_leave_out_what_has_only_its_share():
    switch = Switch(4)
    # Before any observation all are alike, and all count.
    torch.testing.assert_close(switch.log_posterior_of_means(), switch.log_posterior)
    for number in range(3):
        switch.update(torch.tensor([-1.0, -1.5, -1e31, -math.inf]))
        means, posterior = switch.log_posterior_of_means().exp(), switch.posterior()
        torch.testing.assert_close(means[:2], posterior[:2])
        assert not means[2:].any() and posterior[2:].all(), number
    # One that comes back counts again.
    switch.update(torch.tensor([-1.0, -1.0, -math.inf, -1.0]))
    assert switch.log_posterior_of_means().exp().bool().tolist() == [True, True, False, True]
    alone = Switch(1)
    alone.update(torch.tensor([-1e31]))
    assert alone.log_posterior_of_means().exp().tolist() == [1.0]
