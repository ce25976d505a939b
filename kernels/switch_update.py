"""switch_update_: one Bayesian update of the switch posterior (reference/switch_update.py), in one program.

Bound by the launch: 24 N bytes of state, 48 N more for the running statistics of `switch_observe_`. The weights leave
the log domain at the largest, are updated and normalised there, which needs one exponential and one logarithm per
weight and no case for -inf.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def update_state(logw_ptr, log_posterior_ptr, t_ptr, evidence, clones, num_clones, theta, rest):
    """The update by `evidence`, one float64 per entry of `clones`, -inf beyond the last clone."""
    mask = clones < num_clones
    infinity = float("inf")
    evidence = tl.where(evidence < infinity, evidence, -infinity)
    # What all clones have in common cancels; beside 1e12 of it the weights would lose their digits.
    best = tl.max(evidence, 0)
    evidence -= tl.where(best > -infinity, best, 0.0)
    unstable = tl.load(logw_ptr + clones, mask=mask, other=-infinity) + evidence
    stable = tl.load(logw_ptr + num_clones + clones, mask=mask, other=-infinity) + evidence
    largest = tl.maximum(tl.max(unstable, 0), tl.max(stable, 0))
    informative = largest > -infinity
    unstable = tl.exp(unstable - largest)
    stable = tl.exp(stable - largest)

    t = tl.load(t_ptr)
    observations = t.to(tl.float64) + 1
    share = tl.sum(unstable, 0) / (observations * num_clones)
    unstable = unstable * (t.to(tl.float64) / observations) + tl.full([], theta, tl.float64) * share
    stable = stable + tl.full([], rest, tl.float64) * share
    total = tl.sum(tl.where(mask, unstable + stable, 0.0), 0)
    # None of them where every clone with mass is dead: the state stays.
    write = clones < tl.where(informative, num_clones, 0)
    tl.store(logw_ptr + clones, tl.log(unstable / total), mask=write)
    tl.store(logw_ptr + num_clones + clones, tl.log(stable / total), mask=write)
    tl.store(log_posterior_ptr + clones, tl.log((unstable + stable) / total), mask=write)
    tl.store(t_ptr, t + informative.to(tl.int64))


@triton.jit
def switch_update_kernel(
    logw_ptr,
    log_posterior_ptr,
    t_ptr,
    observed_ptr,
    running_ptr,
    num_clones,
    theta: tl.float64,
    rest: tl.float64,
    HAS_STATS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update by log-likelihoods [N]. With HAS_STATS by statistics [3, N], which are added to running [3, N]: by the
    mean of the log-likelihoods, or by their sum."""
    clones = tl.arange(0, BLOCK)
    mask = clones < num_clones
    if HAS_STATS:
        nll = tl.load(observed_ptr + clones, mask=mask, other=float("inf"))
        # 0 beyond the last clone.
        count = tl.load(observed_ptr + 2 * num_clones + clones, mask=mask, other=0.0)
        for row in tl.static_range(3):
            here = running_ptr + row * num_clones + clones
            value = tl.load(observed_ptr + row * num_clones + clones, mask=mask, other=0.0)
            tl.store(here, tl.load(here, mask=mask, other=0.0) + value, mask=mask)
        # Without a sample every clone counts as dead, and the state stays.
        evidence = -nll
        if MEAN:
            evidence = evidence / tl.where(count > 0, count, 1.0)
        evidence = tl.where(count > 0, evidence, -float("inf"))
    else:
        evidence = tl.load(observed_ptr + clones, mask=mask, other=-float("inf")).to(tl.float64)
    update_state(logw_ptr, log_posterior_ptr, t_ptr, evidence, clones, num_clones, theta, rest)


def _update(
    logw: Tensor,
    log_posterior: Tensor,
    t: Tensor,
    observed: Tensor,
    running: Tensor | None,
    mean: bool,
    theta: float,
) -> None:
    num_clones = logw.size(1)
    block = max(triton.next_power_of_2(num_clones), 16)
    launch(
        switch_update_kernel,
        (1,),
        logw,
        log_posterior,
        t,
        observed.contiguous(),
        logw if running is None else running,
        num_clones,
        float(theta),
        1.0 - theta,
        num_warps=1 if block <= 128 else min(max(block // 256, 4), 32),
        HAS_STATS=running is not None,
        MEAN=mean,
        BLOCK=block,
    )


def switch_update_(
    logw: Tensor, log_posterior: Tensor, t: Tensor, log_likelihood: Tensor, theta: float
) -> None:
    """The op, on checked arguments."""
    _update(logw, log_posterior, t, log_likelihood, None, False, theta)


def switch_observe_(
    logw: Tensor,
    log_posterior: Tensor,
    t: Tensor,
    running: Tensor,
    stats: Tensor,
    mean: bool,
    theta: float,
) -> None:
    """The op, on checked arguments."""
    _update(logw, log_posterior, t, stats, running, mean, theta)
