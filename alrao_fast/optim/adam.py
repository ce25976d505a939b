"""Adam and AdamW with one learning rate per feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.ops.feature_adam import feature_adam_
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.binding import Bucket
from alrao_fast.optim.rates import Sampler, check_lr_range


class AlraoAdam(AlraoOptimizer):
    """torch.optim.Adam, or AdamW, in which every feature has its own learning rate, drawn once (arXiv 1810.01322).

        p = p - lr * r(i) * m_hat / (sqrt(v_hat) + eps),    log r ~ U(log lo, log hi) per feature

    betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.Adam.
    decoupled_weight_decay: decay the weights as AdamW does, by lr * r(i) * weight_decay, instead of adding the decay
        to the gradient.
    eps_rule: "torch", or "authors" for that of the paper's code, where eps is not rescaled by the bias correction; it
        is for the pre-classifier only: clones keep torch's and get a param group of their own.
    master_weights: keep a float32 copy of bfloat16 and float16 parameters in the state. The moments of such parameters
        are float32 in any case: at beta2 = 0.999 a bfloat16 second moment would never come down.

    params, lr_range, lr, sampler, generator, rounding, model, foreach, fused, capturable and differentiable are those
    of `AlraoSGD`. Alrao with Adam is less reliable than with SGD: of the drawn rates fewer are usable.

    State per parameter: "rate" (float32), "step" (int64), "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master".
    """

    _op = "feature_adam"
    _rule_option = "eps_rule"
    _float32_states = True

    def __init__(
        self,
        params: Any,
        lr_range: tuple[float, float] = (1e-5, 10.0),
        *,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        eps_rule: str = "torch",
        rounding: str | None = None,
        master_weights: bool = False,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "eps_rule": eps_rule,
            "rounding": rounding,
            "master_weights": master_weights,
            "lr_range": check_lr_range(lr_range),
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, sampler=sampler, generator=generator, model=model)

    def _check_group(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not (isinstance(betas, tuple | list) and len(betas) == 2):
            raise ValueError(f"betas is {betas!r}; expected two numbers")
        for number, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{number}] is {beta}; expected 0 <= beta < 1")
        if not group["eps"] >= 0.0:
            raise ValueError(f"eps is {group['eps']}; expected a number >= 0")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        if group["amsgrad"]:
            return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return ("exp_avg", "exp_avg_sq")

    def _update(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        group: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        lr = self._multiplier(group["lr"], bucket)
        if bucket.plan is not None and not torch.compiler.is_compiling():
            tensor = isinstance(lr, Tensor)
            beta1, beta2 = group["betas"]
            return bucket.plan.adam(
                grads,
                lr=1.0 if tensor else lr,
                lr_tensor=lr if tensor else None,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                amsgrad=group["amsgrad"],
                decoupled=group["decoupled_weight_decay"],
                maximize=group["maximize"],
                authors_eps=group["eps_rule"] == "authors",
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
        feature_adam_(
            bucket.params,
            grads,
            bucket.states[0],
            bucket.states[1],
            bucket.rates,
            steps=bucket.steps,
            max_exp_avg_sqs=bucket.states[2] if group["amsgrad"] else None,
            inners=bucket.inners,
            masters=bucket.masters or None,
            seeds=bucket.seeds or None,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            eps_rule=group["eps_rule"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            impl=bucket.impl,
        )
        return True
