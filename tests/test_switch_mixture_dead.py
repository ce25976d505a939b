"""Protects the mixture from clones that are not finite, for all samples or one, and from samples for which none is."""

import pytest
import torch
from mixture_harness import INF, NAN, gradients, poisoned, without_clone

from alrao_fast import testing

OP = "switch_mixture"
pytestmark = pytest.mark.emulated


@pytest.mark.sanitized(classes=[5])
@pytest.mark.many_launches(classes=[2200], kind=["inf weight", "all weights nan", "nan bias"])
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


@pytest.mark.sanitized(classes=[5])
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


@pytest.mark.sanitized(value=[INF], classes=[5])
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


@pytest.mark.interpreted(classes=[5])
@pytest.mark.sanitized
@pytest.mark.parametrize("classes", [5, 2200], ids=["joint", "streamed"])
def test_all_clones_dead(backend, device, classes):
    inputs = testing.mixture_inputs(7, 4, classes, 2, device=device)
    loss, stats, *grads = gradients(
        inputs._replace(weight=torch.full_like(inputs.weight, NAN)), backend
    )
    assert loss.item() == INF
    assert stats.tolist() == [[INF] * 2, [0.0] * 2, [7.0] * 2]
    assert not any(grad.any() for grad in grads)
