"""Protects the mixture's numbers where logits and losses are huge, on every backend that is available.

- Probabilities that sum to 1, own gradients, dx and statistics beside float64 and torch's own float32, with logits up
  to 3e37: equal ones, some that are close, maxima that differ between clones and between blocks of classes.
- Log-likelihoods of the clones that are huge: responsibilities still sum to 1.
- Sums of finite losses that overflow float32.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from mixture_harness import assert_budget, device_of, gaussian_inputs, gradients, log_prob_gradients

from alrao_fast import testing
from alrao_fast.functional import (
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_stats,
)

OP = "switch_mixture"
pytestmark = pytest.mark.emulated
# B, D, C, N: one of each way through the clones; D up to 128 in low precision, or 64 with TF32, is fused in Triton.
WAYS = {
    "joint, 1 class": (2, 3, 1, 3),
    "joint, 2 classes": (3, 3, 2, 2),
    "joint, 1000 classes": (3, 3, 1000, 2),
    "streamed, 2100 classes": (3, 3, 2100, 2),
    "streamed, 60000 classes": (2, 3, 60000, 2),
}
MANY = "streamed, 60000 classes"
FEW = [name for name in WAYS if name != MANY]
SIZES = [
    *((dtype, size) for dtype in testing.DTYPES[:3] for size in (1e4, 1e6, 1e8, -1e8, 3e37)),
    *((torch.float16, size) for size in (1e4, -3e4)),
    (torch.float64, 1e300),
]


def biased(way, offset, dtype, device):
    """The logits are the bias, whatever the features, and lie `offset` from 0: apart by a few roundings, or equal."""
    samples, features, classes, clones = WAYS[way]
    inputs = testing.mixture_inputs(samples, features, classes, clones, dtype=dtype, device=device)
    bias = torch.full((clones, classes), offset, dtype=torch.float64)
    # Maxima that differ between the blocks of classes, by what the type can tell apart.
    ulp = max(abs(offset) * torch.finfo(dtype).eps, 1 / 64)
    bias[:, 1::3] -= ulp
    bias[:, 600::1000] += 2 * ulp
    # Another scale for the last clone, and with it log-likelihoods of another size.
    bias[-1] = torch.linspace(-1, 1, classes, dtype=torch.float64)
    bias[-1, -1] = offset / 2
    return inputs._replace(
        weight=torch.zeros_like(inputs.weight),
        bias=bias.to(dtype).to(device),
        target=torch.arange(samples, device=device) % classes,
    )


def wide(inputs):
    return inputs._replace(
        **{name: getattr(inputs, name).double() for name in ("x", "weight", "bias")}
    )


def composed(x, weight, bias, log_posterior):
    """log_prob as anyone writes it."""
    logp = F.log_softmax(torch.einsum("bd,ncd->bnc", x, weight) + bias, 2)
    return torch.logsumexp(log_posterior.to(logp.dtype)[:, None] + logp, 1)


def composed_gradients(inputs, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    value = composed(*leaves, inputs.log_posterior)
    value.backward(upstream.to(value.dtype))
    return value.detach(), *(leaf.grad for leaf in leaves)


def assert_near(actual, own, exact, name):
    """Within the budget, with the slack in units of 1 where what came out is smaller: the terms are of that size."""
    slack = testing.SLACK[actual.dtype] / min(max(exact.abs().max().item(), 1e-30), 1.0)
    testing.assert_within_budget(actual, own, exact, name, slack=slack)


def cases(function):
    for mark in (
        pytest.mark.parametrize("way", WAYS),
        pytest.mark.parametrize("dtype, offset", SIZES, ids=str),
        pytest.mark.many_launches(way=[MANY]),
        pytest.mark.interpreted(way=FEW, offset=[1e8], dtype=[torch.float32, torch.bfloat16]),
        pytest.mark.sanitized(way=FEW, offset=[1e8], dtype=[torch.float32]),
    ):
        function = mark(function)
    return function


@cases
def test_log_probabilities_of_huge_logits(compiled, way, offset, dtype):
    inputs = biased(way, offset, dtype, device_of(compiled))
    value = switch_mixture_log_prob(*inputs[:4], impl=compiled)
    total = value.double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=2e-5, atol=0)
    exact = switch_mixture_log_prob(*wide(inputs)[:4], impl="reference")
    narrow = composed(*(t.to(value.dtype) for t in inputs[:3]), inputs.log_posterior)
    testing.assert_within_budget(value.exp(), narrow.exp(), exact.exp(), "probabilities")
    assert_near(value, narrow, exact, "log-probabilities")
    # Of what each clone predicts, the gradient is that of torch's own functions.
    upstream = torch.zeros_like(exact)
    upstream[:, inputs.bias.argmax(1)] = -1
    actual = log_prob_gradients(inputs, compiled, upstream)
    truth = composed_gradients(wide(inputs), upstream)
    low = log_prob_gradients(inputs, "reference", upstream)
    for name, got, own, true in zip(("dx", "dweight", "dbias"), actual[1:], low[1:], truth[1:]):
        assert_near(got, own, true, name)


@cases
def test_loss_of_huge_logits(compiled, way, offset, dtype):
    inputs = biased(way, offset, dtype, device_of(compiled))
    assert_budget(inputs, compiled)
    # Of every clone the gradients to the logits cancel.
    if dtype.itemsize >= 4:
        total = gradients(inputs, compiled)[4].double().sum(1)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=2e-5)


@pytest.mark.interpreted(classes=[3, 2100])
@pytest.mark.sanitized(size=[1e8])
@pytest.mark.parametrize("size", [1e6, 1e8, 3e37])
@pytest.mark.parametrize("features", [3, 80])
@pytest.mark.parametrize("classes", [1, 3, 2100])
def test_responsibilities_of_unlikely_targets_sum_to_1(compiled, classes, features, size):
    device = device_of(compiled)
    inputs = testing.mixture_inputs(5, features, classes, 4, device=device, scale=0.1)
    if classes > 1:
        inputs.bias.zero_()
        inputs.bias[:, 0] = -size
        inputs.target.zero_()
    # The same clone four times, equally likely.
    inputs = inputs._replace(
        weight=inputs.weight[:1].repeat(4, 1, 1),
        bias=inputs.bias[:1].repeat(4, 1),
        log_posterior=torch.full((4,), -math.log(4), dtype=torch.float64, device=device),
    )
    one = inputs._replace(
        weight=inputs.weight[:1],
        bias=inputs.bias[:1],
        log_posterior=torch.zeros_like(inputs[3][:1]),
    )
    for impl in ("reference", compiled):
        torch.testing.assert_close(
            gradients(inputs, impl)[2], gradients(one, "reference")[2], rtol=1e-5, atol=1e-7
        )


@pytest.mark.interpreted(classes=[3, 2100])
@pytest.mark.sanitized(classes=[3])
@pytest.mark.parametrize("size", [1e4, 1e8, 3e37])
@pytest.mark.parametrize("classes", [3, 2100])
def test_gradients_of_unlikely_classes_stay_those_of_torch(compiled, classes, size):
    device = device_of(compiled)
    inputs = testing.mixture_inputs(5, 6, classes, 4, device=device, scale=0.1)
    inputs.bias[:, 0] = -size
    upstream = torch.zeros(5, classes, device=device)
    upstream[:, 0] = -1
    truth = composed_gradients(wide(inputs), upstream)
    torchs = composed_gradients(inputs, upstream)
    actual = log_prob_gradients(inputs, compiled, upstream)
    for name, got, own, exact in zip(("value", "dx", "dweight", "dbias"), actual, torchs, truth):
        testing.assert_within_budget(got, own, exact, name)
    # No clone has more than all of a class.
    assert actual[3][:, 0].abs().max() <= 5


@pytest.mark.interpreted
@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [2, 2100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_whose_sum_overflows(backend, device, reduction, classes):
    inputs = testing.mixture_inputs(3, 2, classes, 3, device=device)
    bias = torch.zeros_like(inputs.bias)
    bias[:, 1] = 2e38
    inputs = inputs._replace(
        weight=torch.zeros_like(inputs.weight), bias=bias, target=torch.zeros_like(inputs.target)
    )
    loss, stats, dx, dweight, dbias = gradients(inputs, backend, reduction=reduction)
    torch.testing.assert_close(
        loss.item(), 2e38 if reduction == "mean" else math.inf, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(stats[0].tolist(), [6e38] * 3, rtol=1e-6, atol=0)
    counted = 1 if reduction == "mean" else 3
    expected = torch.zeros_like(dbias)
    expected[:, 0], expected[:, 1] = -counted, counted
    torch.testing.assert_close(dbias, expected)
    torch.testing.assert_close(dweight, expected[:, :, None] * inputs.x.mean(0))
    assert not dx.any()


@pytest.mark.sanitized
@pytest.mark.parametrize("outputs", [1, 2100])
def test_gaussian_losses_whose_sum_overflows(backend, device, outputs):
    inputs = gaussian_inputs(4, 2, outputs, 3, device=device)
    target = torch.zeros_like(inputs.target)
    target[:, 0] = 1.5e19
    inputs = inputs._replace(weight=torch.zeros_like(inputs.weight), target=target)
    actual = gradients(
        inputs, backend, function=switch_mixture_gaussian_stats, sigma2=1.0, reduction="mean"
    )
    torch.testing.assert_close(actual[0].item(), 1.125e38, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1][0].tolist(), [4.5e38] * 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[4][:, 0].tolist(), [-1.5e19] * 3, rtol=1e-6, atol=0)
    assert all(part.isfinite().all() for part in actual[2:])


@pytest.mark.interpreted
def test_hand_computed(backend, device):
    # Two equal logits: a half each, however large.
    for size in (1e8, -1e8, 3e37):
        x = torch.ones(1, 1, device=device)
        weight = torch.zeros(1, 2, 1, device=device)
        bias = torch.full((1, 2), size, device=device)
        a, y = torch.zeros(1, device=device), torch.tensor([1], device=device)
        value = switch_mixture_log_prob(x, weight, bias, a, impl=backend)
        torch.testing.assert_close(value.exp().tolist(), [[0.5, 0.5]])
        inputs = (x, weight, bias, a, y)
        loss, stats, _, _, dbias = gradients(inputs, backend, function=switch_mixture_stats)
        torch.testing.assert_close(loss.item(), math.log(2))
        torch.testing.assert_close(stats[0].item(), math.log(2), rtol=1e-6, atol=0)
        assert dbias.tolist() == [[0.5, -0.5]]
