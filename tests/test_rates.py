"""Samplers of learning rates. Protects:

- LogUniform: the logarithm is uniform (Kolmogorov-Smirnov), within bounds, whatever the seed; float32 on the CPU;
- clone rates: both ends exact, geometric steps, N = 1 the geometric mean (one case computed by hand);
- LogTriangular: the logarithm has the triangular law, clones its quantiles;
- PerWeight, Fraction and Constant draw what they say; the same seed gives the same rates;
- invalid bounds, probabilities and rates are refused by name; a sampler that returns nonsense is refused.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alrao_fast.arguments import Interval
from alrao_fast.optim import Constant, Fraction, LogTriangular, LogUniform, PerWeight
from alrao_fast.optim.rates import draw, draw_clones, log_spaced


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_distance(samples: torch.Tensor) -> float:
    """Kolmogorov-Smirnov: the largest gap between the empirical distribution and the uniform one on [0, 1]."""
    ordered = samples.double().sort().values
    n = ordered.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))


@pytest.mark.parametrize("sampler_type", [LogUniform, PerWeight])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_uniform(sampler_type, seed):
    lo, hi, n = 1e-5, 10.0, 20_000
    rates = sampler_type(lo, hi)(n, generator(seed))
    assert rates.shape == (n,) and rates.dtype == torch.float32 and rates.device.type == "cpu"
    assert float(rates.min()) >= lo * (1 - 1e-6) and float(rates.max()) <= hi
    u = (rates.double().log() - math.log(lo)) / math.log(hi / lo)
    # The 99.99 % quantile of the Kolmogorov distribution is 2.23 / sqrt(n); a uniform rate would be at 0.8.
    assert uniform_distance(u) < 2.23 / math.sqrt(n)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_triangular(seed):
    lo, hi, n = 1e-4, 0.1, 20_000
    rates = LogTriangular(lo, hi)(n, generator(seed))
    assert rates.dtype == torch.float32 and float(rates.min()) >= lo * (1 - 1e-6)
    assert float(rates.max()) <= hi * (1 + 1e-6)
    u = (rates.double().log() - math.log(lo)) / math.log(hi / lo)
    # The distribution function of the triangular law on [0, 1] with its mode at 1/2.
    uniform = torch.where(u < 0.5, 2 * u * u, 1 - 2 * (1 - u) * (1 - u))
    assert uniform_distance(uniform) < 2.23 / math.sqrt(n)
    assert uniform_distance(u) > 0.1


@pytest.mark.parametrize("n", [1, 2, 10])
def test_clones_are_quantiles_of_the_triangular_law(n):
    clones = LogTriangular(1e-4, 0.1).clone_rates(n)
    assert clones.shape == (n,) and clones.dtype == torch.float32
    u = (clones.double() / 1e-4).log() / math.log(1e3)
    distribution = torch.where(u < 0.5, 2 * u * u, 1 - 2 * (1 - u) * (1 - u))
    expected = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    torch.testing.assert_close(distribution, expected, atol=1e-6, rtol=0)


def test_distance_notices_a_linear_scale():
    rates = torch.rand(20_000, generator=generator()) * 10 + 1e-5
    assert uniform_distance((rates.log() - math.log(1e-5)) / math.log(1e6)) > 0.5


def test_same_seed_same_rates():
    a, b = LogUniform()(100, generator(3)), LogUniform()(100, generator(3))
    assert torch.equal(a, b)
    assert not torch.equal(a, LogUniform()(100, generator(4)))
    torch.manual_seed(3)
    assert torch.equal(LogUniform()(100, None), a)


def test_clone_rates_by_hand():
    expected = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    rates = LogUniform(1e-4, 1.0).clone_rates(5)
    assert rates.dtype == torch.float32
    torch.testing.assert_close(rates, torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(LogUniform(1e-4, 1.0).clone_rates(1), torch.tensor([1e-2]))


@settings(deadline=None)
@given(st.floats(1e-8, 1e2), st.floats(1.0, 1e8), st.integers(2, 40))
def test_clone_rates_are_geometric(lo, ratio, n):
    rates = log_spaced(lo, lo * ratio, n)
    assert float(rates[0]) == float(torch.tensor(lo)) and float(rates[-1]) == float(
        torch.tensor(lo * ratio)
    )
    steps = rates.double().log().diff()
    assert torch.allclose(steps, torch.full_like(steps, math.log(ratio) / (n - 1)), atol=1e-6)


def test_fraction():
    sampler = Fraction(0.3, 0.5)
    rates = sampler(50_000, generator())
    assert set(rates.tolist()) == {0.0, 0.5}
    assert abs(float((rates > 0).float().mean()) - 0.3) < 0.01
    assert sampler.clone_rates(3).tolist() == [0.5] * 3
    assert Fraction(0.0, 1.0)(10, generator()).sum() == 0
    assert Fraction(1.0, 1.0)(10, generator()).sum() == 10


def test_constant():
    assert Constant(0.25)(4, None).tolist() == [0.25] * 4
    assert Constant(0.25).clone_rates(2).tolist() == [0.25] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: LogUniform(0.0, 1.0), "expected 0 < lo <= hi"),
        (lambda: LogUniform(2.0, 1.0), "expected 0 < lo <= hi"),
        (lambda: LogUniform(1.0, math.inf), "within float32"),
        (lambda: LogUniform(math.nan, 1.0), "expected 0 < lo <= hi"),
        (lambda: Interval().check("lr_range", 3.0), r"lr_range: got 3.0, expected two numbers"),
        (lambda: Interval().check("lr_range", (1, 2, 3)), "expected two numbers"),
        (lambda: Fraction(1.5, 1.0), "p: got 1.5, expected a probability"),
        (lambda: Fraction(0.5, -1.0), "lr: got -1.0, expected a finite number >= 0"),
        (lambda: Constant(math.nan), "lr: got nan, expected a finite number >= 0"),
    ],
)
def test_invalid_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (lambda n, g: [1.0] * n, TypeError, "returned list"),
        (
            lambda n, g: torch.ones(n + 1),
            ValueError,
            r"shape \[4\]; expected float32 of shape \[3\]",
        ),
        (lambda n, g: torch.ones(n, dtype=torch.int64), ValueError, "torch.int64"),
        (lambda n, g: -torch.ones(n), ValueError, "negative or non-finite"),
        (lambda n, g: torch.full((n,), math.nan), ValueError, "negative or non-finite"),
    ],
)
def test_sampler_that_returns_nonsense(sampler, error, message):
    with pytest.raises(error, match=message):
        draw(sampler, 3, None)


def test_any_callable():
    def sampler(n, g):
        return torch.linspace(0, 1, n, dtype=torch.float64)

    assert draw(sampler, 3, None).dtype == torch.float32
    assert draw_clones(sampler, (1e-2, 1.0), 3).tolist() == log_spaced(1e-2, 1.0, 3).tolist()
    assert draw_clones(Constant(2.0), (1e-2, 1.0), 3).tolist() == [2.0] * 3
    assert draw(sampler, 0, None).shape == (0,)
