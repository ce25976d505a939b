"""Protects the running averages and the warm-up of the feature optimizers, on every backend:

- by hand; equal to the reference's with masters, stochastic rounding, tensors without an average and unaligned ones;
- in a long run: which values count, and that a float32 average follows them;
- what a skipped step leaves alone, and averages that do not fit.
"""

import math

import pytest
import torch

from alrao_fast import testing
from alrao_fast.functional import feature_adam_, feature_sgd_

OP = "feature_sgd"
pytestmark = [pytest.mark.emulated, pytest.mark.sanitized]


@pytest.mark.interpreted
def test_by_hand(backend, device):
    """A gradient of 1 at rate 1 over a warm-up of two steps: p = 0, -1/2, -3/2, -5/2.

    With averaging 1 the values weigh 2/2, 2/3, 2/4: the averages are -1/2, -7/6, -11/6. With 0 they weigh alike, 1/1,
    1/2, 1/3: -1/2, -1, -3/2.
    """
    for averaging, expected in ((1.0, [-1 / 2, -7 / 6, -11 / 6]), (0.0, [-1 / 2, -1, -3 / 2])):
        param = torch.zeros(5, dtype=torch.float64, device=device)
        average = torch.full_like(param, torch.nan)
        steps = torch.zeros(1, dtype=torch.int64, device=device)
        for value, mean in zip((-0.5, -1.5, -2.5), expected):
            feature_sgd_(
                [param],
                [torch.ones_like(param)],
                [torch.ones(1, device=device)],
                steps=steps,
                averages=[average],
                averaging=averaging,
                warmup_steps=2.0,
                impl=backend,
            )
            torch.testing.assert_close(param, torch.full_like(param, value), rtol=1e-15, atol=0)
            torch.testing.assert_close(average, torch.full_like(param, mean), rtol=1e-6, atol=0)


def step(backend, device, dtype, adam, masters, steps):
    """Several updates of tensors with and without averages, some unaligned; all that was written."""
    generator = torch.Generator().manual_seed(3)
    sizes = [5000, 37, 4096, 3, 0]
    tensors = [
        [torch.randn(n + 1, generator=generator).to(dtype).to(device)[1:] for n in sizes]
        for _ in range(2)
    ]
    params, grads = tensors
    params[2] = params[2].clone()
    kept = [p.clone().float() for p in params] if masters else None
    wide = torch.promote_types(dtype, torch.float32)
    averages = [p.to(wide).clone() for p in params]
    averages[1] = averages[1].new_empty(0)
    counts = torch.arange(len(sizes), device=device)
    rates = [torch.logspace(-3, 0, max(n, 1), device=device) for n in sizes]
    options = {
        "steps": counts,
        "masters": kept,
        "averages": averages,
        "averaging": 3.0,
        "warmup_steps": 6.0,
        "impl": backend,
    }
    options |= {} if masters or dtype == torch.float32 else {"seeds": [11, 12, 13, 14, 15]}
    for _ in range(steps):
        if adam:
            moments = [[torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2)]
            feature_adam_(params, grads, *moments, rates, **options)
        else:
            feature_sgd_(params, grads, rates, **options)
    return [t.cpu() for t in (*params, *averages, *(kept or []), counts)]


@pytest.mark.interpreted(dtype=[torch.float32, torch.bfloat16], adam=[False])
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equal_to_the_references(backend, device, dtype, masters, adam):
    if masters and dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("masters are of low-precision parameters")
    own = step(backend, device, dtype, adam, masters, 4)
    expected = step("reference", torch.device("cpu"), dtype, adam, masters, 4)
    # The float64 chain differs by roundings of the rate; a stochastic rounding may then fall to the other side.
    low = dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-6}
    for number, (a, b) in enumerate(zip(own, expected)):
        if low and a.dtype == dtype:
            assert (a != b).float().mean() < 0.01 if a.numel() > 100 else True, number
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)
        elif low and not masters:
            torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-4)
        else:
            torch.testing.assert_close(a, b, **tolerance)


def average_after(backend, device, step, averaging, dtype=torch.float32, average=0.0):
    """An average of 0 after the update to 1 that follows `step` others."""
    param = torch.full((9,), 2.0, dtype=dtype, device=device)
    averages = [torch.full_like(param, average)]
    steps = torch.tensor([step], device=device)
    ones = torch.ones_like(param), torch.ones(1, device=device)
    feature_sgd_(
        [param],
        [ones[0]],
        [ones[1]],
        steps=steps,
        averages=averages,
        averaging=averaging,
        impl=backend,
    )
    assert steps.tolist() == [step + 1] and param.tolist() == [1.0] * 9
    return averages[0][0].item()


