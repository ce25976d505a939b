"""Protects feature_adam_, one Adam or AdamW step with a learning rate per feature:

- every backend as near to the float64 truth as the reference, for all layouts, dtypes and options at once, with tensors
  at different steps in one call; 50 steps along torch.optim.Adam and AdamW when all rates are equal;
- float32 moments and masters of bf16 and fp16 parameters, stochastic rounding to the reference's very bits;
- skipped steps, gradients left alone, version counters, errors before anything is written;
- opcheck and torch.compile(fullgraph=True).

Layout walking and conversions are shared with feature_sgd_ and are tested closely there and in
test_feature_rounding.py. The plan: test_plan.py.
"""

import math

import pytest
import torch
from feature_harness import ADAM

from alrao_fast import testing
from alrao_fast.ops.feature_adam import feature_adam_

OP = "feature_adam"
pytestmark = pytest.mark.emulated

OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "betas, eps": {"betas": (0.5, 0.8), "eps": 1e-3},
    "multiplier": {"lr": 0.3},
    "multiplier in a tensor": {"lr": torch.tensor(0.3)},
    "warm-up": {"warmup_steps": 5.0, "lr": torch.tensor(0.3)},
    "averages": {"averaging": 8.0, "warmup_steps": 3.0},
    "loss scale": {"grad_scale": torch.tensor([8.0]), "found_inf": torch.tensor([0.0])},
    "amsgrad": {"amsgrad": True},
    "amsgrad, decoupled decay": {
        "amsgrad": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    },
    "authors": {"eps_rule": "authors", "eps": 1e-3},
    "authors, amsgrad, weight decay": {
        "eps_rule": "authors",
        "amsgrad": True,
        "weight_decay": 0.1,
        "eps": 1e-3,
    },
}


