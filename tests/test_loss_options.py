"""Protects the options of the mixture's loss, on every backend that is available.

- Every option alone and together, over shapes, dtypes and memory budgets: error budgets against float64; dead clones.
- What is observed: the likelihood of the data, whatever the loss is made of.

What each of them means: test_loss_formulas.py.
"""

import math
from math import log as LOG

import pytest
import torch
from mixture_harness import (
    INF,
    NAN,
    SHAPES,
    TILED_SHAPES,
    assert_budget,
    case,
    device_of,
    gaussian_inputs,
    gradients,
    log_prob_gradients,
    poisoned,
    to,
)

from alrao_fast import testing
from alrao_fast.functional import (
    switch_mixture_gaussian_stats,
    switch_mixture_nll,
    switch_mixture_stats,
)

OP = "switch_mixture"
pytestmark = pytest.mark.emulated
# One of each way through the kernels, and the smallest.
OPTION_SHAPES = [
    "one of everything",
    "one class",
    "ragged lanes, joint",
    "joint, many chunks",
    "joint, all of shared memory",
    "streamed, ragged last block",
]
COMBINED = [name for name in testing.LOSS_CASES if name.startswith("all")]
# A sanitizer sees the code of every option in all of them together.
SANITIZED = {
    "shape": ["ragged lanes, joint", "streamed, ragged last block"],
    "name": ["none", "losses one by one", *COMBINED],
}


@pytest.mark.interpreted(shape=["one class", "ragged lanes, joint"])
@pytest.mark.sanitized(**SANITIZED)
@pytest.mark.parametrize("shape", OPTION_SHAPES)
@pytest.mark.parametrize("name", testing.LOSS_CASES)
def test_error_budgets(backend, device, name, shape):
    *sizes, memory_budget = SHAPES[shape]
    inputs, options = case(name, *sizes, device=device)
    assert_budget(inputs, backend, memory_budget=memory_budget, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", TILED_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", COMBINED)
def test_error_budgets_of_dtypes(backend, device, name, dtype, shape, bias):
    *sizes, _ = SHAPES[shape]
    inputs, options = case(name, *sizes, device=device, dtype=dtype, bias=bias)
    assert_budget(inputs, backend, **options)


def test_probabilities_of_next_to_no_mass(backend, device):
    inputs, _ = case("none", 5, 4, 3, 2, device=device)
    soft = torch.eye(3, device=device)[inputs.target % 3]
    given = inputs[:4]
    whole, stats = switch_mixture_stats(*given, soft, impl=backend, reduction="sum")
    # The inverse of a mass below 3e-39 overflows; a processor takes it for 0.
    mass = 1e-37 if backend == "cpu" else 1e-39
    loss, of_little = switch_mixture_stats(*given, mass * soft, impl=backend, reduction="sum")
    torch.testing.assert_close(of_little, stats)
    assert loss.item() == pytest.approx(mass * whole.item(), rel=1e-3)


