"""The optimizers' fast path: a plan made once for tensors that stay, so that a step passes only the gradients.

Eager mode only; under torch.compile the list ops (`feature_sgd_`, `feature_adam_`) are the honest graph nodes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from alrao_fast.ops.dispatch import LIB, define

define(
    "_feature_plan(Tensor[] tensors, int num_params, int num_states, int[] inners, int[] seeds, Tensor steps) -> int"
)
define("_feature_plan_options(int plan, float[] options) -> ()")
define("_feature_plan_free(int plan) -> ()")
for _op in ("_feature_sgd_planned_", "_feature_adam_planned_"):
    define(
        f"{_op}(int plan, Tensor[] grads, Tensor? lr, Tensor? grad_scale, Tensor? found_inf) -> bool"
    )
    LIB.impl(_op, torch.library.fallthrough_kernel, "Autograd")
_make = torch.ops.alrao_fast._feature_plan.default
_set_options = torch.ops.alrao_fast._feature_plan_options.default
_free = torch.ops.alrao_fast._feature_plan_free.default
_sgd = torch.ops.alrao_fast._feature_sgd_planned_.default
_adam = torch.ops.alrao_fast._feature_adam_planned_.default


class FeaturePlan:
    """Parameters with their states, masters, rates and layouts, checked, and cut into pieces for threads or blocks.

    Arguments as in the list ops: `states` holds the lists of states (`[momentum_buffers]`, `[]` without momentum,
    `[exp_avgs, exp_avg_sqs]` or, with amsgrad, `[exp_avgs, exp_avg_sqs, max_exp_avg_sqs]`). Raises RuntimeError, as
    they do, where the tensors do not fit together.

    All tensors are on one device, the CPU or a GPU of CUDA's. There the first step puts a table of the tensors into
    device memory, and every step is queued on the current stream; CUDA graphs may capture it, with the gradients'
    addresses as they are then, and stay valid whatever becomes of the plan.

    The plan keeps the tensors alive. `sgd` and `adam` return False, with nothing written, where a tensor is no longer
    what the plan saw (memory, shape, dtype: `module.to(...)`, `param.data = ...`): make a new plan then. They do not
    bump version counters: the caller does (`torch.autograd.graph.increment_version`).
    """

    __slots__ = ("__weakref__", "_number", "_options")

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        masters: Sequence[Tensor],
        rates: Sequence[Tensor],
        inners: Sequence[int],
        seeds: Sequence[int],
        steps: Tensor,
    ) -> None:
        tensors = [*params, *(tensor for state in states for tensor in state), *masters, *rates]
        self._number: int = _make(tensors, len(params), len(states), inners, seeds, steps)
        self._options: tuple[float, ...] = ()
        weakref.finalize(self, _free, self._number).atexit = False

    def sgd(
        self,
        grads: list[Tensor],
        *,
        lr: float,
        lr_tensor: Tensor | None,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        authors_momentum: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """One step of `feature_sgd_`."""
        options = (lr, momentum, dampening, weight_decay, nesterov, maximize, authors_momentum)
        if options != self._options:
            self._set(options)
        return _sgd(self._number, grads, lr_tensor, grad_scale, found_inf)

    def adam(
        self,
        grads: list[Tensor],
        *,
        lr: float,
        lr_tensor: Tensor | None,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        amsgrad: bool,
        decoupled: bool,
        maximize: bool,
        authors_eps: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """One step of `feature_adam_`."""
        options = (
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            amsgrad,
            decoupled,
            maximize,
            authors_eps,
        )
        if options != self._options:
            self._set(options)
        return _adam(self._number, grads, lr_tensor, grad_scale, found_inf)

    def _set(self, options: tuple[float, ...]) -> None:
        _set_options(self._number, [float(option) for option in options])
        self._options = options
