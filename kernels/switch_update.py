"""switch_update_: one Bayesian update of the switch posterior (reference/switch_update.py), in one program.

Bound by the launch (2 to 3 us): 24 N bytes of state. The weights leave the log domain at the largest, are updated
and normalised there, which needs one exponential and one logarithm per weight and no case for -inf.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch


@triton.jit
def switch_update_kernel(
    logw_ptr,
    log_posterior_ptr,
    t_ptr,
    log_likelihood_ptr,
    num_clones,
    theta: tl.float64,
    rest: tl.float64,
    BLOCK: tl.constexpr,
):
    clones = tl.arange(0, BLOCK)
    mask = clones < num_clones
    infinity = float("inf")
    evidence = tl.load(log_likelihood_ptr + clones, mask=mask, other=-infinity).to(tl.float64)
    evidence = tl.where(evidence < infinity, evidence, -infinity)
    informative = tl.max((evidence > -infinity).to(tl.int32), 0) > 0
    unstable = tl.load(logw_ptr + clones, mask=mask, other=-infinity) + evidence
    stable = tl.load(logw_ptr + num_clones + clones, mask=mask, other=-infinity) + evidence
    largest = tl.maximum(tl.max(unstable, 0), tl.max(stable, 0))
    unstable = tl.exp(unstable - largest)
    stable = tl.exp(stable - largest)

    t = tl.load(t_ptr)
    observations = t.to(tl.float64) + 1
    share = tl.sum(unstable, 0) / (observations * num_clones)
    unstable = unstable * (t.to(tl.float64) / observations) + tl.full([], theta, tl.float64) * share
    stable = stable + tl.full([], rest, tl.float64) * share
    total = tl.sum(tl.where(mask, unstable + stable, 0.0), 0)
    # None of them where every clone is dead: the state stays.
    write = clones < tl.where(informative, num_clones, 0)
    tl.store(logw_ptr + clones, tl.log(unstable / total), mask=write)
    tl.store(logw_ptr + num_clones + clones, tl.log(stable / total), mask=write)
    tl.store(log_posterior_ptr + clones, tl.log((unstable + stable) / total), mask=write)
    tl.store(t_ptr, t + informative.to(tl.int64))


def switch_update_(
    logw: Tensor, log_posterior: Tensor, t: Tensor, log_likelihood: Tensor, theta: float
) -> None:
    """The op, on checked arguments."""
    num_clones = logw.size(1)
    block = max(triton.next_power_of_2(num_clones), 16)
    launch(
        switch_update_kernel,
        (1,),
        logw,
        log_posterior,
        t,
        log_likelihood.contiguous(),
        num_clones,
        float(theta),
        1.0 - theta,
        num_warps=1 if block <= 128 else 4 if block <= 1024 else 16,
        BLOCK=block,
    )
