"""The last layers' optimizers: torch's own, one per layer, stepped all at once.

Each layer has a real torch.optim optimizer, with options, state and state_dict of its own. While the layers agree in
everything but the learning rate, one call of the op updates them all; its states are stacked tensors whose slices
stand in the optimizers. Otherwise the optimizers step one after the other, to the same effect.
"""

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alrao_fast.arguments import Number
from alrao_fast.compat._evaluation import Stacked
from alrao_fast.compat._fused_pass import keep_outputs
from alrao_fast.compat._stack import ParameterStack, stack
from alrao_fast.ops.feature import Lists, Scalars
from alrao_fast.optim import adam, sgd
from alrao_fast.optim.binding import Call, Objects

_OPTIONS: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    torch.optim.Adam: ("betas", "eps", "weight_decay", "amsgrad", "maximize"),
}


_RATE = Number(low=0.0)


class CloneOptimizers:
    """`optimizers`: one per last layer, of `kind` torch.optim.SGD or Adam, with the rates `lrs`."""

    def __init__(
        self,
        kind: type[Optimizer],
        params_list: Iterable[Iterable[Tensor]],
        lrs: Iterable[float],
        options: dict[str, Any],
    ) -> None:
        lists = [list(params) for params in params_list]
        rates = [_RATE.check(f"last_layers_lr[{k}]", lr) for k, lr in enumerate(lrs)]
        if len(lists) != len(rates):
            raise ValueError(
                f"last_layers_lr has {len(rates)} entries for {len(lists)} last layers; expected one for each"
            )
        self._kind = kind
        self.optimizers = [
            kind(params, lr=lr, **options)  # type: ignore[call-arg]
            for params, lr in zip(lists, rates)
        ]
        self._start()

    def _start(self) -> None:
        # Gradients that are known to be slices of one tensor.
        self.stacked: list[Stacked] = []
        self._stacks: list[ParameterStack] = []
        self._forget()
        for optimizer in self.optimizers:
            optimizer.register_load_state_dict_post_hook(self._on_load)

    # A copy gathers its states anew, from its own optimizers.

    def __getstate__(self) -> dict[str, Any]:
        return {"_kind": self._kind, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _on_load(self, optimizer: Optimizer) -> None:
        self._forget()

    def _forget(self) -> None:
        """Drop the stacked states: the optimizers' own are the truth."""
        self._states: dict[str, list[Tensor]] = {}
        self._steps: Tensor | None = None
        self._shown: Tensor | None = None
        self._rates: tuple[list[float], Tensor] | None = None
        # Whose states were gathered, and what they held.
        self._owners: list[Tensor] = []
        self._objects: Objects | None = None
        self._call: Call | None = None

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every last layer that has gradients."""
        keep_outputs(
            p for opt in self.optimizers for group in opt.param_groups for p in group["params"]
        )
        together = self._step_together()
        self.stacked = []
        if not together:
            self._forget()
            for optimizer in self.optimizers:
                optimizer.step()

    def _step_together(self) -> bool:
        """Update all layers by one call; False, with nothing written, where they have to be updated one by one."""
        groups = []
        names = _OPTIONS[self._kind]
        for optimizer in self.optimizers:
            if len(optimizer.param_groups) != 1 or optimizer._optimizer_step_pre_hooks:
                return False
            groups.append(optimizer.param_groups[0])
        first = groups[0]
        shared = [first[name] for name in names]
        lrs = [group["lr"] for group in groups]
        if any([group[name] for name in names] != shared for group in groups[1:]):
            return False
        if any(isinstance(lr, Tensor) for lr in lrs):
            return False
        slots = list(zip(*(group["params"] for group in groups)))
        if any(len(group["params"]) != len(slots) for group in groups):
            return False
        params, grads = [], []
        self._stacks += [ParameterStack() for _ in slots[len(self._stacks) :]]
        for slot, as_one in zip(slots, self._stacks):
            own = [p.grad for p in slot]
            together = None if any(g is None or g.is_sparse for g in own) else as_one(slot)
            if together is None:
                return False
            params.append(together)
            grads.append(self._stacked(own))
        if not params or len({(p.dtype, p.device) for p in params}) > 1:
            return False
        rule = sgd if self._kind is torch.optim.SGD else adam
        options = rule.options_of(first, authors=False)
        kept = rule.OP.states[: rule.OP.num_states(options)]
        if not self._gather(kept, slots, params):
            return False
        rates = self._rates_of(lrs, params[0])
        for _ in range(2):
            call = self._call
            if (
                call is None
                or call.lists.rates[0] is not rates
                or not all(map(is_, params, call.lists.params))
                or len(call.lists.states) != len(kept)
                or call.impl != rule.OP.select(params)
            ):
                assert self._steps is not None
                states = [self._states[name] for name in kept]
                inners = [p.stride(0) if len(lrs) > 1 else 1 for p in params]
                each = [rates] * len(params)
                lists = Lists(params, states, [], each, inners, [], self._steps)
                call = self._call = Call(rule.OP, lists, rule.OP.select(params))
            if call.step(grads, options, Scalars(maximize=first["maximize"])):
                break
            # Something has moved.
            self._call = None
        else:
            raise RuntimeError("internal error: an update plan is stale right after it was made")
        if self._shown is not None:
            self._shown += 1
        # The op has written to the stacked tensors.
        torch.autograd.graph.increment_version(self._owners)
        for optimizer in self.optimizers:
            # What a learning-rate scheduler looks at to see that there has been a step.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        return True

    def _stacked(self, grads: list[Tensor]) -> Tensor:
        """The layers' gradients as one tensor [N, ...]."""
        for known, together in self.stacked:
            if len(known) == len(grads) and all(map(is_, known, grads)):
                return together
        return stack(grads)

    def _rates_of(self, lrs: list[float], like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        cached = self._rates
        if (
            cached is None
            or cached[0] != lrs
            or (cached[1].device, cached[1].dtype) != (like.device, dtype)
        ):
            self._rates = cached = lrs, torch.tensor(lrs, dtype=dtype, device=like.device)
        return cached[1]

    def _gather(
        self, names: Sequence[str], slots: Sequence[Sequence[Tensor]], params: list[Tensor]
    ) -> bool:
        """Have the stacked states `names` at hand; False if the layers' optimizers are not at the same step."""
        fresh = self._steps is None or self._steps.device != params[0].device
        fresh = fresh or any(
            name not in self._states
            or [(s.shape, s.dtype) for s in self._states[name]]
            != [(p.shape, p.dtype) for p in params]
            for name in names
        )
        owners = [param for slot in slots for param in slot]
        fresh = fresh or len(owners) != len(self._owners) or not all(map(is_, owners, self._owners))
        if not fresh and self._objects is not None and self._objects.are_same():
            return True
        self._call = None
        counts: list[int | None] = []
        for slot in slots:
            found = {self._count(k, p, names) for k, p in enumerate(slot)}
            if len(found) > 1 or None in found:
                return False
            counts += found
        for name in names:
            self._states[name] = []
            for slot, together in zip(slots, params):
                stored = [o.state[p].get(name) for o, p in zip(self.optimizers, slot)]
                if stored[0] is None:
                    state = torch.zeros_like(together)
                else:
                    state = torch.stack(stored).to(together.device, together.dtype)
                for optimizer, param, part in zip(self.optimizers, slot, state.unbind(0)):
                    optimizer.state[param][name] = part
                self._states[name].append(state)
        self._steps = torch.tensor(counts, dtype=torch.int64, device=params[0].device)
        if self._kind is torch.optim.Adam:
            shown = self._steps.cpu().float().unsqueeze(1).repeat(1, len(self.optimizers))
            for slot, row in zip(slots, shown.unbind(0)):
                for optimizer, param, step in zip(self.optimizers, slot, row.unbind(0)):
                    optimizer.state[param]["step"] = step
            self._shown = shown
        self._owners = owners
        own = [o.state[p] for slot in slots for o, p in zip(self.optimizers, slot)]
        self._objects = Objects(*(o.state for o in self.optimizers), *own)
        return True

    def _count(self, k: int, param: Tensor, names: Sequence[str]) -> int | None:
        """The updates that layer k's parameter has had, as far as the op asks; None if its state is incomplete."""
        state = self.optimizers[k].state[param]
        present = [state.get(name) is not None for name in names]
        if len(set(present)) > 1:
            return None
        if self._kind is torch.optim.Adam:
            return int(state["step"]) if any(present) else 0
        # SGD only asks whether there is momentum already.
        return int(any(present))
