"""Protects the mixture of clones, on every backend that is available.

- Values and gradients: a hand-computed case; the mixture's gradient for x and each clone's own for
  its weights, by separate autograd graphs; error budgets against float64 over a table of shapes,
  dtypes and memory budgets; gradcheck where the gradient is the returned value's own.
- What counts: ignore_index, nothing counted, empty batch, reductions, upstream factors, frozen
  parts, posteriors with zeros, ties in the number of correct predictions.
- Clones that are not finite, for all samples or one, and samples for which none is.
- Same bits for any number of threads; every instruction set; opcheck; torch.compile; messages.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from alrao_fast import _extension, backends, testing
from alrao_fast.functional import (
    switch_mixture_gaussian_nll,
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_nll,
    switch_mixture_stats,
)

OP = "switch_mixture"
INF, NAN = math.inf, math.nan

# name, B, D, C, N, memory budget (None: the default)
SHAPES = [
    ("one of everything", 1, 1, 1, 1, None),
    ("one class", 5, 3, 1, 3, None),
    ("one clone", 17, 8, 10, 1, None),
    ("lanes exactly full", 16, 8, 10, 4, None),
    ("ragged lanes, joint", 33, 20, 7, 5, None),
    ("joint, many chunks", 75, 12, 9, 4, 1),
    ("joint, several tasks", 130, 96, 60, 8, None),
    ("streamed, ragged last block", 19, 6, 2500, 2, None),
    ("streamed, many chunks", 50, 5, 2100, 3, 1),
    ("streamed for its many clones", 9, 4, 500, 40, None),
]


@pytest.fixture(params=[name for name in backends.BACKENDS if name != "reference"])
def compiled(request):
    """A backend that is to be held against the reference."""
    reason = testing.require(OP, request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def device_of(backend):
    return backends.device_of(backend).type


def gradients(inputs, impl, *, function=switch_mixture_stats, upstream=1.0, **kwargs):
    """(loss, stats, dx, dweight, dbias); gradients not reached are zeros."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs[:3]]
    loss, stats = function(*leaves, *inputs[3:], impl=impl, **kwargs)
    (loss * upstream).backward()
    grads = [torch.zeros(0) if t is None else t.grad for t in leaves]
    return (loss.detach(), stats, *grads)


def definition(inputs, *, reduction="mean", ignore_index=-100):
    """The same straight from the formulas, one autograd graph for the mixture and one per clone."""
    x, weight, bias, a, y = (None if t is None else t.detach().clone() for t in inputs)
    x.requires_grad_()
    weight.requires_grad_()
    counted = (y != ignore_index).nonzero().squeeze(1)
    total = len(counted) if reduction == "mean" else 1
    offsets = torch.zeros(weight.shape[:2], dtype=weight.dtype) if bias is None else bias
    offsets.requires_grad_()
    logp = [
        F.log_softmax(F.linear(x, w, b), 1)[counted, y[counted]] for w, b in zip(weight, offsets)
    ]
    loss = -sum(
        torch.logsumexp(torch.stack([a[n] + logp[n][i] for n in range(len(a))]), 0)
        for i in range(len(counted))
    )
    loss = loss / total
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    own = [-each.sum() / total for each in logp]
    dweight = torch.stack(
        [torch.autograd.grad(own[n], weight, retain_graph=True)[0][n] for n in range(len(a))]
    )
    dbias = torch.stack(
        [torch.autograd.grad(own[n], offsets, retain_graph=True)[0][n] for n in range(len(a))]
    )
    own_nll = torch.stack([-each.sum() for each in logp]).detach()
    return loss.detach(), own_nll, dx, dweight, dbias


def without_clone(inputs, n):
    keep = [i for i in range(inputs.weight.size(0)) if i != n]
    bias = None if inputs.bias is None else inputs.bias[keep]
    return inputs._replace(
        weight=inputs.weight[keep], bias=bias, log_posterior=inputs.log_posterior[keep]
    ), keep


NAMES = ("loss", "stats", "dx", "dweight", "dbias")


