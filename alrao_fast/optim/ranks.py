"""What an optimizer has to do with other processes: one draw of the rates for all, and modules that are sharded."""

import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from alrao_fast import compiler, flat_shards, fsdp1, live, sharding
from alrao_fast.optim.binding import Binding, gradients
from alrao_fast.optim.flat_layouts import FlatLayout, flat_layout
from alrao_fast.optim.homes import Homes
from alrao_fast.optim.layouts import Layout, resolve
from alrao_fast.optim.notices import warn_of_replaced
from alrao_fast.optim.states import rates_in

# Of this process, in the order in which they made their first step.
_numbers = itertools.count()


class AcrossRanks(Optimizer):
    """The part of an Alrao optimizer that knows of other ranks."""

    _layouts: dict[Tensor, Layout]
    _rates: dict[Tensor, dict[str, Tensor]]
    _binding: Binding
    _homes: Homes
    # How many gradients each group had in the last step: where that changes, a module may have been sharded.
    _counts: dict[int, int]
    _notice: "_Notice"
    # The process groups, by id, whose ranks have the same rates.
    _agreed: set[int]
    # Whether parameters have been found that others have replaced: they are looked for until then.
    _found_replaced: bool

    def _alone(self) -> None:
        """As an optimizer begins, and a copy, whose parameters are in no module that is known."""
        self._homes, self._counts, self._notice = Homes(), {}, _Notice()
        self._agreed = set()
        self._found_replaced = False

    def refresh(self) -> None:
        """Give rates and states to parameters that were put into `param_groups` by hand, or whose state was cleared."""
        raise NotImplementedError

    def _tell_heads(self) -> None:
        raise NotImplementedError

    def _adopt(self) -> None:
        raise NotImplementedError

    def _resolve(self, root: nn.Module) -> None:
        """Lay out the parameters of a module, and remember where in it they are."""
        resolve(root, self._layouts)
        for param in fsdp1.flats_among(root.parameters(), root):
            if param not in self._layouts:
                self._lay_out_flat(param)
        self._homes.note(root)

    def _lay_out_flat(self, param: Tensor) -> None:
        """Lay out a vector by the parameters in it, as they are laid out now."""
        flat = flat_shards.flat_of(param)
        assert flat is not None
        self._layouts[param] = flat_layout(flat, self._layouts)

    # Modules that are sharded after the optimizer was made.

    @compiler.disable("the optimizer's parameters are looked for in their modules")
    def _recounted(self, number: int) -> list[Tensor]:
        """The gradients of a group that had another number of them in the last step.

        Parameters that were sharded after the optimizer was made have none: their DTensors come into their places.
        """
        self._follow_sharding(without_gradient=True)
        params = self.param_groups[number]["params"]
        if any(p not in self._rates or self._is_late(p) for p in params):
            # On every rank, also where nothing of them is.
            self._adopt()
        grads = gradients(params)
        self._look_for_replaced()
        if not grads and any(p.requires_grad for p in params):
            for root in self._homes.roots():
                fsdp1.check_not_later(root, self._layouts)
        # Looks twice: at the second step every rank has made its first.
        if not self._notice.look(self, number, grads):
            self._counts[number] = len(grads)
        return grads

    def _look_for_replaced(self) -> None:
        """Warn, once, of parameters that have no gradient any more because others are in their places."""
        if self._found_replaced:
            return
        own = dict.fromkeys(p for group in self.param_groups for p in group["params"])
        lacking = (p for p in own if p.grad is None and p.requires_grad)
        found = [(p, new) for p, new in self._homes.replaced(lacking) if new not in own]
        if not found:
            return
        self._found_replaced = True
        trained = {
            id(p)
            for optimizer in live.instances(Optimizer)
            for group in getattr(optimizer, "param_groups", ())
            for p in group["params"]
        }
        untrained = [self._layouts[p].name for p, new in found if id(new) not in trained]
        if untrained:
            warn_of_replaced(untrained)

    def _follow_sharding(self, *, without_gradient: bool = False) -> None:
        """Put DTensors that are in the modules now into the groups, in the places of what they were made of."""
        for group in self.param_groups:
            own = group["params"]
            moved = dict(
                self._homes.sharded(p for p in own if not (without_gradient and p.grad is not None))
            )
            if moved:
                own[:] = [moved.get(param, param) for param in own]

    def _is_late(self, param: Tensor) -> bool:
        """Whether FSDP1 has cut a parameter since it was laid out, or has copies of it on ranks that have drawn by
        themselves."""
        if not fsdp1.is_flattened(param) or isinstance(self._layouts.get(param), FlatLayout):
            return False
        if fsdp1.flats_among([param]):
            return True
        return not self._agreed.issuperset(map(id, flat_shards.groups_of([param])))

    # Rates that are the same on all ranks.

    def _known_rates(self) -> list[Tensor]:
        """The rates of the groups' parameters that have some; where these hold slices of others, of all that are known,
        in an order that is the same whatever is where."""
        own: Iterable[Tensor] = [p for group in self.param_groups for p in group["params"]]
        if any(p in self._layouts and self._is_told(p) for p in own):
            own = [p for p in self._rates if not self._is_told(p)]
        return [rate for p in own if p in self._rates for rate in self._rates[p].values()]

    def _is_told(self, param: Tensor) -> bool:
        """Whether a parameter is a vector of which the ranks may have named other slices."""
        layout = self._layouts[param]
        return isinstance(layout, FlatLayout) and not layout.gathers

    def _drawn_rates(self) -> list[Tensor]:
        """The vectors of rates, each once, in an order that is the same on all ranks that train one network."""
        self.refresh()
        own = (p for group in self.param_groups for p in group["params"])
        rates = (rate for p in own for rate in rates_in(self.state[p]).values())
        return [*{id(rate): rate for rate in rates}.values()]

    def _fingerprint(self) -> tuple[int, int]:
        """A checksum of the rates, as drawn, and rounding seeds, below 2^52, and the number of the rates.

        Waits for the device. Rates that are annealed differ from step to step, and heads look at different ones.
        """
        self.refresh()
        own = (rates_in(self.state[p]) for group in self.param_groups for p in group["params"])
        drawn = (rates.get("drawn_rate", rates.get("rate")) for rates in own)
        checksum, count = 0, 0
        # Which parameters share one vector a checkpoint may have changed.
        for rates in (rate for rate in drawn if rate is not None):
            words = rates.detach().cpu().view(torch.int32).long()
            places = torch.arange(count, count + words.numel())
            # Sums in int64 wrap.
            checksum += int((words * (2 * places + 1)).sum())
            count += words.numel()
        for group in self.param_groups:
            checksum = 3 * checksum + group["rounding_seed"]
        return checksum % 2**52, count

    def _take_over(self, process_group: Any) -> None:
        """Have the rates and rounding seeds that the first rank of the group has; all of its ranks have to call it."""
        self._agree(self._drawn_rates(), [process_group or dist.group.WORLD])
        # The seeds are part of what is bound.
        self._binding = Binding()
        self._tell_heads()

    def _agree(self, rates: Iterable[Tensor], process_groups: list[Any] | None = None) -> None:
        """Take over, in place, rates and the rounding seeds from the first rank of the process groups, by default those
        of the meshes on which parameters are."""
        fresh = [*{id(rate): rate for rate in rates}.values()]
        if process_groups is None:
            params = [p for group in self.param_groups for p in group["params"]]
            process_groups = []
            if fresh:
                process_groups = sharding.groups_of(params) + flat_shards.groups_of(params)
        if fresh:
            self._agreed.update(map(id, process_groups))
        own = [group["rounding_seed"] for group in self.param_groups]
        for group, seed in zip(self.param_groups, sharding.agree(fresh, own, process_groups)):
            group["rounding_seed"] = seed


