"""Which learning rates parameters have: layouts, the draw, the narrowing, and what is put into the groups by hand."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast import fsdp1, live, sharding
from alrao_fast.arguments import Number, checked
from alrao_fast.flat_shards import check_exchange, flat_of, parts_of
from alrao_fast.optim import annealing
from alrao_fast.optim.binding import Binding
from alrao_fast.optim.drawing import draw_all
from alrao_fast.optim.flat_layouts import (
    FlatLayout,
    combined,
    slices_of_states,
    sums_of_squares,
)
from alrao_fast.optim.imitations import itself
from alrao_fast.optim.layouts import Layout, check_param, default_layout
from alrao_fast.optim.limits import limited, rate_limits
from alrao_fast.optim.notices import warn_of_bare_tensors, warn_of_small_multiplier
from alrao_fast.optim.owners import owners
from alrao_fast.optim.param_groups import tensor_of
from alrao_fast.optim.places import Places
from alrao_fast.optim.ranks import AcrossRanks
from alrao_fast.optim.rates import LogUniform, Sampler
from alrao_fast.optim.states import RATES, rates_in

_NARROWING = {"progress": Number(low=0, high=1), "width": Number(low=0)}


class Rated(AcrossRanks):
    """The part of an Alrao optimizer that gives rates to parameters."""

    # How rates are drawn from lr_range.
    _from_interval: type[LogUniform] = LogUniform
    _rule_option: str
    # The optimizer's own sampler, its generator, and by what share of their weights features' rates are bounded.
    _sampler: Sampler | None
    _generator: torch.Generator | None
    _rate_bound: float | None = None
    # Those of groups with a bound of their own, until they are drawn.
    _bounds: dict[Tensor, float | None]
    # Vectors drawn with the optimizer's own sampler: parameters added later share them.
    _vectors: dict[Any, Tensor]
    # Rates are drawn once all groups are there, in the model's order whatever the groups.
    _undrawn: dict[Tensor, tuple[Sampler | None, tuple[float, float]]]
    _places: Places
    # Of a run whose length is known.
    _run: annealing.Run | None = None
    _constructing: bool
    # The names of tensors that no module has laid out, to be warned of.
    _bare: list[str]

    def _sampler_of(self, number: int) -> Sampler:
        """What the rates of a group are drawn by."""
        place = self._places.of(self.param_groups, number)
        lr_range = self.param_groups[number]["lr_range"]
        sampler = place and place.sampler
        # A loaded checkpoint may bring another interval.
        if sampler is None:
            return self._sampler or self._from_interval(*lr_range)
        return self._from_interval(*lr_range) if _is_of_group(sampler) else sampler

    def _lay_out(self, entries: list[Any]) -> None:
        """Lay out the models and heads that bare tensors belong to, as if they had been passed.

        Tensors that no module has laid out have one rate per index of dimension 0.
        """
        bare: list[Tensor] = []
        for param in map(tensor_of, entries):
            if isinstance(param, Tensor) and param not in self._layouts:
                inside = [part.param for part in parts_of(param) or ()]
                bare += [p for p in inside or [param] if p not in self._layouts]
        for owner in owners(bare) if bare else ():
            self._resolve(owner)
        for root in fsdp1.roots_of(p for p in bare if p not in self._layouts):
            self._resolve(root)
        places: dict[Tensor, int] = {}
        for number, entry in enumerate(entries):
            param = tensor_of(entry)
            if not isinstance(param, Tensor):
                # torch's own add_param_group has the message.
                continue
            if places.setdefault(param, number) != number:
                raise ValueError(
                    f"params: got {self._layouts[param].name!r} at {places[param]} and again at {number}, expected "
                    "each parameter once: list(dict.fromkeys(params)) leaves out the repetitions"
                )
            if param in self._layouts:
                check_param(self._layouts[param].name, param)
                continue
            name = entry[0] if isinstance(entry, tuple) else f"params[{number}]"
            self._lay_out_bare(name, param)

    def _lay_out_bare(self, name: str, param: Tensor) -> None:
        parts = parts_of(param)
        if parts is None:
            self._layouts[param] = default_layout(name, param)
            self._bare.append(name)
            return
        for number, part in enumerate(parts):
            if part.param not in self._layouts:
                self._lay_out_bare(f"{name}.slices[{number}]", part.param)
        self._lay_out_flat(param)

    def _parts(self, group: dict[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A new group, whose parameters are laid out, as the groups that hold them."""
        return self._clones_apart(group, options[self._rule_option])

    def _clones_apart(self, group: dict[str, Any], rule: str) -> list[dict[str, Any]]:
        """The authors' rules are for the pre-classifier: under one, clones become a group of their own."""
        if rule != "authors":
            return [group]
        clones: list[Any] = []
        others: list[Any] = []
        for entry in group["params"]:
            layout = self._layouts.get(tensor_of(entry))
            kinds = {part.layout.vector.kind for part in getattr(layout, "slices", ())}
            if len(kinds) > 1:
                raise ValueError(
                    f"{self._rule_option}: got 'authors' with clones and other parameters in one flat vector "
                    f"({layout and layout.name}), expected them in vectors of their own: wrap the head by itself"
                )
            (clones if layout and layout.vector.kind == "clone" else others).append(entry)
        if not clones:
            return [group]
        part = {**group, "params": clones, self._rule_option: "torch"}
        return [{**group, "params": others}, part] if others else [part]

    def _draw(self, *, sharded: bool = False) -> None:
        """Draw the rates of the parameters that have none, in the model's order, and store them in the state.

        With DTensors among the parameters all ranks of their meshes have the first one's. If parameters have been
        `sharded`, all rates, which each rank had drawn by itself, become the first one's.
        """
        pending, self._undrawn = self._undrawn, {}
        fresh = [*pending]
        flats = [p for p in pending if isinstance(self._layouts[p], FlatLayout)]
        inside = self._pending_inside(flats, pending)
        own = self._sampler or self._from_interval(*self.defaults["lr_range"])
        rates = draw_all(pending, own, self._generator, self._layouts, self._vectors)
        for group in self.param_groups:
            if "rounding_seed" not in group:
                # The tensors of a group round with consecutive seeds, starting here.
                seed = torch.randint(2**62, (), generator=self._generator, device="cpu")
                group["rounding_seed"] = int(seed)
        bounded = {
            p: self._bounds.pop(p, self._rate_bound)
            for p in rates
            if isinstance(pending[p][0] or own, LogUniform)
        }
        shares = {p: bound for p, bound in bounded.items() if bound}
        limits = rate_limits(self._in_rates(shares), self._layouts, self._squares(flats, shares))
        known = self._known_rates() if sharded or flats else ()
        self._agree([*rates.values(), *limits.values(), *known])
        for param, own_rates in limited(rates, limits).items():
            self._rates[param] = own_rates
            if param not in inside:
                self.state[param].update(own_rates)
        for flat in flats:
            # Where there is a rate per entry, the draw has laid out the parameters anew.
            self._lay_out_flat(flat)
            layout = self._layouts[flat]
            assert isinstance(layout, FlatLayout)
            whole = [self._rates[part.param] for part in layout.features()]
            self._rates[flat] = combined(layout, whole, flat.device)
            self.state[flat].update(self._rates[flat])
        if self._run and fresh and not self._constructing:
            self._run.catch_up(self, fresh)
        self._tell_heads()

    def _pending_inside(self, flats: list[Tensor], pending: dict[Tensor, Any]) -> set[Tensor]:
        """Put the parameters in vectors, as far as they have no rates, in the place of these; return them."""
        inside = set[Tensor]()
        for flat in flats:
            of_group, bound = pending.pop(flat), self._bounds.pop(flat, self._rate_bound)
            for part in parts_of(flat) or ():
                if part.param not in self._rates and part.param not in pending:
                    pending[part.param], self._bounds[part.param] = of_group, bound
                    inside.add(part.param)
        return inside

    def _squares(self, flats: list[Tensor], bounds: dict[Tensor, float]) -> dict[Tensor, Tensor]:
        """The sums of squares of the parameters in vectors that are nowhere whole."""
        found: dict[Tensor, Tensor] = {}
        for flat in flats:
            told, layout = flat_of(flat), self._layouts[flat]
            if told and told.gathers and any(part.param in bounds for part in told.parts or ()):
                self._lay_out_flat(flat)
                layout = self._layouts[flat]
                assert isinstance(layout, FlatLayout)
                found |= sums_of_squares(layout, flat, next(iter(told.groups), None))
        return found

    def _in_rates(self, shares: dict[Tensor, float]) -> dict[Tensor, float]:
        """Parameters' `rate_bound`s as bounds of their rates."""
        return shares

    def _adopt(self) -> None:
        """Give rates to parameters that were put into `param_groups` by hand.

        One in the place of another of its shape has that one's layout and, unless its state has some, its rates; any
        other is treated as `add_param_group` would treat it.
        """
        groups, before = self.param_groups, dict(self._layouts)
        strangers = [p for group in groups for p in group["params"] if p not in self._rates]
        sharded: dict[Tensor, Tensor] = {}
        late = [p for group in groups for p in group["params"] if self._is_late(p)]
        flats = [p for p in strangers if parts_of(p) is not None]
        try:
            for param in [p for p in late if parts_of(p) is not None]:
                # FSDP1 has cut the parameter itself: its rates stay.
                for part in parts_of(param) or ():
                    self._layouts[part.param] = self._layouts[param]
                self._lay_out_flat(param)
                flats.append(param)
            for new, old in self._places.heirs(groups) if strangers else ():
                if new not in self._layouts and old in self._rates:
                    self._layouts[new] = self._layouts[old]
                    own = {**self.state.get(old, {}), **self.state.get(new, {})}
                    self._rates[new] = rates_in(own) or self._rates[old]
                    if sharding.is_sharded(new) and not sharding.is_sharded(old):
                        sharded[new] = old
            for number, group in enumerate(groups if strangers else ()):
                place = self._places.of(groups, number)
                check_exchange(number, place.params if place else (), group["params"])
                self._lay_out(group["params"])
                for param in [p for p in group["params"] if p not in self._rates]:
                    if "rate" in self.state.get(param, {}):
                        self._rates[param] = rates_in(self.state[param])
                    else:
                        self._undrawn[param] = place and place.sampler, group["lr_range"]
            self._draw(sharded=bool(sharded or late))
        except Exception:
            self._layouts, self._undrawn, self._bare = before, {}, []
            for param in strangers:
                self._rates.pop(param, None)
            raise
        for new, old in sharded.items():
            # The same parameter: its momentum goes on. Nothing whole is kept.
            self.state[new] = (
                sharding.handed_over(self.state.pop(old, {}), new, RATES) | self.state[new]
            )
            del self._layouts[old], self._rates[old]
            self._homes.forget(old)
        present = {p for group in groups for p in group["params"]}
        for param in flats:
            layout = self._layouts[param]
            assert isinstance(layout, FlatLayout)
            self.state[param] |= slices_of_states(layout, self.state, param)
            for inside in layout.slices:
                if inside.param not in present:
                    self.state.pop(inside.param, None)
        self._places.note(groups)
        self._warn_of_bare_tensors()

    def _keep_clones(self, moved: Mapping[Tensor, Tensor], places: Tensor) -> Callable[[], None]:
        """Go on with clones of which some were retired, if they are the optimizer's; returns what undoes it.

        moved: the new parameters of the old ones, whose rows at these places they have.
        """
        mine = [old for old in moved if old in self._layouts]
        if not mine:
            return lambda: None
        undo = self._as_it_is([moved[old] for old in mine], mine)
        known: dict[int, Any] = {}

        def kept(tensor: Tensor) -> Tensor:
            # Rates that parameters share stay shared.
            if id(tensor) not in known:
                known[id(tensor)] = tensor, tensor.index_select(0, places.to(tensor.device))
            return known[id(tensor)][1]

        vectors: dict[Any, Any] = {}
        for old in mine:
            new, vector = moved[old], self._layouts[old].vector
            if vector not in vectors:
                vectors[vector] = replace(vector, length=places.numel())
            rates = self._rates.pop(old, {})
            self._rates[new] = {key: kept(value) for key, value in rates.items()}
            if old in self.state:
                self.state[new] = {
                    key: kept(value) if key in RATES or _is_like(value, old) else value
                    for key, value in self.state.pop(old).items()
                }
            self._homes.exchange(old, new)
        for vector in [v for v in vectors if v in self._vectors]:
            self._vectors[vectors[vector]] = kept(self._vectors.pop(vector))
        # In the order in which rates are drawn.
        self._layouts = {
            moved.get(param, param): (
                replace(layout, vector=vectors[layout.vector]) if param in moved else layout
            )
            for param, layout in self._layouts.items()
        }
        for group in self.param_groups:
            group["params"][:] = [moved.get(param, param) for param in group["params"]]
        self._places.note(self.param_groups)
        # What was bound holds the old tensors.
        self._binding = Binding()
        return undo

    def _as_it_is(self, new: list[Tensor], old: list[Tensor]) -> Callable[[], None]:
        """What puts the `old` parameters, with what is known of them now, into the places of the `new` ones."""
        layouts, rates, vectors = self._layouts, dict(self._rates), dict(self._vectors)
        states = {param: dict(self.state[param]) for param in old if param in self.state}
        lists = [list(group["params"]) for group in self.param_groups]

        def restore() -> None:
            self._layouts, self._rates, self._vectors = layouts, rates, vectors
            for param, before in zip(new, old):
                self.state.pop(param, None)
                self._homes.exchange(param, before)
            self.state.update(states)
            for group, params in zip(self.param_groups, lists):
                group["params"][:] = params
            self._places.note(self.param_groups)
            self._binding = Binding()

        return restore

    def _tell_heads(self) -> None:
        """Let the heads, which outlive the optimizer, copy the rates of their clones."""
        live.optimizers.enter(self)
        for head in live.heads:
            head.take_rates(self)

    def rates_of_clones(
        self, head: nn.Module, count: int, among: Collection[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What the state has of the rates of a head's `count` clones; nothing where its parameters are not the
        optimizer's, or not `among` these."""
        clones = list(head.parameters())
        for clone in clones:
            own = rates_in(self.state.get(clone, {})) if among is None or clone in among else {}
            if "rate" in own and own["rate"].shape == (count,):
                return own
        for param, layout in self._layouts.items():
            if not isinstance(layout, FlatLayout) or (among is not None and param not in among):
                continue
            for part in layout.slices:
                is_its = fsdp1.home_of(part.param) is head or any(p is part.param for p in clones)
                if is_its and part.layout.vector.kind == "clone":
                    whole = rates_in(self.state[param])
                    return {key: part.rates(rate) for key, rate in whole.items()}
        return {}

    def anneal_rates(self, progress: float, *, width: float = annealing.WIDTH) -> None:
        """Narrow the interval of the rates around what the clones have found, in place and without waiting.

        A log-rate keeps its place in the interval, whose width falls to `width` decades, fastest at first, and whose
        centre moves to the posterior mean of the clones' log-rates, within the interval of the draw. A few dozen
        calls in a run are enough. The rates as they were drawn stay in the state, as "drawn_rate", from which each call
        starts: what was written into "rate" by hand is lost. Those of samplers without an interval stay as they are.

        Args:
            progress: the part of the run that is over, from 0 (the rates as they were drawn) to 1.
            width: the decades that are left at the end, at least 0; a narrower interval stays as it is.

        Under a CUDA graph: call it once before the capture, then between replays. Raises ValueError for a number out of
        range or where no clones are among the parameters.
        """
        given = checked(_NARROWING, {"progress": progress, "width": width})
        annealing.anneal(itself(self), given["progress"], given["width"])

    def layout_of(self, param: Tensor) -> Layout:
        """The feature layout of one of the optimizer's parameters."""
        return self._layouts[param]

    def _warn_of_bare_tensors(self) -> None:
        bare, self._bare = self._bare, []
        warn_of_bare_tensors(bare, stacklevel=4 if self._constructing else 3)

    def _warn_of_small_multiplier(self, first: int, stacklevel: int) -> None:
        """Of the first group, from that number on, that has one."""
        for number, group in enumerate(self.param_groups[first:], first):
            if warn_of_small_multiplier(group["lr"], self._sampler_of(number), stacklevel + 1):
                return


def _is_of_group(sampler: Any) -> bool:
    return isinstance(sampler, LogUniform) and sampler.is_of_group


def _is_like(value: Any, param: Tensor) -> bool:
    """Whether what a state holds has an entry for each of the parameter's."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == param.shape