@pytest.mark.parametrize("mass", [1.0, 2.0])
def test_targets_may_be_overwritten_before_the_backward(backend, device, mass):
    inputs, _ = case("none", 5, 4, 3, 2, device=device)
    soft = mass * torch.eye(3, device=device)[inputs.target % 3]
    for reduction in ("none", "mean"):
        results = []
        for overwritten in (False, True):
            x, target = inputs.x.clone().requires_grad_(), soft.clone()
            given = (x, *inputs[1:4], target)
            loss, _ = switch_mixture_stats(*given, impl=backend, reduction=reduction)
            if overwritten and (reduction == "none" or backend != "reference"):
                target.zero_()
            results += torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("classes", [24_576, 27_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMBINED)
def test_error_budgets_of_long_rows(compiled, name, dtype, classes):
    inputs, options = case(name, 6, 3, classes, 2, device=device_of(compiled), dtype=dtype)
    assert_budget(inputs, compiled, **options)


UNSEEN = [
    "sum",
    "none",
    "num_items",
    "label smoothing",
    "label smoothing of 1",
    "z-loss",
    "class weights",
    "sample weights",
    "negative weights",
    "weighted classes, smoothed",
]


@pytest.mark.parametrize("shape", ["ragged lanes, joint", "streamed, ragged last block"])
@pytest.mark.parametrize("name", UNSEEN)
def test_the_switch_observes_the_likelihood_alone(backend, device, name, shape):
    *sizes, _ = SHAPES[shape]
    inputs, options = case(name, *sizes, device=device)
    _, plain = switch_mixture_stats(*inputs, impl=backend)
    _, stats = switch_mixture_stats(*inputs, impl=backend, **options)
    if backend == "triton" and shape.startswith("streamed"):
        # With options its rows go through shorter blocks, and a sum of float32 is made in another order.
        torch.testing.assert_close(stats[0], plain[0], rtol=1e-6, atol=0)
        stats, plain = stats[1:], plain[1:]
    assert torch.equal(stats, plain)


def test_observed_probabilities_are_expected_ones(backend, device):
    name = "all of probabilities"
    inputs, options = case(name, 9, 3, 4, 2, dtype=torch.float64, device=device)
    _, stats = switch_mixture_stats(*inputs, impl=backend, **options)
    q, kept = inputs.target.double(), options["sample_weight"] & (inputs.target.sum(1) > 0)
    q = q[kept] / q[kept].sum(1, keepdim=True)
    logits = torch.einsum("bd,ncd->nbc", inputs.x[kept], inputs.weight) + inputs.bias[:, None]
    capped = options["logit_softcap"] * (logits / options["logit_softcap"]).tanh()
    torch.testing.assert_close(stats[0], -(q * capped.log_softmax(-1)).sum((1, 2)))
    torch.testing.assert_close(stats[1], (capped.argmax(-1) == q.argmax(-1)).sum(1).double())
    assert stats[2].tolist() == [kept.sum()] * 2


@pytest.mark.parametrize("shape", ["ragged lanes, joint", "streamed, ragged last block"])
@pytest.mark.parametrize("kind", ["nan weight", "inf weight", "-inf bias"])
@pytest.mark.parametrize("name", [*COMBINED, "probabilities"])
def test_dead_clones(backend, device, name, kind, shape):
    *sizes, _ = SHAPES[shape]
    inputs, options = case(name, *sizes, device=device, dtype=torch.float64)
    inputs = poisoned(kind, inputs)
    assert_budget(inputs, backend, **options)
    _, stats, dx, dweight, dbias = gradients(inputs, backend, **options)
    assert stats[0].isfinite().tolist() == [n != 1 for n in range(sizes[3])]
    assert dx.isfinite().all() and not dweight[1].any() and not dbias[1].any()
    assert dweight.isfinite().all() and dbias.isfinite().all()


def test_a_clone_that_dies_of_one_sample(backend, device):
    """Of losses one by one it lives where that sample's has no gradient."""
    inputs = testing.mixture_inputs(5, 3, 4, 2, dtype=torch.float64, device=device)
    weight = inputs.weight.clone()
    x = inputs.x.clone()
    x[:, 0] = 0
    x[2, 0], weight[1, :, 0] = 1e200, 1e200
    inputs = inputs._replace(x=x, weight=weight)
    for factors, dead in (([1.0, 1, 1, 1, 1], True), ([1.0, 1, 0, 1, 1], False)):
        leaf = inputs.weight.clone().requires_grad_()
        losses, _ = switch_mixture_stats(
            inputs.x, leaf, *inputs[2:], reduction="none", impl=backend, label_smoothing=0.1
        )
        losses.backward(torch.tensor(factors, dtype=torch.float64, device=device))
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0].any() and leaf.grad[1].any() != dead


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_target_that_is_not_finite(backend, device, bad):
    """On a GPU nobody looks at it: the loss shows it, and no gradient is spoilt."""
    inputs, options = case("probabilities", 5, 3, 4, 2, device=device)
    target = inputs.target.clone()
    target[1, 2] = bad
    inputs = inputs._replace(target=target)
    if torch.device(device).type == "cpu":
        with pytest.raises(RuntimeError, match=r"target: got .* expected probabilities"):
            switch_mixture_nll(*inputs, impl=backend, **options)
        return
    loss, _, dx, dweight, _ = gradients(inputs, backend, **options)
    assert loss == INF and dx.isfinite().all() and dweight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"num_items_in_batch": 3},
        {"weighted": True},
        {"weighted": True, "reduction": "none"},
    ],
    ids=str,
)
def test_regression(backend, device, dtype, options):
    inputs = gaussian_inputs(33, 5, 3, 4, dtype=dtype, device=device)
    options = dict(options)
    if options.pop("weighted", False):
        v = torch.rand(33, generator=torch.Generator().manual_seed(3)).to(device)
        v[::4] = 0
        options["sample_weight"] = v
        inputs = inputs._replace(
            x=torch.where(v[:, None] == 0, NAN, inputs.x),
            target=torch.where(v[:, None] == 0, NAN, inputs.target),
        )
    assert_budget(inputs, backend, function=switch_mixture_gaussian_stats, sigma2=0.7, **options)


