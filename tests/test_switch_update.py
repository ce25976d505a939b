"""Protects the update of the switch posterior, on every backend that is available.

- One step by hand; the posterior against a direct enumeration of the Bayesian mixture over all
  switching sequences; 500 steps against the float64 reference, with clones at -inf.
- What must leave the state alone, what counts as -inf, extreme evidence (up to the largest numbers), one clone.
- opcheck, torch.compile, messages; nothing is written when a check fails.
"""

import itertools
import math

import pytest
import torch

from alrao_fast import backends
from alrao_fast.functional import switch_update_
from alrao_fast.ops.switch_update import switch_observe_
from alrao_fast.reference.switch_update import initial_state

OP = "switch_update"
pytestmark = [pytest.mark.emulated, pytest.mark.interpreted]
INF, NAN = math.inf, math.nan


def device_of(backend):
    return backends.device_of(backend).type


def state(num_clones, theta=0.999, device="cpu"):
    return tuple(t.to(device) for t in initial_state(num_clones, theta))


def evidence(steps, num_clones, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, num_clones, generator=generator, dtype=torch.float64) * scale


def enumerate_posterior(likelihoods, theta):
    """Posterior over clones after the observations [T, N], by summing over every history.

    A history says which clone explains each observation and whether it is stable. It starts at any
    clone with probability 1/N, unstable with probability theta. After observation t an unstable one
    switches with probability 1/(t+1): to any clone with probability 1/N, then again unstable with
    probability theta. A stable one never changes.
    """
    steps, num_clones = likelihoods.shape
    states = list(itertools.product((0, 1), range(num_clones)))
    split = (theta, 1 - theta)
    mass = dict.fromkeys(range(num_clones), 0.0)
    for history in itertools.product(states, repeat=steps + 1):
        probability = split[history[0][0]] / num_clones
        for t in range(1, steps + 1):
            (stable, clone), (next_stable, next_clone) = history[t - 1], history[t]
            probability *= math.exp(likelihoods[t - 1, clone])
            same = float((stable, clone) == (next_stable, next_clone))
            if stable:
                probability *= same
            else:
                switch = 1 / (t + 1)
                probability *= switch * split[next_stable] / num_clones + (1 - switch) * same
            if probability == 0:
                break
        mass[history[-1][1]] += probability
    total = sum(mass.values())
    return [mass[n] / total for n in range(num_clones)]


@pytest.mark.sanitized
def test_hand_computed(backend, device):
    # Two clones, theta = 1/2: every hypothesis starts at 1/4. Clone 0 is three times as likely, so
    # the masses become 3/8, 1/8 in both rows. Half of the unstable 1/2 is pooled: 1/8 for each
    # clone, half of it for each row.
    logw, posterior, t = state(2, theta=0.5, device=device)
    likelihood = torch.tensor([math.log(3), 0.0], dtype=torch.float64, device=device)
    switch_update_(logw, posterior, t, likelihood, theta=0.5, impl=backend)
    expected = torch.tensor(
        [[3 / 16 + 1 / 16, 1 / 16 + 1 / 16], [3 / 8 + 1 / 16, 1 / 8 + 1 / 16]], device=device
    )
    torch.testing.assert_close(logw.exp().float(), expected)
    torch.testing.assert_close(posterior.exp().float(), expected.sum(0))
    assert t.item() == 2


@pytest.mark.parametrize("num_clones, steps, theta", [(2, 4, 0.9), (2, 3, 0.5), (3, 3, 0.999)])
def test_equals_the_enumeration_of_switching_sequences(backend, device, num_clones, steps, theta):
    likelihoods = evidence(steps, num_clones, seed=steps)
    if num_clones == 3:
        likelihoods[1, 2] = -INF
    current = state(num_clones, theta, device)
    for t in range(steps):
        switch_update_(*current, likelihoods[t].to(device), theta=theta, impl=backend)
        expected = enumerate_posterior(likelihoods[: t + 1], theta)
        torch.testing.assert_close(
            current[1].exp().tolist(), expected, rtol=1e-12, atol=1e-15, msg=f"step {t}"
        )


@pytest.mark.many_launches(num_clones=[1, 2, 7])
@pytest.mark.parametrize("num_clones", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_500_steps_follow_the_reference(compiled, num_clones, dtype):
    device = device_of(compiled)
    likelihoods = evidence(500, num_clones, scale=3.0).to(dtype)
    for t in range(0, 500, 3):
        likelihoods[t, t % num_clones] = -INF if num_clones > 1 else 0.0
    # The best clone changes on the way.
    likelihoods[:250, 0] += 1
    likelihoods[250:, -1] += 1
    ours, reference = state(num_clones, device=device), state(num_clones)
    for likelihood in likelihoods:
        switch_update_(*ours, likelihood.to(device), impl=compiled)
        switch_update_(*reference, likelihood, impl="reference")
    for actual, expected in zip(ours, reference):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-11, atol=1e-11)
    assert ours[2].item() == 501
    torch.testing.assert_close(ours[1].exp().sum().item(), 1.0)
    torch.testing.assert_close(torch.logsumexp(ours[0], 0), ours[1])


