"""Protects Triton's large output layers whose first product writes exponentials in place of logits.

Runs on a GPU, or under TRITON_INTERPRET=1 (tests/test_triton_interpreter.py). Loss, statistics and gradients against
float64, trained and evaluated, of special values; which memory it takes.
"""

import pytest
import torch
from mixture_harness import (
    dead_sample,
    ignored_sample_not_finite,
    nothing_counted,
    posterior_with_zeros,
)

from alrao_fast import backends, testing
from alrao_fast.ops.mixture import switch_mixture_stats

REASON = testing.require("switch_mixture", "triton")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}"),
]
DEVICE = backends.device_of("triton")


def target_is_the_largest(inputs):
    inputs.target[:] = torch.einsum(
        "bd,cd->bc", inputs.x.double(), inputs.weight[1].double()
    ).argmax(1)


def equal_logits(inputs):
    inputs.weight[0] = 0
    pairs = inputs.weight[2, : inputs.weight.size(1) // 2 * 2].unflatten(0, (-1, 2))
    pairs[:, 1] = pairs[:, 0]


def certain(inputs):
    # Of a probability of 1 the gradient has nothing left, however large the logits are.
    inputs.weight[1] *= 1e4
    target_is_the_largest(inputs)


def far_above_the_target(inputs):
    # Its second pass takes the largest logit, which is none of those that the first one looks at.
    inputs.weight[1] *= 40
    inputs.weight[2, 67] *= 1000


EXPONENTIAL_CHANGES = [
    None,
    ignored_sample_not_finite,
    nothing_counted,
    posterior_with_zeros,
    dead_sample,
    target_is_the_largest,
    equal_logits,
    certain,
    far_above_the_target,
]


# Every change on one size, and some on all of them: many classes, and several chunks.
@pytest.mark.interpreted(sizes=[(40, 40, 200, 4)])
@pytest.mark.interpreted(change=[None, nothing_counted, far_above_the_target])
@pytest.mark.parametrize(
    "change", EXPONENTIAL_CHANGES, ids=lambda change: change.__name__ if change else ""
)
@pytest.mark.parametrize(
    "sizes, budget",
    [((40, 40, 200, 4), None), ((37, 24, 1003, 3), None), ((70, 40, 130, 3), 20_000)],
    ids=str,
)
def test_exponentials_in_place_of_logits(monkeypatch, sizes, budget, change):
    from alrao_fast.kernels.mixture import exponential, problem
    from alrao_fast.kernels.mixture import loss as mixture_loss

    monkeypatch.setattr(problem, "TILE", 0)
    monkeypatch.setattr(problem, "MANY_CLASSES", 2)
    monkeypatch.setattr(problem, "is_fused", lambda *_: False)
    calls, run = [], exponential.mixture_exponential
    monkeypatch.setattr(mixture_loss, "mixture_exponential", lambda given: calls.append(run(given)))
    inputs = testing.mixture_inputs(*sizes, dtype=torch.bfloat16, device=DEVICE, bias=False)
    if change:
        change(inputs)

    def results(impl, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (inputs.x, inputs.weight)]
        given = (*leaves, None, inputs.log_posterior, inputs.target)
        loss, stats = switch_mixture_stats(*given, impl=impl, memory_budget=budget)
        gradients = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            evaluated = switch_mixture_stats(*given, impl=impl, memory_budget=budget)
        for again, value in zip(evaluated, (loss, stats), strict=True):
            torch.testing.assert_close(again, value, rtol=0, atol=0, equal_nan=True)
        return loss.detach(), stats, *gradients

    actual = results("triton", torch.bfloat16)
    assert len(calls) == 2
    own, truth = results("reference", torch.bfloat16), results("reference", torch.float64)
    # What is correct, of logits that tie too.
    torch.testing.assert_close(actual[1][1:], own[1][1:], rtol=0, atol=0)
    for name, got, reference, exact in zip(("loss", "nll"), actual, own, truth):
        got, reference, exact = (t if name == "loss" else t[0] for t in (got, reference, exact))
        testing.assert_within_budget(got, reference, exact, name, slack=4e-6)
    for name, got, reference, exact in zip(("dx", "dweight"), actual[2:], own[2:], truth[2:]):
        testing.assert_within_budget(got, reference, exact, name)
        # Its norm, too: a bfloat16 gradient of bfloat16 factors.
        error = (got.double() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error < 4e-3, (name, error)


@pytest.mark.interpreted
def test_memory_that_begins_anywhere(monkeypatch):
    from alrao_fast.kernels.mixture import problem

    monkeypatch.setattr(problem, "TILE", 0)
    monkeypatch.setattr(problem, "MANY_CLASSES", 2)
    monkeypatch.setattr(problem, "is_fused", lambda *_: False)
    inputs = testing.mixture_inputs(9, 8, 40, 2, dtype=torch.bfloat16, device=DEVICE, bias=False)

    def shifted(tensor):
        memory = tensor.new_empty(tensor.numel() + 1)
        return memory[1:].view_as(tensor).copy_(tensor)

    expected, _ = switch_mixture_stats(*inputs, impl="triton")
    for x, weight in (
        (shifted(inputs.x), inputs.weight),
        (inputs.x, shifted(inputs.weight)),
    ):
        loss, _ = switch_mixture_stats(x, weight, *inputs[2:], impl="triton")
        torch.testing.assert_close(loss, expected)