def test_regression_by_formulas(backend, device):
    inputs = gaussian_inputs(6, 2, 3, 2, dtype=torch.float64, device=device)
    v = torch.tensor([0.5, 0.0, 2.0, 1.0, -1.0, 3.0], device=device)
    outputs = torch.einsum("bd,nkd->bnk", inputs.x, inputs.weight) + inputs.bias
    logp = -0.5 * (inputs.target[:, None] - outputs).square().sum(2) - 1.5 * LOG(2 * math.pi)
    each = -v * torch.logsumexp(inputs.log_posterior + logp, 1)
    for reduction, expected in (
        ("none", each),
        ("sum", each.sum()),
        ("mean", each.sum() / v.sum()),
    ):
        loss, stats = switch_mixture_gaussian_stats(
            *inputs, sample_weight=v, reduction=reduction, impl=backend
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(stats[0], -logp[v != 0].sum(0))


@pytest.mark.parametrize("shape", ["ragged lanes, joint", "joint, many chunks", *TILED_SHAPES])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_capped_predictions(backend, device, dtype, shape):
    *sizes, memory_budget = SHAPES[shape]
    inputs = testing.mixture_inputs(*sizes, dtype=dtype, device=device)
    upstream = torch.randn(sizes[0], sizes[2], generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(device, torch.float64)
    wide = [t.double() for t in inputs[:3]]
    options = {"logit_softcap": 2.5}
    low = log_prob_gradients(inputs, "reference", upstream, **options)
    truth = log_prob_gradients(
        inputs._replace(x=wide[0], weight=wide[1], bias=wide[2]), "reference", upstream, **options
    )
    actual = log_prob_gradients(inputs, backend, upstream, memory_budget=memory_budget, **options)
    for got, reference, exact in zip(actual, low, truth, strict=True):
        testing.assert_within_budget(got, reference, exact, "log_prob")


def test_micro_batches_make_one_big_batch(backend, device):
    """With the number of items of the whole step, and any split."""
    inputs, options = case("all", 30, 4, 5, 3, dtype=torch.float64, device=device)
    v = options.pop("sample_weight")
    options["num_items_in_batch"] = torch.tensor(30)
    whole = gradients(inputs, backend, sample_weight=v, **options)
    parts = []
    for part in torch.arange(30).split([7, 1, 22]):
        piece = inputs._replace(x=inputs.x[part], target=inputs.target[part])
        parts.append(gradients(piece, backend, sample_weight=v[part], **options))
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i])
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole[2])


@pytest.mark.parametrize("name", COMBINED)
def test_gradcheck_of_dx(backend, device, name):
    inputs, options = case(name, 5, 3, 4, 3, dtype=torch.float64, device=device)
    x = inputs.x.nan_to_num().requires_grad_()

    def loss(x):
        return switch_mixture_nll(x, *inputs[1:], impl=backend, **options)[0]

    assert torch.autograd.gradcheck(loss, (x,))