def assert_budget(inputs, impl, function=switch_mixture_stats, slack=None, **kwargs):
    low = gradients(inputs, "reference", function=function, **kwargs)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    truth = gradients(wide, "reference", function=function, **kwargs)
    kwargs.setdefault("memory_budget", None)
    actual = gradients(inputs, impl, function=function, **kwargs)
    for name, got, reference, exact in zip(NAMES, actual, low, truth):
        assert got.dtype == reference.dtype, name
        if name == "stats":
            # Rounding decides ties in the predictions: row 1 is held against its own dtype.
            testing.assert_within_budget(
                got[1:], reference[1:], reference[1:], "stats[1:]", slack=1e-4
            )
            got, reference, exact = got[0], reference[0], exact[0]
            slack_here = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(inputs[0].dtype, 4e-6)
            testing.assert_within_budget(got, reference, exact, name, slack=slack_here)
            continue
        if name == "loss" and slack is None:
            # With one class all that is left of the posterior's terms, of size 1, is their rounding.
            unit = 1e-13 if got.dtype == torch.float64 else 4e-6
            slack_of_loss = unit / min(max(exact.abs().item(), 1e-30), 1.0)
            testing.assert_within_budget(got, reference, exact, name, slack=slack_of_loss)
            continue
        testing.assert_within_budget(got, reference, exact, name, slack=slack)


