"""The pass of linear classifiers by the mixture's compiled kernels: each way is one call, and no logits are kept.

The kernels make the logits again on each way back instead of reading them from memory. Measured on a CPU, that is as
fast as keeping them or faster, from 10 classes to 2000, and it needs no memory for them.
"""

import functools
import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from alrao_fast import backends
from alrao_fast.compat._passes import LinearPass, Own, Slots, check_features, living, sum_of
from alrao_fast.ops.dispatch import overload
from alrao_fast.ops.mixture.checks import CPU_MEMORY_BUDGET

# The pass has its own way back: the one registered for the ops would only cost time.
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


# The last pass over some layers, by the identity of the first parameter, which it keeps alive.
_LATEST: weakref.WeakValueDictionary[int, "FusedPass"] = weakref.WeakValueDictionary()


def keep_outputs(params: Iterable[Tensor]) -> None:
    """Have the last pass over these parameters ready for a change of them."""
    for param in params if _LATEST else ():
        latest = _LATEST.pop(id(param), None)
        if latest is not None:
            latest.keep()
            if not _LATEST:
                return


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    keep_outputs(param for group in optimizer.param_groups for param in group["params"])


# The last layers may be in an optimizer of torch's.
register_optimizer_step_pre_hook(_before_step)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are there and take these tensors."""
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    return backends.select("switch_mixture", x.device) != "reference"


class FusedPass(LinearPass):
    """`LinearPass` with log_softmax; the outputs themselves are only computed if somebody asks for them."""

    _kept = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _LATEST[id(self.params[0])] = self

    def keep(self) -> None:
        """Make ready for a change of the parameters: the outputs remain those of this forward."""
        if not self._kept and "_rows" not in self.__dict__:
            self._weight = self._weight.clone()
            self._bias = None if self._bias is None else self._bias.clone()
        self._kept = True

    @functools.cached_property
    def _rows(self) -> Tensor:
        if not self._kept:
            self.check_unchanged()
        return super()._rows

    def check_finite(self, x: Tensor) -> None:
        # Dead layers are the kernels' business.
        if not math.isfinite(sum_of(x).item()):
            check_features(x)

    @functools.cached_property
    def alive(self) -> Tensor | None:  # type: ignore[override]
        return living(self.outputs)

    @functools.cached_property
    def _backend(self) -> str:
        return backends.select("switch_mixture", self._x.device)

    @property
    def mixes(self) -> bool:
        return True

    def mix(self, log_prior: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mixture's log-probabilities [M, C]."""
        with _BelowAutograd():
            op = overload("switch_mixture_log_prob", self._backend)
            log_prob, log_mass = op(*self._inputs(log_prior), CPU_MEMORY_BUDGET)
        # The op normalises the posterior over the layers that are alive, the authors' average does not.
        average = log_prob + log_mass.unsqueeze(1)
        # The posterior moves on in place; the way back is from the one that was used.
        return average, (log_prior.clone(), log_prob, log_mass)

    def pull_mixture(
        self, grad: Tensor, kept: tuple[Tensor, ...], *, features: bool
    ) -> tuple[Tensor | None, Slots]:
        log_prior, log_prob, log_mass = kept
        with _BelowAutograd():
            dx, *slots = overload("switch_mixture_log_prob_backward", self._backend)(
                grad.contiguous(),
                *self._inputs(log_prior),
                log_prob,
                log_mass,
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
            _, stats, _, *slots = overload("switch_mixture_nll", self._backend)(
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

    def _typed(self, slots: list[Tensor]) -> Slots:
        dtype = self._weight.dtype
        return [slot.to(dtype) for slot in slots[: 1 if self._bias is None else 2]]
