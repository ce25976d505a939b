"""Inputs and error budgets, shared by the tests and the benchmarks.

Budget: a backend may be as far from the float64 truth as the same-dtype reference is, plus a small constant. No
tolerance is guessed per test.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Slack over the reference's own error, in units of the largest true magnitude: a few roundings of that dtype.
_SLACK = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest |actual - truth| over the finite entries, relative to the largest finite |truth| (at least 1e-30).

    inf where NaN or infinities do not stand in the same places.
    """
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    finite = truth.isfinite()
    same = torch.equal(actual[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5))
    if not same or not actual[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().clamp(min=1e-30)
    return float((actual[finite] - truth[finite]).abs().max() / scale)


def assert_within_budget(
    actual: Tensor, reference: Tensor, truth: Tensor, name: str, *, slack: float | None = None
) -> None:
    """Fail unless `actual` is as near to the float64 `truth` as `reference`, of the same dtype, plus a small slack."""
    if slack is None:
        slack = _SLACK[actual.dtype]
    error, own = relative_error(actual, truth), relative_error(reference, truth)
    if not error <= 1.5 * own + slack:
        raise AssertionError(
            f"{name}: error {error:.2e}, the reference's own {own:.2e} + {slack:.0e}"
        )


def require(op: str, backend: str) -> str | None:
    """Why `backend` cannot be tested for `op` here, or None; raises if ALRAO_REQUIRE names the backend."""
    state = backends.status(op, backend)
    if state.available:
        return None
    if backend in os.environ.get("ALRAO_REQUIRE", "").split(","):
        raise AssertionError(
            f"ALRAO_REQUIRE names {backend}, which cannot run {op}: {state.reason}"
        )
    return state.reason


class MixtureInputs(NamedTuple):
    """Inputs of switch_mixture: `x [B, D]`, `weight [N, C, D]`, `bias [N, C]`, `log_posterior [N]`, `target [B]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    log_posterior: Tensor
    target: Tensor


def mixture_inputs(
    batch: int,
    features: int,
    classes: int,
    clones: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> MixtureInputs:
    """Random inputs whose logits have a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(batch, features)
    weight = normal(clones, classes, features) * (scale / max(features, 1) ** 0.5)
    offset = normal(clones, classes) * scale if bias else None
    log_posterior = normal(clones).log_softmax(0)
    target = torch.randint(classes, (batch,), generator=generator)
    return MixtureInputs(
        x.to(device, dtype),
        weight.to(device, dtype),
        None if offset is None else offset.to(device, dtype),
        log_posterior.to(device),
        target.to(device),
    )