def test_hand_computed(backend, device):
    # Clone 0 gives the target 3/4, clone 1 gives it 1/2; they weigh the same.
    x = torch.ones(1, 1, device=device, requires_grad=True)
    weight = torch.tensor(
        [[[0.0], [math.log(3)]], [[0.0], [0.0]]], device=device, requires_grad=True
    )
    a = torch.full((2,), math.log(0.5), device=device, dtype=torch.float64)
    y = torch.tensor([1], device=device)
    loss, own = switch_mixture_nll(x, weight, None, a, y, impl=backend)
    loss.backward()
    torch.testing.assert_close(loss.item(), -math.log(5 / 8))
    torch.testing.assert_close(own.tolist(), [-math.log(3 / 4), -math.log(1 / 2)])
    torch.testing.assert_close(
        weight.grad.flatten().tolist(), [0.25, -0.25, 0.5, -0.5], rtol=1e-6, atol=1e-7
    )
    # Responsibilities 0.6 and 0.4; clone 1's weights are zero.
    torch.testing.assert_close(x.grad.item(), -0.6 * 0.25 * math.log(3), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_dx_is_the_mixtures_and_dweight_each_clones_own(backend, device, reduction, bias):
    inputs = testing.mixture_inputs(13, 6, 5, 4, dtype=torch.float64, bias=bias)
    inputs.target[::4] = -100
    expected = definition(inputs, reduction=reduction)
    on_device = type(inputs)(*(None if t is None else t.to(device) for t in inputs))
    actual = gradients(on_device, backend, reduction=reduction)
    torch.testing.assert_close(actual[0].cpu(), expected[0])
    torch.testing.assert_close(actual[1][0].cpu(), expected[1])
    assert actual[1][2].tolist() == [9.0] * 4
    for got, want in zip(actual[2:], expected[2:]):
        if got.numel():
            torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_error_budget(compiled, shape, dtype):
    _, batch, features, classes, clones, budget = shape
    inputs = testing.mixture_inputs(
        batch, features, classes, clones, dtype=dtype, device=device_of(compiled), scale=2.0
    )
    inputs.target[1::5] = -100
    assert_budget(inputs, compiled)
    if budget:
        few = gradients(inputs, compiled, memory_budget=budget)
        for name, got, reference in zip(NAMES, few, gradients(inputs, compiled)):
            # The logits of another chunk may be summed in another order.
            slack = 4e-6 if name == "stats" and dtype != torch.float64 else None
            testing.assert_within_budget(got, reference, reference, name, slack=slack)


@pytest.mark.parametrize("classes", [10, 2200], ids=["joint", "streamed"])
@pytest.mark.parametrize("scale", [60.0, 1e4])
def test_huge_logits(compiled, classes, scale):
    inputs = testing.mixture_inputs(20, 8, classes, 3, device=device_of(compiled), scale=scale)
    assert_budget(inputs, compiled, slack=1e-5)


@pytest.mark.parametrize("classes", [6, 2200], ids=["joint", "streamed"])
def test_posterior_with_zeros_and_in_float32(backend, device, classes):
    inputs = testing.mixture_inputs(9, 4, classes, 4, dtype=torch.float64, device=device)
    a = inputs.log_posterior
    a[1] = -INF
    inputs = inputs._replace(log_posterior=a)
    actual = gradients(inputs, backend)
    fewer, keep = without_clone(inputs, 1)
    expected = gradients(fewer, "reference")
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2])
    # The clone without mass goes on learning from its own loss.
    torch.testing.assert_close(actual[3][keep], expected[3])
    assert actual[3][1].abs().max() > 0
    narrow = gradients(inputs._replace(log_posterior=a.float()), backend)
    torch.testing.assert_close(narrow[2], actual[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
@pytest.mark.parametrize("batch", [0, 6])
def test_nothing_counted(backend, device, classes, batch):
    inputs = testing.mixture_inputs(batch, 3, classes, 2, device=device)
    inputs.target.fill_(-100)
    loss, stats, *grads = gradients(inputs, backend)
    assert loss.item() == 0.0
    assert not stats.any()
    for grad, leaf in zip(grads, inputs):
        assert grad.shape == leaf.shape
        assert not grad.any()
    assert switch_mixture_nll(*inputs, impl=backend)[1].isnan().all()


def test_ignore_index_may_be_a_class(backend, device):
    inputs = testing.mixture_inputs(12, 4, 3, 2, dtype=torch.float64, device=device)
    expected = definition(
        type(inputs)(*(t.cpu() for t in inputs)), ignore_index=1, reduction="mean"
    )
    actual = gradients(inputs, backend, ignore_index=1)
    torch.testing.assert_close(actual[0].cpu(), expected[0])
    torch.testing.assert_close(actual[3].cpu(), expected[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_scale_with_the_upstream_gradient(backend, device, dtype):
    inputs = testing.mixture_inputs(8, 5, 4, 3, dtype=dtype, device=device)
    plain = gradients(inputs, backend, reduction="sum")
    scaled = gradients(inputs, backend, upstream=2.0**10, reduction="sum")
    for one, other in zip(plain[2:], scaled[2:]):
        torch.testing.assert_close(one * 2.0**10, other, rtol=2e-3, atol=1e-6)
    inputs = inputs._replace(x=inputs.x / 4096)
    big = gradients(inputs, backend, upstream=2.0**16)
    assert all(grad.isfinite().all() for grad in big[2:])


@pytest.mark.parametrize("classes", [4, 2200], ids=["joint", "streamed"])
def test_frozen_parts_get_no_gradient_and_change_nothing(backend, device, classes):
    inputs = testing.mixture_inputs(8, 5, classes, 3, device=device)
    full = gradients(inputs, backend)
    for frozen in ("x", "head"):
        x, weight, bias = (t.clone() for t in inputs[:3])
        leaves = [weight, bias] if frozen == "x" else [x]
        for leaf in leaves:
            leaf.requires_grad_()
        loss, stats = switch_mixture_stats(x, weight, bias, *inputs[3:], impl=backend)
        loss.backward()
        torch.testing.assert_close(loss.detach(), full[0])
        torch.testing.assert_close(stats, full[1])
        expected = full[3:] if frozen == "x" else full[2:3]
        for leaf, want in zip(leaves, expected):
            torch.testing.assert_close(leaf.grad, want)
        assert (x.grad is None) == (frozen == "x")
    with torch.no_grad():
        loss, stats = switch_mixture_stats(*inputs, impl=backend)
    torch.testing.assert_close((loss, stats), full[:2])
    assert not loss.requires_grad


def test_the_op_computes_only_the_gradients_asked_for(compiled):
    inputs = testing.mixture_inputs(8, 5, 4, 3, device=device_of(compiled))
    for dx, dw in [(True, False), (False, True), (False, False)]:
        out = torch.ops.alrao_fast.switch_mixture_nll(*inputs, -100, True, dx, dw, 1 << 20)
        assert [t.numel() > 0 for t in out[2:]] == [dx, dw, dw]


def test_correct_predictions_count_the_first_of_equal_logits(backend, device):
    for classes in (6, 2200):
        inputs = testing.mixture_inputs(9, 4, classes, 2, device=device)
        inputs.target.copy_(torch.arange(9) % 3)
        inputs.weight[0] = 0
        inputs.bias[0] = 0
        inputs.weight[1] = 0
        inputs.bias[1] = 0
        inputs.bias[1, classes - 1] = 1e-3
        _, stats = switch_mixture_stats(*inputs, impl=backend)
        assert stats[1].tolist() == [3.0, 0.0]


def test_leading_shape_strides_and_mixed_dtypes(backend, device):
    inputs = testing.mixture_inputs(12, 6, 5, 3, device=device)
    expected = gradients(inputs, backend)
    shaped = inputs._replace(x=inputs.x.view(3, 4, 6), target=inputs.target.view(3, 4))
    actual = gradients(shaped, backend)
    torch.testing.assert_close(actual[2].view(12, 6), expected[2])
    strided = torch.empty(6, 12, device=device).t().copy_(inputs.x)
    every_other = torch.empty(24, device=device, dtype=torch.int64)[::2].copy_(inputs.target)
    x = strided.detach().requires_grad_()
    weight = inputs.weight.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    loss, _ = switch_mixture_stats(
        x, weight, inputs.bias, inputs.log_posterior, every_other, impl=backend
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(x.grad, expected[2])
    torch.testing.assert_close(weight.grad, expected[3])

    mixed = gradients(inputs._replace(x=inputs.x.bfloat16()), backend)
    assert [t.dtype for t in mixed] == [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-2, atol=1e-2)


# ---- clones and samples that are not finite ----


def poisoned(kind, inputs, n=1):
    weight, bias, x = inputs.weight.clone(), inputs.bias.clone(), inputs.x.clone()
    if kind == "nan weight":
        weight[n, 2, 1] = NAN
    elif kind == "inf weight":
        weight[n, -1, 0] = INF
    elif kind == "all weights nan":
        weight[n] = NAN
    elif kind == "nan bias":
        bias[n, 0] = NAN
    elif kind == "-inf bias":
        bias[n, 1] = -INF
    return inputs._replace(x=x, weight=weight, bias=bias)


@pytest.mark.parametrize(
    "kind", ["nan weight", "inf weight", "all weights nan", "nan bias", "-inf bias"]
)
@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
def test_a_dead_clone_is_as_if_it_were_not_there(backend, device, kind, classes):
    inputs = testing.mixture_inputs(21, 4, classes, 3, dtype=torch.float64, device=device)
    inputs.target[3] = -100
    dead = poisoned(kind, inputs)
    fewer, keep = without_clone(inputs, 1)
    expected = gradients(fewer, "reference")
    for budget in (None, 1):
        actual = gradients(dead, backend, memory_budget=budget)
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1][:, keep], expected[1])
        torch.testing.assert_close(actual[2], expected[2])
        torch.testing.assert_close(actual[3][keep], expected[3])
        torch.testing.assert_close(actual[4][keep], expected[4])
        assert not actual[3][1].any()
        assert not actual[4][1].any()
        assert actual[1][:, 1].tolist() == [INF, 0.0, 20.0]
        # The same as if the mixture gave it weight 0.
        zero = inputs.log_posterior.clone()
        zero[1] = -INF
        weightless = gradients(inputs._replace(log_posterior=zero), backend)
        torch.testing.assert_close(actual[0], weightless[0])
        torch.testing.assert_close(actual[2], weightless[2])
        torch.testing.assert_close(actual[3][keep], weightless[3][keep])


@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
def test_a_clone_that_overflows_for_one_sample(backend, device, classes):
    inputs = testing.mixture_inputs(21, 4, classes, 3, device=device)
    inputs.x[:, 0] = 0
    inputs.x[18, 0] = 1e20
    inputs.weight[:, :, 0] = 0
    inputs.weight[1, 2, 0] = 1e25
    loss, stats, dx, dweight, dbias = gradients(inputs, backend, memory_budget=1)
    others = [b for b in range(21) if b != 18]
    fewer, keep = without_clone(inputs, 1)
    alive = gradients(
        inputs._replace(x=inputs.x[others], target=inputs.target[others]), "reference"
    )
    rest = gradients(fewer._replace(x=inputs.x[18:19], target=inputs.target[18:19]), "reference")
    torch.testing.assert_close(loss, (alive[0] * 20 + rest[0]) / 21)
    torch.testing.assert_close(dx[others], alive[2] * 20 / 21, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dx[18:19], rest[2] / 21, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dbias[keep], (alive[4][keep] * 20 + rest[4]) / 21)
    assert not dweight[1].any()
    assert not dbias[1].any()
    assert stats[0].isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_sample_that_is_not_finite(backend, device, classes, value):
    inputs = testing.mixture_inputs(19, 4, classes, 3, dtype=torch.float64, device=device)
    x = inputs.x.clone()
    x[17, 2] = value
    bad = inputs._replace(x=x)
    loss, stats, dx, dweight, dbias = gradients(bad, backend)
    expected = gradients(inputs, "reference")
    assert loss.item() == INF
    assert stats[0].tolist() == [INF] * 3
    assert not dweight.any()
    assert not dbias.any()
    assert not dx[17].any()
    others = [b for b in range(19) if b != 17]
    torch.testing.assert_close(dx[others], expected[2][others])

    # An ignored sample may hold anything.
    y = inputs.target.clone()
    y[17] = -100
    actual = gradients(bad._replace(target=y), backend)
    expected = gradients(inputs._replace(target=y), "reference")
    for got, want in zip(actual, expected):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
def test_all_clones_dead(backend, device, classes):
    inputs = testing.mixture_inputs(7, 4, classes, 2, device=device)
    loss, stats, *grads = gradients(
        inputs._replace(weight=torch.full_like(inputs.weight, NAN)), backend
    )
    assert loss.item() == INF
    assert stats.tolist() == [[INF] * 2, [0.0] * 2, [7.0] * 2]
    assert not any(grad.any() for grad in grads)


# ---- regression ----


def gaussian_inputs(batch, features, outputs, clones, **kwargs):
    inputs = testing.mixture_inputs(batch, features, outputs, clones, **kwargs)
    target = torch.randn(batch, outputs, generator=torch.Generator().manual_seed(1))
    return inputs._replace(target=target.to(inputs.x))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (33, 7, 3, 5), (70, 16, 40, 4), (18, 3, 2100, 2)], ids=str
)
def test_gaussian_error_budget(compiled, shape, dtype):
    inputs = gaussian_inputs(*shape, dtype=dtype, device=device_of(compiled))
    # The float64 truth is itself a float64 computation, with log-likelihoods in the thousands.
    slack = 1e-12 if dtype == torch.float64 else None
    assert_budget(inputs, compiled, function=switch_mixture_gaussian_stats, slack=slack, sigma2=0.7)
    if dtype == torch.float64:
        whole = gradients(inputs, compiled, function=switch_mixture_gaussian_stats)
        chunks = gradients(
            inputs, compiled, function=switch_mixture_gaussian_stats, memory_budget=1
        )
        for got, want in zip(chunks, whole):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_against_the_density(backend, device, reduction):
    inputs = gaussian_inputs(9, 4, 3, 5, dtype=torch.float64, device=device)
    x, weight, bias = (t.clone().requires_grad_() for t in inputs[:3])
    total = 9 if reduction == "mean" else 1
    logp = torch.stack(
        [
            torch.distributions.Normal(F.linear(x, w, b), math.sqrt(0.7))
            .log_prob(inputs.target)
            .sum(1)
            for w, b in zip(weight, bias)
        ],
        1,
    )
    loss = -torch.logsumexp(inputs.log_posterior + logp, 1).sum() / total
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    dweight, dbias = torch.autograd.grad(-logp.sum() / total, (weight, bias))
    actual = gradients(
        inputs, backend, function=switch_mixture_gaussian_nll, sigma2=0.7, reduction=reduction
    )
    expected = (loss.detach(), -logp.detach().mean(0), dx, dweight, dbias)
    for got, want in zip(actual, expected):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("outputs", [3, 2100], ids=["joint", "streamed"])
def test_gaussian_dead_clone_and_sample(backend, device, outputs):
    inputs = gaussian_inputs(9, 4, outputs, 3, dtype=torch.float64, device=device)
    function = switch_mixture_gaussian_stats
    weight = inputs.weight.clone()
    weight[1, 0, 0] = INF
    actual = gradients(inputs._replace(weight=weight), backend, function=function)
    fewer, keep = without_clone(inputs, 1)
    expected = gradients(fewer, "reference", function=function)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2])
    torch.testing.assert_close(actual[3][keep], expected[3])
    assert not actual[3][1].any()
    assert actual[1][:, 1].tolist() == [INF, INF, 9.0]
    target = inputs.target.clone()
    target[4, 0] = NAN
    bad = gradients(inputs._replace(target=target), backend, function=function)
    assert bad[0].item() == INF
    assert not bad[2][4].any()
    assert bad[2].isfinite().all()
    assert not bad[3].any()


