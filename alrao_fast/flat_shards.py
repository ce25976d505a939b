"""Parameters that other libraries have flattened into vectors and cut: what such a vector holds.

An entry of a vector does not say by itself to which feature it belongs. FullyShardedDataParallel (FSDP1) tells
(fsdp1.py), of other vectors somebody has to: `register_flat_slices`. Without it the optimizers refuse them.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from alrao_fast.arguments import shown

_CURE = (
    "expected whole parameters, DTensors (shard by torch.distributed.fsdp.fully_shard, FSDP2) or vectors of which "
    "alrao_fast.distributed.register_flat_slices has been told what they hold"
)


class FlatSlice(NamedTuple):
    """Entries of a parameter that lie next to each other in a vector.

    param: the parameter, with its shape; its data is not looked at.
    start, stop: the first of its entries, counted row by row as `param.flatten()` does, and the one past the last; None
        is the parameter's end.
    at: where in the vector the first one lies; None is right behind the slice before.
    """

    param: Tensor
    start: int = 0
    stop: int | None = None
    at: int | None = None


class Part(NamedTuple):
    """A slice with its numbers filled in; `twin` has the parameter's shape, and the strides of its flattening."""

    param: Tensor
    twin: Tensor
    start: int
    stop: int
    at: int


class Flat(NamedTuple):
    """What a vector holds, and the process groups whose ranks have the same rates; over the first it is cut.

    parts: None where it is a parameter as it ever was, of which only the groups are known.
    gathers: whether checkpoints bring entries of whole parameters together, as FSDP1's do: they have to have a rate for
        each entry, then.
    """

    parts: tuple[Part, ...] | None
    groups: tuple[Any, ...] = ()
    gathers: bool = False


_flats: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The attribute of a registered tensor that says whether it is cut, which torch.compile can follow.
_CUT = "_alrao_is_cut"


def register_flat_slices(
    flat: Tensor, slices: Iterable[FlatSlice], process_group: Any = None
) -> None:
    """Say which entries of which parameters a flat vector holds, so that an Alrao optimizer updates each by its rate.

    For engines that flatten parameters, cut the result over ranks and give the optimizer the vectors, as ZeRO-1 and
    ZeRO-2 of DeepSpeed and Megatron's distributed optimizer do. Afterwards `opt.refresh()`, on every rank.

    Args:
        flat: the vector `[n]` that is, or will be, in the optimizer's param groups.
        slices: what it holds, in any order and without overlaps. Entries of no slice are padding, and never written.
            Where the optimizer is made on the vectors, every rank names all parameters, in the same order: those of
            which nothing is here by an empty slice. Where it was made on the parameters, only those that are here.
        process_group: the ranks that train the network take over the rates and rounding seeds of its first one. None:
            they draw the same, by the same seed on every rank.

    A vector that is registered again holds from then on what was said last, for optimizers that do not know it yet.
    Raises TypeError for a `flat`, a slice or a group that is none, ValueError for numbers that do not fit the vector
    or the parameter, and for overlaps; registers nothing then.
    """
    if not isinstance(flat, Tensor):
        raise TypeError(f"flat: got {shown(flat)}, expected a tensor")
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            f"flat: got a tensor of shape {list(flat.shape)} and strides {list(flat.stride())}, expected a contiguous "
            "vector"
        )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group: got {shown(process_group)}, expected a process group")
    if isinstance(slices, FlatSlice) or not isinstance(slices, Iterable):
        raise TypeError(f"slices: got {shown(slices)}, expected an iterable of FlatSlice")
    parts: list[Part] = []
    end = 0
    for number, entry in enumerate(slices):
        parts.append(_part(f"slices[{number}]", entry, end, flat))
        end = parts[-1].at + parts[-1].stop - parts[-1].start
    _check_overlaps(parts)
    note(flat, Flat(tuple(parts), () if process_group is None else (process_group,)))


