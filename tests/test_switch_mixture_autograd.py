"""Protects the mixture's place in autograd and the dispatcher, on every backend that is available.

gradcheck where the gradient is the returned value's own, retained graphs, opcheck, torch.compile(fullgraph=True), and
the messages for invalid inputs.
"""

import pytest
import torch
from mixture_harness import device_of, gaussian_inputs

from alrao_fast import testing
from alrao_fast.functional import (
    switch_mixture_gaussian_nll,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_nll,
)

OP = "switch_mixture"
pytestmark = pytest.mark.emulated


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


@pytest.mark.sanitized
def test_backward_twice_over_a_retained_graph(compiled):
    inputs = testing.mixture_inputs(5, 3, 4, 3, device=device_of(compiled))
    weight = inputs.weight.clone().requires_grad_()
    loss, _ = switch_mixture_nll(inputs.x, weight, *inputs[2:], impl=compiled)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_factor_of_a_backward_is_taken_in_place(compiled, dtype):
    device, wide = device_of(compiled), torch.promote_types(dtype, torch.float32)
    shapes = {"dx": (7, 5), "dweight": (3, 41, 5), "dbias": (3, 41)}
    for empty in (None, *shapes):
        gradients = [
            torch.randn(
                (0,) if name == empty else shape,
                device=device,
                dtype=dtype if name == "dweight" else wide,
            )
            for name, shape in shapes.items()
        ]
        for factor in (1.0, 0.5, -3.0):
            expected = [g * factor for g in gradients]
            scale = torch.tensor(factor, device=device, dtype=wide)
            torch.ops.alrao_fast.switch_mixture_scale_(*gradients, scale)
            for gradient, value in zip(gradients, expected, strict=True):
                torch.testing.assert_close(gradient, value, rtol=0, atol=0)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_upstream_gradient_scales_all_gradients(compiled, dtype):
    inputs = testing.mixture_inputs(6, 5, 7, 4, dtype=dtype, device=device_of(compiled))
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    loss, _ = switch_mixture_nll(*leaves, *inputs[3:], impl=compiled)
    once = torch.autograd.grad(loss, leaves)
    loss, _ = switch_mixture_nll(*leaves, *inputs[3:], impl=compiled)
    for scaled, gradient in zip(torch.autograd.grad(loss * 0.25, leaves), once, strict=True):
        torch.testing.assert_close(scaled, 0.25 * gradient)


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
                torch.randn(7, device=device),
                True,
                True,
                1 << 20,
            ),
        }[op]
        torch.library.opcheck(overload, args)


@pytest.mark.interpreted
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


def changed(device="cpu", **changes):
    return testing.mixture_inputs(4, 3, 5, 2, device=device)._replace(**changes)


@pytest.mark.interpreted
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
    device = device_of(compiled)
    if "at position" in message and (compiled == "cuda" or device != "cpu"):
        pytest.skip("a CUDA kernel does not wait to look at classes, wherever it runs")
    inputs = [t.to(device) for t in inputs]
    with pytest.raises((RuntimeError, ValueError), match=message):
        switch_mixture_nll(*inputs, impl=compiled)


@pytest.mark.interpreted
def test_invalid_options(compiled):
    device = device_of(compiled)
    inputs = changed(device)
    with pytest.raises(ValueError, match="reduction: got 'average', expected 'mean', 'sum'"):
        switch_mixture_nll(*inputs, reduction="average", impl=compiled)
    with pytest.raises(RuntimeError, match="memory_budget: got 0, expected a positive number"):
        switch_mixture_nll(*inputs, memory_budget=0, impl=compiled)
    regression = gaussian_inputs(4, 3, 5, 2, device=device)
    with pytest.raises(RuntimeError, match="sigma2: got 0, expected a positive variance"):
        switch_mixture_gaussian_nll(*regression, sigma2=0.0, impl=compiled)
    with pytest.raises(ValueError, match=r"target: got shape \[4\], expected \[4, 5\]"):
        switch_mixture_gaussian_nll(*inputs, impl=compiled)
    with pytest.raises(ValueError, match="impl: got 'gpu'"):
        switch_mixture_log_prob(*inputs[:4], impl="gpu")
