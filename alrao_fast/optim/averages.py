"""Running averages of the parameters in the parameters' place, for as long as they are evaluated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alrao_fast import fsdp1, live, sharding
from alrao_fast.arguments import Instance, Optional

if TYPE_CHECKING:
    from alrao_fast.optim.base import AlraoOptimizer

_MODEL = Optional(Instance(nn.Module, "the torch.nn.Module that is evaluated"))


@contextmanager
def averaged(
    optimizer: AlraoOptimizer, model: nn.Module | None, loader: Iterable[Any] | None
) -> Iterator[None]:
    """What `AlraoOptimizer.averaged` returns."""
    model = _MODEL.check("model", model)
    if (model is None) != (loader is None):
        missing, given = ("loader", "model") if loader is None else ("model", "loader")
        raise ValueError(f"{missing}: got None with a {given}, expected both or neither")
    if optimizer._shows_averages:
        raise RuntimeError("averaged() within averaged(): leave the outer block first")
    shown = _shown(optimizer)
    buffers = [] if model is None else list(model.buffers())
    statistics = _statistics(optimizer) if model is None else []
    with torch.no_grad():
        kept = [(param, param.detach().clone()) for param, _ in shown]
        before = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    optimizer._shows_averages = True
    try:
        with torch.no_grad():
            for param, average in shown:
                param.copy_(average)
        _forget_gathered(optimizer, model)
        if model is not None and loader is not None:
            try:
                _estimate_statistics(model, loader)
            finally:
                # What training passes write: the vectors of spectral normalisation, too. What the block itself
                # writes into other buffers, such as metrics, stays.
                kept += [(buffer, old) for buffer, n, old in before if buffer._version != n]
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        optimizer._shows_averages = False
        _forget_gathered(optimizer, model)
    if statistics and all(tensor._version == version for tensor, version in statistics):
        # Of the block that the context manager's __exit__ leaves.
        warnings.warn(
            "averaged(): BatchNorm's running statistics were those of the weights in training, not of their averages: "
            "averaged(net, loader) estimates them",
            stacklevel=3,
        )


def _statistics(optimizer: AlraoOptimizer) -> list[tuple[Tensor, int]]:
    """The statistics of batch normalisation that is trained, and their versions."""
    modules = (module for root in optimizer._homes.roots() for module in root.modules())
    norms = (module for module in modules if isinstance(module, _BatchNorm))
    # A forward in training leaves the version of the means as it was, and raises that of the count.
    tensors = (
        tensor
        for norm in norms
        if norm.weight is None or norm.weight.requires_grad
        for tensor in (norm.running_mean, norm.num_batches_tracked)
    )
    return [(t, t._version) for t in tensors if t is not None and not t.is_inference()]


def _forget_gathered(optimizer: AlraoOptimizer, model: nn.Module | None) -> None:
    """Have sharded modules gather what their shards are now: after a forward without a backward FSDP keeps the whole
    weights of its root, of others as it was told, for the next forward."""
    own = set(optimizer._homes.roots())
    around = (whole for whole in live.models if not own.isdisjoint(whole.modules()))
    roots = {*own, *around, *(() if model is None else (model,))}
    sharding.forget_gathered(module for root in roots for module in root.modules())
    fsdp1.forget_gathered(p for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def _estimate_statistics(model: nn.Module, loader: Iterable[Any]) -> None:
    """Batch normalisation's running statistics as means over the batches, but for layers that are frozen: those that
    stay in evaluation mode when the model trains. The random numbers that follow are those of a run without."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    # In evaluation mode all layers are in it: which of them are frozen their own train() says.
    frozen = [module for module, training in modes.items() if model.training and not training]
    try:
        model.train()
        for module in frozen:
            module.training = False
        own = [norm for norm in norms if norm.training and norm.track_running_stats]
        for norm in own:
            norm.reset_running_stats()
            # A mean over all batches.
            norm.momentum = None
        count = 0
        with _same_random_numbers(model):
            for batch in loader if own else ():
                model(_inputs(batch, model))
                count += 1
        if own and not count:
            raise ValueError(
                "loader: got no batches, expected some: an iterator that was used up gives none"
            )
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _same_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    """What is drawn within, by dropout or the loader's order, changes nothing of what is drawn afterwards."""
    devices = {param.device for param in model.parameters()} - {torch.device("cpu")}
    kind = min((device.type for device in devices), default="cuda")
    places = sorted(device.index or 0 for device in devices if device.type == kind)
    return torch.random.fork_rng(places, device_type=kind)


def _inputs(batch: Any, model: nn.Module) -> Any:
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"loader: got a batch of {type(inputs).__name__}, expected tensors, or tuples that begin with the input's: "
            "(x for x, *_ in loader) makes such batches"
        )
    return inputs.to(next(model.parameters()).device)


def _shown(optimizer: AlraoOptimizer) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have been updated, and their averages."""
    optimizer.refresh()
    groups = [g for g in optimizer.param_groups if g.get("averaging") is not None]
    if not groups:
        raise ValueError(
            "averaging: got None in every param group, expected a number, such as 8, in at least one"
        )
    params = [param for group in groups for param in group["params"]]
    params = [param for param in params if "average" in optimizer.state[param]]
    # One wait for each device in place of one for each parameter.
    counts: dict[torch.device, list[Tensor]] = {}
    for param in params:
        step = optimizer.state[param]["step"]
        counts.setdefault(step.device, []).append(step)
    begun = {device: iter(torch.stack(steps).tolist()) for device, steps in counts.items()}
    return [
        (param, own["average"])
        for param in params
        if next(begun[(own := optimizer.state[param])["step"].device]) > 0
    ]