def test_one_clone_keeps_all_the_mass(backend, device):
    current = state(1, device=device)
    for value in (-3.0, 2.0, -INF, -1e5):
        likelihood = torch.tensor([value], dtype=torch.float64, device=device)
        switch_update_(*current, likelihood, impl=backend)
    torch.testing.assert_close(current[1].item(), 0.0, rtol=0, atol=1e-10)
    assert current[2].item() == 4


@pytest.mark.sanitized
@pytest.mark.parametrize("values", [(-INF,) * 3, (NAN,) * 3, (INF, NAN, -INF)])
def test_no_clone_alive_leaves_the_state(backend, device, values):
    current = state(3, device=device)
    likelihoods = evidence(2, 3).to(device)
    switch_update_(*current, likelihoods[0], impl=backend)
    before = [t.clone() for t in current]
    dead = torch.tensor(values, dtype=torch.float64, device=device)
    switch_update_(*current, dead, impl=backend)
    assert all(torch.equal(one, two) for one, two in zip(before, current))
    switch_update_(*current, likelihoods[1], impl=backend)
    assert current[2].item() == 3


@pytest.mark.sanitized
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_count_as_dead_and_a_clone_can_come_back(backend, device, value):
    ours, other = state(3, device=device), state(3, device=device)
    likelihoods = evidence(4, 3).to(device)
    for t, likelihood in enumerate(likelihoods):
        dead = likelihood.clone()
        if t == 1:
            dead[2] = value
            likelihood[2] = -INF
        switch_update_(*ours, dead, impl=backend)
        switch_update_(*other, likelihood, impl=backend)
        if t == 1:
            # Only its share of the pool is left.
            assert 0 < ours[1][2].exp().item() < 0.2
    for one, two in zip(ours, other):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("offset", [0.0, -1e5, 1e5])
def test_gaps_of_hundreds_of_nats_and_a_common_offset(backend, device, offset):
    current, plain = state(3, device=device), state(3, device=device)
    gaps = torch.tensor([[0.0, -900.0, -3.0], [-2000.0, 0.0, -5.0], [0.0, -1.0, -800.0]])
    for gap in gaps.double().to(device):
        switch_update_(*current, gap + offset, impl=backend)
        switch_update_(*plain, gap, impl="reference")
    for one, two in zip(current, plain):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    assert current[0].isfinite().all()


# What the log-likelihoods have in common, and how far below the best ones the clones are.
HUGE = {
    "1e10": (-1e10, (0, 1, 2)),
    "1e12": (-1e12, (0, 0.5, 3)),
    "1e15": (1e15, (1, 0, 4)),
    "1e18": (-1e18, (0, 0, 256)),
    "1e100": (1e100, (0, 0, 0)),
    "1e300": (-1e300, (0, 0, 0)),
    "mixed": (0.0, (1e10, 2, 0)),
    "mixed, 1e300": (-2.0, (0, 1e300, 1e12)),
    "opposite, 1e308": (0.0, (1.7e308, -1.7e308, -1.7e308)),
    "a dead one": (-1e14, (INF, 0, 2)),
    "float32's largest": (-3e38, (0, 0, 0)),
}


def expected_update(logw, t, lags, theta):
    """The masses after one step, from log-likelihoods relative to the best: no cancellation."""
    lags = torch.tensor(lags, dtype=torch.float64)
    mass = logw.exp() * torch.exp(lags.min() - lags)
    pool = mass[0].sum() / (t + 1) / len(lags)
    mass = torch.stack([mass[0] * t / (t + 1) + theta * pool, mass[1] + (1 - theta) * pool])
    return mass / mass.sum()


@pytest.mark.sanitized(name=["1e12", "mixed, 1e300", "a dead one"])
@pytest.mark.parametrize("name", HUGE)
def test_the_posterior_stays_normalised_for_huge_log_likelihoods(backend, device, name):
    common, lags = HUGE[name]
    current = state(3, device=device)
    likelihood = torch.tensor([common - lag for lag in lags], dtype=torch.float64, device=device)
    # What of the lags is left in float64.
    lags = [common - value for value in likelihood.tolist()]
    for step in range(3):
        expected = expected_update(current[0].cpu(), 1 + step, lags, 0.999)
        if name == "float32's largest":
            likelihood = likelihood.float()
        switch_update_(*current, likelihood, impl=backend)
        mass = current[0].cpu().exp()
        torch.testing.assert_close(mass, expected, rtol=1e-12, atol=1e-300)
        torch.testing.assert_close(current[1].cpu().exp(), expected.sum(0), rtol=1e-12, atol=1e-300)
        assert abs(current[1].exp().sum().item() - 1) < 1e-12
    running, stats = (torch.zeros(3, 3, dtype=torch.float64, device=device) for _ in range(2))
    stats[0] = -likelihood.double()
    stats[2] = 1
    expected = expected_update(current[0].cpu(), 4, lags, 0.999)
    switch_observe_(*current, running, stats, impl=backend)
    torch.testing.assert_close(current[0].cpu().exp(), expected, rtol=1e-12, atol=1e-300)