@pytest.mark.parametrize("name", ["all", "all, one by one", "all of probabilities, one by one"])
def test_compile_fullgraph(backend, device, name):
    inputs, options = case(name, 6, 4, 5, 3, device=device)

    def step(x, weight, bias):
        loss, stats = switch_mixture_stats(x, weight, bias, *inputs[3:], impl=backend, **options)
        return loss.square().sum(), stats

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs[:3]]
        loss, stats = function(*leaves)
        loss.backward()
        results.append((loss, stats, *(t.grad for t in leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_opcheck(compiled, soft, per_sample):
    inputs, options = case("probabilities" if soft else "class weights", 7, 5, 3, 4)
    w = options.get("class_weight", torch.ones(3)).float()
    if device_of(compiled) == "cpu":
        overload = torch.ops.alrao_fast.switch_mixture_weights.default
        torch.library.opcheck(overload, (inputs.target, torch.rand(7), w, -100, 0.1, True, 1.0))
        torch.library.opcheck(overload, (inputs.target, torch.rand(7), None, -100, 0.0, True, 1.0))
    inputs, _ = to(device_of(compiled), inputs, {})
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    rows = torch.rand(7, device=inputs.x.device)
    needs = False, not per_sample, not per_sample, 1 << 20
    options = rows, w.to(rows), 0.1, 0.02, 2.5, per_sample
    overload = torch.ops.alrao_fast.switch_mixture_nll.default
    torch.library.opcheck(overload, (*leaves, *inputs[3:], -100, *needs, *options))
    if not per_sample:
        options = *options, 1.0, None, None, True
        torch.library.opcheck(overload, (*leaves, *inputs[3:], -100, True, *needs[1:], *options))


def test_nothing_counts(backend, device):
    inputs = testing.mixture_inputs(4, 3, 5, 2, device=device)
    zeros = torch.zeros(4, device=device)
    soft = torch.zeros(4, 5, device=device)
    for options in (
        {"sample_weight": zeros},
        {"class_weight": torch.tensor([0.0, 0, 0, 0, 1], device=device), "ignore_index": 4},
        {"target": soft},
        {"sample_weight": zeros, "reduction": "none", "label_smoothing": 0.1},
    ):
        target = options.pop("target", inputs.target)
        given = inputs._replace(x=torch.full_like(inputs.x, NAN), target=target)
        loss, stats, *grads = gradients(given, backend, **options)
        assert not loss.any() and not stats.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
def test_no_samples(backend, device, batch):
    inputs = testing.mixture_inputs(0, 3, 5, 2, device=device)
    x = torch.zeros((*batch, 3), device=device)
    target = torch.zeros(batch, dtype=torch.int64, device=device)
    losses, _ = switch_mixture_nll(
        x,
        *inputs[1:4],
        target,
        reduction="none",
        label_smoothing=0.1,
        sample_weight=target + 1,
        impl=backend,
    )
    assert losses.shape == batch


WRONG = {
    "label_smoothing": [("a", TypeError), (1.5, RuntimeError), (-0.1, RuntimeError)],
    "z_loss": [("a", TypeError), (-1.0, RuntimeError), (NAN, RuntimeError)],
    "logit_softcap": [("a", TypeError), (0.0, ValueError), (INF, ValueError)],
    "class_weight": [
        ([1.0] * 4, TypeError),
        (torch.ones(3), ValueError),
        (-torch.ones(4), ValueError),
        (torch.zeros(4), ValueError),
        (torch.full((4,), NAN), ValueError),
        (torch.ones(4, dtype=torch.complex64), TypeError),
    ],
    "sample_weight": [
        (2.0, TypeError),
        (torch.ones(4), ValueError),
        (torch.ones(5, 1), ValueError),
        (torch.full((5,), NAN), RuntimeError),
        (torch.ones(5, dtype=torch.complex64), TypeError),
    ],
    "num_items_in_batch": [("a", TypeError), (0, ValueError), (-2, ValueError)],
    "target": [
        (torch.full((5,), 0.5), RuntimeError),
        (torch.full((5, 3), 0.5), ValueError),
        (-torch.ones(5, 4), RuntimeError),
        (torch.ones(5, 4, dtype=torch.int64), ValueError),
    ],
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, i) for name, values in WRONG.items() for i in range(len(values))]
)
def test_wrong_arguments(backend, device, name, wrong):
    if torch.device(device).type != "cpu" or "cuda" in str(backend):
        pytest.skip("a GPU's values are not looked at")
    value, error = WRONG[name][wrong]
    inputs = testing.mixture_inputs(5, 3, 4, 2)._asdict()
    with pytest.raises(error, match=rf"^{name}: got .*expected"):
        switch_mixture_nll(**{**inputs, name: value}, impl=backend)


def test_a_mean_of_no_sum():
    inputs = testing.mixture_inputs(5, 3, 4, 2)
    with pytest.raises(ValueError, match="num_items_in_batch: got 3 with reduction='none'"):
        switch_mixture_nll(*inputs, reduction="none", num_items_in_batch=3)
