"""Protects feature_sgd_, one SGD step with a learning rate per feature, and the plan that makes it fast:

- every backend as near to the float64 truth as the reference, for all layouts, dtypes and options at once, with first
  and later steps mixed in one call; 50 steps along torch.optim.SGD when all rates are equal;
- bf16 and fp16: conversions exact for every bit pattern, masters, stochastic rounding to the reference's very bits and
  without bias;
- skipped steps, gradients left alone, version counters, errors before anything is written;
- the same bits for any number of threads, for the plan and for the list op; instruction sets agree;
- opcheck and torch.compile(fullgraph=True).
"""

import gc
import os
import subprocess
import sys

import pytest
import torch

from alrao_fast import testing
from alrao_fast.ops import feature_sgd
from alrao_fast.ops.feature import Scalars
from alrao_fast.ops.feature_sgd import feature_sgd_

OP = "feature_sgd"
OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "multiplier": {"lr": 0.3},
    "multiplier in a tensor": {"lr": torch.tensor(0.3)},
    "loss scale": {"grad_scale": torch.tensor([8.0]), "found_inf": torch.tensor([0.0])},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True},
    "nesterov, weight decay": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    "authors": {"momentum": 0.9, "momentum_rule": "authors", "lr": 3.0},
    "authors, all": {
        "momentum": 0.5,
        "momentum_rule": "authors",
        "dampening": 0.1,
        "nesterov": True,
        "weight_decay": 0.1,
        "maximize": True,
    },
}


