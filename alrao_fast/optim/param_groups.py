"""Param groups: what `params` may be, and the checks of the options that AlraoSGD and AlraoAdam share."""

from typing import Any

from torch import Tensor, nn

from alrao_fast.optim.rates import check_lr_range


def as_groups(params: Any) -> list[Any]:
    """`params` of a constructor as a list of param groups."""
    if isinstance(params, nn.Module):
        return [{"params": params}]
    if isinstance(params, Tensor):
        raise TypeError("params is a tensor; expected a module, an iterable of tensors or groups")
    entries = list(params)
    if not entries:
        raise ValueError("params is empty; expected at least one parameter")
    return entries if isinstance(entries[0], dict) else [{"params": entries}]


def modules_of(groups: list[Any]) -> list[nn.Module]:
    """The modules that the groups name, in order."""
    modules = []
    for group in groups:
        params = group.get("params", ()) if isinstance(group, dict) else ()
        if isinstance(params, nn.Module):
            modules.append(params)
        elif isinstance(params, list | tuple):
            modules += [item for item in params if isinstance(item, nn.Module)]
    return modules


def tensor_of(entry: Any) -> Any:
    """The tensor of an entry of a group: bare, or in a (name, tensor) pair."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def expanded(params: Any) -> list[Any]:
    """Tensors and (name, tensor) pairs; the modules among `params` are replaced by their parameters."""
    if isinstance(params, set):
        raise TypeError("params is a set; expected an ordered collection, such as a list")
    entries: list[Any] = []
    for item in [params] if isinstance(params, nn.Module | Tensor) else params:
        if isinstance(item, nn.Module):
            known = {id(tensor_of(entry)) for entry in entries}
            entries += [p for p in item.parameters() if id(p) not in known]
        else:
            entries.append(item)
    return entries


def check_sampler(sampler: Any) -> None:
    """Raises TypeError unless `sampler` can be called, or is None."""
    if sampler is not None and not callable(sampler):
        raise TypeError(
            f"sampler is {sampler!r}; expected LogUniform, PerWeight, Fraction, Constant, a function "
            "(n, generator) -> rates, or None"
        )


def check_options(group: dict[str, Any], rule_option: str) -> None:
    """Raises ValueError, naming the option, where one that both optimizers have is out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {list(lr.shape)}; expected a single element")
    elif not lr >= 0.0:
        raise ValueError(f"lr is {lr}; expected a multiplier >= 0 of the drawn rates")
    check_lr_range(group["lr_range"])
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"weight_decay is {group['weight_decay']}; expected a number >= 0")
    if group["rounding"] not in (None, "nearest", "stochastic"):
        raise ValueError(
            f"rounding is {group['rounding']!r}; expected None, 'nearest' or 'stochastic'"
        )
    if group["rounding"] == "stochastic" and group["master_weights"]:
        raise ValueError(
            "rounding is 'stochastic' with master_weights=True; expected one of the two: masters keep every bit"
        )
    if group[rule_option] not in ("torch", "authors"):
        raise ValueError(f"{rule_option} is {group[rule_option]!r}; expected 'torch' or 'authors'")
    if group["foreach"]:
        raise ValueError(
            "foreach is True; expected None or False: one fused call updates all tensors"
        )
    if group["differentiable"]:
        raise ValueError(
            "differentiable is True; expected False: the update is done in place and has no gradient"
        )
