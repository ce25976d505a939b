"""Retiring clones that the switch has ruled out: the head's cost goes back towards that of one last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.arguments import COUNT, Number, checked
from alrao_fast.nn.clones import LinearClones
from alrao_fast.nn.heads import heads_of
from alrao_fast.nn.holders import check_holders, params_of

_KINDS = {"below": Number(above=0, high=1), "keep": COUNT}


def retire_clones(net: nn.Module, *, below: float = 0.01, keep: int = 3) -> int:
    """Drop the clones that the switch has ruled out, for good; returns how many.

        for step, (x, y) in enumerate(loader):
            ...
            opt.step()
            if step == total_steps // 5:
                alrao.retire_clones(net)

    N clones cost N times the work and memory of one last layer, which is most of a step where there are many classes.
    Call it between two steps, from a fifth of the run on; it waits for the device once. A clone goes whose posterior is
    below `below`, unless it is among the `keep` most probable ones or has the lowest rate: the slowest clone is the
    least sure of itself, and its share, however small, bounds the loss of a confident mistake.

    Args:
        net: an `AlraoModel`, a head, or any module with heads in it.
        below: a probability, above 0 to 1. After t observations a clone that is d nats worse than the best at each of
            them has about 1 / (N t d), and none has less than about 1 / (N t). At 1 all go that may.
        keep: how many of the most probable clones stay in any case.

    The parameters `[N, C, D]` and `[N, C]` of a head become new ones of the clones left, which keep their bits. Their
    gradients follow, and the Alrao optimizers that have them: rates, momentum, moments, master weights, averages. The
    posterior is that of the clones left, renormalised. `head.num_clones`, `clone_lr`, `collapse` and all else speak of
    those left; `head.clone_numbers` says which they are, and names in `metrics` and columns of `History` keep the old
    numbers.

    A checkpoint of such a run loads into a network made with all clones, before DistributedDataParallel has it, and
    then into its optimizer. One that does not fit retires none where an `AlraoModel`, a wrapped model or a head loads
    it; of another module with several heads, those that stand before the misfit have lost theirs. A new optimizer gives
    those left the rates that they have among all. What else holds the old parameters has to be made anew: a
    `GraphedStep`, which raises until then; copies such as an `AveragedModel`; DistributedDataParallel, which has to be
    undone before (`net = ddp.module; del ddp`). Under `torch.distributed` all ranks have to call it; they have the same
    posterior.

    TypeError or ValueError for arguments of another type or out of range, for a network that DistributedDataParallel
    or ZeroRedundancyOptimizer has, and for heads that lie over ranks (`fully_shard`, FSDP1, `ClonesParallel`,
    `ClassesParallel`), share parameters with another module, or have hooks on them; RuntimeError where no Alrao
    optimizer has them and within `averaged()`. Nothing has changed then.
    """
    given = checked(_KINDS, {"below": below, "keep": keep})
    heads = list(heads_of(net).values())
    for head in heads:
        head.check_retiring()
    _check_owners(net, heads)
    found = [torch.cat([head.switch.posterior(), head.clone_lr.double()]) for head in heads]
    # One wait for all.
    values = torch.cat([entry.to(found[0].device) for entry in found]).cpu()
    chosen = [
        _staying(own, given["below"], given["keep"])
        for own in values.split([2 * head.num_clones for head in heads])
    ]
    retired = sum(head.num_clones - len(places) for head, places in zip(heads, chosen))
    if retired:
        check_holders(param for head in heads for param in head.parameters())
    for head, places in zip(heads, chosen):
        if len(places) < head.num_clones:
            head.go_on_with(places)
    return retired


def _staying(values: Tensor, below: float, keep: int) -> list[int]:
    """The places of the clones that stay; `values [2 N]` are their posterior and their rates."""
    posterior, rates = values.chunk(2)
    # NaN, where every clone was dead, says nothing against any.
    stays = ~(posterior < below)
    stays[posterior.nan_to_num(0.0).argsort(descending=True, stable=True)[:keep]] = True
    stays[rates.argmin()] = True
    return stays.nonzero().flatten().tolist()


def _check_owners(net: nn.Module, heads: list[LinearClones]) -> None:
    """Who holds a parameter that is to be exchanged must be known."""
    trained = {id(p) for opt in live.optimizers for p in params_of(opt.param_groups)}
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
                    f"net: no Alrao optimizer has the {name} of its {type(head).__name__}, expected one: another "
                    "optimizer would go on with the parameters that are exchanged"
                )
