"""Protects feature_sgd_, one SGD step with a learning rate per feature:

- every backend as near to the float64 truth as the reference, for all layouts, dtypes and options at once, with first
  and later steps mixed in one call; 50 steps along torch.optim.SGD when all rates are equal;
- skipped steps, gradients left alone, version counters, errors before anything is written;
- many tensors and large ones; opcheck and torch.compile(fullgraph=True).

Rounding into bf16 and fp16: test_feature_rounding.py. The plan: test_plan.py.
"""

import pytest
import torch
from feature_harness import SGD

from alrao_fast import testing
from alrao_fast.ops.feature_sgd import feature_sgd_

OP = "feature_sgd"
pytestmark = pytest.mark.emulated

OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "multiplier": {"lr": 0.3},
    "multiplier in a tensor": {"lr": torch.tensor(0.3)},
    "warm-up": {"warmup_steps": 5.0, "lr": torch.tensor(0.3)},
    "averages": {"averaging": 8.0, "warmup_steps": 3.0},
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


@pytest.mark.interpreted(
    dtype=[torch.float32], options=["authors", "authors, all", "averages", "loss scale", "warm-up"]
)
@pytest.mark.interpreted(dtype=[torch.float64], options=["loss scale"])
@pytest.mark.sanitized(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equals_the_reference(backend, device, dtype, options):
    SGD.assert_within_budget(backend, device, dtype, OPTIONS[options])


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_momentum_of_low_precision_parameters(backend, device, dtype):
    options = {"momentum": 0.9, "weight_decay": 0.1}
    SGD.assert_within_budget(backend, device, dtype, options, state_dtype=torch.float32)


@pytest.mark.sanitized
def test_float64_rates_are_used_as_they_are(backend, device):
    problem = testing.feature_problem(torch.float64, device, names=["rows of a linear layer"])
    rate = problem.rates[0].double() * (1 + 1e-9)
    before = problem.params[0].clone()
    feature_sgd_(problem.params, problem.grads, [rate], impl=backend)
    expected = before - rate[:, None] * problem.grads[0]
    torch.testing.assert_close(problem.params[0], expected, rtol=1e-15, atol=1e-15)


@pytest.mark.interpreted
@pytest.mark.sanitized
def test_parameters_of_several_dtypes_in_one_call(backend, device):
    names = ["rows of a linear layer", "columns of an embedding"]
    parts = [testing.feature_problem(dtype, device, names=names) for dtype in testing.DTYPES]
    separate = [testing.feature_problem(dtype, device, names=names) for dtype in testing.DTYPES]
    joined = testing.FeatureProblem(*([x for part in parts for x in part[k]] for k in range(5)))
    SGD.run(joined, backend, {"momentum": 0.9})
    for problem in separate:
        SGD.run(problem, backend, {"momentum": 0.9})
    for actual, expected in zip(joined.params, (p for s in separate for p in s.params)):
        assert torch.equal(actual, expected)


@pytest.mark.interpreted
@pytest.mark.sanitized
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
    tolerance = 1e-13 if dtype == torch.float64 else 3e-5

    def peer(params):
        return torch.optim.SGD(params, lr=0.01, **options)

    SGD.assert_follows(peer, backend, device, dtype, options, tolerance)


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


@pytest.mark.interpreted
@pytest.mark.sanitized
def test_found_inf_skips_everything(backend, device):
    SGD.assert_found_inf_skips_everything(backend, device, {"momentum": 0.9})


def test_reads_gradients_only_and_bumps_versions_of_what_it_writes(backend, device):
    scale = {"grad_scale": torch.full((1,), 2.0)}
    options = {"momentum": 0.9, "maximize": True, "weight_decay": 0.1, **scale}
    SGD.assert_reads_gradients_only_and_bumps_versions(backend, device, options)


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


@pytest.mark.interpreted
@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_are_named_and_nothing_is_written(backend, device, case):
    SGD.assert_refused(backend, device, *INVALID[case])


def test_unknown_rule_and_unknown_implementation():
    with pytest.raises(
        ValueError, match="momentum_rule: got 'fast', expected 'torch' or 'authors'"
    ):
        feature_sgd_([], [], [], momentum_rule="fast")
    one = [torch.ones(1)]
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        feature_sgd_(one, one, one, impl="fast")


@pytest.mark.sanitized
def test_default_layout_runs_along_the_first_dimension(backend, device):
    param = torch.zeros(2, 3, 1, 1, device=device).contiguous(memory_format=torch.channels_last)
    grads = [torch.ones_like(param), torch.ones((), device=device)]
    rates = [torch.tensor([1.0, 2.0], device=device), torch.tensor([4.0], device=device)]
    scalar = torch.zeros((), device=device)
    feature_sgd_([param, scalar], grads, rates, impl=backend)
    assert param.flatten(1).tolist() == [[-1.0] * 3, [-2.0] * 3] and scalar.item() == -4


@pytest.mark.sanitized
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opcheck(dispatched, momentum):
    SGD.opcheck(dispatched, {"momentum": momentum})


@pytest.mark.interpreted
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_compiles_as_one_graph(backend, device, momentum):
    if backend == "reference" and momentum:
        pytest.skip("the reference looks at the step count, which a graph cannot")
    names = ["rows of a linear layer", "few columns"]
    if backend != "reference":  # whose as_strided_scatter torch refuses for such strides
        names.append("channels_last")
    options = {"momentum": momentum, "weight_decay": 0.1}
    SGD.assert_compiles_as_one_graph(backend, device, options, names)
