"""The pass of last layers of any kind: their own autograd graph, walked back as often as needed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alrao_fast.compat._passes import ClonePass, Slots
from alrao_fast.compat._stack import lay_out


class GraphPass(ClonePass):
    """Any layers: their autograd graph, from one copy of the features per layer, is kept for several ways back.

    batched: evaluate them together by torch.func, on stacked parameters, where these can lie together.
    """

    def __init__(self, x: Tensor, layers: Sequence[nn.Module], *, batched: bool) -> None:
        self._layers = list(layers)
        self._x = x.detach()
        by_layer = [dict(layer.named_parameters()) for layer in layers]
        # By name; None where they have changed so that they cannot be together: tied, for instance.
        stacks = {name: lay_out([own[name] for own in by_layer]) for name in by_layer[0] if batched}
        self._stacks = {name: stack for name, stack in stacks.items() if stack is not None}
        self._batched = batched and len(self._stacks) == len(stacks)
        self.calls_hooks = not self._batched
        self._names = list(stacks) if self._batched else []
        if self._batched:
            super().__init__(own[name] for name in self._names for own in by_layer)
        else:
            super().__init__(dict.fromkeys(p for own in by_layer for p in own.values()))
        self._run()
        self.outputs = self._graph.detach()

    def _run(self) -> None:
        # A copy of the features per layer: what a dead layer sends back can be told apart.
        copies = self._x.expand(len(self._layers), *self._x.shape)
        if torch.is_grad_enabled():
            copies = copies.detach().requires_grad_(self._x.is_floating_point())
        self._copies = copies
        if self._batched:
            self._graph = self._run_batched()
        else:
            self._leaves = [p for p in self.params if p.requires_grad]
            self._graph = torch.stack(
                [layer(own) for layer, own in zip(self._layers, copies.unbind(0))]
            )

    def _run_batched(self) -> Tensor:
        first = self._layers[0]
        self._leaves = [
            stack.requires_grad_(torch.is_grad_enabled()) for stack in self._stacks.values()
        ]

        def call(params: dict[str, Tensor], own: Tensor) -> Tensor:
            return torch.func.functional_call(first, params, (own,))

        return torch.func.vmap(call, randomness="different")(self._stacks, self._copies)

    def pull(
        self, grad: Tensor, *, features: bool, masked: bool = True
    ) -> tuple[Tensor | None, Slots]:
        if not self._graph.requires_grad and self.params:
            # The forward ran without a graph.
            with torch.enable_grad():
                self._run()
        inputs = [self._copies, *self._leaves] if features else list(self._leaves)
        if not inputs:
            return None, [None] * (len(self._names) or len(self.params))
        grads: Slots = list(
            torch.autograd.grad(self._graph, inputs, grad, retain_graph=True, allow_unused=True)
        )
        dx = None
        if features:
            dx = self._finite_only(grads.pop(0), masked)
            dx = None if dx is None else dx.sum(0)
        if self._batched:
            return dx, [self._finite_only(g, masked) for g in grads]
        of = dict(zip(self._leaves, grads))
        slots = [of.get(p) for p in self.params]
        if self.alive is not None and masked:
            slots = [None if g is None else torch.where(g.isfinite().all(), g, 0) for g in slots]
        return dx, slots

    def _finite_only(self, grad: Tensor | None, masked: bool) -> Tensor | None:
        """`grad [N, ...]` with zeros for the layers where it is not finite, if there are dead ones."""
        if grad is None or self.alive is None or not masked:
            return grad
        good = grad.flatten(1).isfinite().all(1)
        return super().only(good, [grad])[0]

    def only(self, good: Tensor, slots: Slots) -> Slots:
        if self._batched:
            return super().only(good, slots)
        owner = {id(p): k for k, layer in enumerate(self._layers) for p in layer.parameters()}
        return [
            None if g is None else torch.where(good[owner[id(p)]], g, 0)
            for p, g in zip(self.params, slots)
        ]

    def split(self, slots: Slots) -> Slots:
        return super().split(slots) if self._batched else slots
