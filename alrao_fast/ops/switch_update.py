"""switch_update_: one Bayesian update of the switch posterior (reference/switch_update.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.arguments import Flag, Number
from alrao_fast.ops import dispatch
from alrao_fast.ops.checks import check, check_tensor, check_together
from alrao_fast.reference import switch_update as reference

OP = "switch_update"
THETA = Number(above=0, below=1, words="0 < theta < 1")
_MEAN = Flag()
backends.OPS[OP] = "switch_update_"


def _check_logw(logw: Tensor, log_posterior: Tensor, name: str, other_shape: Sequence[int]) -> None:
    """N is that of `logw`, unless the two others agree on another."""
    check(
        logw.dim() == 2 and logw.size(0) == 2 and logw.size(1) > 0,
        f"logw: got shape {list(logw.shape)}, expected [2, N] with N >= 1",
    )
    outvoted = log_posterior.dim() == 1 and log_posterior.shape == other_shape != logw.shape[1:]
    check(
        not outvoted,
        f"logw: got shape {list(logw.shape)}, expected {[2, *log_posterior.shape]}, as log_posterior and {name} have "
        "it",
    )


def _check_state(logw: Tensor, log_posterior: Tensor, t: Tensor, theta: float) -> None:
    for name, tensor, shape, dtype in (
        ("logw", logw, logw.shape, torch.float64),
        ("log_posterior", log_posterior, logw.shape[1:], torch.float64),
        ("t", t, (), torch.int64),
    ):
        check_tensor(name, tensor, shape, (dtype,), logw.device)
    for name, tensor in (("logw", logw), ("log_posterior", log_posterior)):
        check(
            tensor.is_contiguous(),
            f"{name}: got strides {list(tensor.stride())} for shape {list(tensor.shape)}, expected "
            "a contiguous tensor",
        )
    check(0 < theta < 1, f"theta: got {theta:g}, expected 0 < theta < 1")


def _check(
    logw: Tensor, log_posterior: Tensor, t: Tensor, log_likelihood: Tensor, theta: float
) -> None:
    """For Triton; the compiled implementations check by themselves (csrc/switch/checks.cpp)."""
    _check_logw(logw, log_posterior, "log_likelihood", log_likelihood.shape)
    _check_state(logw, log_posterior, t, theta)
    dtypes = torch.float32, torch.float64
    check_tensor("log_likelihood", log_likelihood, logw.shape[1:], dtypes, logw.device)


def _check_observe(
    logw: Tensor,
    log_posterior: Tensor,
    t: Tensor,
    running: Tensor,
    stats: Tensor,
    mean: bool,
    theta: float,
) -> None:
    _check_logw(logw, log_posterior, "stats", stats.shape[1:])
    _check_state(logw, log_posterior, t, theta)
    for name, tensor in (("running", running), ("stats", stats)):
        check_tensor(name, tensor, (3, logw.size(1)), (torch.float64,), logw.device)
    check(running.is_contiguous(), "running: got a strided tensor, expected a contiguous one")


_STATE = "Tensor(a!) logw, Tensor(b!) log_posterior, Tensor(c!) t"
for _schema, _checked in (
    (f"switch_update_({_STATE}, Tensor log_likelihood, float theta) -> ()", _check),
    (
        f"switch_observe_({_STATE}, Tensor(d!) running, Tensor stats, bool mean, float theta) -> ()",
        _check_observe,
    ),
):
    dispatch.outside_graphs(
        dispatch.define(_schema, dispatch.no_result),
        dispatch.define_triton(_schema, dispatch.no_result, OP, _checked),
    )


def observe_op(backend: str) -> Any:
    """The op of `switch_observe_` on a backend that has one."""
    return _twin if backend == "triton" else _observe


_observe = dispatch.overload("switch_observe_")
_twin = dispatch.overload("switch_observe_", "triton")


def switch_update_(
    logw: Tensor,
    log_posterior: Tensor,
    t: Tensor,
    log_likelihood: Tensor,
    *,
    theta: float = 0.999,
    impl: str = "auto",
) -> None:
    """Update the switch state in place by one observation: the N clones' log-likelihoods.

    Args:
        logw: `[2, N]` float64, the log of the joint posterior over (unstable, stable) and clone.
        log_posterior: `[N]` float64, the log posterior over clones, `logsumexp_k logw[k]`.
        t: int64 scalar tensor, the number of the next observation (1 at the start).
        log_likelihood: `[N]` float32 or float64. NaN and +inf count as -inf. If all are -inf the
            state stays as it is.
        theta: the share of redistributed mass that may switch again, in (0, 1). 0.999 in the paper.
        impl: "auto", or the backend that must run it.

    With `l` the log-likelihood and `pi = 1 / (t + 1)`:

        logw += l;  pool = logsumexp(logw[0]) + log(pi);  logw[0] += log(1 - pi)
        logw[k] = logaddexp(logw[k], log([theta, 1 - theta][k]) + pool - log N)
        logw -= logsumexp(logw);  log_posterior = logsumexp_k logw[k];  t += 1
    """
    check_together(logw=logw, log_posterior=log_posterior, t=t, log_likelihood=log_likelihood)
    theta = THETA.plain("theta", theta)
    backend = backends.select(OP, logw.device, impl)
    if backend == "reference":
        _check(logw, log_posterior, t, log_likelihood, theta)
        reference.switch_update_(logw, log_posterior, t, log_likelihood, theta)
    else:
        op = dispatch.overload("switch_update_", backend)
        op(logw, log_posterior, t, log_likelihood.detach(), float(theta))


def switch_observe_(
    logw: Tensor,
    log_posterior: Tensor,
    t: Tensor,
    running: Tensor,
    stats: Tensor,
    *,
    mean: bool = True,
    theta: float = 0.999,
    impl: str = "auto",
) -> None:
    """Take the statistics of a batch: add them to `running`, and update the switch by them.

    `stats [3, N]` and `running [3, N]` are float64, as `switch_mixture_stats` returns them. The
    observation is the mean of the log-likelihoods over the counted samples, `-stats[0] / stats[2]`,
    or their sum. With nothing counted the switch stays as it is. The other arguments are those of
    `switch_update_`. The kernels do it in one call: for a small head the six small operations that it
    replaces take as long as the head's gradients.
    """
    check_together(logw=logw, log_posterior=log_posterior, t=t, running=running, stats=stats)
    theta = float(THETA.plain("theta", theta))
    mean = _MEAN.check("mean", mean)
    backend = backends.select(OP, logw.device, impl)
    if backend != "reference":
        observe_op(backend)(logw, log_posterior, t, running, stats.detach(), mean, theta)
        return
    _check_observe(logw, log_posterior, t, running, stats, mean, theta)
    running.add_(stats)
    average = -stats[0] / stats[2]
    observed = average if mean else average * stats[2]
    switch_update_(logw, log_posterior, t, observed, theta=theta, impl=impl)
