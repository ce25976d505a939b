"""One call of the feature ops on the same tensors again and again: by a compiled plan where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from alrao_fast import backends
from alrao_fast.functional import feature_adam_, feature_sgd_
from alrao_fast.ops.plan import FeaturePlan
from alrao_fast.optim.binding import PLANNED


class FeatureUpdate:
    """SGD (no states, or momentum buffers) or Adam (two or three states) on `params`, of one device and dtype."""

    def __init__(
        self,
        params: list[Tensor],
        states: list[list[Tensor]],
        rates: list[Tensor],
        inners: list[int],
        steps: Tensor,
    ) -> None:
        self.params, self.states, self.rates, self.inners, self.steps = (
            params,
            states,
            rates,
            inners,
            steps,
        )
        self._plan: FeaturePlan | None = None

    def sgd(self, grads: Sequence[Tensor], group: dict[str, Any], *, authors: bool) -> None:
        """One step with the options of `group` and its lr as a multiplier."""
        options = {
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group.get("maximize", False),
        }
        if self._planned("feature_sgd"):
            self._run("sgd", grads, {**options, "authors_momentum": authors})
            return
        feature_sgd_(
            self.params,
            grads,
            self.rates,
            inners=self.inners,
            momentum_buffers=self.states[0] if self.states else None,
            steps=self.steps,
            momentum_rule="authors" if authors else "torch",
            **options,
        )

    def adam(self, grads: Sequence[Tensor], group: dict[str, Any], *, authors: bool) -> None:
        """One step with the options of `group` and its lr as a multiplier."""
        beta1, beta2 = group["betas"]
        options = {
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": group.get("maximize", False),
        }
        if self._planned("feature_adam"):
            more = {"beta1": beta1, "beta2": beta2, "amsgrad": group["amsgrad"], "decoupled": False}
            self._run("adam", grads, {**options, **more, "authors_eps": authors})
            return
        feature_adam_(
            self.params,
            grads,
            self.states[0],
            self.states[1],
            self.rates,
            steps=self.steps,
            max_exp_avg_sqs=self.states[2] if group["amsgrad"] else None,
            inners=self.inners,
            betas=(beta1, beta2),
            eps_rule="authors" if authors else "torch",
            **options,
        )

    def _planned(self, op: str) -> bool:
        return backends.select(op, self.params[0].device) in PLANNED

    def _run(self, name: str, grads: Sequence[Tensor], options: dict[str, Any]) -> None:
        for _ in range(2):
            if self._plan is None:
                self._plan = FeaturePlan(
                    self.params, self.states, [], self.rates, self.inners, [], self.steps
                )
            step = getattr(self._plan, name)
            if step(grads, lr=1.0, lr_tensor=None, grad_scale=None, found_inf=None, **options):
                # Autograd has to see that the parameters have changed; the kernels do not tell it.
                increment_version(self.params)
                return
            # A parameter has moved since.
            self._plan = None
        raise RuntimeError("internal error: an update plan is stale right after it was made")