def test_nothing_is_learned_of_clones_without_mass(backend, device):
    logw = torch.tensor([[0.0, -INF], [-1.0, -INF]], dtype=torch.float64, device=device)
    current = [logw - logw.flatten().logsumexp(0), logw.logsumexp(0), torch.tensor(5).to(device)]
    before = [t.clone() for t in current]
    likelihood = torch.tensor([-INF, -1.0], dtype=torch.float64, device=device)
    switch_update_(*current, likelihood, impl=backend)
    assert all(torch.equal(one, two) for one, two in zip(before, current))


@pytest.mark.sanitized
@pytest.mark.parametrize("mean", [True, False])
def test_observing_a_batch_is_its_parts(backend, device, mean):
    ours, other = state(3, device=device), state(3, device=device)
    running, sums = (torch.ones(3, 3, dtype=torch.float64, device=device) for _ in range(2))
    for i, losses in enumerate(evidence(5, 3).abs()):
        stats = torch.stack([losses, losses + 1, torch.full((3,), 4.0)]).to(device)
        if i == 2:
            stats[0, 1] = INF
        if i == 3:
            stats.zero_()
        switch_observe_(*ours, running, stats, mean=mean, impl=backend)
        sums += stats
        if i != 3:
            switch_update_(*other, -stats[0] / 4 if mean else -stats[0], impl=backend)
        for one, two in zip((*ours, running), (*other, sums)):
            torch.testing.assert_close(one, two)
    assert ours[2].item() == 5


@pytest.mark.sanitized
def test_strided_likelihood(compiled):
    device = device_of(compiled)
    table = evidence(4, 3).to(device)
    ours, other = state(4, device=device), state(4, device=device)
    switch_update_(*ours, table[:, 1], impl=compiled)
    switch_update_(*other, table[:, 1].contiguous(), impl=compiled)
    assert torch.equal(ours[0], other[0])


def test_opcheck(compiled):
    device = device_of(compiled)
    for dtype in (torch.float32, torch.float64):
        likelihood = evidence(1, 4)[0].to(device, dtype)
        torch.library.opcheck(
            torch.ops.alrao_fast.switch_update_.default, (*state(4, device=device), likelihood, 0.9)
        )
    if compiled == "cpu":
        running, stats = torch.rand(2, 3, 4, dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.alrao_fast.switch_observe_.default, (*state(4), running, stats, True, 0.9)
        )


def test_compile_fullgraph(compiled):
    device = device_of(compiled)
    likelihood = evidence(1, 4)[0].to(device)

    def step(logw, posterior, t, likelihood):
        switch_update_(logw, posterior, t, likelihood, impl=compiled)
        return posterior.exp()

    ours, other = state(4, device=device), state(4, device=device)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*ours, likelihood)
    expected = step(*other, likelihood)
    torch.testing.assert_close(result, expected)
    for one, two in zip(ours, other):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logw": torch.zeros(3, 2)}, r"logw: got shape \[3, 2\], expected \[2, N\]"),
        ({"logw": torch.zeros(2, 3)}, "logw: got dtype Float, expected Double"),
        (
            {"logw": torch.zeros(3, 2).double().t()},
            r"logw: got strides \[1, 2\] for shape \[2, 3\], expected a contiguous tensor",
        ),
        ({"log_posterior": torch.zeros(4).double()}, r"log_posterior: got shape \[4\]"),
        ({"t": torch.tensor([1])}, r"t: got shape \[1\], expected \[\]"),
        ({"t": torch.tensor(1.0)}, "t: got dtype Float, expected Long"),
        ({"log_likelihood": torch.zeros(2)}, r"log_likelihood: got shape \[2\], expected \[3\]"),
        (
            {"log_likelihood": torch.zeros(3, dtype=torch.int32)},
            "log_likelihood: got dtype Int, expected one of Float, Double",
        ),
        ({"theta": 1.0}, "theta: got 1, expected 0 < theta < 1"),
    ],
)
def test_invalid_inputs_write_nothing(compiled, change, message):
    device = device_of(compiled)
    logw, posterior, t = state(3)
    arguments = {"logw": logw, "log_posterior": posterior, "t": t}
    arguments |= {"log_likelihood": torch.ones(3), "theta": 0.999} | change
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v)}
    with pytest.raises(RuntimeError, match=message):
        switch_update_(**arguments, impl=compiled)
    for name, tensor in before.items():
        assert torch.equal(tensor, arguments[name]), name
