"""The optimizers of the whole model, and the training step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alrao_fast.compat._clone_optimizers import CloneOptimizers
from alrao_fast.compat._evaluation import Stacked
from alrao_fast.compat._losses import Criterion
from alrao_fast.compat._spec import AdamSpec, SGDSpec, SpecOptimizer
from alrao_fast.compat.alrao_model import AlraoModel
from alrao_fast.compat.custom_layers import L2LossAdditional
from alrao_fast.compat.learningratesgen import generator_randomlr_neurons, lr_sampler_generic

__all__ = [
    "AdamAlrao",
    "AdamSpec",
    "SGDAlrao",
    "SGDSpec",
    "alrao_step",
    "init_alrao_optimizer",
    "sample_best_candidate",
]


class _AlraoOptimizer:
    """An optimizer of the internal network and one for each last layer.

    opt_internal_nn, opt_last_layers: these; last_layers_lr: the last layers' rates; posterior: what
    `update_posterior` was given last.
    """

    _spec: type[SGDSpec] | type[AdamSpec]
    _kind: type[Optimizer]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        (params, rates, clones, clone_rates), options = _four(args, kwargs)
        self.last_layers_lr: list[float] = list(clone_rates)
        self.opt_internal_nn = self._spec(params, rates, **options)
        self._clones = CloneOptimizers(self._kind, clones, self.last_layers_lr, options)
        self.posterior: Any = None

    @property
    def opt_last_layers(self) -> list[Optimizer]:
        return self._clones.optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups = list(self.opt_internal_nn.param_groups)
        return groups + [group for opt in self.opt_last_layers for group in opt.param_groups]

    def step(self) -> None:
        """Update the internal network and the last layers by the gradients that are there."""
        internal = self.opt_internal_nn
        if internal._optimizer_step_pre_hooks or internal._optimizer_step_post_hooks:
            internal.step()
        else:
            internal.update()
        self._clones.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.opt_internal_nn.param_groups:
            for param in group["params"]:
                param.grad = None
        self._clones.zero_grad()

    def last_layers_zero_grad(self) -> None:
        """Drop the gradients of the last layers."""
        self._clones.zero_grad()

    def expect(self, stacked: list[Stacked]) -> None:
        """Learn which of the last layers' gradients are slices of one tensor, for the next step."""
        self._clones.stacked = stacked

    def update_posterior(self, posterior: Any) -> None:
        """Keep the posterior over the last layers, as `posterior`."""
        self.posterior = posterior

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the rates of the internal network included."""
        return {
            "opt_internal_nn": self.opt_internal_nn.state_dict(),
            "opt_last_layers": [opt.state_dict() for opt in self.opt_last_layers],
            "last_layers_lr": list(self.last_layers_lr),
            "posterior": self.posterior,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; raises, changing nothing, where it does not fit.

        ValueError for another number of last layers.
        """
        saved = state_dict["opt_last_layers"]
        if len(saved) != len(self.opt_last_layers):
            raise ValueError(
                f"state_dict has {len(saved)} last layers; expected {len(self.opt_last_layers)}"
            )
        rates, posterior = list(state_dict["last_layers_lr"]), state_dict["posterior"]
        before = [opt.state_dict() for opt in self.opt_last_layers]
        try:
            for opt, state in zip(self.opt_last_layers, saved):
                opt.load_state_dict(state)
            self.opt_internal_nn.load_state_dict(state_dict["opt_internal_nn"])
        except Exception:
            for opt, state in zip(self.opt_last_layers, before):
                opt.load_state_dict(state)
            raise
        self.last_layers_lr, self.posterior = rates, posterior

    # The older names.
    classifiers_zero_grad = last_layers_zero_grad

    @property
    def opt_preclassifier(self) -> SpecOptimizer:
        return self.opt_internal_nn

    @property
    def opt_classifiers(self) -> list[Optimizer]:
        return self.opt_last_layers

    @property
    def classifiers_lr(self) -> list[float]:
        return self.last_layers_lr


_OLDER = {
    "parameters_preclassifier": "parameters_internal_nn",
    "lr_preclassifier": "lr_internal_nn",
    "classifiers_parameters_list": "last_layers_parameters_list",
    "classifiers_lr": "last_layers_lr",
}
_NAMES = tuple(_OLDER.values())


