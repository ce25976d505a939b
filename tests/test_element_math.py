"""Protects csrc's arithmetic of one element, for any numbers (hypothesis), against NumPy in a wider type.

- SGD and Adam within a few roundings of the terms' sizes, for every rule and option; a NaN in AMSGrad's maximum stays;
  powers to the nearest.
- The mixture's running maximum and sum: any order, exact where a clone is dead; the CUDA kernels' merge of parts.
- The switch's step: normalised, and the reference's.
- Norms of every order, with NaN and infinities, and the factor by which they clip.

As the CPU's kernels are compiled, without and with fused multiply-adds, and as the CUDA kernels run on the CPU.
Rounding: test_element_rounding.py.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from element_math import build
from element_math.loaded import any_numbers, load
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alrao_fast.reference.switch_update import initial_state, switch_update_

pytestmark = [pytest.mark.xdist_group("element_math"), pytest.mark.long(20)]
INF, NAN = math.inf, math.nan
# The type of the arithmetic, and a wider one for the truth.
TYPES = {"float32": (np.float32, np.float64), "float64": (np.float64, np.longdouble)}


@pytest.fixture(scope="module", params=build.BUILDS)
def module(request):
    return load(request.param)


@pytest.fixture(scope="module", params=TYPES)
def number(request):
    return request.param


def floats(low, high):
    """Exact in float32, so that every type starts from the same; no subnormal numbers."""
    return st.floats(low, high, width=32, allow_subnormal=False)


def vectors(low, high, count):
    """`count` arrays of eight numbers."""
    eight = hnp.arrays(np.float32, 8, elements=floats(low, high))
    return st.tuples(*[eight] * count)


def assert_near(actual, truth, size, own, roundings):
    """Within so many roundings of the terms' `size`."""
    bound = roundings * np.finfo(own).eps * size + np.finfo(own).smallest_normal
    assert np.all(np.abs(actual - truth) <= bound), (actual, truth, size)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", ["none", "first", "torch", "authors"])
@any_numbers
@given(
    signed=vectors(-100, 100, 3),
    rates=vectors(0, 10, 1),
    momentum=floats(0.125, 0.96875),
    dampening=floats(0, 0.5),
    weight_decay=st.sampled_from([0.0, 0.125, 1.0]),
    grad_factor=st.sampled_from([1.0, -1.0, 0.125]),
)
def test_sgd(
    module, number, rule, nesterov, signed, rates, momentum, dampening, weight_decay, grad_factor
):
    own, wide = TYPES[number]
    new_p, new_buf = getattr(module, f"sgd_{number}")(
        *(x.astype(own) for x in (*signed, *rates)),
        rule,
        nesterov,
        momentum,
        dampening,
        weight_decay,
        grad_factor,
    )
    p, g, buf, (rate,) = (*(x.astype(wide) for x in signed), (x.astype(wide) for x in rates))

    def step(p, g, buf, sign):
        g = g * (grad_factor * (1 if sign < 0 else np.sign(grad_factor))) + weight_decay * p
        limited = momentum * np.minimum(np.sqrt(rate), 1 / momentum)
        kept = {"torch": momentum, "authors": 1 + sign * limited}.get(rule, 0)
        new = kept * buf + (g if rule == "first" else (1 - dampening) * g)
        direction = g if rule == "none" else g + momentum * new if nesterov else new
        return p + sign * rate * direction, buf if rule == "none" else new

    # With absolute values and sums in place of differences: the size of the terms.
    (truth_p, truth_buf), (size_p, size_buf) = (
        step(p, g, buf, -1),
        step(abs(p), abs(g), abs(buf), 1),
    )
    assert_near(new_buf, truth_buf, size_buf, own, 8)
    assert_near(new_p, truth_p, size_p, own, 12)