def to_device(options, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def run(problem, impl, options, *, state_dtype=None, updates=3, **more):
    """Several updates; returns the states. Every second tensor has had an update before; the buffers of the others
    hold NaN, which must not be read."""
    device = problem.params[0].device
    steps = torch.arange(len(problem.params), device=device) % 2
    before = steps.clone()
    buffers = []
    if options.get("momentum"):
        for t, p in enumerate(problem.params):
            value = 0.5 if t % 2 else float("nan")
            buffers.append(torch.full_like(p, value, dtype=state_dtype or p.dtype))
    for _ in range(updates):
        feature_sgd_(
            problem.params,
            problem.grads,
            problem.rates,
            inners=problem.inners,
            momentum_buffers=buffers,
            steps=steps,
            impl=impl,
            **to_device(options, device),
            **more,
        )
    assert torch.equal(steps, before + updates)
    return buffers


def compare(backend, device, problem_of, options, *, state_dtype=None):
    if backend == "reference":
        pytest.skip("the reference itself")
    actual, expected = problem_of(device), problem_of("cpu")
    truth = expected.to(torch.float64)
    buffers = [
        run(problem, impl, options, state_dtype=dtype)
        for problem, impl, dtype in (
            (actual, backend, state_dtype),
            (expected, "reference", state_dtype),
            (truth, "reference", None),
        )
    ]
    names, check = actual.names, testing.assert_feature_within_budget
    check(actual.params, expected.params, truth.params, names, "parameter")
    if options.get("momentum"):
        check(*buffers, names, "momentum buffer")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equals_the_reference(backend, device, dtype, options):
    compare(backend, device, lambda d: testing.feature_problem(dtype, d), options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_momentum_of_low_precision_parameters(backend, device, dtype):
    options = {"momentum": 0.9, "weight_decay": 0.1}
    problem_of = lambda d: testing.feature_problem(dtype, d)  # noqa: E731
    compare(backend, device, problem_of, options, state_dtype=torch.float32)


def test_float64_rates_are_used_as_they_are(backend, device):
    problem = testing.feature_problem(torch.float64, device, names=["rows of a linear layer"])
    rate = problem.rates[0].double() * (1 + 1e-9)
    before = problem.params[0].clone()
    feature_sgd_(problem.params, problem.grads, [rate], impl=backend)
    expected = before - rate[:, None] * problem.grads[0]
    torch.testing.assert_close(problem.params[0], expected, rtol=1e-15, atol=1e-15)


def test_parameters_of_several_dtypes_in_one_call(backend, device):
    names = ["rows of a linear layer", "columns of an embedding"]
    parts = [testing.feature_problem(dtype, device, names=names) for dtype in testing.DTYPES]
    separate = [testing.feature_problem(dtype, device, names=names) for dtype in testing.DTYPES]
    joined = testing.FeatureProblem(*([x for part in parts for x in part[k]] for k in range(5)))
    run(joined, backend, {"momentum": 0.9})
    for problem in separate:
        run(problem, backend, {"momentum": 0.9})
    for actual, expected in zip(joined.params, (p for s in separate for p in s.params)):
        assert torch.equal(actual, expected)


def test_by_hand(backend, device):
    """Two rows with rates 1/2 and 1/4; power-of-two numbers, so that every dtype gives the exact result.

    Row 0, first step: g = 2 + 0.5 * 4 = 4, buf = 4, p = 4 - 1/2 * 4 = 2. Second: g = 2 + 0.5 * 2 = 3,
    buf = 0.5 * 4 + 3 = 5, p = 2 - 5/2 = -1/2. Row 1: g = -1 + 0.5 * 2 = 0, buf = 0, p = 2; then g = 0, buf = 0, p = 2.
    """
    for dtype in testing.DTYPES:
        param = torch.tensor([[4.0], [2.0]], dtype=dtype, device=device)
        grad = torch.tensor([[2.0], [-1.0]], dtype=dtype, device=device)
        buffer, steps = torch.empty_like(param), torch.zeros(1, dtype=torch.int64, device=device)
        rates = torch.tensor([0.5, 0.25], device=device)
        for expected in ([[2.0], [2.0]], [[-0.5], [2.0]]):
            feature_sgd_(
                [param],
                [grad],
                [rates],
                momentum_buffers=[buffer],
                steps=steps,
                momentum=0.5,
                weight_decay=0.5,
                impl=backend,
            )
            assert param.tolist() == expected
        assert buffer.tolist() == [[5.0], [0.0]] and steps.tolist() == [2]


TORCH_OPTIONS = [
    {},
    {"weight_decay": 0.05},
    {"maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True},
]


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fifty_steps_with_equal_rates_follow_torch(backend, device, dtype, options):
    lr = 0.01
    problem = testing.feature_problem(
        dtype, device, names=["rows of a linear layer", "channels_last"]
    )
    peers = [p.clone().requires_grad_() for p in problem.params]
    optimizer = torch.optim.SGD(peers, lr=lr, **options)
    buffers = [torch.empty_like(p) for p in problem.params] if options.get("momentum") else None
    steps = torch.zeros(len(peers), dtype=torch.int64, device=device)
    rates = [torch.full_like(r, 0.5) for r in problem.rates]
    for k in range(50):
        grads = [g * (1 + k % 3) + 0.1 * p.detach() for g, p in zip(problem.grads, peers)]
        for peer, grad in zip(peers, grads):
            peer.grad = grad.clone()
        optimizer.step()
        feature_sgd_(
            problem.params,
            grads,
            rates,
            inners=problem.inners,
            momentum_buffers=buffers,
            steps=steps,
            lr=2 * lr,
            impl=backend,
            **options,
        )
    tolerance = 1e-13 if dtype == torch.float64 else 3e-5
    for param, peer in zip(problem.params, peers):
        torch.testing.assert_close(param, peer.detach(), rtol=tolerance, atol=tolerance)


# ---- bf16 and fp16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_takes_the_update_and_is_rounded_to_nearest(backend, device, dtype):
    values = awkward_floats(dtype).to(device)
    master = values.clone()
    param, grad = torch.zeros_like(values, dtype=dtype), torch.ones_like(values, dtype=dtype)
    feature_sgd_([param], [grad], [torch.zeros(1, device=device)], masters=[master], impl=backend)
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


def exact_problem(dtype, device, numel):
    """Rates that are powers of two: rate * gradient is exact in float32, so there is one rounding before the last."""
    generator = torch.Generator().manual_seed(3)
    param = torch.randn(numel, generator=generator)
    param[: numel // 2] *= 2.0 ** torch.randint(-30, 1, (numel // 2,), generator=generator)
    grad = torch.randn(numel, generator=generator)
    rates = 2.0 ** torch.randint(-30, -4, (37,), generator=generator)
    return param.to(device, dtype), grad.to(device, dtype), rates.to(device)


@pytest.mark.parametrize("seed", [0, 5, -1, 2**40 + 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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
    numel, rate = (
        40000,
        2.0**-12,
    )  # bf16 has a spacing of 2^-8 below 1: rounding to nearest never moves
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


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_nan_and_infinity_stay_where_they_are(backend, device, dtype):
    numel = 600
    grad = torch.zeros(numel, dtype=dtype, device=device)
    grad[3], grad[41], grad[599] = torch.nan, torch.inf, -torch.inf
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    for seeds in (None, [1]):
        param = torch.ones_like(grad)
        rates = torch.ones(1, device=device)
        feature_sgd_([param], [grad], [rates], steps=steps, seeds=seeds, impl=backend)
        assert param[3].isnan() and param[41] == -torch.inf and param[599] == torch.inf
        assert int((param == 1).sum()) == numel - 3


# ---- the contract around the numbers ------------------------------------------------------------


def test_found_inf_skips_everything(backend, device):
    problem = testing.feature_problem(torch.float32, device)
    before = problem.to(torch.float32)
    buffers = [torch.zeros_like(p) for p in problem.params]
    steps = torch.zeros(len(buffers), dtype=torch.int64, device=device)
    feature_sgd_(
        problem.params,
        problem.grads,
        problem.rates,
        inners=problem.inners,
        momentum_buffers=buffers,
        steps=steps,
        momentum=0.9,
        found_inf=torch.ones(1, device=device),
        impl=backend,
    )
    assert not steps.any() and not any(b.any() for b in buffers)
    assert all(torch.equal(a, b) for a, b in zip(problem.params, before.params))


def test_reads_gradients_only_and_bumps_versions_of_what_it_writes(backend, device):
    problem = testing.feature_problem(torch.float32, device)
    params = [torch.nn.Parameter(p) for p in problem.params]
    before = problem.to(torch.float32)
    buffers = [torch.zeros_like(p) for p in problem.params]
    steps = torch.zeros(len(buffers), dtype=torch.int64, device=device)
    written = [*params, *buffers, steps]
    versions = [t._version for t in written]
    feature_sgd_(
        params,
        problem.grads,
        problem.rates,
        inners=problem.inners,
        momentum_buffers=buffers,
        steps=steps,
        momentum=0.9,
        grad_scale=torch.full((1,), 2.0, device=device),
        maximize=True,
        weight_decay=0.1,
        impl=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(problem.grads, before.grads))
    assert all(t._version > v for t, v in zip(written, versions))
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in params)


def test_no_parameters(backend):
    feature_sgd_([], [], [], impl=backend)


INVALID = {
    "too few gradients": (
        lambda a: a["grads"].pop(),
        "grads has 1 entries, expected 2, one for each of params",
    ),
    "too many rates": (
        lambda a: a["rates"].append(a["rates"][0]),
        "rates has 3 entries, expected 2",
    ),
    "inners": (lambda a: a.update(inners=[4]), "inners has 1 entries, expected 2"),
    "seeds": (lambda a: a.update(seeds=[1]), "seeds has 1 entries, expected 2, .* or none"),
    "masters": (lambda a: a.update(masters=[torch.zeros(3, 4)]), "masters has 1 entries"),
    "sparse gradient": (
        lambda a: a["grads"].__setitem__(1, a["grads"][1].to_sparse()),
        r"grads\[1\] is sparse, expected an ordinary \(dense\) gradient",
    ),
    "gradient's shape": (
        lambda a: a["grads"].__setitem__(0, torch.zeros(4, 3)),
        r"grads\[0\] has shape \[4, 3\] .*, expected the shape of params\[0\], shape \[3, 4\]",
    ),
    "gradient's dtype": (
        lambda a: a["grads"].__setitem__(0, a["grads"][0].double()),
        r"grads\[0\] has dtype float64, expected float32 as params\[0\]",
    ),
    "integer parameter": (
        lambda a: a["params"].__setitem__(0, a["params"][0].long()),
        r"params\[0\] has an unsupported dtype, expected float64, float32, bfloat16 or float16",
    ),
    "parameter with gaps": (
        lambda a: a["params"].__setitem__(0, torch.zeros(3, 8)[:, ::2]),
        r"params\[0\] has shape \[3, 4\] with strides \[8, 2\], expected a dense tensor",
    ),
    "rate of the wrong length": (
        lambda a: a["rates"].__setitem__(0, torch.ones(2)),
        r"rates\[0\] has 2 entries and inners\[0\] is 4, which does not divide params\[0\] of 12",
    ),
    "no rate": (lambda a: a["rates"].__setitem__(0, torch.ones(0)), r"rates\[0\] has 0 entries"),
    "rate's dtype": (
        lambda a: a["rates"].__setitem__(1, torch.ones(5, dtype=torch.bfloat16)),
        r"rates\[1\] has dtype bfloat16, expected float32",
    ),
    "rate with gaps": (
        lambda a: a["rates"].__setitem__(0, torch.ones(6)[::2]),
        r"rates\[0\] has shape \[3\] with strides \[2\], expected a contiguous vector",
    ),
    "inner": (lambda a: a.update(inners=[4, 0]), r"inners\[1\] is 0, expected at least 1"),
    "steps' dtype": (
        lambda a: a.update(steps=torch.zeros(2)),
        "steps has dtype float32 and shape .*, expected a contiguous int64 tensor with 2 entries",
    ),
    "master of a float32 parameter": (
        lambda a: a.update(masters=[torch.zeros(3, 4), torch.zeros(0)]),
        r"masters\[0\] has dtype float32 for a float32 parameter, expected float32 for a bfloat16",
    ),
    "no momentum buffers": (
        lambda a: a.update(momentum=0.9),
        "momentum_buffers is empty, expected one for each of params because momentum is not 0",
    ),
    "needless momentum buffers": (
        lambda a: a.update(momentum_buffers=[torch.zeros_like(p) for p in a["params"]]),
        "momentum_buffers has entries, expected an empty list because momentum is 0",
    ),
    "momentum buffer's strides": (
        lambda a: a.update(momentum=0.9, momentum_buffers=[torch.zeros(4, 3).t(), torch.zeros(5)]),
        r"momentum_buffers\[0\] has shape \[3, 4\] with strides \[1, 3\], expected those of params\[0\]",
    ),
    "momentum buffer's dtype": (
        lambda a: a.update(
            momentum=0.9, momentum_buffers=[torch.zeros(3, 4, dtype=torch.half), torch.zeros(5)]
        ),
        r"momentum_buffers\[0\] has dtype float16, expected float32 as params\[0\], or float32",
    ),
    "momentum without steps": (
        lambda a: a.update(momentum=0.9, steps=None),
        "steps is None, expected an int64 tensor with one entry for each of params",
    ),
    "grad_scale": (
        lambda a: a.update(grad_scale=torch.ones(2)),
        "grad_scale has dtype float32 and 2 elements, expected one float32 or float64 element",
    ),
    "found_inf": (
        lambda a: a.update(found_inf=torch.ones(1, dtype=torch.bool)),
        "found_inf has dtype .* and 1 elements, expected one float32 or float64 element",
    ),
    "lr": (
        lambda a: a.update(lr=torch.ones(2)),
        "lr has dtype float32 and 2 elements, expected one float32 or float64 element",
    ),
    "the same memory twice": (
        lambda a: a["params"].__setitem__(1, a["params"][0].view(-1)[:5]),
        "share memory, expected each tensor once",
    ),
}


@pytest.mark.parametrize("change, message", INVALID.values(), ids=INVALID)
def test_invalid_arguments_are_named_and_nothing_is_written(backend, device, change, message):
    if device.type != "cpu":
        pytest.skip("the cases are CPU tensors")
    arguments = {
        "params": [torch.ones(3, 4), torch.ones(5)],
        "grads": [torch.ones(3, 4), torch.ones(5)],
        "rates": [torch.ones(3), torch.ones(5)],
        "inners": [4, 1],
        "steps": torch.zeros(2, dtype=torch.int64),
    }
    change(arguments)
    tensors = [*arguments["params"], *arguments.get("momentum_buffers", ())]
    if arguments["steps"] is not None:
        tensors.append(arguments["steps"])
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match="feature_sgd_: .*" + message):
        feature_sgd_(**arguments, impl=backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_unknown_rule_and_unknown_implementation():
    with pytest.raises(
        ValueError, match="momentum_rule: got 'fast', expected 'torch' or 'authors'"
    ):
        feature_sgd_([], [], [], momentum_rule="fast")
    one = [torch.ones(1)]
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        feature_sgd_(one, one, one, impl="fast")


def test_default_layout_runs_along_the_first_dimension(backend, device):
    param = torch.zeros(2, 3, 1, 1, device=device).contiguous(memory_format=torch.channels_last)
    grads = [torch.ones_like(param), torch.ones((), device=device)]
    rates = [torch.tensor([1.0, 2.0], device=device), torch.tensor([4.0], device=device)]
    scalar = torch.zeros((), device=device)
    feature_sgd_([param, scalar], grads, rates, impl=backend)
    assert param.flatten(1).tolist() == [[-1.0] * 3, [-2.0] * 3] and scalar.item() == -4


@pytest.mark.parametrize("count", [500, 4000])
def test_many_tensors(backend, device, count):
    """More than a CUDA launch takes in its short and in its long list of gradients; most are empty."""
    sizes = [3 if t % 10 == 0 else 0 for t in range(count)]
    params = [torch.zeros(size, device=device) for size in sizes]
    grads = [torch.full((size,), -float(t), device=device) for t, size in enumerate(sizes)]
    rates = [torch.tensor([1.0, 2.0, 4.0], device=device)] * count
    steps = torch.arange(count, device=device)
    for _ in range(2):
        feature_sgd_(params, grads, rates, steps=steps, impl=backend)
    for t, param in enumerate(params):
        assert param.tolist() == [2.0 * t, 4.0 * t, 8.0 * t][: sizes[t]]
    assert steps.tolist() == list(range(2, count + 2))


@pytest.mark.parametrize("shape", [(67, 500813), (3728273, 9)], ids=["long rows", "short rows"])
def test_more_than_2_25_entries(backend, device, shape):
    """From there on a CUDA block takes more entries."""
    param = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    rates = (torch.arange(shape[0], device=device) % 251).float()  # in bfloat16 as they are
    feature_sgd_([param], [torch.full_like(param, -1)], [rates], impl=backend)
    assert torch.equal(param, rates.bfloat16()[:, None].expand(shape))


# ---- the compiled backends, the dispatcher, the plan --------------------------------------------


@pytest.fixture
def cpu():
    """Some of the tests below are about the CPU's kernels alone."""
    reason = testing.require(OP, "cpu")
    if reason is not None:
        pytest.skip(f"cpu: {reason}")


SCALARS = {
    "lr": 1.0,
    "lr_tensor": None,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.1,
    "nesterov": False,
    "maximize": False,
    "authors_momentum": False,
    "grad_scale": None,
    "found_inf": None,
}

OPTIONS_OF_PLAN = {name: SCALARS[name] for name in feature_sgd.OP.options}


def planned(compiled, problem, seeds=()):
    buffers = [torch.zeros_like(p) for p in problem.params]
    steps = torch.zeros(len(buffers), dtype=torch.int64, device=compiled.device)
    lists = (problem.rates, problem.inners, list(seeds), steps)
    return compiled.plan(problem.params, [buffers], [], *lists), buffers, steps


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_plan_gives_the_bits_of_the_list_op(compiled, dtype):
    problem, expected = (testing.feature_problem(dtype, compiled.device) for _ in range(2))
    seeds = range(len(problem.params))
    plan, buffers, steps = planned(compiled, problem, seeds)
    others = [torch.zeros_like(p) for p in expected.params]
    counted = torch.zeros_like(steps)
    for _ in range(3):
        assert plan.step(problem.grads, OPTIONS_OF_PLAN, Scalars())
        torch.ops.alrao_fast.feature_sgd_(
            expected.params,
            expected.grads,
            others,
            [],
            expected.rates,
            expected.inners,
            list(seeds),
            counted,
            **SCALARS,
        )
        for rates in (problem.rates, expected.rates):  # shared vectors may change in place
            rates[0].mul_(0.5)
    assert torch.equal(steps, counted)
    for got, want in ((problem.params, expected.params), (buffers, others)):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "data", p.data.clone()),
        lambda p: setattr(p, "data", p.data.double()),
        lambda p: setattr(p, "data", p.data.view(torch.int32)),
        lambda p: setattr(p, "data", p.data.as_strided((8, 6), (1, 8))),
        lambda p: p.resize_(3, 4),
    ],
    ids=["memory", "dtype", "dtype in the same memory", "strides", "shape"],
)
def test_plan_notices_that_a_parameter_changed(compiled, change):
    param, rate, steps = compiled.to_device(
        torch.ones(8, 6), torch.ones(8), torch.zeros(1, dtype=torch.int64)
    )
    buffer = torch.zeros_like(param)
    plan = compiled.plan([param], [[buffer]], [], [rate], [6], [], steps)
    assert plan.step([torch.ones_like(param)], OPTIONS_OF_PLAN, Scalars())
    change(param)
    before, state = param.clone(), buffer.clone()
    assert not plan.step([torch.ones_like(param)], OPTIONS_OF_PLAN, Scalars())
    assert torch.equal(param, before) and torch.equal(buffer, state) and steps.tolist() == [1]


def test_plan_notices_that_a_state_changed(compiled):
    param, rate, steps = compiled.to_device(
        torch.ones(8, 6), torch.ones(8), torch.zeros(1, dtype=torch.int64)
    )
    buffer = torch.zeros_like(param)
    plan = compiled.plan([param], [[buffer]], [], [rate], [6], [], steps)
    buffer.data = buffer.data.clone()
    assert not plan.step([torch.ones_like(param)], OPTIONS_OF_PLAN, Scalars())


def test_plan_refuses_what_does_not_fit(compiled):
    names = ["rows of a linear layer", "columns of an embedding"]
    problem = testing.feature_problem(device=compiled.device, names=names)
    plan, _, steps = planned(compiled, problem)
    before = problem.to(torch.float32)
    sparse = [problem.grads[0].to_sparse(), problem.grads[1]]
    for grads, message in (
        (problem.grads[:1], "grads has 1 entries"),
        (sparse, r"grads\[0\] is sp"),
    ):
        with pytest.raises(RuntimeError, match=message):
            plan.step(grads, OPTIONS_OF_PLAN, Scalars())
    with pytest.raises(RuntimeError, match="momentum_buffers has entries"):
        plan.step(problem.grads, OPTIONS_OF_PLAN | {"momentum": 0.0}, Scalars())
    with pytest.raises(RuntimeError, match=r"rates\[0\] has 6 entries"):
        param, rate = compiled.to_device(torch.ones(5, 4), torch.ones(6))
        compiled.plan([param], [], [], [rate], [4], [], steps[:1])
    with pytest.raises(RuntimeError, match="got plan 123456789"):
        torch.ops.alrao_fast._feature_plan_step_(123456789, problem.grads, None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(problem.params, before.params))
    assert not steps.any()


def test_plan_holds_its_tensors_and_lets_them_go(compiled):
    freed = []

    class Watched(torch.Tensor):
        def __del__(self):
            freed.append(True)

    problem = testing.feature_problem(device=compiled.device, names=["rows of a linear layer"])
    problem.params[0] = problem.params[0].as_subclass(Watched)
    plan, *_ = planned(compiled, problem)
    number = plan._number
    problem.params.clear()
    gc.collect()
    assert not freed and plan.step(problem.grads, OPTIONS_OF_PLAN, Scalars())
    del plan
    gc.collect()
    assert freed
    with pytest.raises(RuntimeError, match=f"got plan {number}"):
        torch.ops.alrao_fast._feature_plan_step_(number, problem.grads, None, None, None)


def test_the_number_of_threads_does_not_change_the_bits(cpu):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            problem = testing.feature_problem(torch.float32)
            for t in range(len(problem.params)):  # enough work for all of them
                if problem.names[t].startswith("long rows"):
                    problem.params[t], problem.grads[t] = torch.ones(3, 50021), torch.ones(3, 50021)
                    problem.inners[t] = 50021
            buffers = run(problem, "cpu", {"momentum": 0.9, "weight_decay": 0.1})
            results.append([*problem.params, *buffers])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


ISA_SCRIPT = """
import sys, torch
from alrao_fast import _C, testing
from alrao_fast.ops.feature_adam import feature_adam_
from alrao_fast.ops import feature_sgd
from alrao_fast.ops.feature import Scalars
from alrao_fast.ops.feature_sgd import feature_sgd_

results = []
for dtype in testing.DTYPES:
    problem = testing.feature_problem(dtype)
    states = [[torch.zeros_like(p) for p in problem.params] for _ in range(3)]
    steps = torch.zeros(len(problem.params), dtype=torch.int64)
    common = dict(inners=problem.inners, steps=steps, weight_decay=0.1)
    for rule in ("torch", "authors"):
        feature_sgd_(problem.params, problem.grads, problem.rates, momentum=0.9, momentum_rule=rule,
                     momentum_buffers=states[0], impl="cpu", **common)
    feature_adam_(problem.params, problem.grads, states[1], states[2], problem.rates, impl="cpu", **common)
    results.append([t.double() for tensors in (problem.params, *states) for t in tensors])
torch.save((_C.cpu_isa(), results), sys.argv[1])
"""


def test_instruction_sets_agree(cpu, tmp_path):
    results = {}
    for isa in ("v2", "v3", "v4"):
        target = tmp_path / isa
        environment = {**os.environ, "ALRAO_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT, str(target)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            name, results[isa] = torch.load(target)
            assert name == isa
        else:  # not built for or not supported by this machine: then the message says so
            assert isa in done.stderr, done.stderr
    if len(results) < 2:
        pytest.skip(f"this machine runs {list(results)} only")
    first, *others = results.values()
    for other in others:
        for dtype, expected, actual in zip(testing.DTYPES, first, other):
            slack = 2 * testing.FEATURE_SLACK[dtype]
            for a, b in zip(expected, actual):
                torch.testing.assert_close(a, b, rtol=slack, atol=slack)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opcheck(compiled, momentum):
    names = ["rows of a linear layer", "few columns", "channels_last"]
    problem = testing.feature_problem(device=compiled.device, names=names)
    params = [p.requires_grad_() for p in problem.params]
    arguments = (
        params,
        problem.grads,
        [torch.zeros_like(p) for p in params] if momentum else [],
        [],
        problem.rates,
        problem.inners,
        [],
        torch.zeros(len(params), dtype=torch.int64, device=compiled.device),
    )
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.alrao_fast.feature_sgd_.default, arguments, SCALARS | {"momentum": momentum}
        )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_compiles_as_one_graph(backend, device, momentum):
    if backend == "reference" and momentum:
        pytest.skip("the reference looks at the step count, which a graph cannot")
    names = ["rows of a linear layer", "few columns"]
    if backend != "reference":  # whose as_strided_scatter torch refuses for such strides
        names.append("channels_last")
    problem, expected = (testing.feature_problem(device=device, names=names) for _ in range(2))

    def step(params, grads, rates, buffers, steps):
        feature_sgd_(
            params,
            grads,
            rates,
            inners=problem.inners,
            momentum_buffers=buffers,
            steps=steps,
            momentum=momentum,
            weight_decay=0.1,
            impl=backend,
        )

    for tensors, function in (
        (problem, torch.compile(step, fullgraph=True, backend="aot_eager")),
        (expected, step),
    ):
        params = [torch.nn.Parameter(p) for p in tensors.params]
        buffers = [torch.zeros_like(p) for p in params] if momentum else []
        steps = torch.zeros(len(params), dtype=torch.int64, device=device)
        versions = [p._version for p in params]
        for _ in range(2):
            function(params, tensors.grads, tensors.rates, buffers, steps)
        assert steps.tolist() == [2] * len(params)
        assert all(p._version > v for p, v in zip(params, versions))
    for a, b in zip(problem.params, expected.params):
        torch.testing.assert_close(a, b)
