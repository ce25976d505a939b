"""SGD with one learning rate per feature."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast.arguments import Flag, Optional
from alrao_fast.ops.feature import Options
from alrao_fast.ops.feature_sgd import OP, OPTIONS
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.param_groups import SHARED
from alrao_fast.optim.rates import Constant, Sampler


class AlraoSGD(AlraoOptimizer):
    """torch.optim.SGD in which every feature has its own learning rate, drawn once (arXiv 1810.01322, section 3).

        p = p - lr * r(i) * d,    log r ~ U(log lo, log hi) per feature

    where d is the gradient with momentum and decay as in SGD.

    Args:
        params: an `AlraoModel` or any module, an iterable of tensors or (name, tensor) pairs, or param groups whose
            "params" are any of these. A group may have its own `sampler` and `lr_range`. Frozen parameters get their
            rate and are skipped while they have no gradient.
        lr_range: (lo, hi), the interval of the rates, 0 < lo <= hi. Clone n of N has lo * (hi/lo)^(n/(N-1)).
        lr: the multiplier of all drawn rates, float or one-element tensor: what LR schedulers move.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        normalized_momentum: multiply the rates by 1 - momentum, so that a rate says how far one gradient moves a
            parameter over all the steps in which it counts: an entry has the learning rate lr * r(i) * (1 - momentum)
            of torch.optim.SGD. Without it a momentum of 0.9 makes steps ten times as large as the interval says, and
            networks without normalisation diverge. None: on, unless momentum_rule is "authors" or a group's sampler is
            `Constant`, with which this is torch.optim.SGD.
        sampler: `LogUniform(*lr_range)` if None; `PerWeight`, `Fraction`, `Constant` or a function `(n, generator) ->
            [n]` of rates.
        generator: a CPU torch.Generator to draw from; the same seed gives the same rates on any device. Ranks whose
            parameters are DTensors, or whose networks have clones, take over the first one's rates; plain networks
            without clones need the same seed on every rank.
        momentum_rule: "torch", or "authors" for that of the paper's code, which shortens the memory of fast features;
            it is for the pre-classifier only: clones keep torch's and get a param group of their own.
        rounding: how bfloat16 and float16 parameters are rounded: "stochastic" (None: the same) or "nearest", under
            which a rate of 1e-5 moves next to nothing.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters in the state, and float32 momentum.
            What is written into a parameter between two steps, by any way, counts: where it is no longer its master
            rounded, the master takes its value. A step moves 14 bytes an entry, 22 with momentum, instead of 6 and
            10.
        warmup_steps: lr grows linearly from 0 over so many updates of each parameter, counted on the device: no
            scheduler is needed for it, and one that is there multiplies.
        averaging: keep a running average of every parameter, in which later values count more: after t updates
            average += (a + 1) / (t + a) * (p - average), a the number given, 8 being usual (polynomial-decay averaging,
            Shamir and Zhang, ICML 2013). From 2048 (a + 1) updates on only every 2nd, later every 4th value counts, and
            so on, or float32 would lose what is new. `with opt.averaged():` evaluates it. A step moves 8 bytes an entry
            more, the state has 4. None: no averages.
        model: the module whose feature layouts apply where `params` are bare tensors. Those of an `AlraoModel`, or of
            clones in any module, need none: `AlraoSGD(net.parameters())` is `AlraoSGD(net)`. Without it other bare
            tensors get one rate per index of dimension 0, and a warning says so.
        fused: None or True for the best implementation available, False for the plain PyTorch reference. With True,
            as in torch.optim, a GradScaler leaves loss scaling to the kernels and never waits for the device; unscale
            gradients before clipping then. Otherwise it unscales and checks them itself, except for float16
            parameters, whose gradients it refuses: None is True for them in this respect.
        foreach, differentiable: must not be true.
        capturable: always so; accepted for uniformity. Under a CUDA graph `lr` must be a tensor on the device for
            schedulers to move it: `GraphedStep` sees to it.

    State per parameter, made at construction: "rate" (float32), "step" (int64), "momentum_buffer", "master", "average"
    (float32, float64 for float64 parameters), after `anneal_rates` "drawn_rate" (float32); of frozen ones only rates.

    Raises TypeError or ValueError, naming the argument, for options of another type or out of range (a number that is
    not finite among them), for a set of parameters, for one that is given twice or is uninitialized; RuntimeError at
    `step()` for sparse gradients. Options that are assigned to a param group are checked by the next
    `step()`, which raises before it writes anything; the value of a tensor on a GPU is not looked at.
    """

    _op = OP
    _kinds = {**SHARED, **OPTIONS, "normalized_momentum": Optional(Flag())}
    _rule_option = "momentum_rule"
    _of_old = MappingProxyType({"normalized_momentum": False})

    def __init__(
        self,
        params: Any,
        lr_range: tuple[float, float] = (1e-5, 10.0),
        *,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        momentum_rule: str = "torch",
        normalized_momentum: bool | None = None,
        rounding: str | None = None,
        master_weights: bool = False,
        warmup_steps: int = 0,
        averaging: float | None = None,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(locals())

    def _check_group(self, options: Mapping[str, Any]) -> None:
        super()._check_group(options)
        check_group(options)

    def _lr_factor(self, group: dict[str, Any]) -> float:
        momentum = group["momentum"]
        # From 1 on there is no sum of the steps to go by.
        normalized = momentum and group["normalized_momentum"] and momentum < 1
        return 1.0 - float(momentum) if normalized else 1.0

    def _implied(self, group: dict[str, Any], sampler: Sampler | None) -> dict[str, Any]:
        options = {**self.defaults, **group}
        if options["normalized_momentum"] is not None:
            return {}
        plain = isinstance(sampler or self._sampler, Constant)
        return {"normalized_momentum": options["momentum_rule"] == "torch" and not plain}

    def _options(self, group: dict[str, Any]) -> Options:
        return options_of(group, authors=group["momentum_rule"] == "authors")


def check_group(options: Mapping[str, Any]) -> None:
    """Raise ValueError where options that torch.optim.SGD has, too, do not go together."""
    momentum, dampening = options["momentum"], options["dampening"]
    if options["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov: got True with momentum={momentum}, dampening={dampening}, expected a momentum > 0 and no "
            "dampening"
        )


def options_of(group: dict[str, Any], *, authors: bool) -> Options:
    """The op's options of a param group that has those of torch.optim.SGD."""
    return {
        "momentum": group["momentum"],
        "dampening": group["dampening"],
        "weight_decay": group["weight_decay"],
        "nesterov": group["nesterov"],
        "authors_momentum": authors,
    }