def test_mean_is_the_posterior_mean_over_living_clones(backend, device):
    inputs = gaussian_inputs(6, 4, 3, 5, dtype=torch.float64, device=device)
    x, weight, bias, a, _ = inputs

    def direct(weight, bias, p):
        return sum(p[n] * F.linear(x, weight[n], bias[n]) for n in range(len(p)))

    actual = switch_mixture_mean(x, weight, bias, a, impl=backend)
    torch.testing.assert_close(actual, direct(weight, bias, a.exp()))
    dead = weight.clone()
    dead[2, 1, 1] = NAN
    keep = [0, 1, 3, 4]
    p = a[keep].exp()
    expected = direct(weight[keep], bias[keep], p / p.sum())
    torch.testing.assert_close(switch_mixture_mean(x, dead, bias, a, impl=backend), expected)
    shaped = switch_mixture_mean(x.view(2, 3, 4), weight, bias, a, impl=backend)
    torch.testing.assert_close(shaped.view(6, 3), actual)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: switch_mixture_mean(*t, a, impl=backend), leaves)


# ---- log-probabilities ----


def log_prob_gradients(inputs, impl, upstream, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    value = switch_mixture_log_prob(*leaves, inputs.log_posterior, impl=impl, **kwargs)
    value.backward(upstream.to(value.dtype))
    return value.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] > 1], ids=lambda s: s[0])
