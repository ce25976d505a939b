"""One evaluation of all last layers on the same features, and the way back from their outputs to the gradients.

A pass keeps what the way back needs, so that it can be walked twice without a second forward: once for the mixture's
loss, to the features, and once for each layer's own loss, to its parameters.

A layer is dead for a sample if its output there is not finite. Gradients of dead outputs are dropped on the way back,
and nothing of a dead layer reaches the features.

Gradients by the parameters go by slots: for passes that keep the layers' parameters stacked a slot is one name, its
gradient [N, *shape]; for the others it is one parameter. `split` gives every parameter its own.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alrao_fast.compat._losses import nll_losses, nll_terms
from alrao_fast.ops import derivatives

Slots = list["Tensor | None"]
NO_SECOND_DERIVATIVE = (
    "the last layers of this AlraoModel are evaluated together, by a pass that has no second derivative: call them one "
    "by one (last_layers()) on the output of internal_nn to differentiate twice"
)


class Own(NamedTuple):
    """Losses [N] of the layers, the gradients of their slots, and correct predictions [N], None if not counted."""

    losses: Tensor
    slots: Slots
    correct: Tensor | None


class ClonePass:
    """`outputs [N, ...]` of the layers, detached, and `alive`, None or where the outputs are finite, `[N, ..., 1]`.

    params: the layers' parameters, name by name, each name for layer 0 to N - 1. They must not change before the way
    back: `check_unchanged`.
    normalised: the outputs are exact log-probabilities along their last dimension.
    """

    outputs: Tensor
    alive: Tensor | None = None
    normalised = False
    # Whether the parameters' own hooks have seen what `pull` gives.
    calls_hooks = False

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = tuple(params)
        self._versions = _versions(self.params)

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a parameter has been modified since."""
        if _versions(self.params) != self._versions:
            raise RuntimeError(
                "the last layers' parameters have been modified since this forward, by a step or in place: call "
                "backward and alrao_step before, or run the forward again"
            )

    @property
    def classified(self) -> int | None:
        """M where the outputs are [N, M, C], else None."""
        return self.outputs.size(1) if self.outputs.dim() == 3 else None

    def pull(
        self, grad: Tensor, *, features: bool, masked: bool = True
    ) -> tuple[Tensor | None, Slots]:
        """Gradients by the features (None unless asked for) and by the slots, from those by the outputs.

        masked: let dead outputs give no gradient; otherwise a dead layer's own gradient is not finite, as it is.
        """
        raise NotImplementedError

    def own_nll(self, targets: Tensor, ignored: int, *, masked: bool) -> Own:
        """What each layer's own mean negative log-likelihood of the classes [M] says; outputs are [N, M, C]."""
        terms = nll_terms(self.outputs, targets, ignored)
        losses = nll_losses(self.outputs, terms)
        slots = self._pull_nll(*terms, masked=masked)
        return Own(losses, self.only(losses.isfinite(), slots) if masked else slots, None)

    def _pull_nll(self, targets: Tensor, share: Tensor, *, masked: bool) -> Slots:
        """Gradients by the slots of each layer's own `-sum_m share[m] outputs[n, m, targets[m]]`."""
        index = targets.view(1, -1, 1).expand(self.outputs.size(0), -1, 1)
        grad = torch.zeros_like(self.outputs)
        grad.scatter_(2, index, -share.view(1, -1, 1).expand_as(index))
        return self.pull(grad, features=False, masked=masked)[1]

    def only(self, good: Tensor, slots: Slots) -> Slots:
        """The slots with zeros for those layers that are not among the `good [N]`."""
        return [
            None if g is None else torch.where(good.view(-1, *[1] * (g.dim() - 1)), g, 0)
            for g in slots
        ]

    def split(self, slots: Slots) -> Slots:
        """The gradient of each of `params`."""
        parts: Slots = []
        n = len(self.params) // max(len(slots), 1)
        for grad in slots:
            parts += [None] * n if grad is None else grad.unbind(0)
        return parts

    @property
    def mixes(self) -> bool:
        """Whether `mixture` can be used."""
        return self.alive is None

    def mixture(self, x: Tensor, log_prior: Tensor) -> Tensor:
        """`log sum_n exp(log_prior[n] + outputs[n])`, differentiable."""
        if not torch.is_grad_enabled():
            return self.mix(log_prior)[0]
        return _Mixture.apply(self, log_prior, x, *self.params)

    def mix(self, log_prior: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`mixture` without a graph, and what the way back needs of it."""
        outputs = self.outputs
        joint = outputs + log_prior.to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
        largest = joint.amax(0)
        joint.sub_(largest).exp_()
        total = joint.sum(0)
        return total.log().add_(largest), (joint, total)

    def pull_mixture(
        self, grad: Tensor, kept: tuple[Tensor, ...], *, features: bool
    ) -> tuple[Tensor | None, Slots]:
        """The way back from `mix`, which kept these; by the outputs it is softmax_n(log_prior[n] + outputs[n])."""
        joint, total = kept
        return self.pull(joint * (grad / total), features=features)

    def attached(self, x: Tensor) -> Tensor:
        """The outputs as a differentiable function of the features `x` and of the parameters."""
        return _Outputs.apply(self, x, *self.params)

    def check_finite(self, x: Tensor) -> None:
        """Raise ValueError unless the features are finite, and find out which layers are dead where."""
        # A sum is finite only if its terms are: one number for the host to look at, and details only where needed.
        if not math.isfinite((sum_of(x) + sum_of(self.outputs)).item()):
            check_features(x)
            self.alive = living(self.outputs)


def check_features(x: Tensor) -> None:
    """Raise ValueError unless all of `x` is finite."""
    if not bool(x.isfinite().all()):
        raise ValueError(
            "the output of internal_nn is not finite: the internal network has diverged"
        )


def living(outputs: Tensor) -> Tensor | None:
    """Where the outputs are finite, [N, ..., 1]; None if everywhere."""
    finite = outputs.isfinite()
    alive = finite.all(-1, keepdim=True) if finite.dim() > 1 else finite
    return None if bool(alive.all()) else alive


def sum_of(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    wide = tensor.dtype in (torch.float64, torch.float32)
    return tensor.sum() if wide else tensor.sum(dtype=torch.float32)


def _versions(params: Iterable[Tensor]) -> list[int]:
    try:
        return [p._version for p in params]
    except RuntimeError:
        # Inference tensors have none.
        return []


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clone_pass: ClonePass, x: Tensor, *params: Tensor) -> Tensor:
        ctx.clone_pass, ctx.sources = clone_pass, (x, *params)
        return clone_pass.outputs.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clone_pass.check_unchanged()
        with torch.no_grad():
            dx, slots = ctx.clone_pass.pull(grad, features=ctx.needs_input_grad[1])
        return None, *_final(ctx, grad, [dx, *ctx.clone_pass.split(slots)])


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, clone_pass: ClonePass, log_prior: Tensor, x: Tensor, *params: Tensor
    ) -> Tensor:
        result, kept = clone_pass.mix(log_prior)
        ctx.clone_pass, ctx.sources = clone_pass, (x, *params)
        ctx.save_for_backward(*kept)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features = ctx.needs_input_grad[2]
        ctx.clone_pass.check_unchanged()
        with torch.no_grad():
            dx, slots = ctx.clone_pass.pull_mixture(grad, ctx.saved_tensors, features=features)
        return None, None, *_final(ctx, grad, [dx, *ctx.clone_pass.split(slots)])


def _final(ctx: Any, grad: Tensor, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients that a pass gives; a graph that is created from them raises wherever it would need their own."""
    if not torch.is_grad_enabled():
        return gradients
    return derivatives.final(gradients, (grad, *ctx.sources), NO_SECOND_DERIVATIVE)


class LinearPass(ClonePass):
    """Linear layers, with or without log_softmax, as one matrix product each way.

    weight [N, C, D] and bias [N, C] or None lie over `params`; flatten: the features are a matrix [M, D] to the
    layers, whatever their shape.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        params: Sequence[Tensor],
        *,
        log_softmax: bool,
        flatten: bool,
    ) -> None:
        super().__init__(params)
        x = x.detach()
        self.normalised = log_softmax
        self._weight, self._bias, self._flatten = weight, bias, flatten
        self._shape = x.shape
        self._x = x if x.dim() == 2 else x.reshape(-1, weight.size(2))

    @functools.cached_property
    def _rows(self) -> Tensor:
        """The outputs as [M, N, C], the product's own memory order."""
        n, c, d = self._weight.shape
        bias = None if self._bias is None else self._bias.view(-1)
        with torch.no_grad():
            logits = F.linear(self._x, self._weight.view(n * c, d), bias).view(-1, n, c)
            return logits.log_softmax(2) if self.normalised else logits

    @property
    def classified(self) -> int | None:
        return self._x.size(0) if self._flatten or len(self._shape) == 2 else None

    @functools.cached_property
    def outputs(self) -> Tensor:  # type: ignore[override]
        outputs = self._rows.transpose(0, 1)
        matrix = self._flatten or len(self._shape) == 2
        return outputs if matrix else outputs.unflatten(1, self._shape[:-1])

    def pull(
        self, grad: Tensor, *, features: bool, masked: bool = True
    ) -> tuple[Tensor | None, Slots]:
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
        return dx, self._slots(rows, self._x, rows.sum(0))

    def _pull_nll(self, targets: Tensor, share: Tensor, *, masked: bool) -> Slots:
        if not self.normalised:
            return super()._pull_nll(targets, share, masked=masked)
        # Of the logits: share[m] (softmax - one-hot); the factor goes to the smaller side of the product.
        rows = self._rows.exp()
        index = targets.view(-1, 1, 1).expand(-1, rows.size(1), 1)
        rows.scatter_add_(2, index, rows.new_full((), -1.0).expand_as(index))
        if self.alive is not None and masked:
            rows = torch.where(self.alive.transpose(0, 1), rows, 0)
        rows = rows.flatten(1).to(self._x.dtype)
        share = share.to(rows.dtype)
        return self._slots(rows, self._x * share.unsqueeze(1), share @ rows)

    def _slots(self, rows: Tensor, x: Tensor, bias: Tensor) -> Slots:
        """The slots of weight and bias, from `rows` [M, N * C] and `x` whose product is the weight's gradient."""
        n, c, d = self._weight.shape
        dtype = self._weight.dtype
        dweight = (rows.T @ x).view(n, c, d).to(dtype)
        return [dweight] if self._bias is None else [dweight, bias.view(n, c).to(dtype)]
