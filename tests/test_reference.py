"""Protects the specification itself: the reference against definitions written another way.

- switch_mixture: the gradients of the mixture and of each clone's own loss, by separate autograd graphs; dead clones.
- rounding: Philox against its published known answers; stochastic rounding is unbiased and exact where exact.
"""

import math

import pytest
import torch

from alrao_fast import testing
from alrao_fast.reference import rounding, switch_mixture


def separate_losses(inputs):
    """Mixture loss and per-clone losses, straight from the definition, each in its own graph."""
    x, weight, bias, a, y = inputs
    logp = torch.stack(
        [
            torch.log_softmax(x @ w.T + b, 1)[torch.arange(len(y)), y]
            for w, b in zip(weight, bias, strict=True)
        ],
        dim=1,
    )
    return -torch.logsumexp(a + logp, 1).mean(), -logp.mean(0)


def test_gradients_are_the_mixtures_for_x_and_each_clones_own_for_its_weights():
    inputs = testing.mixture_inputs(7, 5, 3, 4, dtype=torch.float64)
    x, weight, bias = (t.clone().requires_grad_() for t in inputs[:3])
    mixture, own = separate_losses(inputs._replace(x=x, weight=weight, bias=bias))
    (dx,) = torch.autograd.grad(mixture, x, retain_graph=True)
    dweight, dbias = torch.autograd.grad(own.sum(), (weight, bias))

    loss, stats = switch_mixture.switch_mixture_nll(
        x, weight, bias, inputs.log_posterior, inputs.target, ignore_index=-100, reduction="mean"
    )
    got = torch.autograd.grad(loss, (x, weight, bias))
    torch.testing.assert_close(loss, mixture)
    torch.testing.assert_close(stats[0] / stats[2], own.detach())
    for actual, expected in zip(got, (dx, dweight, dbias), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_dead_clone_equals_a_mixture_without_it(poison):
    inputs = testing.mixture_inputs(6, 5, 3, 4, dtype=torch.float64)
    weight = inputs.weight.clone()
    weight[2, 1, 3] = poison
    living = [0, 1, 3]

    def run(weight, bias, a):
        leaves = [t.clone().requires_grad_() for t in (inputs.x, weight, bias)]
        loss, _ = switch_mixture.switch_mixture_nll(
            *leaves, a, inputs.target, ignore_index=-100, reduction="mean"
        )
        return loss, *torch.autograd.grad(loss, leaves)

    loss, dx, dweight, dbias = run(weight, inputs.bias, inputs.log_posterior)
    expected = run(inputs.weight[living], inputs.bias[living], inputs.log_posterior[living])
    torch.testing.assert_close((loss, dx, dweight[living], dbias[living]), expected)
    assert not dweight[2].any()
    assert not dbias[2].any()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = rounding.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_random_bits_of_neighbours_steps_and_seeds_are_independent():
    numel = 2**16
    cpu = torch.device("cpu")
    bits = rounding.random_bits16(numel, 5, 7, cpu)
    others = [bits.roll(lag) for lag in (*range(1, 17), numel // 2)]
    others += [rounding.random_bits16(numel, 5, step, cpu) for step in (6, 8, 7 + 2**32)]
    others += [rounding.random_bits16(numel, seed, 7, cpu) for seed in (4, 6, 5 + 2**32, -5)]
    others += [bits.flip(0)]

    def digits(words):
        return (words[:, None] >> torch.arange(16) & 1).double() * 2 - 1

    own = digits(bits)
    # Each bit as often 0 as 1, and each pair of bits as often equal as not: within six standard deviations.
    limit = 6 * numel**0.5
    assert own.sum(0).abs().max() < limit
    assert (own.T @ own - numel * torch.eye(16)).abs().max() < limit
    for words in others:
        assert (own.T @ digits(words)).abs().max() < limit * 2**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_keeps_representable_values(dtype):
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-14, 3 * 2.0**-24, math.inf, -math.inf])
    bits = torch.full((len(exact),), 0xFFFF)
    assert torch.equal(rounding.stochastic_round(exact, dtype, bits).float(), exact)
    assert rounding.stochastic_round(torch.tensor([math.nan]), dtype, bits[:1]).isnan().all()

    for value in (1.0 + 1 / 3000, -0.3, 5.3e-7):
        values = torch.full((65536,), value)
        value = float(values[0])
        rounded = rounding.stochastic_round(values, dtype, torch.arange(65536)).double()
        spacing = rounded.max() - rounded.min()
        assert rounded.min() <= value <= rounded.max()
        assert abs(float(rounded.mean()) - value) <= 1.1 * float(spacing) / 65536 + 1e-12