def test_log_prob_error_budget(compiled, shape, dtype):
    _, batch, features, classes, clones, budget = shape
    inputs = testing.mixture_inputs(
        batch, features, classes, clones, dtype=dtype, device=device_of(compiled), scale=2.0
    )
    upstream = torch.randn(batch, classes, device=device_of(compiled), dtype=torch.float64)
    low = log_prob_gradients(inputs, "reference", upstream)
    wide = inputs._replace(
        x=inputs.x.double(), weight=inputs.weight.double(), bias=inputs.bias.double()
    )
    truth = log_prob_gradients(wide, "reference", upstream)
    actual = log_prob_gradients(inputs, compiled, upstream, memory_budget=budget)
    for name, got, own, exact in zip(("value", *NAMES[2:]), actual, low, truth):
        testing.assert_within_budget(got, own, exact, name)


def test_log_prob_by_definition_and_gradcheck(backend, device):
    inputs = testing.mixture_inputs(4, 3, 5, 3, dtype=torch.float64, device=device)
    x, weight, bias, a, _ = inputs
    expected = torch.logsumexp(
        torch.stack([a[n] + F.log_softmax(F.linear(x, weight[n], bias[n]), 1) for n in range(3)]), 0
    )
    actual = switch_mixture_log_prob(*inputs[:4], impl=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual.exp().sum(1), torch.ones_like(actual[:, 0]))
    shaped = switch_mixture_log_prob(x.view(2, 2, 3), weight, bias, a, impl=backend)
    torch.testing.assert_close(shaped.view(4, 5), actual)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: switch_mixture_log_prob(*t, a, impl=backend), leaves)
    assert switch_mixture_log_prob(x[:0], weight, bias, a, impl=backend).shape == (0, 5)
    certain = switch_mixture_log_prob(x, weight[:, :1], bias[:, :1], a, impl=backend)
    torch.testing.assert_close(certain, torch.zeros_like(certain))


