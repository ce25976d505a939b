"""Sharded parameters, DTensors of torch.distributed.tensor: which of their entries and rates are on this rank.

An update acts entry by entry, so a rank updates its own entries by its own part of the gradient, with the rates that
their places in the whole parameter have: nothing is gathered. The rates are whole on every rank and the same, whatever
the ranks' seeds: `agree` hands round those of the first.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Of what is no subclass of a tensor.
PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Nothing is imported: while the module is not there, no tensor is one."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def forget_gathered(modules: Iterable[torch.nn.Module]) -> None:
    """Free what those of the modules that `fully_shard` has sharded keep of whole parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    for module in {module for module in modules if isinstance(module, kind)}:
        module.reshard()


def local(tensor: Any) -> Tensor:
    """The entries of a DTensor that are on this rank, as the tensor that holds them; any other tensor itself.

    `to_local()` makes a new tensor at each call: what is bound is looked at by identity.
    """
    if not is_sharded(tensor):
        return tensor
    return _arrived(tensor._local_tensor)


def _arrived(part: Any) -> Tensor:
    """The result of a collective that may be on its way still; any other tensor itself."""
    if type(part) is Tensor or type(part).__name__ != "AsyncCollectiveTensor":
        return part
    return part.wait()


def whole(value: Any) -> Any:
    """A DTensor as one ordinary tensor, for which all of its ranks have to ask; anything else itself."""
    return value.full_tensor() if is_sharded(value) else value


def check_parts(name: str, param: Any) -> None:
    """Raise ValueError for a DTensor whose parts do not say where in it their entries are, and TypeError for another
    wrapper of tensors, whose memory the kernels would not find."""
    if is_sharded(param):
        sizes, here = [stop - start for start, stop in spans(param, name)], local(param)
        if here.numel() and list(here.shape) != sizes:
            raise ValueError(
                f"parameter {name!r} has a part of shape {list(here.shape)} on this rank, expected {sizes} by its "
                f"placements {param.placements}"
            )
    kind = type(local(param))
    if param.requires_grad and hasattr(kind, "__tensor_flatten__"):
        raise TypeError(
            f"parameter {name!r} is a {kind.__name__}, a wrapper of other tensors, expected an ordinary tensor or a "
            "DTensor of such: train it by torch.optim, or freeze it"
        )


def draw_row_(param: Any, row: int, bound: float) -> None:
    """Draw the entries of this place in the first dimension anew, uniformly from -bound to bound.

    Of a DTensor those that are here, from a draw of all: ranks with the same random numbers have what one process has.
    (An index into a sharded dimension would be a copy, and a draw into it lost.)
    """
    if not is_sharded(param):
        param[row].uniform_(-bound, bound)
        return
    here = local(param)
    drawn = here.new_empty(param.shape[1:]).uniform_(-bound, bound)
    (start, stop), *others = spans(param)
    if start <= row < stop:
        here[row - start].copy_(drawn[tuple(slice(*span) for span in others)])


