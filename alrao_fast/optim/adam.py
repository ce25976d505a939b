"""Adam and AdamW with one learning rate per feature."""

from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.ops.feature import Options
from alrao_fast.ops.feature_adam import OP, OPTIONS
from alrao_fast.optim.annealing import recipe
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.param_groups import SHARED
from alrao_fast.optim.rates import LogTriangular, Sampler


class AlraoAdam(AlraoOptimizer):
    """torch.optim.Adam, or AdamW, in which every feature has its own learning rate, drawn once (arXiv 1810.01322).

        p = p - lr * r(i) * m_hat / (sqrt(v_hat) + eps)

    log r is drawn per feature from a triangular law on [log lo, log hi]; clone n of N has its quantile (n + 1/2) / N.

    Args:
        betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.Adam.
        decoupled_weight_decay: decay the weights as AdamW does, by the factor 1 - lr * r(i) * weight_decay, at least 0,
            instead of adding the decay to the gradient.
        eps_rule: "torch", or "authors" for that of the paper's code, where eps is not rescaled by the bias
            correction; it is for the pre-classifier only: clones keep torch's and get a param group of their own.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters in the state, which follows what is
            written into them, as in `AlraoSGD`; a step moves 30 bytes an entry instead of 22. The moments of such
            parameters are float32 in any case: at beta2 = 0.999 a bfloat16 second moment would never come down.
        rate_bound: the largest rate of a feature, as a multiple of the root mean square of its weights at construction:
            about the share of a feature that Adam changes in a step. It follows the width of a layer, as weights do,
            and makes the upper end of the interval nearly irrelevant. Features whose weights are all 0, and parameters
            on the meta device, are taken to be as large as torch's layers draw them. Clones are not bounded, nor are
            the rates of samplers without an interval. None: no bound, as in the paper.
        total_steps: the length of the run in steps, where it is known, and with it the whole recipe: a warm-up over 5 %
            of it, an interval that narrows to 0.4 decades around the clones' posterior mean (`anneal_rates`, 40 times),
            and averages, which `with opt.averaged():` evaluates. Needs clones among the parameters; steps beyond it
            keep the last rates.
        warmup_steps, averaging: as in `AlraoSGD`; None: as `total_steps` says, or neither. `averaging=False`: none in
            any case.
        sampler: `LogTriangular(*lr_range)` if None.

    params, lr_range, lr, generator, rounding, model, foreach, fused, capturable and differentiable are those of
    `AlraoSGD`, but for the default of lr_range: Adam moves an entry by about its rate whatever the gradient.

    State per parameter, made at construction: "rate" (float32), "step" (int64), "exp_avg", "exp_avg_sq",
    "max_exp_avg_sq", "master", "average", and where rates are bounded "drawn_rate" and "rate_limit" (float32); of
    frozen ones only these and the rate.

    Raises as `AlraoSGD` does; ValueError also for `total_steps` without clones among the parameters.
    """

    _op = OP
    _kinds = {**SHARED, **OPTIONS, "amsgrad": OP.options["amsgrad"]}
    _rule_option = "eps_rule"
    _float32_states = True
    _from_interval = LogTriangular

    def __init__(
        self,
        params: Any,
        lr_range: tuple[float, float] = (1e-4, 1.0),
        *,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        rate_bound: float | None = 0.1,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        eps_rule: str = "torch",
        rounding: str | None = None,
        master_weights: bool = False,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        averaging: float | bool | None = None,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        arguments = locals()
        self._run, implied = recipe(arguments.pop("total_steps"), warmup_steps, averaging)
        super().__init__(arguments | implied)
        if self._run:
            # From now on the state has all that it will have.
            self.anneal_rates(0.0)

    def _options(self, group: dict[str, Any]) -> Options:
        return options_of(group, authors=group["eps_rule"] == "authors")


def options_of(group: dict[str, Any], *, authors: bool) -> Options:
    """The op's options of a param group that has those of torch.optim.Adam."""
    beta1, beta2 = group["betas"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "amsgrad": group["amsgrad"],
        "decoupled": group.get("decoupled_weight_decay", False),
        "authors_eps": authors,
    }