@pytest.mark.parametrize("kind", ["nan weight", "inf weight", "-inf bias"])
def test_log_prob_with_dead_clones(backend, device, kind):
    inputs = testing.mixture_inputs(21, 4, 5, 3, dtype=torch.float64, device=device)
    upstream = torch.randn(21, 5, dtype=torch.float64, device=device)
    fewer, keep = without_clone(inputs, 1)
    expected = log_prob_gradients(fewer, "reference", upstream)
    actual = log_prob_gradients(poisoned(kind, inputs), backend, upstream, memory_budget=1)
    for got, want in zip(actual[:2], expected):
        torch.testing.assert_close(got, want)
    for got, want in zip(actual[2:], expected[2:]):
        torch.testing.assert_close(got[keep], want)
        assert not got[1].any()
    x = inputs.x.clone()
    x[5, 0] = NAN
    value, dx, dweight, _ = log_prob_gradients(inputs._replace(x=x), backend, upstream)
    assert value[5].tolist() == [-INF] * 5
    assert not dx[5].any()
    upstream[5] = 0
    expected = log_prob_gradients(inputs, "reference", upstream)
    torch.testing.assert_close(dweight, expected[2])


# ---- autograd, dispatcher, numerics ----


def test_gradcheck_of_dx(backend, device):
    inputs = testing.mixture_inputs(5, 3, 4, 3, dtype=torch.float64, device=device)
    x = inputs.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: switch_mixture_nll(x, *inputs[1:], impl=backend)[0], (x,)
    )
    regression = gaussian_inputs(5, 3, 4, 3, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda x: switch_mixture_gaussian_nll(x, *regression[1:], impl=backend)[0], (x,)
    )


