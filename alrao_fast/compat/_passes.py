"""One evaluation of all last layers on the same features, and the way back from their outputs to the gradients.

A pass keeps what the way back needs, so that it can be walked twice without a second forward: once for the mixture's
loss, to the features, and once for each layer's own loss, to its parameters.

A layer is dead for a sample if its output there is not finite. Gradients of dead outputs are dropped on the way back,
and nothing of a dead layer reaches the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alrao_fast.compat._stack import lay_out

Gradients = tuple["Tensor | None", list["Tensor | None"]]


class ClonePass:
    """`outputs [N, ...]` of the layers, detached, and `alive`, None or where the outputs are finite, `[N, ..., 1]`.

    params: the layers' parameters, name by name, each name for layer 0 to N - 1.
    normalised: the outputs are exact log-probabilities along their last dimension.
    """

    params: tuple[Tensor, ...]
    outputs: Tensor
    alive: Tensor | None = None
    normalised = False

    def pull(self, grad: Tensor, *, features: bool, masked: bool = True) -> Gradients:
        """Gradients by the features (None unless asked for) and by `params`, from those by the outputs.

        masked: let dead outputs give no gradient; otherwise a dead layer's own gradient is not finite, as it is.
        """
        raise NotImplementedError

    def attached(self, x: Tensor) -> Tensor:
        """The outputs as a differentiable function of the features `x` and of the parameters."""
        return _Outputs.apply(self, x, *self.params)

    def check_finite(self, x: Tensor) -> None:
        """Raise ValueError unless the features are finite, and find out which layers are dead where."""
        # A sum is finite only if its terms are: one number for the host to look at, and details only where needed.
        total = _sum(x) + _sum(self.outputs)
        if bool(total.isfinite()):
            return
        if not bool(x.isfinite().all()):
            raise ValueError(
                "the output of internal_nn is not finite: the internal network has diverged"
            )
        alive = self._living()
        self.alive = None if bool(alive.all()) else alive

    def _living(self) -> Tensor:
        finite = self.outputs.isfinite()
        return finite.all(-1, keepdim=True) if finite.dim() > 1 else finite


def _sum(tensor: Tensor) -> Tensor:
    wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().sum(dtype=wide)


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clone_pass: ClonePass, x: Tensor, *params: Tensor) -> Tensor:
        ctx.clone_pass = clone_pass
        return clone_pass.outputs.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dparams = ctx.clone_pass.pull(grad, features=ctx.needs_input_grad[1])
        return None, dx, *dparams


class LinearPass(ClonePass):
    """Linear layers, with or without log_softmax, as one matrix product each way."""

    def __init__(
        self, x: Tensor, linears: Sequence[nn.Linear], *, log_softmax: bool, flatten: bool
    ) -> None:
        x = x.detach()
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        weight, bias = lay_out(weights), lay_out(biases) if biases else None
        assert weight is not None
        self.params = (*weights, *biases)
        self.normalised = log_softmax
        self._weight, self._has_bias = weight, bias is not None
        self._shape = x.shape
        n, c, d = weight.shape
        leading = (-1,) if flatten else x.shape[:-1]
        self._x = x.reshape(-1, d)
        with torch.no_grad():
            logits = F.linear(self._x, weight.view(n * c, d), None if bias is None else bias.view(-1))
            logits = logits.view(-1, n, c)
            # [M, N, C]: the product's own memory order.
            self._rows = logits.log_softmax(2) if log_softmax else logits
        outputs = self._rows.transpose(0, 1)
        self.outputs = outputs if len(leading) == 1 else outputs.unflatten(1, leading)

    def pull(self, grad: Tensor, *, features: bool, masked: bool = True) -> Gradients:
        n, c, d = self._weight.shape
        rows = grad.reshape(n, -1, c).transpose(0, 1)
        if self.normalised:
            rows = torch.ops.aten._log_softmax_backward_data(rows, self._rows, 2, self._rows.dtype)
        weight = self._weight
        if self.alive is not None and masked:
            rows = torch.where(self.alive.reshape(n, -1, 1).transpose(0, 1), rows, 0)
            # Zero times a weight that is not finite is not zero.
            weight = torch.where(weight.isfinite(), weight, 0)
        rows = rows.reshape(-1, n * c).to(self._x.dtype)
        dx = None
        if features:
            dx = (rows @ weight.view(n * c, d).to(rows.dtype)).view(self._shape)
        dweight = (rows.T @ self._x).view(n, c, d).to(weight.dtype)
        dparams: list[Tensor | None] = [*dweight.unbind(0)]
        if self._has_bias:
            dparams += rows.sum(0).view(n, c).to(weight.dtype).unbind(0)
        return dx, dparams


class GraphPass(ClonePass):
    """Any layers: their autograd graph, from one copy of the features per layer, is kept for several ways back.

    batched: evaluate them together by torch.func, on stacked parameters, instead of one after the other.
    """

    def __init__(self, x: Tensor, layers: Sequence[nn.Module], *, batched: bool) -> None:
        self._layers = list(layers)
        self._batched = batched
        self._x = x.detach()
        self._names = [name for name, _ in layers[0].named_parameters()] if batched else []
        by_layer = [dict(layer.named_parameters()) for layer in layers]
        if batched:
            self.params = tuple(own[name] for name in self._names for own in by_layer)
        else:
            self.params = tuple(dict.fromkeys(p for own in by_layer for p in own.values()))
        self._run()
        self.outputs = self._graph.detach()

    def _run(self) -> None:
        # A copy of the features per layer: what a dead layer sends back can be told apart.
        copies = self._x.expand(len(self._layers), *self._x.shape)
        if torch.is_grad_enabled():
            copies = copies.detach().requires_grad_(self._x.is_floating_point())
        self._copies = copies
        if self._batched:
            outputs = self._run_batched()
        else:
            self._leaves: list[Tensor] = [p for p in self.params if p.requires_grad]
            outputs = torch.stack(
                [layer(own) for layer, own in zip(self._layers, copies.unbind(0))]
            )
        self._graph = outputs

    def _run_batched(self) -> Tensor:
        n, first = len(self._layers), self._layers[0]
        stacked = {}
        for k, name in enumerate(self._names):
            together = lay_out(self.params[k * n : (k + 1) * n])
            assert together is not None
            stacked[name] = together.requires_grad_(torch.is_grad_enabled())
        self._leaves = list(stacked.values())

        def call(params: dict[str, Tensor], own: Tensor) -> Tensor:
            return torch.func.functional_call(first, params, (own,))

        return torch.func.vmap(call, randomness="different")(stacked, self._copies)

    def pull(self, grad: Tensor, *, features: bool, masked: bool = True) -> Gradients:
        if not self._graph.requires_grad and (features or self._leaves or self._names):
            # The forward ran without a graph.
            with torch.enable_grad():
                self._run()
        inputs = [self._copies] if features else []
        inputs += self._leaves
        if not inputs:
            return None, [None] * len(self.params)
        grads = list(
            torch.autograd.grad(self._graph, inputs, grad, retain_graph=True, allow_unused=True)
        )
        dx = self._masked(grads.pop(0), masked) if features else None
        dparams: list[Tensor | None] = []
        if self._batched:
            for together in grads:
                together = self._masked(together, masked)
                n = len(self._layers)
                dparams += [None] * n if together is None else together.unbind(0)
        else:
            of = dict(zip(self._leaves, grads))
            dparams = [self._finite(of.get(p), masked) for p in self.params]
        return None if dx is None else dx.sum(0), dparams

    def _masked(self, grad: Tensor | None, masked: bool) -> Tensor | None:
        """Zero for the layers whose gradient is not finite, where some are dead."""
        if grad is None or self.alive is None or not masked:
            return grad
        good = grad.flatten(1).isfinite().all(1)
        return torch.where(good.view(-1, *[1] * (grad.dim() - 1)), grad, 0)

    def _finite(self, grad: Tensor | None, masked: bool) -> Tensor | None:
        if grad is None or self.alive is None or not masked:
            return grad
        return torch.where(grad.isfinite().all(), grad, 0)