@pytest.mark.parametrize("decay", ["none", "gradient", "weights"])
@pytest.mark.parametrize("amsgrad", [False, True])
@any_numbers
@given(
    signed=vectors(-100, 100, 3),
    positive=vectors(0, 100, 3),
    beta1=floats(0, 0.96875),
    beta2=floats(0.5, 0.96875),
    step_factor=floats(0.125, 10),
    root_factor=floats(0.125, 10),
    eps=floats(2**-20, 1),
    grad_factor=st.sampled_from([1.0, -1.0, 0.125]),
)
def test_adam(
    module,
    number,
    decay,
    amsgrad,
    signed,
    positive,
    beta1,
    beta2,
    step_factor,
    root_factor,
    eps,
    grad_factor,
):
    own, wide = TYPES[number]
    weight_decay = 0.0 if decay == "none" else 0.125
    (p, g, m), (v, largest, rate) = signed, positive
    actual = getattr(module, f"adam_{number}")(
        *(x.astype(own) for x in (p, g, m, v, largest, rate)),
        amsgrad,
        decay,
        beta1,
        beta2,
        step_factor,
        root_factor,
        eps,
        weight_decay,
        grad_factor,
    )
    p, g, m, v, largest, rate = (x.astype(wide) for x in (p, g, m, v, largest, rate))

    def step(p, g, m, sign, second=None):
        g = g * (grad_factor * (1 if sign < 0 else np.sign(grad_factor)))
        if decay == "gradient":
            g = g + weight_decay * p
        if decay == "weights":
            p = p * np.maximum(1 + sign * rate * weight_decay, 0)
        m = beta1 * m + (1 - beta1) * g
        new = beta2 * v + (1 - beta2) * g * g
        new_largest = np.maximum(largest, new) if amsgrad else largest
        second = (new_largest if amsgrad else new) if second is None else second
        denominator = np.sqrt(second) * root_factor + eps
        return (p + sign * rate * step_factor * m / denominator, m, new, new_largest), denominator

    truth, denominator = step(p, g, m, -1)
    second = truth[3] if amsgrad else truth[2]
    size, _ = step(abs(p), abs(g), abs(m), 1, second)
    # Where the terms of g cancel, the root of its square carries the rounding of their sizes.
    _, largest_denominator = step(abs(p), abs(g), abs(m), 1)
    size = (size[0] * largest_denominator / denominator, *size[1:])
    for got, want, terms, roundings in zip(actual, truth, size, (12, 8, 12, 12)):
        assert_near(got, want, terms, own, roundings)


def test_a_nan_in_the_largest_second_moment_stays(module, number):
    own, _ = TYPES[number]
    one = np.ones(3, own)
    largest = np.array([NAN, 5, 0], own)
    scalars = (0.5, 0.5, 1.0, 1.0, 1e-8, 0.0, 1.0)
    p, _, _, new = getattr(module, f"adam_{number}")(
        one, one, 0 * one, 0 * one, largest, one, True, "none", *scalars
    )
    assert np.isnan(new[0]) and new[1:].tolist() == [5, 0.5]
    assert np.isnan(p[0]) and np.isfinite(p[1:]).all()


@any_numbers
@given(base=st.floats(0.9, 1), exponent=st.integers(1, 5000))
def test_integer_power(module, base, exponent):
    with localcontext() as context:
        context.prec = 60
        truth = Decimal(base) ** exponent
        power = float(module.integer_power(base, exponent))
        assert abs(Decimal(power) - truth) <= Decimal(math.ulp(power)) * Decimal("0.5001")


def log_likelihoods(**options):
    number = st.floats(-80, 80, width=32) | st.just(-INF)
    return st.lists(number, **options)


@any_numbers
@given(joints=log_likelihoods(max_size=12), data=st.data())
def test_the_mixture_in_any_order(module, number, joints, data):
    own, wide = TYPES[number]
    take_in = getattr(module, f"mixture_{number}")
    largest, total, nll = take_in(np.array(joints, own))
    alive = np.array([x for x in joints if x > -INF], wide)
    if not len(alive):
        assert (largest, total, nll) == (-INF, 0, INF)
        return
    assert largest == alive.max()
    truth = np.exp(alive - alive.max()).sum()
    assert_near(total, truth, truth, own, 4 * len(alive))
    exact = -alive.max() - np.log(truth)
    assert_near(nll, exact, abs(alive.max()) + np.log(truth) + 1, own, 4 * len(alive))
    # Another order: the same maximum, and the sum but for rounding.
    other = take_in(np.array(data.draw(st.permutations(joints)), own))
    assert other[0] == largest
    assert_near(other[1], truth, truth, own, 4 * len(alive))
    # Those at -inf change no bit.
    assert take_in(alive.astype(own)) == (largest, total, nll)


@any_numbers
@given(values=hnp.arrays(np.float32, 32))
def test_who_is_alive(module, number, values):
    own, _ = TYPES[number]
    alive = getattr(module, f"is_alive_{number}")(values.astype(own))
    assert np.array_equal(alive, np.isfinite(values))


@any_numbers
@given(vectors(-80, 80, 2), vectors(1, 2**16, 1))
def test_log_likelihood_of_a_class(module, number, logits, sums):
    own, wide = TYPES[number]
    (logit, largest), (total,) = logits, sums
    actual = getattr(module, f"class_log_likelihood_{number}")(
        *(x.astype(own) for x in (logit, largest, total))
    )
    truth = logit.astype(wide) - largest.astype(wide) - np.log(total.astype(wide))
    size = abs(logit) + abs(largest) + np.log(total) + 1
    assert_near(actual, truth, size.astype(wide), own, 4)


def test_a_sum_that_is_nan_is_a_dead_clone(module, number):
    own, _ = TYPES[number]
    log_likelihood = getattr(module, f"class_log_likelihood_{number}")
    for total in (NAN, INF):
        value = log_likelihood(own(1), own(2), own(total))
        assert not getattr(module, f"is_alive_{number}")(own(value))