def _four(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The four leading arguments, given by position, name or older name, and the other keyword arguments."""
    if len(args) > len(_NAMES):
        raise TypeError(f"{len(args)} positional arguments; expected {', '.join(_NAMES)}")
    values = {**dict(zip(_NAMES, args)), **{_OLDER.get(k, k): v for k, v in kwargs.items()}}
    missing = [name for name in _NAMES if name not in values]
    if missing:
        raise TypeError(f"argument {missing[0]!r} is missing")
    return [values.pop(name) for name in _NAMES], values


class SGDAlrao(_AlraoOptimizer):
    """`SGDAlrao(parameters_internal_nn, lr_internal_nn, last_layers_parameters_list, last_layers_lr, momentum=0.,
    weight_decay=0.)`: `SGDSpec` for the internal network, torch.optim.SGD for each last layer.

    lr_internal_nn: a tensor of rates for each parameter, of its shape; a vector over its dimension 0 or a single rate
    will do. last_layers_lr: one rate for each last layer.
    """

    _spec = SGDSpec
    _kind = torch.optim.SGD

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(_NAMES):
            kwargs = {**dict(zip(("momentum", "weight_decay"), args[len(_NAMES) :])), **kwargs}
            args = args[: len(_NAMES)]
        super().__init__(*args, **kwargs)


class AdamAlrao(_AlraoOptimizer):
    """`AdamAlrao(parameters_internal_nn, lr_internal_nn, last_layers_parameters_list, last_layers_lr, **adam_kwargs)`:
    `AdamSpec` for the internal network, torch.optim.Adam for each last layer; arguments as in `SGDAlrao`."""

    _spec = AdamSpec
    _kind = torch.optim.Adam


def init_alrao_optimizer(
    net: AlraoModel,
    n_last_layers: int,
    minlr: float,
    maxlr: float,
    optim_name: str = "SGD",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> SGDAlrao | AdamAlrao:
    """The optimizer of `net`, its last layers' rates log-spaced from `minlr` to `maxlr` (one layer: minlr) and
    printed, the internal network's drawn in between, by neuron.

    optim_name: "SGD" or "Adam" (which takes no momentum); ValueError for another.
    """
    if optim_name not in ("SGD", "Adam"):
        raise ValueError(f"optim_name is {optim_name!r}; expected 'SGD' or 'Adam'")
    sampler = lr_sampler_generic(minlr, maxlr)
    steps = max(n_last_layers - 1, 1)
    ratio = math.log(maxlr / minlr)
    last_layers_lr = [minlr * math.exp(ratio * k / steps) for k in range(n_last_layers)]
    print("Classifiers LR:" + ", ".join(f"{lr:.1e}" for lr in last_layers_lr))
    arguments: tuple[Iterable[Any], ...] = (
        net.parameters_internal_nn(),
        generator_randomlr_neurons(net.internal_nn, sampler),
        net.last_layers_parameters_list(),
        last_layers_lr,
    )
    if optim_name == "SGD":
        return SGDAlrao(*arguments, momentum=momentum, weight_decay=weight_decay)
    return AdamAlrao(*arguments, weight_decay=weight_decay)


def alrao_step(
    net: AlraoModel,
    optimizer: SGDAlrao | AdamAlrao,
    criterion: Criterion,
    targets: Any,
    catch_up: bool = False,
    remove_non_numerical: bool = True,
) -> None:
    """Update the model after `loss.backward()` on the loss of the average of the last layers.

    The internal network follows the gradients that are there, clipped or not; each last layer follows its own loss
    `criterion(output, targets)` on the features of the last forward, which is not run again; an evaluation between the
    training forward and this call is one, too. The switch observes the batch.

    remove_non_numerical: a last layer whose loss is not finite is given a zero gradient. catch_up: see
    `AlraoModel.hard_catch_up`.
    """
    # The criterion of a single last layer, where this one only scores their mixture.
    own = net.loss if isinstance(criterion, L2LossAdditional) else criterion
    stacked = net.last_evaluation().own_gradients(own, targets, remove_non_numerical)
    optimizer.expect(stacked)
    # The switch first, from the outputs that are there: what cannot be scored changes nothing.
    net.update_switch(targets)
    optimizer.step()
    if catch_up:
        net.hard_catch_up()
    optimizer.update_posterior(net.posterior())


def sample_best_candidate(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """The outputs `outs[:, :, k]` of the last layer k of largest posterior, from `(outs, ps)`."""
    outs, ps = outputs
    return outs[:, :, int(ps.argmax())]
