"""Protects bf16 and fp16 parameters of the feature optimizers, on every backend, through feature_sgd_:

- conversions exact for every bit pattern and around every boundary; masters take the update, and what was written into
  their parameters;
- stochastic rounding to the reference's very bits, different at each step, and without bias.

Every other optimizer stores through the same code; its own file has its masters and its stochastic steps.
"""

import pytest
import torch

from alrao_fast.ops.feature_sgd import feature_sgd_

OP = "feature_sgd"
pytestmark = [pytest.mark.emulated, pytest.mark.sanitized]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.interpreted(stochastic=[True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_every_bit_pattern_survives_a_step_with_rate_zero(backend, device, dtype, stochastic):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    param = patterns.clone()
    zero = torch.zeros(1, device=device)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    seeds = [7] if stochastic else None
    feature_sgd_([param], [torch.zeros_like(param)], [zero], steps=steps, seeds=seeds, impl=backend)
    nan = patterns.isnan()
    assert torch.equal(param[~nan].view(torch.int16), patterns[~nan].view(torch.int16))
    assert param[nan].isnan().all()


def awkward_floats(dtype):
    """float32 values around every kind of boundary of `dtype`: all its values, its midpoints, and their neighbours."""
    values = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    values = torch.cat([values, middle, torch.tensor([3e38, 65519.0, 65520.0, 65536.0, 1e-45])])
    away = torch.full_like(values, torch.inf)
    values = torch.cat([values, values.nextafter(away), values.nextafter(-away)])
    values = torch.cat([values, -values])
    # Midpoints of the smallest bf16 numbers are themselves subnormal floats: whether they are flushed is up to a mode.
    return values[(values.abs() > 1e-37) | (values == 0)]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_takes_the_update_and_is_rounded_to_nearest(backend, device, dtype):
    # From a half to the whole: p - -1 * p.
    values = awkward_floats(dtype).to(device)
    values = values[values.abs() > 1e-36]
    master = values / 2
    param = master.to(dtype)
    grad, rate = torch.zeros_like(param), torch.full((1,), -1.0, device=device)
    options = {"weight_decay": 1.0, "impl": backend}
    feature_sgd_([param], [grad], [rate], masters=[master], **options)
    assert torch.equal(master, values)
    assert torch.equal(param.float(), values.to(dtype).float())

    start = torch.linspace(-3, 3, 1000, device=device)
    master, param = start.clone(), start.to(dtype)
    rates = torch.full((10,), 2.0**-12, device=device)
    empty = torch.empty(0, device=device)
    alone = torch.ones(4, dtype=dtype, device=device)  # without a master, in the same call
    feature_sgd_(
        [param, alone],
        [torch.full_like(param, 0.5), alone.clone()],
        [rates, torch.full((1,), 0.25, device=device)],
        inners=[100, 1],
        masters=[master, empty],
        impl=backend,
    )
    torch.testing.assert_close(master, start - 2.0**-13, rtol=1e-7, atol=1e-7)
    assert torch.equal(param, master.to(dtype))
    assert alone.tolist() == [0.75] * 4


def step_of_nothing(param, master, momentum, backend):
    """A step by a gradient of 0, `momentum` the dtype of the buffer or None."""
    grad, rates = torch.zeros_like(param), torch.ones(1, device=param.device)
    buffers, options = None, {"steps": torch.zeros_like(rates, dtype=torch.int64)}
    if momentum is not None:
        buffers, options["momentum"] = [torch.zeros_like(param, dtype=momentum)], 0.5
    options |= {"masters": [master], "momentum_buffers": buffers, "impl": backend}
    feature_sgd_([param], [grad], [rates], **options)


@pytest.mark.interpreted(dtype=[torch.bfloat16], momentum=[None])
@pytest.mark.parametrize("momentum", [None, torch.float32, "own"], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_was_written_into_a_parameter_counts_before_its_master(
    backend, device, dtype, momentum
):
    momentum = dtype if momentum == "own" else momentum
    # Every value in the place of a 0: a NaN, an infinity and a subnormal number, too.
    param = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    written, master = param.float(), torch.zeros(2**16, device=device)
    step_of_nothing(param, master, momentum, backend)
    assert torch.equal(master.nan_to_num(nan=7.0), written.nan_to_num(nan=7.0))
    assert torch.equal(param.float().nan_to_num(nan=7.0), written.nan_to_num(nan=7.0))

    # What the master itself was rounded to leaves it alone, infinity after an overflow included.
    values = awkward_floats(dtype).to(device)
    master, param = values.clone(), values.to(dtype)
    step_of_nothing(param, master, momentum, backend)
    assert torch.equal(master, values)
    assert torch.equal(param, values.to(dtype))

    # Both in one vector, and a master that has become a NaN: 1 and 1 + 2^-7 are neighbours in bfloat16.
    master = torch.tensor([1.003, 1.003, torch.nan, torch.nan, 1e30], device=device)
    param = torch.tensor([1.0, 1 + 2**-7, 2.0, torch.nan, 3.0], device=device).to(dtype)
    low_bits = 1.003 if dtype == torch.bfloat16 else 1.0
    step_of_nothing(param, master, momentum, backend)
    expected = torch.tensor([low_bits, 1 + 2**-7, 2.0, torch.nan, 3.0], device=device)
    assert torch.equal(master.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def exact_problem(dtype, device, numel):
    """Rates that are powers of two: rate * gradient is exact in float32, so there is one rounding before the last."""
    generator = torch.Generator().manual_seed(3)
    param = torch.randn(numel, generator=generator)
    param[: numel // 2] *= 2.0 ** torch.randint(-30, 1, (numel // 2,), generator=generator)
    grad = torch.randn(numel, generator=generator)
    rates = 2.0 ** torch.randint(-30, -4, (37,), generator=generator)
    return param.to(device, dtype), grad.to(device, dtype), rates.to(device)


@pytest.mark.interpreted(dtype=[torch.bfloat16], seed=[5, 2**40 + 11])
@pytest.mark.parametrize("seed", [0, 5, -1, 2**40 + 11])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_gives_the_references_bits(backend, device, dtype, seed):
    numel = 37 * 1001  # more than two pieces, and a tail that is no multiple of eight
    param, grad, rates = exact_problem(dtype, device, numel)
    expected = param.clone()
    for step in (0, 1, 2**33 + 5):
        for values, impl in ((param, backend), (expected, "reference")):
            feature_sgd_(
                [values],
                [grad],
                [rates],
                inners=[1001],
                seeds=[seed],
                steps=torch.tensor([step], device=device),
                impl=impl,
            )
        assert torch.equal(param, expected)


def test_stochastic_rounding_depends_on_the_step_and_keeps_the_mean(backend, device):
    # bf16 has a spacing of 2^-8 below 1: rounding to nearest never moves
    numel, rate = 40000, 2.0**-12
    rates = torch.full((1,), rate, device=device)
    grad = torch.ones(numel, dtype=torch.bfloat16, device=device)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    param = grad.clone()
    moved = []
    for _ in range(16):
        before = param.clone()
        feature_sgd_([param], [grad], [rates], seeds=[1], steps=steps, impl=backend)
        moved.append(before != param)
    assert 0 < int((moved[0] & moved[1]).sum()) < int(moved[0].sum())
    # 16 steps of 2^-12; each element's total has a standard deviation below 2^-8 * sqrt(16 / 16).
    assert abs(float(param.float().mean()) - (1 - 16 * rate)) < 6 * 2.0**-8 / numel**0.5

    frozen = grad.clone()
    feature_sgd_([frozen], [grad], [rates], impl=backend)
    assert torch.equal(frozen, grad)
