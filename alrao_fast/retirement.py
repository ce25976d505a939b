"""Retiring clones that the switch has ruled out: the head's cost goes back towards that of one last layer."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from alrao_fast import live
from alrao_fast.arguments import COUNT, Number, checked
from alrao_fast.monitor import heads_of
from alrao_fast.nn.clones import LinearClones

# Of torch.distributed, by module.
_WRAPPERS = {
    "torch.nn.parallel.distributed": "DistributedDataParallel",
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
}
_KINDS = {"below": Number(above=0, high=1), "keep": COUNT}


def retire_clones(net: nn.Module, *, below: float = 0.01, keep: int = 4) -> int:
    """Drop the clones whose posterior is below `below`, but for the `keep` of largest posterior, for good.

        for step, (x, y) in enumerate(loader):
            ...
            opt.step()
            if step % 100 == 0 and step >= total_steps // 5:
                alrao.retire_clones(net)

    N clones cost N times the work and memory of one last layer, which is most of a step where there are many classes.
    Call it between two steps, from a fifth of the run on, as often as you like; it waits for the device once. With
    `below=1` exactly `keep` clones are left.

    Args:
        net: an `AlraoModel`, a head, or any module with heads in it.
        below: a probability, above 0 to 1. A clone that has nothing going for it keeps about 1 / (N t) after t
            observations; one that is d nats worse than the best at each observation about 1 / (N t d).
        keep: how many clones, those of largest posterior, stay in any case; 1 or more.

    Returns how many clones were retired. The parameters `[N, C, D]` and `[N, C]` of a head become new ones,
    `[N', C, D]` and `[N', C]`: the gradients and the Alrao optimizers that have them follow, with rates, momentum,
    moments, master weights, averages and limits. The bits of those that are left stay as they were. The posterior is
    that of the clones left, renormalised; a retired clone never comes back. `head.num_clones`, `head.clone_lr`,
    `collapse` and all else speak of those left; `head.clone_numbers` says which they are, and names in `metrics` and
    columns of `History` keep the old numbers.

    A checkpoint of such a run loads into a fresh network and its optimizer, made with all clones: load the network
    first. What else holds the old parameters has to be made anew: a `GraphedStep`, which raises until then, copies
    such as an `AveragedModel`, and DistributedDataParallel, which has to come off before (`net = ddp.module; del ddp`)
    and be put on again. Under `torch.distributed` every rank must call it; all have the same posterior.

    TypeError or ValueError for arguments of another type or out of range, for a network that DistributedDataParallel
    or ZeroRedundancyOptimizer has, and for heads that lie over ranks (`fully_shard`, `ClonesParallel`, `ClassesParallel`), share parameters with another
    module, or have hooks on them; RuntimeError where no Alrao optimizer has them and within `averaged()`. Nothing has
    changed then.
    """
    given = checked(_KINDS, {"below": below, "keep": keep})
    heads = list(heads_of(net).values())
    for head in heads:
        head.check_retiring()
    _check_owners(net, heads)
    posteriors = [head.switch.posterior() for head in heads]
    # One wait for all.
    values = torch.cat([p.to(posteriors[0].device) for p in posteriors]).cpu()
    chosen = []
    for head, posterior in zip(heads, values.split([head.num_clones for head in heads])):
        # What is not known, before the first observation with a living clone, says nothing against any.
        stays = ~(posterior < given["below"])
        stays[posterior.nan_to_num(0.0).argsort(descending=True, stable=True)[: given["keep"]]] = True
        chosen.append(stays.nonzero().flatten().tolist())
    retired = sum(head.num_clones - len(places) for head, places in zip(heads, chosen))
    if retired:
        _check_wrappers(heads)
    for head, places in zip(heads, chosen):
        if len(places) < head.num_clones:
            head.keep_clones(places)
    return retired


def _check_owners(net: nn.Module, heads: list[LinearClones]) -> None:
    """Who holds a parameter that is to be exchanged must be known."""
    trained = {id(p) for opt in live.optimizers for p in _params_of(opt.param_groups)}
    places: dict[int, int] = {}
    for module in net.modules():
        for param in module._parameters.values():
            places[id(param)] = places.get(id(param), 0) + 1
    for head in heads:
        for name, param in head.named_parameters():
            if places[id(param)] > 1:
                raise ValueError(
                    f"net: got a {type(head).__name__} whose {name} is another module's, too; expected one of its own"
                )
            if id(param) not in trained:
                raise RuntimeError(
                    f"net: no AlraoSGD or AlraoAdam has the {name} of its {type(head).__name__}, expected one: another "
                    "optimizer would go on with the parameters that are exchanged"
                )


def _check_wrappers(heads: list[LinearClones]) -> None:
    """What exchanges gradients or updates between ranks has listed the parameters, and would not say that it goes on
    with the old ones."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    own = {id(param) for head in heads for param in head.parameters()}

    def wrapper() -> str | None:
        """The name of one; nothing that is alive lists its parameters to those who look for them."""
        modules = (sys.modules.get(name) for name in _WRAPPERS)
        kinds = tuple(getattr(m, _WRAPPERS[m.__name__]) for m in modules if m is not None)
        for holder in gc.get_objects():
            if issubclass(type(holder), kinds):
                groups = getattr(holder, "param_groups", None)
                held = holder.parameters() if groups is None else _params_of(groups)
                if any(id(param) in own for param in held):
                    return type(holder).__name__
        return None

    if wrapper():
        # One that was let go may be in a cycle.
        gc.collect()
        name = wrapper()
        if name:
            raise ValueError(
                f"net: got parameters that a {name} has, expected none: undo it, `net = ddp.module; del ddp`, retire, "
                "and make a new one"
            )


def _params_of(groups: list[dict[str, Any]]) -> Iterator[nn.Parameter]:
    return (param for group in groups for param in group["params"])