def spans(param: Any, name: str = "") -> list[tuple[int, int]]:
    """For each dimension of a DTensor, the places `(start, stop)` in the whole that the entries here have.

    ValueError, with the parameter's name, for parts that are no such ranges.
    """
    mesh, placements = param.device_mesh, param.placements
    where = mesh.get_coordinate()
    if where is None:
        return [(0, 0)] * param.dim()
    found = [(0, size) for size in param.shape]
    # Those with a split factor (_StridedShard, of FSDP on top of tensor parallelism) cut what the others have left, the
    # last of them first.
    strided = [k for k, placement in enumerate(placements) if hasattr(placement, "split_factor")]
    plain = [k for k in range(mesh.ndim) if k not in strided]
    for k in plain + strided[::-1]:
        placement = placements[k]
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or dim is None or (k in strided and not _cuts_last(param, k)):
            raise ValueError(
                f"parameter {name!r} is placed as {type(placement).__name__} on dimension {k} of its mesh, expected "
                "Shard or Replicate: redistribute it first"
            )
        start, stop = found[dim]
        part = -(-(stop - start) // mesh.size(k))
        begin = start + part * where[k]
        found[dim] = min(begin, stop), min(begin + part, stop)
    return found


def _cuts_last(param: Any, k: int) -> bool:
    """Whether a strided placement cuts the ranges that the mesh's dimensions to its right have left."""
    dim, mesh = param.placements[k].dim, param.device_mesh
    right = [
        mesh.size(j)
        for j in range(k + 1, mesh.ndim)
        if getattr(param.placements[j], "dim", None) == dim
    ]
    return param.placements[k].split_factor == math.prod(right)


def local_rates(rate: Tensor, param: Any, dims: tuple[int, ...], name: str = "") -> Tensor:
    """Those of the rates along `dims` that the entries here have, in their order.

    rate: one per position along `dims`, row by row, or for a single dimension a divisor of its size. Where they lie
    next to each other the result is a view.
    """
    places = [spans(param, name)[dim] for dim in dims]
    if len(dims) == 1:
        ((start, stop),) = places
        period = max(rate.numel(), 1)
        if start % period == 0 and (stop - start) % period == 0 and stop > start:
            return rate
        if start % period + stop - start > period:
            return rate[torch.arange(start, stop, device=rate.device) % period]
        return rate[start % period : start % period + stop - start]
    rates = rate.view([param.size(dim) for dim in dims])
    for k, (start, stop) in enumerate(places):
        rates = rates.narrow(k, start, stop - start)
    return rates.reshape(-1)


def local_seed(seed: int, param: Any) -> int:
    """A seed for rounding the entries here: that of the whole for the first of them and for all replicas, else one that
    no other part has, since the kernels count a tensor's entries from 0."""
    if not is_sharded(param):
        return seed
    first = 0
    for (start, _), size in zip(spans(param), param.shape):
        first = first * size + min(start, max(size - 1, 0))
    return (seed + first * 0x9E3779B97F4A7C15) % 2**63


@torch.no_grad()
def like(stored: Any, param: Any, dtype: torch.dtype, *, copy: bool = False) -> Any:
    """A state of a DTensor with its mesh, placements and local strides: the stored one, or its values, or zeros.

    A stored one that is placed otherwise is gathered, for which all ranks have to ask; one that is whole is not.
    """
    here = local(param)
    if _is_like(stored, param) and not copy:
        own = local(stored)
        if (own.dtype, own.device, own.stride()) == (dtype, here.device, here.stride()):
            return stored
    state = torch.empty_strided(here.size(), here.stride(), dtype=dtype, device=here.device)
    if stored is None:
        state.zero_()
    elif _is_like(stored, param):
        state.copy_(local(stored))
    else:
        state.copy_(part_of(whole(stored), param))
    return type(param).from_local(
        state,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


@torch.no_grad()
def gathered(part: Tensor, param: Any) -> Tensor:
    """What the parts that all ranks have of a tensor placed as this DTensor make together; all of them have to ask."""
    return (
        type(param)
        .from_local(
            part,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
        .full_tensor()
    )


def part_of(tensor: Tensor, param: Any) -> Tensor:
    """The entries of a whole tensor that a DTensor of its shape has here."""
    return tensor[tuple(slice(*span) for span in spans(param))]


@torch.no_grad()
def handed_over(own: Mapping[str, Any], param: Any, rates: Sequence[str]) -> dict[str, Any]:
    """What was kept of a whole parameter, as that of the DTensor that it has become; `rates` stay whole."""
    return {
        key: like(value, param, value.dtype) if key not in rates and _is_of(value, param) else value
        for key, value in own.items()
        if not (isinstance(value, Tensor) and value.is_meta and not param.is_meta)
    }


def _is_of(value: Any, param: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == param.shape


def _is_like(state: Any, param: Any) -> bool:
    return is_sharded(state) and (state.device_mesh, state.placements) == (
        param.device_mesh,
        param.placements,
    )


@torch.no_grad()
def settled_gradient(param: Any) -> Any:
    """The gradient of a DTensor without partial sums, which is put in the place of one with any."""
    grad = param.grad
    if any(placement.is_partial() for placement in grad.placements):
        grad = param.grad = grad.redistribute(placements=param.placements)
    return grad


class LocalParts:
    """What a call on DTensors updates, and how it comes by their gradients; looked at before each step.

    Whoever shards a module, or moves it, gives its DTensors other local tensors.
    """

    def __init__(self, params: list[Any], states: Iterable[Any], names: list[str]) -> None:
        self.params, self._names = params, names
        self._sharded = [*params, *states]
        self._parts = [tensor._local_tensor for tensor in self._sharded]
        self._specs = [param._spec for param in params]

    def gradients(self, grads: Sequence[Any]) -> list[Tensor] | None:
        """The entries here of all gradients; None where a local tensor is another one.

        A gradient placed otherwise than its parameter is redistributed, as torch.optim's operators would.
        """
        if not all(map(is_, [tensor._local_tensor for tensor in self._sharded], self._parts)):
            return None
        parts = []
        for number, (grad, spec) in enumerate(zip(grads, self._specs)):
            if getattr(grad, "_spec", None) is not spec:
                grad = self._placed(number, grad)
            part = grad._local_tensor
            parts.append(part if type(part) is Tensor else _arrived(part))
        return parts

    def _placed(self, number: int, grad: Any) -> Any:
        param = self.params[number]
        if not is_sharded(grad) or grad.device_mesh != param.device_mesh:
            raise RuntimeError(
                f"parameter {self._names[number]!r} has a gradient that is no DTensor of its mesh: expected one on "
                f"{param.device_mesh}"
            )
        if grad.placements == param.placements:
            # The next one's is this object, most likely.
            self._specs[number] = grad._spec
            return grad
        with torch.no_grad():
            return grad.redistribute(placements=param.placements)


def groups_of(params: Iterable[Any]) -> list[Any]:
    """The process groups, of more than one rank, of all meshes on which DTensors among `params` are placed."""
    groups: dict[int, Any] = {}
    meshes = {id(p.device_mesh): p.device_mesh for p in params if is_sharded(p)}
    for mesh in meshes.values():
        if mesh.get_coordinate() is not None:
            groups |= {id(group): group for group in mesh.get_all_groups()}
    return [group for group in groups.values() if dist.get_world_size(group) > 1]


@torch.no_grad()
def agree(rates: Sequence[Tensor], seeds: list[int], groups: list[Any]) -> list[int]:
    """Give all ranks of the groups the first one's rates (float32, in place), and return its seeds.

    Their numbers are gathered and the rates broadcast, along the dimensions of a mesh one after the other: all end with
    what the mesh's first rank has. ValueError, on all ranks, where their optimizers do not have as many rates.
    """
    if not groups:
        return seeds
    seeds_here = torch.tensor(seeds, dtype=torch.int64)
    packed = torch.cat(
        [*(r.detach().cpu().view(torch.int32) for r in rates), seeds_here.view(torch.int32)]
    )
    for group in groups:
        device = sending_device(group)
        # The sum tells vectors of other lengths apart where all of them together are as long.
        lengths = sum(place * rate.numel() for place, rate in enumerate(rates, 1))
        own = torch.tensor([len(rates), packed.numel(), lengths], device=device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        counts = torch.stack(gathered).tolist()
        if any(count != counts[0] for count in counts):
            raise ValueError(
                f"params: got {[n for n, _, _ in counts]} vectors of learning rates on the ranks of the process group, "
                f"{[words for _, words, _ in counts]} words in all, expected the same parameters on every rank"
            )
        sent = packed.to(device)
        dist.broadcast(sent, group=group, group_src=0)
        packed = sent.cpu()
    *vectors, words = packed.split([*(r.numel() for r in rates), 2 * len(seeds)])
    for rate, vector in zip(rates, vectors):
        rate.copy_(vector.view(torch.float32))
    return words.clone().view(torch.int64).tolist()


def sending_device(group: Any) -> torch.device:
    """A device whose tensors the group sends."""
    types = {device.type for device in group._device_types}
    return torch.device("cpu" if "cpu" in types or not types else min(types))
