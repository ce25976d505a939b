"""The pass of linear classifiers by the mixture's compiled kernels: each way is one call, and no logits are kept.

The kernels make the logits again on each way back instead of reading them from memory. Measured on a CPU, that is as
fast as keeping them or faster, from 10 classes to 2000, and it needs no memory for them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.compat._passes import LinearPass, Own, check_features, living, sum_of
from alrao_fast.ops.dispatch import overload
from alrao_fast.ops.mixture.checks import CPU_MEMORY_BUDGET

# The pass has its own way back: the one registered for the ops would only cost time.
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


class _Kernels(NamedTuple):
    log_prob: Callable[..., Any]
    log_prob_backward: Callable[..., Any]
    nll: Callable[..., Any]


@functools.cache
def _kernels(backend: str) -> _Kernels:
    names = ("log_prob", "log_prob_backward", "nll")
    return _Kernels(*(overload(f"switch_mixture_{name}", backend) for name in names))


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are there and take these tensors."""
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    return backends.select("switch_mixture", x.device) != "reference"


class FusedPass(LinearPass):
    """`LinearPass` with log_softmax; the outputs themselves are only computed if somebody asks for them."""

    def check_finite(self, x: Tensor) -> None:
        # Dead layers are the kernels' business.
        if not math.isfinite(sum_of(x).item()):
            check_features(x)

    @functools.cached_property
    def alive(self) -> Tensor | None:  # type: ignore[override]
        return living(self.outputs)

    @functools.cached_property
    def _ops(self) -> _Kernels:
        return _kernels(backends.select("switch_mixture", self._x.device))

    @property
    def mixes(self) -> bool:
        return True

    def mixture(self, x: Tensor, log_prior: Tensor) -> Tensor:
        return _FusedMixture.apply(self, log_prior, x, *self.params)

    def log_prob(self, log_prior: Tensor) -> Tensor:
        """The mixture's log-probabilities [M, C]."""
        with _BelowAutograd():
            return self._ops.log_prob(*self._inputs(log_prior), CPU_MEMORY_BUDGET)

    def pull_mixture(
        self, grad: Tensor, log_prior: Tensor, log_prob: Tensor, features: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The way back from `log_prob`: gradients by the features and by the slots."""
        with _BelowAutograd():
            dx, *slots = self._ops.log_prob_backward(
                grad.contiguous(),
                *self._inputs(log_prior),
                log_prob,
                features,
                True,
                CPU_MEMORY_BUDGET,
            )
        dx = dx.view(self._shape).to(self._x.dtype) if features else None
        return dx, self._typed(slots)

    def own_nll(self, targets: Tensor, ignored: int, *, masked: bool) -> Own:
        if not masked:
            # The kernels leave out dead layers; here they shall not be.
            return super().own_nll(targets, ignored, masked=masked)
        prior = torch.zeros(self._weight.size(0), dtype=torch.float64, device=targets.device)
        with _BelowAutograd():
            _, stats, _, *slots = self._ops.nll(
                *self._inputs(prior),
                targets,
                ignore_index=ignored,
                mean=True,
                need_dx=False,
                need_dw=True,
                memory_budget=CPU_MEMORY_BUDGET,
            )
        return Own(stats[0] / stats[2], self._typed(slots), stats[1])

    def _inputs(self, log_prior: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self._x.contiguous(), self._weight, self._bias, log_prior

    def _typed(self, slots: list[Tensor]) -> list[Tensor | None]:
        dtype = self._weight.dtype
        return [slot.to(dtype) for slot in slots[: 1 if self._bias is None else 2]]


class _FusedMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: FusedPass, log_prior: Tensor, x: Tensor, *params: Tensor
    ) -> Tensor:
        result = fused.log_prob(log_prior)
        # The posterior moves on in place; the way back is from the one that was used.
        ctx.fused, ctx.log_prior = fused, log_prior.clone()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (log_prob,) = ctx.saved_tensors
        features = ctx.needs_input_grad[2]
        dx, slots = ctx.fused.pull_mixture(grad, ctx.log_prior, log_prob, features)
        return None, None, dx, *ctx.fused.split(slots)