def _part(name: str, entry: Any, end: int, flat: Tensor) -> Part:
    if not isinstance(entry, FlatSlice) or not isinstance(entry.param, Tensor):
        raise TypeError(f"{name}: got {shown(entry)}, expected FlatSlice(param, start, stop, at)")
    param, start, stop, at = entry
    size = param.numel()
    stop, at = size if stop is None else stop, end if at is None else at
    for field, value in (("start", start), ("stop", stop), ("at", at)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}.{field}: got {shown(value)}, expected an integer")
    if not 0 <= start <= stop <= size:
        raise ValueError(
            f"{name}: got entries {start} to {stop} of a parameter of shape {list(param.shape)}, expected "
            f"0 <= start <= stop <= {size}"
        )
    if not 0 <= at <= at + stop - start <= flat.numel():
        raise ValueError(
            f"{name}: got {stop - start} entries at {at}, expected them within the vector's {flat.numel()}"
        )
    if param is flat:
        raise ValueError(f"{name}.param: got the vector itself, expected the parameter it holds")
    return Part(param, torch.empty(param.shape, dtype=param.dtype, device="meta"), start, stop, at)


def _check_overlaps(parts: Sequence[Part]) -> None:
    filled = [(p.at, p.at + p.stop - p.start, k) for k, p in enumerate(parts) if p.stop > p.start]
    filled.sort()
    for (_, end, k), (at, _, other) in pairwise(filled):
        if at < end:
            raise ValueError(
                f"slices[{other}]: got entries at {at}, which slices[{k}] reaches up to {end}, expected no overlap"
            )


def note(tensor: Tensor, flat: Flat) -> None:
    """Register what a vector holds that its library has told."""
    _flats[tensor] = flat
    setattr(tensor, _CUT, flat.parts is not None)


def flat_of(tensor: Tensor) -> Flat | None:
    """What is registered of a tensor."""
    return _flats.get(tensor)


def is_cut(tensor: Tensor) -> bool:
    """Whether a parameter is, or may be, a part of what it was: a vector, or one that FSDP1 keeps as such."""
    cut = getattr(tensor, _CUT, None)
    if cut is not None:
        return cut
    return getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False)


def parts_of(tensor: Tensor) -> tuple[Part, ...] | None:
    """What a vector holds; None for a tensor of which nothing is registered, and for a whole parameter."""
    flat = _flats.get(tensor)
    return None if flat is None else flat.parts


def groups_of(params: Iterable[Tensor]) -> list[Any]:
    """The process groups, of more than one rank, in which the parts of the vectors among `params` lie, each once."""
    flats = [flat for flat in map(_flats.get, params) if flat is not None]
    groups = {id(group): group for flat in flats for group in flat.groups}
    return [group for group in groups.values() if dist.get_world_size(group) > 1]


def check_whole(name: str, param: Tensor) -> None:
    """Raise ValueError for a partition of which nothing is known."""
    if param in _flats:
        return
    if hasattr(param, "ds_tensor"):
        raise ValueError(f"parameter {name!r} is partitioned by DeepSpeed's ZeRO-3, {_CURE}")
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {name!r} is a flat shard of FullyShardedDataParallel (FSDP1) whose wrapper is not found, "
            "expected the wrapped module: AlraoSGD(wrapped), or model=wrapped beside bare parameters"
        )


def check_exchange(number: int, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Raise ValueError where all parameters of a param group have given way to vectors with their entries.

    So do ZeRO-1 and ZeRO-2 of DeepSpeed and Megatron's distributed optimizer, which mark nothing.
    """
    if not before or not now or all(param.dim() < 2 for param in before):
        return
    known = set(map(id, before))
    shapes = {tuple(param.shape) for param in before}
    for param in now:
        known_vector = id(param) in known or param in _flats
        if known_vector or param.dim() != 1 or tuple(param.shape) in shapes:
            return
    raise ValueError(
        f"the {len(before)} parameters of param group {number} were replaced by vectors of other shapes "
        f"({', '.join(str(list(param.shape)) for param in now[:3])}), as flat partitions are (ZeRO of DeepSpeed, the "
        f"distributed optimizer of Megatron), {_CURE}"
    )
