"""A head whose clones can be retired: those that are left take over its parameters, its switch and its rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.arguments import Ascending
from alrao_fast.flat_shards import is_cut
from alrao_fast.fsdp1 import is_flattened
from alrao_fast.nn.clone_parameters import WithParameters
from alrao_fast.nn.holders import check_holders
from alrao_fast.sharding import is_sharded

if TYPE_CHECKING:
    from alrao_fast.nn.switch import Switch

# How to undo what a checkpoint has retired so far, while it is loaded by one of our modules.
_undone: ContextVar[list[Callable[[], None]] | None] = ContextVar("_undone", default=None)


@contextmanager
def undone_on_error() -> Iterator[None]:
    """A block that loads a checkpoint: where it raises, the clones retired in it are back."""
    steps: list[Callable[[], None]] = []
    token = _undone.set(steps)
    try:
        yield
    except BaseException:
        for step in reversed(steps):
            step()
        raise
    finally:
        _undone.reset(token)


class Retiring(WithParameters):
    """A module of clones `[N, ...]` that can go on with some of them.

    `kept [M]`, bool, which of the M clones at construction are left: a buffer that is there, and in the state_dict,
    only once some have been retired. Its copy on the CPU spares a wait for the device.
    """

    switch: Switch
    kept: Tensor | None
    _numbers: tuple[int, ...] | None = None

    @property
    def clone_numbers(self) -> tuple[int, ...]:
        """The numbers, from 0 on, that the clones which are left had at construction."""
        return tuple(range(self.num_clones)) if self._numbers is None else self._numbers

    def check_retiring(self) -> None:
        """Raise ValueError where clones cannot be taken out of this head."""
        own = {id(param) for owner in self.owners() for param in owner._parameters.values()}
        over_ranks = getattr(self, "over_ranks", None) is not None
        # FSDP1 flattens parameters of which a rank may have the whole, and without the originals takes them from the
        # module: what is refused on one rank has to be refused on all.
        taken = isinstance(self.__dict__.get("weight"), Tensor)
        for name, param in [("weight", self.weight)] if taken else self.named_parameters():
            if taken or over_ranks or is_sharded(param) or is_cut(param) or is_flattened(param):
                what = f"a {name} that lies over ranks"
            elif id(param) not in own or param.shape[:1] != (self.num_clones,):
                what = f"a parameter {name} of shape {list(param.shape)}"
            elif param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
                what = f"hooks on its {name}"
            else:
                continue
            raise ValueError(
                f"net: got a {type(self).__name__} with {what}, expected ordinary parameters of its own with one "
                f"entry for each of its {self.num_clones} clones: they are exchanged for smaller ones"
            )
        for optimizer in live.optimizers:
            if getattr(optimizer, "_shows_averages", False) and any(
                id(param) in own for group in optimizer.param_groups for param in group["params"]
            ):
                raise RuntimeError(
                    "net: its clones cannot be retired within averaged(): leave the block first"
                )

    def keep_clones(self, places: Sequence[int]) -> None:
        """Go on with the clones at these places `[N']`, in ascending order; their optimizers follow.

        Parameters, gradients, statistics and states of the clones that are left keep their bits. `retire_clones`
        chooses them by the posterior. TypeError or ValueError, with nothing changed, for places that are not ascending
        integers from 0 to N - 1, and where `retire_clones` raises.
        """
        found = Ascending(0, self.num_clones - 1).check("places", places)
        if len(found) < self.num_clones:
            self.check_retiring()
            check_holders(self.parameters())
            self.go_on_with(found)

    @torch.no_grad()
    def go_on_with(self, places: Sequence[int]) -> Callable[[], None]:
        """`keep_clones` where all has been checked. What is returned undoes it, with all that was written into what is
        new."""
        index = torch.tensor(places, dtype=torch.int64)
        undo = [self._as_it_is()]
        before = self.clone_numbers
        moved: dict[Tensor, Tensor] = {}
        for owner in self.owners():
            for name, old in owner._parameters.items():
                if old is not None:
                    moved[old] = owner._parameters[name] = _some_of(old, index)
        for name, dim in (("clone_lr", 0), ("running", 1)):
            # Past the property, which would look for the optimizer.
            buffer = self._buffers[name]
            if buffer is not None:
                self._buffers[name] = buffer.index_select(dim, index.to(buffer.device))
        self.switch.keep_clones(index)
        self._note_kept([before[place] for place in places])
        for optimizer in live.optimizers:
            follow: Any = getattr(optimizer, "_keep_clones", None)
            if follow is not None:
                undo.append(follow(moved, index))

        def undo_all() -> None:
            for step in undo:
                step()

        return undo_all

    def _as_it_is(self) -> Callable[[], None]:
        """What makes the head that of now again; of its optimizers nothing."""
        owners = [(owner, dict(owner._parameters)) for owner in self.owners()]
        modules = [(module, dict(module._buffers)) for module in (self, self.switch)]
        numbers, count, t = self._numbers, self.num_clones, self.switch.t.clone()

        def restore() -> None:
            for owner, params in owners:
                owner._parameters.update(params)
            for module, buffers in modules:
                module._buffers.clear()
                module._buffers.update(buffers)
            self._numbers, self.num_clones, self.switch.num_clones = numbers, count, count
            # The only one of the state that an observation shares with a checkpoint.
            self.switch.t.copy_(t)

        return restore

    def _note_kept(self, numbers: list[int]) -> None:
        kept = self._buffers.get("kept")
        if kept is None:
            kept = torch.ones(self.num_clones, dtype=torch.bool, device=self.switch.t.device)
        mask = torch.zeros(kept.numel(), dtype=torch.bool)
        mask[numbers] = True
        self.register_buffer("kept", mask.to(kept.device))
        self.num_clones, self._numbers = len(numbers), tuple(numbers)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        kept = state_dict.get(f"{prefix}kept")
        if isinstance(kept, Tensor):
            *_, errors = arguments
            self._follow(prefix, kept, state_dict, errors)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; where it raises no clone has been retired."""
        with undone_on_error():
            return super().load_state_dict(state_dict, strict, assign)

    def _follow(
        self, prefix: str, kept: Tensor, state_dict: Mapping[str, Any], errors: Sequence[str]
    ) -> None:
        """Retire what a saved head of as many clones had retired; RuntimeError where that cannot be, or where the
        checkpoint does not fit otherwise as far as it is known here (`errors` are those of other modules). ValueError
        as of `retire_clones`."""
        name = f"{prefix}kept"
        own = self._buffers.get("kept")
        total = self.num_clones if own is None else own.numel()
        numbers = kept.cpu().flatten().nonzero().flatten().tolist()
        if kept.shape != (total,) or not numbers:
            raise RuntimeError(
                f"{name}: got {len(numbers)} of {kept.numel()} clones, expected some of the {total} that this head was "
                "made with"
            )
        gone = sorted(set(numbers).difference(self.clone_numbers))
        if gone:
            raise RuntimeError(
                f"{name}: got clones {numbers}, of which this head has retired {gone}: load into a new one"
            )
        if numbers != list(self.clone_numbers):
            self.check_retiring()
            errors = [*errors, *self._misfits(prefix, len(numbers), state_dict)]
            if errors:
                raise RuntimeError(
                    f"{name}: got clones {numbers} of a checkpoint that does not fit, expected one that does: "
                    + "; ".join(errors)
                )
            check_holders(self.parameters())
            undo = self.go_on_with([self.clone_numbers.index(number) for number in numbers])
            steps = _undone.get()
            if steps is not None:
                steps.append(undo)

    def _misfits(self, prefix: str, count: int, state_dict: Mapping[str, Any]) -> list[str]:
        """What a saved head of `count` clones has in other shapes than this one would have then."""
        shapes = {name: (count, *param.shape[1:]) for name, param in self.named_parameters()}
        shapes |= {
            "clone_lr": (count,),
            "switch.log_posterior": (count,),
            "switch.logw": (2, count),
        }
        given = {name: state_dict.get(f"{prefix}{name}") for name in shapes}
        return [
            f"{prefix}{name} has shape {list(value.shape)}, expected {list(shapes[name])}"
            for name, value in given.items()
            if isinstance(value, Tensor) and value.shape != shapes[name]
        ]


def _some_of(param: nn.Parameter, index: Tensor) -> nn.Parameter:
    """A parameter of these rows of another, with their gradients and what was noted on it."""
    index = index.to(param.device)
    new = nn.Parameter(param.detach().index_select(0, index), requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    if param.grad is not None:
        new.grad = param.grad.detach().index_select(0, index)
    return new
