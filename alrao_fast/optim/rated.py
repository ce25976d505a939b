"""Which learning rates parameters have: their layouts, the draw, and what is put into the groups by hand."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alrao_fast import live, sharding
from alrao_fast.optim.drawing import draw_all
from alrao_fast.optim.flat_shards import check_exchange
from alrao_fast.optim.layouts import Layout, check_param, default_layout
from alrao_fast.optim.limits import limited, rate_limits
from alrao_fast.optim.notices import warn_of_bare_tensors, warn_of_small_multiplier
from alrao_fast.optim.owners import owners
from alrao_fast.optim.param_groups import tensor_of
from alrao_fast.optim.places import Places
from alrao_fast.optim.ranks import AcrossRanks
from alrao_fast.optim.rates import LogUniform, Sampler
from alrao_fast.optim.states import RATES, rates_in


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
        bare = [
            p for p in map(tensor_of, entries) if isinstance(p, Tensor) and p not in self._layouts
        ]
        for owner in owners(bare) if bare else ():
            self._resolve(owner)
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
            self._layouts[param] = default_layout(name, param)
            self._bare.append(name)

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
        own = self._sampler or self._from_interval(*self.defaults["lr_range"])
        rates = draw_all(pending, own, self._generator, self._layouts, self._vectors)
        for group in self.param_groups:
            if "rounding_seed" not in group:
                # The tensors of a group round with consecutive seeds, starting here.
                seed = torch.randint(2**62, (), generator=self._generator, device="cpu")
                group["rounding_seed"] = int(seed)
        bounds = {
            p: self._bounds.pop(p, self._rate_bound)
            for p in rates
            if isinstance(pending[p][0] or own, LogUniform)
        }
        shares = {p: bound for p, bound in bounds.items() if bound}
        limits = rate_limits(self._in_rates(shares), self._layouts)
        known = self._known_rates() if sharded else ()
        self._agree([*rates.values(), *limits.values(), *known])
        for param, own_rates in limited(rates, limits).items():
            self._rates[param] = own_rates
            self.state[param].update(own_rates)
        self._tell_heads()

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
        try:
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
            self._draw(sharded=bool(sharded))
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
        self._places.note(groups)
        self._warn_of_bare_tensors()

    def _tell_heads(self) -> None:
        """Let the heads, which outlive the optimizer, copy the rates of their clones."""
        live.optimizers.enter(self)
        for head in live.heads:
            head.take_rates(self)

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
