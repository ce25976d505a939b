"""The layouts of vectors that hold slices of parameters.

Entry i of a parameter, in memory order, has the rate `rates[(i // inner) % period]`. A slice of it is at most five
runs that are laid out in the same way, with a part of the rates: the rest of a row, the rest of a period, whole
periods, the beginning of a period and of a row. The kernels update each as a tensor of its own.

The state "rate" of such a vector has the whole rates of all parameters in it, one after the other; those that share
theirs have them once. On ranks that hold other slices of the same parameters it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from alrao_fast import sharding
from alrao_fast.flat_shards import Flat, flat_of
from alrao_fast.ops.checks import LOW_PRECISION
from alrao_fast.optim.layouts import Layout, Vector, memory_rates
from alrao_fast.optim.states import RATES

# The limit of a rate that has none.
_NO_LIMIT = torch.finfo(torch.float32).max


class Run(NamedTuple):
    """Entries `begin` to `end` of a parameter, laid out with the rates `low` to `high`, each for `inner` of them."""

    begin: int
    end: int
    low: int
    high: int
    inner: int


def runs(start: int, stop: int, inner: int, period: int) -> Iterator[Run]:
    """The runs of entries `start` to `stop` of a parameter whose entry i has the rate (i // inner) % period."""
    row, end = start // inner, min(stop, -(-start // inner) * inner)
    if start < end:
        yield Run(start, end, row % period, row % period + 1, end - start)
        row += 1
    last = stop // inner
    while row < last:
        low = row % period
        # To the end of the period, or all whole ones.
        rows = period - low if low else max((last - row) // period * period, period)
        rows = min(rows, last - row)
        yield Run(row * inner, (row + rows) * inner, low, low + min(rows, period), inner)
        row += rows
    if row * inner < stop and start < stop:
        yield Run(row * inner, stop, row % period, row % period + 1, stop - row * inner)


class Slice(NamedTuple):
    """A part of a vector: the parameter it is of, that one's layout, where it lies, and where its rates begin."""

    param: Tensor
    layout: Layout
    twin: Tensor
    start: int
    stop: int
    at: int
    first: int

    def rates(self, whole: Tensor) -> Tensor:
        """The parameter's, of the vector's."""
        return whole[self.first : self.first + self.layout.length(self.twin)]

    def in_memory(self, whole: Tensor) -> tuple[Tensor, int]:
        """The parameter's as `memory_rates` has them."""
        rate = self.rates(whole)
        rate = rate if rate.numel() else whole.new_ones(1)
        return memory_rates(rate, self.twin, self.layout.dims, self.layout.name)

    def runs(self, whole: Tensor) -> Iterator[Run]:
        """What a call of the kernels takes as one tensor each; `begin` and `end` count in the vector."""
        rates, inner = self.in_memory(whole)
        move = self.at - self.start
        for begin, end, *others in runs(self.start, self.stop, inner, rates.numel()):
            yield Run(begin + move, end + move, *others)


@dataclass(eq=False)
class FlatLayout(Layout):
    """The layout of a vector; `gathers` as in `Flat`, and the group over whose ranks it is cut."""

    slices: tuple[Slice, ...] = ()
    gathers: bool = False

    def features(self) -> list[Slice]:
        """One slice for each stretch of the vector's rates."""
        return [*{part.first: part for part in reversed(self.slices)}.values()][::-1]


def flat_layout(flat: Flat, layouts: Mapping[Tensor, Layout]) -> FlatLayout:
    """The layout of a vector by those of the parameters in it."""
    slices, firsts, length = [], dict[Any, int](), 0
    for part in flat.parts or ():
        layout = layouts[part.param]
        key = layout.vector, id(layout.feature_of)
        if key not in firsts:
            firsts[key] = length
            length += layout.length(part.twin)
        slices.append(
            Slice(part.param, layout, part.twin, part.start, part.stop, part.at, firsts[key])
        )
    names = [part.layout.name for part in slices]
    name = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    kinds = {part.layout.vector.kind for part in slices}
    vector = Vector(name, length, kinds.pop() if len(kinds) == 1 else "feature")
    return FlatLayout(
        name, "", "built-in", (0,), vector, slices=tuple(slices), gathers=flat.gathers
    )


def combined(
    layout: FlatLayout, own: Sequence[Mapping[str, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """What a vector's state has of its rates, by what each of its `features()` has; one that is alone shares them."""
    if len(own) == 1:
        return {key: value.to(device) for key, value in own[0].items()}
    found = {}
    for key in RATES if own else ():
        if any(key in each for each in own):
            found[key] = torch.cat([_or_default(key, each) for each in own]).to(device)
    return found or {"rate": torch.empty(0, device=device)}


def _or_default(key: str, own: Mapping[str, Tensor]) -> Tensor:
    if key in own:
        return own[key]
    return torch.full_like(own["rate"], _NO_LIMIT) if key == "rate_limit" else own["rate"]


@torch.no_grad()
def slices_of_states(layout: FlatLayout, state: Mapping[Any, Any], flat: Tensor) -> dict[str, Any]:
    """What was kept of the parameters in a vector, as its own: cut out of a tensor for each of them, or out of its own
    state where it was the parameter itself.

    ValueError where some of the parameters have taken other steps than the others.
    """
    found: dict[str, Any] = {}
    steps = {}
    for part in layout.slices:
        own = state.get(part.param) or (state.get(flat) or {} if len(layout.slices) == 1 else {})
        kept = {
            key: value
            for key, value in own.items()
            if key not in RATES and isinstance(value, Tensor) and value.shape == part.twin.shape
        }
        for key, value in kept.items():
            if key == "step" or (key == "master" and flat.dtype not in LOW_PRECISION):
                continue
            whole = (
                value.flatten()
                if part.twin.is_contiguous()
                else value.as_strided((value.numel(),), (1,))
            )
            vector = found.setdefault(
                key, torch.zeros(flat.shape, dtype=value.dtype, device=flat.device)
            )
            end = part.at + part.stop - part.start
            vector[part.at : end].copy_(whole[part.start : part.stop])
        if kept:
            steps[int(own["step"])] = part.layout.name
    if len(steps) > 1:
        raise ValueError(
            f"flat: got a vector of parameters that have taken other numbers of steps ({steps}), expected the same "
            "number, or an optimizer that is made for the vector"
        )
    if steps:
        found["step"] = torch.tensor(next(iter(steps)), dtype=torch.int64, device=flat.device)
    return found


# Sums over the features, of vectors whose parameters are nowhere whole.


@torch.no_grad()
def sums_of_squares(layout: FlatLayout, values: Tensor, group: Any) -> dict[Tensor, Tensor]:
    """For each parameter in a vector the sums of the squares of the entries with each of its rates, over all ranks of
    the group, which all have to ask: float64 on the CPU, laid out as the rates."""
    numbers = torch.arange(max(layout.vector.length, 1), device=values.device)
    sums = []
    for part in layout.slices:
        own = values.new_zeros(layout.vector.length, dtype=torch.float64)
        in_memory, _ = part.in_memory(numbers)
        for run in part.runs(numbers):
            entries = values.detach()[run.begin : run.end].view(-1, run.high - run.low, run.inner)
            norms = torch.linalg.vector_norm(entries, dim=(0, 2), dtype=torch.float64)
            own.index_add_(0, in_memory[run.low : run.high], norms.square())
        sums.append(part.rates(own))
    packed = torch.cat(sums) if sums else values.new_zeros(0, dtype=torch.float64)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(packed, group=group)
    lengths = [part.layout.length(part.twin) for part in layout.slices]
    return {
        part.param: own
        for part, own in zip(layout.slices, packed.cpu().split(lengths), strict=True)
    }


# Rates by entries, for checkpoints that bring the entries of whole parameters together.


def by_entry(layout: FlatLayout, rate: Tensor, flat: Tensor) -> Tensor:
    """The rate of each entry of a vector; 0 where it is padding."""
    entries = torch.zeros(flat.shape, dtype=rate.dtype, device=rate.device)
    for part in layout.slices:
        rates, _ = part.in_memory(rate)
        for run in part.runs(rate):
            here = entries[run.begin : run.end].view(-1, run.high - run.low, run.inner)
            here.copy_(rates[run.low : run.high].unsqueeze(-1).expand_as(here))
    return entries


def from_entries(layout: FlatLayout, entries: Tensor) -> Tensor:
    """The rates that a vector's entries have, -1 of those of which none is here. ValueError where entries of one
    feature differ."""
    numbers = torch.arange(max(layout.vector.length, 1), device=entries.device)
    found = torch.full((layout.vector.length,), -1.0, dtype=torch.float32, device=entries.device)
    for part in layout.slices:
        in_memory, _ = part.in_memory(numbers)
        for run in part.runs(numbers):
            here = entries[run.begin : run.end].view(-1, run.high - run.low, run.inner)
            found[in_memory[run.low : run.high]] = here[0, :, 0].float()
    if not torch.equal(by_entry(layout, found, entries), entries.float()):
        raise ValueError(
            f"state 'rate' of parameter {layout.name!r} in state_dict differs among the entries of one feature, "
            "expected one rate for all of them"
        )
    return found


def _of_whole(layout: Layout, param: Tensor) -> FlatLayout:
    """The layout of a whole parameter's entries, row by row."""
    twin = torch.empty(param.shape, device="meta")
    part = Slice(twin, layout, twin, 0, param.numel(), 0, 0)
    vector = Vector(layout.name, layout.length(twin), layout.vector.kind)
    return FlatLayout(layout.name, "", layout.rule, (0,), vector, slices=(part,))


def spread(
    saved: dict[str, Any], params: Sequence[Tensor], layouts: Mapping[Tensor, Layout]
) -> None:
    """Give a state_dict the rates by entry, for the vectors of which checkpoints bring whole parameters
    together; of those among them that are frozen it has no state then."""
    ids = [number for group in saved["param_groups"] for number in group["params"]]
    flats = []
    for number, param in zip(ids, params, strict=True):
        told, layout = flat_of(param), layouts[param]
        if told and told.gathers:
            # FSDP expects all states that its other parameters have, or none.
            if "step" not in saved["state"][number]:
                del saved["state"][number]
                continue
            flat = layout if isinstance(layout, FlatLayout) else _of_whole(layout, param)
            flats.append((number, param, flat))
    # FSDP expects the same states of all parameters that it has flattened together.
    keys = [key for key in RATES if any(key in saved["state"][number] for number, *_ in flats)]
    for number, param, flat in flats:
        own = saved["state"][number]
        entries = torch.empty(param.numel(), device=param.device)
        rates = {
            key: by_entry(flat, _or_default(key, own), entries).view(param.shape) for key in keys
        }
        saved["state"][number] = {**own, **rates}


def gathered(state_dict: Any, params: Sequence[Tensor], layouts: Mapping[Tensor, Layout]) -> Any:
    """A state_dict with whole rates where it has them by entry; all ranks have to ask.

    Anything that does not fit is left as it is, for others to refuse.
    """
    try:
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        state = {**state_dict["state"]}
        found = {k: dict(state[k]) for k, _ in zip(ids, params, strict=True) if k in state}
    except (KeyError, TypeError, ValueError):
        return state_dict
    flats: list[tuple[Tensor, FlatLayout, dict[str, Any]]] = []
    for number, param in zip(ids, params):
        layout = layouts[param]
        if isinstance(layout, FlatLayout):
            if layout.gathers:
                # FSDP leaves out those of which nothing is here.
                flats.append((param, layout, found.setdefault(number, {})))
            continue
        own = found.get(number, {})
        for key in RATES:
            rate = own.get(key)
            if (
                isinstance(rate, Tensor)
                and rate.shape == param.shape
                and not sharding.is_sharded(rate)
            ):
                # Where these are the same, so are the two ways of saving them.
                if rate.shape != (layout.length(param),):
                    own[key] = from_entries(_of_whole(layout, rate), rate.flatten())
    # Vectors of one parameter each that share its rates go on to share them.
    shared: dict[Any, dict[str, Tensor]] = {}
    owners: list[tuple[Any, dict[str, Any]]] = []
    for (_, layout, own), rates in zip(flats, _whole_rates(flats)):
        inside = tuple(
            (part.layout.vector, id(part.layout.feature_of)) for part in layout.features()
        )
        for key in RATES:
            own.pop(key, None)
        if rates:
            shared.setdefault(inside, rates)
        owners.append((inside, own))
    for inside, own in owners:
        # Frozen ones bring none.
        own |= shared.get(inside, {})
    return {**state_dict, "state": {**state, **found}}


@torch.no_grad()
def _whole_rates(
    flats: Sequence[tuple[Tensor, FlatLayout, Mapping[str, Any]]],
) -> list[dict[str, Tensor]]:
    """The whole rates of vectors of which states have those of the entries that are here."""
    found: list[dict[str, Tensor]] = []
    groups: dict[int, tuple[Any, list[int]]] = {}
    for number, (flat, layout, own) in enumerate(flats):
        told = flat_of(flat)
        group = next(iter(told.groups), None) if told else None
        groups.setdefault(id(group), (group, []))[1].append(number)
        found.append({key: _known(layout, own.get(key), flat) for key in RATES})
    for group, numbers in groups.values():
        packed = torch.cat([found[k][key] for k in numbers for key in RATES])
        if group is not None and dist.get_world_size(group) > 1:
            sent = packed.to(sharding.sending_device(group))
            dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=group)
            packed = sent.cpu()
        vectors = iter(packed.split([found[k][key].numel() for k in numbers for key in RATES]))
        for k in numbers:
            found[k] = {key: next(vectors) for key in RATES}
    # Without what no rank has.
    return [{key: v for key, v in own.items() if bool((v >= 0).all())} for own in found]


def _known(layout: FlatLayout, entries: Any, flat: Tensor) -> Tensor:
    """The rates of the entries here, on the CPU; -1 for the others."""
    if not isinstance(entries, Tensor) or not any(p.stop > p.start for p in layout.slices):
        return torch.full((layout.vector.length,), -1.0)
    if entries.shape != flat.shape:
        raise ValueError(
            f"state 'rate' of parameter {layout.name!r} in state_dict has shape {list(entries.shape)}; expected "
            f"{list(flat.shape)}, a rate for each entry"
        )
    return from_entries(layout, entries.cpu())