@pytest.mark.interpreted(
    dtype=[torch.float32],
    options=[
        "averages",
        "amsgrad",
        "amsgrad, decoupled decay",
        "authors",
        "authors, amsgrad, weight decay",
    ],
)
@pytest.mark.sanitized(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equals_the_reference(backend, device, dtype, options):
    ADAM.assert_within_budget(backend, device, dtype, OPTIONS[options])


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_moments_of_low_precision_parameters(backend, device, dtype):
    options = {"weight_decay": 0.1}
    ADAM.assert_within_budget(backend, device, dtype, options, state_dtype=torch.float32)


@pytest.mark.interpreted
@pytest.mark.sanitized
def test_by_hand(backend, device):
    """betas (1/2, 1/2), eps 0, one step from m = v = 0 with g = 2 and rates 1/2, 1/4 and 6.

    m = 1, v = 2; both corrections are 1/2, so m / (1 - beta1) = 2 and sqrt(v / (1 - beta2)) = 2: the change is the
    rate itself. Decoupled decay 1/2 first: p = 4 * (1 - r/2) - r = 2.5 and 3.25; the third factor, -2, counts as 0.
    """
    param = torch.full((3, 1), 4.0, dtype=torch.float64, device=device)
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    feature_adam_(
        [param],
        [torch.full_like(param, 2.0)],
        [m],
        [v],
        [torch.tensor([0.5, 0.25, 6.0], device=device)],
        steps=steps,
        betas=(0.5, 0.5),
        eps=0.0,
        weight_decay=0.5,
        decoupled_weight_decay=True,
        impl=backend,
    )
    torch.testing.assert_close(param.flatten().tolist(), [2.5, 3.25, -6.0], rtol=1e-15, atol=0)
    assert m.tolist() == [[1.0]] * 3 and v.tolist() == [[2.0]] * 3 and steps.tolist() == [1]


@pytest.mark.parametrize(
    "peer, options",
    [
        ("Adam", {}),
        ("Adam", {"betas": (0.8, 0.95), "eps": 1e-4, "maximize": True}),
        ("Adam", {"weight_decay": 0.05, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.05}),
        ("AdamW", {"weight_decay": 0.05, "amsgrad": True, "maximize": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fifty_steps_with_equal_rates_follow_torch(backend, device, dtype, peer, options):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    ours = options | {"decoupled_weight_decay": peer == "AdamW"}

    def theirs(params):
        return getattr(torch.optim, peer)(params, lr=0.02, **options)

    ADAM.assert_follows(theirs, backend, device, dtype, ours, tolerance)


@pytest.mark.interpreted
@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_masters(backend, device, dtype, amsgrad):
    start = torch.linspace(-3, 3, 1000, device=device)
    grad = torch.linspace(2, -1, 1000, device=device).to(dtype)
    rates = torch.logspace(-5, 0, 10, device=device)
    param, master = start.to(dtype), start.clone()
    plain = start.clone()
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    for values, gradient, masters in ((param, grad, [master]), (plain, grad.float(), None)):
        exp_avgs, exp_avg_sqs, largest = [[torch.zeros(1000, device=device)] for _ in range(3)]
        for step in range(2):
            feature_adam_(
                [values],
                [gradient],
                exp_avgs,
                exp_avg_sqs,
                [rates],
                max_exp_avg_sqs=largest if amsgrad else None,
                steps=steps + step,
                inners=[100],
                masters=masters,
                impl=backend,
            )
            if step == 0:
                # Not by an optimizer: the master is to take it.
                values[::7] = 0.5
    torch.testing.assert_close(master, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(param, master.to(dtype))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_gives_the_references_bits(backend, device, dtype):
    """On the first step with these betas and eps = 0 the change is exactly +-rate, and m = v = 0 is exact."""
    numel, step = 37 * 501, 0
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(numel, generator=generator).to(device, dtype)
    rates = 2.0 ** torch.randint(-12, -4, (37,), generator=generator).to(device)
    grad = torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0).to(device, dtype)
    results = []
    for impl in (backend, "reference"):
        param = start.clone()
        states = [[torch.zeros(numel, device=device)] for _ in range(2)]
        feature_adam_(
            [param],
            [grad],
            *states,
            [rates],
            steps=torch.tensor([step], device=device),
            inners=[501],
            seeds=[2**35 + 9],
            betas=(0.5, 0.75),
            eps=0.0,
            impl=impl,
        )
        results.append(param)
    assert torch.equal(*results)
    assert 0.1 < float((results[0] != start).float().mean()) < 0.999


@pytest.mark.interpreted
@pytest.mark.sanitized
def test_amsgrad_keeps_a_nan(backend, device):
    param, grad = torch.ones(3, device=device), torch.ones(3, device=device)
    largest = torch.tensor([math.nan, 5.0, 0.0], device=device)
    steps = torch.ones(1, dtype=torch.int64, device=device)
    feature_adam_(
        [param],
        [grad],
        [torch.zeros(3, device=device)],
        [torch.zeros(3, device=device)],
        [torch.ones(1, device=device)],
        steps=steps,
        max_exp_avg_sqs=[largest],
        betas=(0.5, 0.5),
        impl=backend,
    )
    assert largest[0].isnan() and largest[1:].tolist() == [5.0, 0.5] and param[0].isnan()


@pytest.mark.interpreted
@pytest.mark.sanitized
def test_found_inf_skips_everything(backend, device):
    ADAM.assert_found_inf_skips_everything(backend, device, {"amsgrad": True})


def test_reads_gradients_only_and_bumps_versions_of_what_it_writes(backend, device):
    scale = {"grad_scale": torch.full((1,), 2.0)}
    options = {"amsgrad": True, "weight_decay": 0.1, **scale}
    ADAM.assert_reads_gradients_only_and_bumps_versions(backend, device, options)


INVALID = {
    "gradients": (lambda a: a["grads"].pop(), "grads has 1 entries, expected 2"),
    "first moments": (lambda a: a["exp_avgs"].pop(), "exp_avgs has 1 entries, expected 2"),
    "no second moments": (lambda a: a["exp_avg_sqs"].clear(), "exp_avg_sqs"),
    "largest second moments": (
        lambda a: a.update(max_exp_avg_sqs=[torch.zeros(3, 4)]),
        "max_exp_avg_sqs has 1 entries, expected 2",
    ),
    "moment's shape": (
        lambda a: a["exp_avg_sqs"].__setitem__(0, torch.zeros(4, 3)),
        r"exp_avg_sqs\[0\] has shape \[4, 3\] .*, expected those of params\[0\], shape \[3, 4\]",
    ),
    "moment's dtype": (
        lambda a: a["exp_avgs"].__setitem__(1, torch.zeros(5, dtype=torch.double)),
        r"exp_avgs\[1\] has dtype float64, expected float32 as params\[1\]",
    ),
    "sparse gradient": (
        lambda a: a["grads"].__setitem__(0, a["grads"][0].to_sparse()),
        r"grads\[0\] is sparse, expected an ordinary \(dense\) gradient",
    ),
    "rate": (
        lambda a: a["rates"].__setitem__(0, torch.ones(2)),
        r"rates\[0\] has 2 entries and inners\[0\] is 4, which does not divide params\[0\] of 12",
    ),
    "moments in the same memory": (
        lambda a: a["exp_avg_sqs"].__setitem__(0, a["exp_avgs"][0]),
        "share memory, expected each tensor once",
    ),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_are_named_and_nothing_is_written(backend, device, case):
    ADAM.assert_refused(backend, device, *INVALID[case])


def test_unknown_rule():
    with pytest.raises(ValueError, match="eps_rule: got 'fast', expected 'torch' or 'authors'"):
        feature_adam_([], [], [], [], [], steps=torch.zeros(0, dtype=torch.int64), eps_rule="fast")


@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(dispatched, amsgrad):
    ADAM.opcheck(dispatched, {"amsgrad": amsgrad})


@pytest.mark.interpreted
def test_compiles_as_one_graph(backend, device):
    if backend == "reference":
        pytest.skip("the reference looks at the step count, which a graph cannot")
    names = ["rows of a linear layer", "few columns", "channels_last"]
    ADAM.assert_compiles_as_one_graph(backend, device, {"weight_decay": 0.1}, names)
