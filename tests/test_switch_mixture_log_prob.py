"""Protects the mixture's log-probabilities, on every backend that is available.

Error budgets against float64 for values and gradients, the definition, gradcheck, and dead clones.
"""

import pytest
import torch
import torch.nn.functional as F
from mixture_harness import (
    INF,
    NAMES,
    NAN,
    OTHER_DTYPES,
    SHAPES,
    SHORT_SHAPES,
    TILED_SHAPES,
    device_of,
    log_prob_gradients,
    poisoned,
    without_clone,
)

from alrao_fast import testing
from alrao_fast.functional import switch_mixture_log_prob

OP = "switch_mixture"
pytestmark = pytest.mark.emulated
# With one class nothing is left to learn.
SEVERAL_CLASSES = [name for name, (_, _, classes, _, _) in SHAPES.items() if classes > 1]
SHORT = [name for name in SEVERAL_CLASSES if name in SHORT_SHAPES]


@pytest.mark.interpreted(shape=["streamed for its many clones"], dtype=[torch.float32])
@pytest.mark.sanitized(shape=SHORT, dtype=[torch.float32])
@pytest.mark.sanitized(shape=TILED_SHAPES, dtype=[torch.bfloat16])
@pytest.mark.many_launches(shape=["streamed, many chunks"], dtype=OTHER_DTYPES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SEVERAL_CLASSES)
def test_log_prob_error_budget(compiled, shape, dtype):
    batch, features, classes, clones, budget = SHAPES[shape]
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


@pytest.mark.sanitized
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
