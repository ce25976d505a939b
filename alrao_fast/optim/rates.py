"""Samplers: where the learning rates come from.

A sampler is called as `sampler(n, generator)` and returns `n` non-negative rates, a float32 tensor of shape [n] on the
CPU. `sampler.clone_rates(num_clones)` gives the rates of the clones of the output layer; a plain callable without that
method leaves them to the optimizer's `lr_range`. A sampler whose attribute `per_weight` is true is asked for one rate
per entry of a parameter instead of one per feature.

Every draw is made on the CPU in float64 and then rounded, so that a seed gives the same rates for every device and
every parameter dtype.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alrao_fast.arguments import Interval, Number, Rate, shown

Sampler = Callable[[int, "torch.Generator | None"], Tensor]
PROBABILITY = Number(low=0, high=1, words="a probability, from 0 to 1")


def log_spaced(lo: float, hi: float, n: int) -> Tensor:
    """`n` rates from lo to hi, evenly spaced in the logarithm; the geometric mean for n = 1 (float32, [n])."""
    if n == 1:
        return _full(1, math.sqrt(lo) * math.sqrt(hi))
    log_lo, log_hi = math.log(lo), math.log(hi)
    rates = torch.linspace(log_lo, log_hi, n, dtype=torch.float64, device="cpu").exp_()
    # exp(log(x)) may miss x by a rounding: the ends are exact.
    rates[:1], rates[-1:] = lo, hi
    return rates.to(torch.float32)


def _uniform(n: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")


def _full(n: int, rate: float) -> Tensor:
    return torch.full((n,), rate, dtype=torch.float32, device="cpu")


class LogUniform:
    """Rates whose logarithm is uniform on [log lo, log hi]: the paper's choice.

    Clone n of N has lo * (hi/lo)^(n/(N-1)).
    """

    per_weight = False
    # Made by an optimizer from the lr_range of a param group.
    is_of_group = False

    def __init__(self, lo: float = 1e-5, hi: float = 10.0) -> None:
        self.lo, self.hi = Interval().check("lr_range", (lo, hi))

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        u = _uniform(n, generator)
        log_lo, log_hi = math.log(self.lo), math.log(self.hi)
        rates = u.mul_(log_hi - log_lo).add_(log_lo).exp_()
        return rates.clamp_(self.lo, self.hi).to(torch.float32)

    def clone_rates(self, num_clones: int) -> Tensor:
        """Rates `[N]` of the clones: log-spaced from lo to hi, both included; the geometric mean for one."""
        return log_spaced(self.lo, self.hi, num_clones)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lo:g}, {self.hi:g})"


class LogTriangular(LogUniform):
    """Rates whose logarithm has a triangular density on [log lo, log hi], highest in the middle.

    Fewer features than of `LogUniform` have rates near the ends, where they move next to nothing or too far. Clone n of
    N has the quantile (n + 1/2) / N of the same law: clones are close together where most features are, and a wider
    interval adds none that cannot learn.
    """

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        # The mean of two uniform numbers would need two draws.
        return self._quantiles(_uniform(n, generator))

    def clone_rates(self, num_clones: int) -> Tensor:
        """Rates `[N]` of the clones: the law's quantiles (n + 1/2) / N; the geometric mean for one."""
        numbers = torch.arange(num_clones, dtype=torch.float64, device="cpu")
        return self._quantiles((numbers + 0.5) / num_clones)

    def _quantiles(self, u: Tensor) -> Tensor:
        """The rates below which the parts `u` of all are: the inverse of the distribution function."""
        below, above = (u / 2).sqrt(), 1 - ((1 - u) / 2).sqrt()
        log_lo, log_hi = math.log(self.lo), math.log(self.hi)
        rates = torch.where(u < 0.5, below, above).mul_(log_hi - log_lo).add_(log_lo).exp_()
        return rates.clamp_(self.lo, self.hi).to(torch.float32)


class PerWeight(LogUniform):
    """One log-uniform rate for each single entry of each parameter (the paper's appendix E)."""

    per_weight = True


class Fraction:
    """The rate `lr` with probability `p`, else 0: a random part of the features learns (the paper's appendix F)."""

    per_weight = False

    def __init__(self, p: float, lr: float) -> None:
        self.p, self.lr = float(PROBABILITY.check("p", p)), float(Rate().check("lr", lr))

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        u = _uniform(n, generator)
        return (u < self.p).to(torch.float32) * self.lr

    def clone_rates(self, num_clones: int) -> Tensor:
        """Rates `[N]` of the clones: all of them `lr`, none 0."""
        return _full(num_clones, self.lr)

    def __repr__(self) -> str:
        return f"Fraction({self.p:g}, {self.lr:g})"


class Constant:
    """The same rate everywhere, for the clones too: plain SGD or Adam."""

    per_weight = False

    def __init__(self, lr: float) -> None:
        self.lr = float(Rate().check("lr", lr))

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return _full(n, self.lr)

    def clone_rates(self, num_clones: int) -> Tensor:
        """Rates `[N]` of the clones: all of them `lr`."""
        return self(num_clones)

    def __repr__(self) -> str:
        return f"Constant({self.lr:g})"


def draw(sampler: Sampler, n: int, generator: torch.Generator | None) -> Tensor:
    """`n` checked rates from `sampler`: float32, [n], CPU. Raises where the sampler returns anything else."""
    if n == 0:
        return _full(0, math.nan)
    # A sampler of the user's need not name the device, whatever torch's default is.
    with torch.device("cpu"):
        rates = sampler(n, generator)
    return _checked(rates, n, f"sampler {sampler!r}")


def draw_clones(sampler: Sampler, lr_range: tuple[float, float], num_clones: int) -> Tensor:
    """The rates of `num_clones` clones: the sampler's `clone_rates`, or log-spaced over `lr_range` if it has none."""
    clone_rates = getattr(sampler, "clone_rates", None)
    if clone_rates is None:
        return log_spaced(*lr_range, num_clones)
    with torch.device("cpu"):
        rates = clone_rates(num_clones)
    return _checked(rates, num_clones, f"{sampler!r}.clone_rates")


def _checked(rates: Any, n: int, source: str) -> Tensor:
    if not isinstance(rates, Tensor):
        raise TypeError(
            f"{source} returned {type(rates).__name__}; expected a float32 tensor of shape [{n}]"
        )
    if rates.is_meta or rates.layout is not torch.strided:
        raise ValueError(f"{source} returned {shown(rates)}; expected rates, strided and with data")
    if rates.shape != (n,) or not rates.is_floating_point():
        raise ValueError(
            f"{source} returned {rates.dtype} of shape {list(rates.shape)}; expected float32 of shape [{n}]"
        )
    rates = rates.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    if not bool((torch.isfinite(rates) & (rates >= 0)).all()):
        raise ValueError(
            f"{source} returned a negative or non-finite rate; expected finite rates >= 0"
        )
    return rates