class _Notice:
    """Warns, once, of ranks that have the same gradients and other rates: they train one network, and it drifts apart.

    Nothing is waited for, since other ranks may train something else: each leaves what it has in the store of the
    process group at its first step, and looks at the first rank's at its second, which comes after everyone's first
    where gradients are averaged over the ranks.
    """

    def __init__(self) -> None:
        self._steps, self._group = 0, -1
        self._own, self._keys = "", ("", "")

    def look(self, optimizer: AcrossRanks, group: int, grads: list[Tensor]) -> bool:
        """Look at the gradients of the first group that has any; return whether to look again in its next step."""
        if self._steps == 0 and grads:
            self._group = group
        if group != self._group or self._steps > 1 or not grads or _is_alone():
            return False
        store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        if store is None or any(map(sharding.is_sharded, grads)):
            return False
        self._steps += 1
        try:
            if self._steps == 1:
                self._tell(store, optimizer, grads)
                return True
            if store.check([self._keys[1]]):
                self._compare(store.get(self._keys[1]).decode())
        except RuntimeError:
            # A store of another kind, or one whose host has gone: nobody is told.
            self._steps = 2
        return False

    def _tell(self, store: Any, optimizer: AcrossRanks, grads: list[Tensor]) -> None:
        norms = (torch.linalg.vector_norm(g.detach(), 1, dtype=torch.float64) for g in grads)
        total = sum(map(float, norms))
        checksum, count = optimizer._fingerprint()
        prefix = f"alrao_fast/{next(_numbers)}"
        self._own = f"{total!r} {count} {checksum}"
        self._keys = f"{prefix}/{dist.get_rank()}", f"{prefix}/0"
        store.set(self._keys[0], self._own)

    def _compare(self, first: str) -> None:
        theirs, ours = first.split(), self._own.split()
        if theirs[:2] == ours[:2] and theirs[2] != ours[2] and 0 < float(ours[0]) < math.inf:
            warnings.warn(
                f"ranks 0 and {dist.get_rank()} have the same gradients and different learning rates: if they train "
                "one network, as under DistributedDataParallel, its copies drift apart. Draw the same rates on every "
                "rank: generator=torch.Generator().manual_seed(...) with one seed for all",
                stacklevel=2,
            )


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
