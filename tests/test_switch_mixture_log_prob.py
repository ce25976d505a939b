"""Protects the mixture's log-probabilities, on every backend that is available.

Error budgets against float64 for values and gradients, the definition, gradcheck; dead clones, whose posterior mass
goes to the others, and posteriors that are not normalised.
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


def living_mixture(inputs, alive):
    """The definition, sample by sample over the clones that are alive for it, with the posterior normalised to them."""
    x, weight, bias, a, _ = inputs
    logp = F.log_softmax(torch.einsum("bd,ncd->bnc", x, weight) + bias, 2)
    rows = []
    for b in range(x.size(0)):
        living = alive[b].nonzero().squeeze(1)
        p = a[living].to(x.dtype).log_softmax(0)
        rows.append(torch.logsumexp(p[:, None] + logp[b, living], 0))
    return torch.stack(rows)


@pytest.mark.interpreted(classes=[5, 2200], shift=[3.0], budget=[None])
@pytest.mark.sanitized(classes=[5], shift=[3.0])
@pytest.mark.sanitized(classes=[2200], shift=[3.0], budget=[None])
@pytest.mark.parametrize("shift", [0.0, 3.0, -40.0])
@pytest.mark.parametrize("classes", [1, 5, 2200])
@pytest.mark.parametrize("budget", [None, 1], ids=["one chunk", "chunks"])
def test_the_mass_of_dead_clones_goes_to_the_living(backend, device, classes, shift, budget):
    inputs = testing.mixture_inputs(19, 4, classes, 3, dtype=torch.float64, device=device)
    # The clone that dies has nearly all of the posterior, which is not normalised.
    inputs.log_posterior[1] += 9
    inputs = inputs._replace(log_posterior=inputs.log_posterior + shift)
    broken = inputs._replace(x=inputs.x.clone(), weight=inputs.weight.clone())
    # For samples 4 and 17 it overflows; the others do not see the feature.
    inputs.x[:, 0] = broken.x[:, 0] = 0
    inputs.weight[:, :, 0] = broken.weight[:, :, 0] = 0
    broken.x[[4, 17], 0] = 1e200
    broken.weight[1, 0, 0] = 1e200
    alive = torch.ones(19, 3, dtype=torch.bool, device=device)
    alive[[4, 17], 1] = False

    upstream = torch.randn(19, classes, dtype=torch.float64, device=device)
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    expected = living_mixture(inputs._replace(x=leaves[0], weight=leaves[1], bias=leaves[2]), alive)
    expected.backward(upstream)
    value, dx, dweight, dbias = log_prob_gradients(broken, backend, upstream, memory_budget=budget)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(value.exp().sum(1), torch.ones_like(value[:, 0]))
    torch.testing.assert_close(dx[:, 1:], leaves[0].grad[:, 1:])
    torch.testing.assert_close(dweight[:, :, 1:], leaves[1].grad[:, :, 1:])
    torch.testing.assert_close(dbias, leaves[2].grad)


@pytest.mark.interpreted(classes=[5])
@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
def test_the_op_tells_the_mass_of_the_living(compiled, classes):
    device = device_of(compiled)
    inputs = testing.mixture_inputs(18, 4, classes, 3, device=device)
    inputs.log_posterior.copy_(torch.tensor([0.5, 0.25, 0.125]).log())
    inputs.weight[0] = INF
    inputs.x[7] = NAN
    name = "switch_mixture_log_prob" + ("__triton" if compiled == "triton" else "")
    _, log_mass = getattr(torch.ops.alrao_fast, name)(*inputs[:4], 1)
    expected = torch.full((18,), 0.375)
    expected[7] = 0
    torch.testing.assert_close(log_mass.exp().cpu(), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
def test_nothing_is_predicted_where_no_clone_with_mass_is_alive(backend, device, classes):
    inputs = testing.mixture_inputs(4, 3, classes, 3, device=device)
    weight, a = inputs.weight.clone(), inputs.log_posterior.clone()
    upstream = torch.ones(4, classes, device=device)
    weight[:2] = NAN
    a[2] = -INF
    for dead in (
        inputs._replace(weight=weight, log_posterior=a),
        inputs._replace(weight=weight * INF),
    ):
        value, *grads = log_prob_gradients(dead, backend, upstream)
        assert value.tolist() == [[-INF] * classes] * 4
        assert not any(grad.any() for grad in grads)
