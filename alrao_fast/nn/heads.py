"""The heads in a module."""

from torch import nn

from alrao_fast.arguments import shown
from alrao_fast.nn.clones import LinearClones
from alrao_fast.nn.pretrained import Pretrained


def heads_of(net: nn.Module) -> dict[str, LinearClones]:
    """The heads in a module by name, "" for the module itself; TypeError or ValueError where there are none."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: got {shown(net)}, expected a torch.nn.Module with clones in it")
    # PEFT keeps copies of what it trains, in the place of the layer; one of them is active.
    idle = {
        id(m)
        for model in net.modules()
        if isinstance(model, Pretrained)
        for m in model._place().modules()
        if m is not model.clones
    }
    heads = {
        name: m
        for name, m in net.named_modules()
        if isinstance(m, LinearClones) and id(m) not in idle
    }
    if not heads:
        raise ValueError(
            f"net: got a {type(net).__name__} without clones, expected an AlraoModel, or a module with "
            "ClassifierClones, AdaptiveClassifierClones or RegressorClones in it"
        )
    return heads


def head_of(net: nn.Module) -> LinearClones:
    """The one head in a module; ValueError if there are several."""
    heads = heads_of(net)
    if len(heads) > 1:
        raise ValueError(
            f"net: got one with {len(heads)} heads ({', '.join(heads)}), expected one: pass that head"
        )
    return next(iter(heads.values()))
