"""Protects the mixture of regressors, on every backend that is available.

Error budgets against float64, the density by torch.distributions, dead clones and samples, and the posterior mean.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from mixture_harness import (
    INF,
    NAN,
    assert_budget,
    device_of,
    gaussian_inputs,
    gradients,
    without_clone,
)

from alrao_fast import testing
from alrao_fast.functional import (
    switch_mixture_gaussian_nll,
    switch_mixture_gaussian_stats,
    switch_mixture_mean,
)

OP = "switch_mixture"
pytestmark = pytest.mark.emulated


@pytest.mark.sanitized(dtype=[torch.float32, torch.bfloat16])
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


@pytest.mark.sanitized
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


@pytest.mark.sanitized
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
    # Neither a sum other than 1 nor one below the smallest number counts.
    for shift in (1.0, -1e3):
        shifted = switch_mixture_mean(x, weight, bias, a + shift, impl=backend)
        torch.testing.assert_close(shifted, actual)
    dead[keep] = NAN
    assert switch_mixture_mean(x, dead, bias, a, impl=backend).isnan().all()
    shaped = switch_mixture_mean(x.view(2, 3, 4), weight, bias, a, impl=backend)
    torch.testing.assert_close(shaped.view(6, 3), actual)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: switch_mixture_mean(*t, a, impl=backend), leaves)