def test_second_derivatives_raise(compiled):
    inputs = testing.mixture_inputs(5, 3, 4, 3, device=device_of(compiled))
    x = inputs.x.clone().requires_grad_()
    loss, _ = switch_mixture_nll(x, *inputs[1:], impl=compiled)
    value = switch_mixture_log_prob(x, *inputs[1:4], impl=compiled)
    for output in (loss, value.sum()):
        (dx,) = torch.autograd.grad(output, x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            dx.sum().backward()


def test_backward_twice_over_a_retained_graph(compiled):
    inputs = testing.mixture_inputs(5, 3, 4, 3, device=device_of(compiled))
    weight = inputs.weight.clone().requires_grad_()
    loss, _ = switch_mixture_nll(inputs.x, weight, *inputs[2:], impl=compiled)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("op", ["nll", "gaussian_nll", "log_prob", "log_prob_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(compiled, op, dtype):
    device = device_of(compiled)
    inputs = testing.mixture_inputs(7, 5, 3, 4, dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    flags = [(True, True, True), (False, True, False)] if op.endswith("nll") else [()]
    overload = getattr(torch.ops.alrao_fast, f"switch_mixture_{op}").default
    for flag in flags:
        a = inputs.log_posterior
        args = {
            "nll": (*leaves, a, inputs.target, -100, *flag, 1 << 20),
            "gaussian_nll": (*leaves, a, torch.randn(7, 3).to(leaves[0]), 1.5, *flag, 1 << 20),
            "log_prob": (*leaves, a, 1 << 20),
            "log_prob_backward": (
                torch.randn(7, 3, device=device),
                *inputs[:3],
                a,
                torch.randn(7, 3, device=device),
                True,
                True,
                1 << 20,
            ),
        }[op]
        torch.library.opcheck(overload, args)


def test_compile_fullgraph(compiled):
    inputs = testing.mixture_inputs(6, 5, 3, 4, device=device_of(compiled))
    regression = gaussian_inputs(6, 5, 3, 4, device=device_of(compiled))

    def everything(x, weight, bias):
        a = inputs.log_posterior
        loss, own = switch_mixture_nll(x, weight, bias, a, inputs.target, impl=compiled)
        other, _ = switch_mixture_gaussian_nll(x, weight, bias, a, regression.target, impl=compiled)
        log_prob = switch_mixture_log_prob(x, weight, bias, a, impl=compiled)
        mean = switch_mixture_mean(x, weight, bias, a, impl=compiled)
        return 3 * loss + other + log_prob[:, 0].sum() + mean.sum(), own

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs[:3]]
        total, own = function(*leaves)
        total.backward()
        results.append((total.detach(), own, *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype, ulps", [(torch.float32, 4), (torch.float64, 8)], ids=str)
def test_softmax_to_a_few_ulps(compiled, dtype, ulps):
    # One sample, one clone, no features: dbias is the softmax of the bias.
    logits = torch.linspace(-80, 0, 2001, dtype=dtype, device=device_of(compiled))
    for classes in (2001, 2100):
        bias = torch.full((1, classes), -85.0, dtype=dtype, device=device_of(compiled))
        bias[0, :2001] = logits
        x, weight = bias.new_zeros(1, 1), bias.new_zeros(1, classes, 1)
        target = torch.tensor([classes - 1 if classes > 2001 else 0], device=x.device)
        a = torch.zeros(1, dtype=torch.float64, device=x.device)
        out = torch.ops.alrao_fast.switch_mixture_nll(
            x, weight, bias, a, target, -100, True, False, True, 1 << 20
        )
        exact = bias.double().softmax(1)[0, 1:2001]
        error = ((out[4][0, 1:2001].double() - exact) / exact).abs().max().item()
        assert error < ulps * torch.finfo(dtype).eps, error


@pytest.mark.parametrize(
    "shape",
    [(32, 64, 10, 10), (700, 100, 50, 6), (64, 1024, 30, 4), (260, 100, 2600, 3)],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(shape):
    reason = testing.require(OP, "cpu")
    if reason is not None:
        pytest.skip(f"cpu: {reason}")
    inputs = testing.mixture_inputs(*shape)
    upstream = torch.randn(shape[0], shape[2])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(inputs, "cpu") + log_prob_gradients(inputs, "cpu", upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert torch.equal(one, two)


ISA_SCRIPT = """
import sys, torch
from alrao_fast import _C, testing
from alrao_fast.functional import switch_mixture_log_prob, switch_mixture_stats
results = []
for shape in [(33, 20, 7, 5), (19, 6, 2500, 2)]:
    for dtype in (torch.float32, torch.float64):
        inputs = testing.mixture_inputs(*shape, dtype=dtype, scale=3.0)
        leaves = [t.requires_grad_() for t in inputs[:3]]
        loss, stats = switch_mixture_stats(*leaves, *inputs[3:], impl="cpu")
        loss.backward()
        results += [loss.detach(), stats, *(t.grad.clone() for t in leaves)]
        value = switch_mixture_log_prob(*leaves, inputs.log_posterior, impl="cpu")
        value.square().mean().backward()
        results += [value.detach(), *(t.grad for t in leaves)]
torch.save((_C.cpu_isa(), results), sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    isas = _extension.build_info().get("isas") or []
    if len(isas) < 2:
        pytest.skip(f"built for one instruction set only: {isas}")
    results = {}
    for isa in isas:
        path = tmp_path / f"{isa}.pt"
        done = subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT, str(path)],
            env={**os.environ, "ALRAO_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 and "takes one of" in done.stderr:
            continue  # this machine is older
        assert done.returncode == 0, done.stderr
        used, results[isa] = torch.load(path)
        assert used == isa
    first = results.pop(isas[0])
    for isa, other in results.items():
        for i, (one, two) in enumerate(zip(first, other)):
            slack = 1e-13 if one.dtype == torch.float64 and i % 18 >= 9 else 4e-6
            testing.assert_within_budget(two, one, one, f"{isa} result {i}", slack=slack)


# ---- invalid inputs ----


def changed(**changes):
    return testing.mixture_inputs(4, 3, 5, 2)._replace(**changes)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (changed(weight=torch.zeros(5, 3)), r"weight: got shape \[5, 3\], expected \[N, C, D\]"),
        (changed(x=torch.zeros(4, 7)), r"x: got shape \[4, 7\], expected \[B, 3\]"),
        (changed(bias=torch.zeros(5)), r"bias: got shape \[5\], expected \[2, 5\]"),
        (changed(log_posterior=torch.zeros(3)), r"log_posterior: got shape \[3\], expected \[2\]"),
        (
            changed(log_posterior=torch.zeros(2, dtype=torch.int64)),
            "log_posterior: got dtype Long, expected one of Float, Double",
        ),
        (changed(target=torch.zeros(3, dtype=torch.int64)), r"target: got shape \[3\]"),
        (changed(target=torch.zeros(4)), "target: got dtype Float, expected Long"),
        (
            changed(target=torch.tensor([0, 5, 0, 0])),
            "target: got 5 at position 1, expected a class from 0 to 4 or ignore_index -100",
        ),
        (changed(target=torch.tensor([0, 0, 0, -1])), "target: got -1 at position 3"),
    ],
)
def test_invalid_inputs(compiled, inputs, message):
    if device_of(compiled) != "cpu":
        pytest.skip("classes out of range are found on the CPU only")
    if compiled == "cuda" and "at position" in message:
        pytest.skip("a CUDA kernel does not wait to look at classes, wherever it runs")
    with pytest.raises((RuntimeError, ValueError), match=message):
        switch_mixture_nll(*inputs, impl=compiled)


def test_invalid_options(compiled):
    inputs = changed()
    with pytest.raises(ValueError, match="reduction: got 'none', expected 'mean' or 'sum'"):
        switch_mixture_nll(*inputs, reduction="none", impl=compiled)
    with pytest.raises(RuntimeError, match="memory_budget: got 0, expected a positive number"):
        switch_mixture_nll(*inputs, memory_budget=0, impl=compiled)
    regression = gaussian_inputs(4, 3, 5, 2)
    with pytest.raises(RuntimeError, match="sigma2: got 0, expected a positive variance"):
        switch_mixture_gaussian_nll(*regression, sigma2=0.0, impl=compiled)
    with pytest.raises(ValueError, match=r"target: got shape \[4\], expected \[4, 5\]"):
        switch_mixture_gaussian_nll(*inputs, impl=compiled)
    with pytest.raises(ValueError, match="impl: got 'gpu'"):
        switch_mixture_log_prob(*inputs[:4], impl="gpu")
