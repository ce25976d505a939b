"""Protects the mixture of clones over classes, on every backend that is available.

- Values and gradients: a hand-computed case; the mixture's gradient for x and each clone's own for
  its weights, by separate autograd graphs; error budgets against float64 over a table of shapes,
  dtypes and memory budgets; the softmax to a few ulps.
- What counts: ignore_index, nothing counted, empty batch, reductions, upstream factors, frozen
  parts, posteriors with zeros, ties in the number of correct predictions.

Beside this file: test_switch_mixture_dead.py, _gaussian.py, _log_prob.py and _autograd.py.
"""

import math

import pytest
import torch
from mixture_harness import (
    INF,
    NAMES,
    OTHER_DTYPES,
    SHAPES,
    SHORT_SHAPES,
    TILED_SHAPES,
    assert_budget,
    definition,
    device_of,
    gradients,
    without_clone,
)

from alrao_fast import testing
from alrao_fast.functional import switch_mixture_nll, switch_mixture_stats

OP = "switch_mixture"
pytestmark = pytest.mark.emulated


@pytest.mark.interpreted
@pytest.mark.sanitized
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


@pytest.mark.interpreted
@pytest.mark.sanitized(reduction=["mean"])
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


@pytest.mark.parametrize("classes", [70, 2100])
def test_the_lowest_logit_has_a_place(compiled, classes):
    device = device_of(compiled)
    x = torch.ones(3, 1, device=device)
    weight = torch.full((2, classes, 1), torch.finfo(torch.float32).min, device=device)
    a = torch.full((2,), math.log(0.5), device=device, dtype=torch.float64)
    y = torch.tensor([0, 0, 1], device=device)
    _, stats = switch_mixture_stats(x, weight, None, a, y, impl=compiled)
    assert stats[1].tolist() == [2.0, 2.0]


# Around what shared memory has of a row, on every GPU and on those with the most of it; bfloat16's
# gradient is narrower than the logits under it.
@pytest.mark.sanitized(classes=[24_577], dtype=[torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [24_575, 24_576, 24_577, 27_000, 57_343, 57_345, 60_001])
def test_rows_longer_than_shared_memory(compiled, classes, dtype):
    inputs = testing.mixture_inputs(6, 3, classes, 2, dtype=dtype, device=device_of(compiled))
    inputs.target[2] = -100
    inputs.target[3] = classes - 1
    assert_budget(inputs, compiled)


@pytest.mark.interpreted(shape=["streamed for its many clones"], dtype=[torch.float32])
@pytest.mark.sanitized(shape=SHORT_SHAPES, dtype=[torch.float32])
@pytest.mark.sanitized(shape=TILED_SHAPES, dtype=[torch.bfloat16])
@pytest.mark.many_launches(shape=["streamed, many chunks"], dtype=OTHER_DTYPES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(compiled, shape, dtype):
    batch, features, classes, clones, budget = SHAPES[shape]
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


@pytest.mark.sanitized
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


@pytest.mark.sanitized
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


@pytest.mark.interpreted
@pytest.mark.sanitized
def test_the_op_computes_only_the_gradients_asked_for(compiled):
    inputs = testing.mixture_inputs(8, 5, 4, 3, device=device_of(compiled))
    for dx, dw in [(True, False), (False, True), (False, False)]:
        out = torch.ops.alrao_fast.switch_mixture_nll(*inputs, -100, True, dx, dw, 1 << 20)
        assert [t.numel() > 0 for t in out[2:]] == [dx, dw, dw]


@pytest.mark.interpreted
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


@pytest.mark.interpreted
@pytest.mark.sanitized
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
        error = ((out[4][0, 1:2001].double() - exact) / exact).abs()
        few = torch.full_like(error, ulps)
        if compiled != "cpu" and dtype == torch.float32:
            # GPUs' exponential is as exact as a logit of that size is.
            few -= logits[1:].double() / 2
        assert (error < few * torch.finfo(dtype).eps).all(), error.max()