@any_numbers
@given(
    parts=st.lists(
        st.tuples(
            st.floats(-80, 80, width=32) | st.sampled_from([-1.0, 2.0]),
            st.floats(1, 1000, width=32),
        ),
        min_size=1,
        max_size=8,
    ),
    data=st.data(),
)
def test_merging_parts_of_the_classes(module, number, parts, data):
    own, wide = TYPES[number]
    merge = getattr(module, f"merge_{number}", None)
    if merge is None:
        pytest.skip("only the CUDA kernels merge parts of a sample")
    placed = [(*part, place) for place, part in enumerate(parts)]

    def merged(placed):
        largest, sums, places = zip(*placed)
        return merge(np.array(largest, own), np.array(places, np.int32), np.array(sums, own))

    largest, place, total = merged(placed)
    values, sums = (np.array(x, wide) for x in zip(*parts))
    truth = (sums * np.exp(values - values.max())).sum()
    # The first of those that are equal.
    assert (largest, place) == (values.max(), int(values.argmax()))
    # A part's factor is the product of several exponentials, each with an exponent's rounding.
    roundings = 4 * len(parts) + 160
    assert_near(total, truth, truth, own, roundings)
    other = merged(data.draw(st.permutations(placed)))
    assert other[:2] == (largest, place)
    assert_near(other[2], truth, truth, own, roundings)
    # The merge with nothing, at the start, has changed no bit.
    assert merged(placed[:1])[2] == own(sums[0])
    # What was not finite in one part is not finite in all.
    assert math.isnan(merged([(*parts[0][:1], NAN, 0), *placed[1:]])[2])


def switch_step(module, logw, likelihood, t, theta):
    """One update as the kernels compose it, in NumPy; None where the observation says nothing."""
    evidence = module.switch_evidence(likelihood)
    lag = module.switch_lag(evidence, evidence.max())
    reference = (lag + logw.max(0)).max()
    if reference == -INF:
        return None
    masses = [module.switch_mass(row, lag, reference) for row in logw]
    share = module.switch_share(masses[0].sum(), t, len(likelihood))
    unstable, stable = module.switch_redistribute(*masses, share, t, theta)
    total = (unstable + stable).sum()
    return np.log(np.stack([unstable, stable]) / total), np.log((unstable + stable) / total)


@any_numbers
@given(
    likelihoods=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 6), st.integers(1, 12)),
        elements=st.floats(-200, 50) | st.floats() | st.sampled_from([-INF, INF, NAN]),
    ),
    theta=st.floats(0.5, 0.999),
    first=st.integers(1, 10**6),
)
def test_the_switch_stays_normalised_and_follows_the_reference(module, likelihoods, theta, first):
    logw, posterior, t = initial_state(likelihoods.shape[1], theta)
    t.fill_(first)
    for row in likelihoods:
        new = switch_step(module, logw.numpy(), row, int(t), theta)
        before = logw.clone()
        switch_update_(logw, posterior, t, torch.from_numpy(row), theta)
        if new is None:
            assert torch.equal(logw, before)
            continue
        assert abs(np.exp(new[0]).sum() - 1) < 1e-13
        assert np.allclose(np.exp(new[0]).sum(0), np.exp(new[1]), rtol=1e-13, atol=0)
        assert np.allclose(new[0], logw, rtol=1e-11, atol=1e-11)
        assert np.allclose(new[1], posterior, rtol=1e-11, atol=1e-11)


@any_numbers
@given(nll=st.floats(-1e6, 1e6), count=st.integers(1, 10**6))
def test_what_a_batch_says(module, nll, count):
    assert module.switch_observed(nll, count, True) == -nll / count
    assert module.switch_observed(nll, count, False) == pytest.approx(-nll, rel=1e-15)
    assert math.isnan(module.switch_observed(0.0, 0.0, True))
    assert module.switch_evidence(NAN) == module.switch_evidence(INF) == -INF


@any_numbers
@given(
    values=hnp.arrays(
        np.float64,
        st.integers(0, 12),
        elements=st.floats(-1e6, 1e6) | st.sampled_from([0.0, INF, -INF, NAN]),
    ),
    order=st.sampled_from([2.0, 1.0, INF, 3.0, 0.5]),
)
def test_norms(module, values, order):
    expected = np.linalg.norm(values, order) if len(values) else 0.0
    # NumPy's sums of squares underflow where the entries do.
    assert np.isclose(
        module.norm_of(values, order), expected, rtol=1e-13, atol=1e-150, equal_nan=True
    )


@any_numbers
@given(norm=st.floats(0, 1e30), max_norm=st.floats(0, 1e30))
def test_what_a_norm_is_clipped_by(module, norm, max_norm):
    factor = module.clip_factor(norm, max_norm)
    assert factor == min(1.0, max_norm / (norm + 1e-6))
    # A factor below the smallest normal number has lost digits.
    assert factor * norm <= max_norm * (1 + 1e-15) + norm * 2**-1074
    assert math.isnan(module.clip_factor(NAN, max_norm)) and module.clip_factor(INF, max_norm) == 0
    assert module.clip_factor(norm, INF) == module.clip_factor(NAN, INF) == 1