@pytest.mark.interpreted
@pytest.mark.parametrize("averaging", [8.0, 0.0, 0.5, 1e300])
def test_which_values_count_in_a_long_run(backend, device, averaging):
    """Every k-th, k the power of two by which a value weighs 2^-11 to 2^-10."""
    power = averaging + 1
    first = int(2048 * power) if power < 1e9 else 2**62
    for step in (1, 1024, first - 1, first, first + 1, 2 * first - 2, 2 * first, 2 * first + 2):
        double = 1 if step < first else 2 if step < 2 * first else 4
        stride = double if power < 1e9 else 1
        if step >= 2**63:
            continue
        expected = 0.0 if step % stride else power / (step // stride + power)
        found = average_after(backend, device, step, averaging)
        assert found == pytest.approx(expected, rel=1e-6, abs=0), step
    late = [2**24, 2**31, 2**32 + 2**21, 10**12, 2**53] if power < 1e9 else []
    for step in late:
        stride = 1
        while 2 * stride * 1024 * power <= step:
            stride *= 2
        for at in (step - step % stride, step - step % stride + 1):
            expected = 0.0 if at % stride else power / (at // stride + power)
            assert not expected or 2**-11 < expected <= 2**-10
            found = average_after(backend, device, at, averaging, torch.float64)
            assert found == pytest.approx(expected, rel=1e-12, abs=0), at


@pytest.mark.interpreted
def test_a_value_that_does_not_count_leaves_the_average(backend, device):
    """Whatever the value is."""
    for value in (math.nan, math.inf):
        param, average = (
            torch.full((9,), value, device=device),
            torch.full((9,), 3.0, device=device),
        )
        feature_sgd_(
            [param],
            [torch.zeros_like(param)],
            [torch.ones(1, device=device)],
            steps=torch.tensor([10**6 + 1], device=device),
            averages=[average],
            impl=backend,
        )
        assert average.tolist() == [3.0] * 9


def test_a_float32_average_follows_in_a_long_run(backend, device):
    """Weights that move by 3 thousandths of themselves, 10^6 updates from the start: with a weight of 9e-6 for each of
    them a float32 average would be stuck up to 7e-3 away."""
    size, count, begin = 64, 1280, 10**6
    rates = torch.ones(1, device=device)
    generator = torch.Generator().manual_seed(0)
    start = (0.5 + torch.rand(size, generator=generator)).to(device)
    param, average = start.clone(), start.clone()
    exact = start.double()
    moved = start * 1.003
    steps = torch.tensor([begin], device=device)
    for step in range(begin, begin + count):
        # The gradient takes it to `moved`.
        feature_sgd_(
            [param],
            [param - moved],
            [rates],
            steps=steps,
            averages=[average],
            averaging=8.0,
            impl=backend,
        )
        exact += 9 / (step + 9) * (param.double() - exact)
    way = (exact - start.double()).abs()
    assert (average.double() - exact).abs().max() < 0.1 * way.max()


def test_a_skipped_step_leaves_averages_alone(backend, device):
    param, average = torch.ones(9, device=device), torch.full((9,), 3.0, device=device)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    feature_sgd_(
        [param],
        [torch.ones_like(param)],
        [torch.ones(9, device=device)],
        steps=steps,
        averages=[average],
        found_inf=torch.ones(1, device=device),
        impl=backend,
    )
    assert param.tolist() == [1.0] * 9 and average.tolist() == [3.0] * 9 and steps.tolist() == [0]


@pytest.mark.parametrize(
    "average, message",
    [
        (torch.zeros(4, dtype=torch.float64), r"averages\[0\] has dtype float64 for a float32 par"),
        (torch.zeros(5), r"averages\[0\] has shape \[5\]"),
        (None, "two of params, their states, masters and averages share memory"),
    ],
    ids=["dtype", "shape", "shared"],
)
def test_averages_that_do_not_fit(backend, device, average, message):
    param = torch.ones(4, device=device)
    average = param if average is None else average.to(device)
    with pytest.raises(RuntimeError, match=message):
        feature_sgd_(
            [param],
            [param.clone()],
            [torch.ones(4, device=device)],
            steps=torch.zeros(1, dtype=torch.int64, device=device),
            averages=[average],
            impl=backend,
        )
    assert param.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"warmup_steps": -1.0}, "warmup_steps: got -1.0"),
        ({"averaging": float("nan")}, "averaging: got nan"),
    ],
    ids=["warmup_steps", "averaging"],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        feature_sgd_([torch.ones(2)], [torch.ones(2)], [torch.ones(1)], **options)


def test_steps_are_needed():
    for options in ({"averages": [torch.ones(2)]}, {"warmup_steps": 5.0}):
        with pytest.raises(RuntimeError, match="steps is None"):
            feature_sgd_([torch.ones(2)], [torch.ones(2)], [torch.ones(1)], **options)
