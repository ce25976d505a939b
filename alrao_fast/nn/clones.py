"""The N clones of the last layer, each with its own learning rate, mixed by the switch (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alrao_fast.nn.switch import FixedDtypeBuffers, Switch
from alrao_fast.ops.mixture import (
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_stats,
)
from alrao_fast.ops.mixture.loss import Observer
from alrao_fast.reference import switch_mixture as reference

Reduction = Literal["mean", "sum"]


class LinearClones(FixedDtypeBuffers):
    """What classification and regression share: N linear layers in one tensor, their switch, rates and statistics.

    `weight [N, C, D]` and `bias [N, C]` hold the clones; `clone_lr [N]` (float32) their learning rates, NaN until an
    optimizer sets them. In training mode every loss is one observation of the switch, and its statistics are added to
    `running` on the device.
    """

    in_features: int
    num_clones: int
    evidence: Reduction
    reduction: Reduction
    memory_budget: int | None
    clone_lr: Tensor
    running: Tensor
    # The constructor's name for the width of a clone's output.
    _width: str
    # Name of the second row of the statistics, divided by the number of samples.
    _score: str
    # The mixture's loss and statistics, by its likelihood.
    _stats: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: the `locals()` of a subclass's constructor, which has named and typed them."""
        super().__init__()
        sizes, choices = ("in_features", self._width, "num_clones"), ("evidence", "reduction")
        for name in (*sizes, *choices, "memory_budget"):
            setattr(self, name, arguments[name])
        for name in sizes:
            if arguments[name] < 1:
                raise ValueError(f"{name}: got {arguments[name]}, expected at least 1")
        for name in choices:
            if arguments[name] not in ("mean", "sum"):
                raise ValueError(f"{name}: got {arguments[name]!r}, expected 'mean' or 'sum'")
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise ValueError(
                f"memory_budget: got {self.memory_budget}, expected bytes > 0, or None"
            )
        device, dtype = arguments["device"], arguments["dtype"]
        num_clones, group = self.num_clones, arguments["process_group"]
        self.switch = Switch(num_clones, arguments["theta"], process_group=group, device=device)
        shape = (num_clones, arguments[self._width])
        weight = torch.empty(*shape, self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        if arguments["bias"]:
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("clone_lr", torch.empty(num_clones, device=device).float())
        running = torch.empty(3, num_clones, device=device, dtype=torch.float64)
        self.register_buffer("running", running, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each clone anew as `nn.Linear` does; forget the switch, the clones' rates and statistics."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            # Clone by clone: the same values as N nn.Linear made one after the other.
            for n in range(self.num_clones):
                self.weight[n].uniform_(-bound, bound)
                if self.bias is not None:
                    self.bias[n].uniform_(-bound, bound)
        self.clone_lr.fill_(math.nan)
        self.running.zero_()
        self.switch.reset_parameters()

    def clone_outputs(self, features: Tensor) -> Tensor:
        """Outputs `[N, ..., C]` of every clone for features `[..., D]`, by one matrix product, with plain gradients."""
        return self._outputs(features, self.weight, self.bias)

    @staticmethod
    def _outputs(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        joint = F.linear(features, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return joint.unflatten(-1, weight.shape[:2]).movedim(-2, 0)

    def clone_loss(self, features: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Alrao with a criterion of your own, in place of the built-in likelihood.

        `criterion(outputs [N, ..., C]) -> losses [N, ...]` gives the loss of each clone for each sample, a negative
        log-likelihood, without reduction; it may leave samples out. It is called twice and must be free of
        randomness and of parameters. Example, an L1 loss:

            loss = head.clone_loss(backbone(x), lambda out: (out - y).abs().sum(-1))

        Returns the mixture's loss `-reduction_b logsumexp_n(log_posterior[n] - losses[n, b])`. Its gradient goes to
        the features; each clone gets the gradient of its own mean (or sum) loss. In training mode the switch is
        updated, as by `forward`. A clone with a non-finite loss or output gradient is dead for the sample, as there.
        """
        # Each branch detaches, and makes finite, what it has no gradient for: 0 * inf would be NaN in its backward.
        own_outputs = self.clone_outputs(_finite_rows(features.detach(), -1))
        weight = _finite_rows(self.weight.detach(), (1, 2))
        bias = None if self.bias is None else _finite_rows(self.bias.detach(), 1)
        mixture_outputs = self._outputs(features, weight, bias)
        own = _per_sample(criterion(own_outputs), self.num_clones)
        mixture = _per_sample(criterion(mixture_outputs), self.num_clones)
        alive = own.detach().isfinite() & mixture.detach().isfinite()
        never_dead = alive.all(0).view(-1, *[1] * (own_outputs.dim() - 1))

        # A masked loss sends a zero gradient back through the criterion, which may make it 0 * inf = NaN.
        if own_outputs.requires_grad:
            own_outputs.register_hook(lambda grad: torch.where(never_dead, grad, 0))
        if mixture_outputs.requires_grad:
            mixture_outputs.register_hook(
                lambda grad: torch.where(never_dead | grad.isfinite(), grad, 0)
            )
        loss, stats = reference.combine(
            torch.where(alive, -mixture, -math.inf),
            torch.where(alive, -own, -math.inf),
            alive,
            torch.full_like(own, math.nan, dtype=torch.float64),
            torch.ones_like(alive[:, 0]),
            self.switch.log_posterior,
            self.reduction,
        )
        if self.training:
            self._observe(stats)
        return loss

    def _observer(self) -> Observer:
        switch = self.switch
        # This runs in every training step: past nn.Module's __getattr__, which costs as much as a small kernel.
        state: dict[str, Any] = switch._buffers
        return Observer(
            state["logw"],
            state["log_posterior"],
            state["t"],
            self.running,
            self.evidence == "mean",
            switch.theta,
        )

    def _observe(self, stats: Tensor) -> None:
        """One observation of the switch from the statistics `[3, N]` of a batch."""
        self._observer().observe(self.switch.sum_over_processes(stats))

    def _loss(self, features: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The mixture's loss; in training mode its statistics are observed."""
        # With other processes the statistics must be summed first.
        alone = self.training and self.switch.is_alone()
        loss, stats = self._stats(
            features,
            self.weight,
            self.bias,
            self.switch.log_posterior,
            targets,
            reduction=self.reduction,
            memory_budget=self.memory_budget,
            observer=self._observer() if alone else None,
            **options,
        )
        if self.training and not alone:
            self._observe(stats)
        return loss

    def clone_metrics(self, reset: bool = False) -> dict[str, Tensor]:
        """Per-clone means over the training samples since construction or the last reset, float64, on the device.

        `loss [N]`, the clone's own -log-likelihood (inf once the clone was dead); `accuracy [N]` for a classifier,
        `squared_error [N]` for a regressor (NaN if `clone_loss` was used); `count`, the number of samples. Reading
        them costs no synchronisation, printing them does.
        """
        loss, score, count = self.running.clone()
        if reset:
            self.running.zero_()
        return {"loss": loss / count, self._score: score / count, "count": count[0]}

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, {self._width}={getattr(self, self._width)}"
        return f"{sizes}, num_clones={self.num_clones}, bias={self.bias is not None}"


def _finite_rows(tensor: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """`tensor` with zeros in place of every row along `dims` that holds a non-finite entry."""
    return torch.where(tensor.isfinite().all(dims, keepdim=True), tensor, 0)


def _per_sample(losses: Tensor, num_clones: int) -> Tensor:
    """The criterion's losses as `[B, N]`, float32 at least."""
    if losses.dim() < 2 or losses.size(0) != num_clones:
        raise ValueError(
            f"criterion: returned losses of shape {list(losses.shape)}, expected [{num_clones}, ...]: one per clone "
            "and sample, without reduction"
        )
    return losses.flatten(1).t().to(torch.promote_types(losses.dtype, torch.float32))


class ClassifierClones(LinearClones):
    """N linear softmax classifiers in place of one last layer.

    Args:
        in_features: D, the width of the features.
        num_classes: C.
        num_clones: N; the optimizer spreads their learning rates over its range.
        bias: whether the clones have one.
        theta: see `Switch`.
        evidence: what the switch observes of a batch: the "mean" of the log-likelihoods (the default), or their "sum".
        ignore_index: samples with this target count nowhere.
        reduction: of the loss over the counted samples, "mean" or "sum".
        memory_budget: bytes that the logits of a chunk may take; None is the backend's default.
        process_group: see `Switch`.
        device, dtype: of the parameters.
    """

    num_classes: int
    _width = "num_classes"
    _score = "accuracy"
    _stats = staticmethod(switch_mixture_stats)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_clones: int = 10,
        bias: bool = True,
        *,
        theta: float = 0.999,
        evidence: Reduction = "mean",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        memory_budget: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(locals())
        self.ignore_index = ignore_index

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mixture log-probabilities `[..., C]` of features `[..., D]`, or with targets `[...]` the mixture's loss.

        The log-probabilities are differentiable in the features and in all clones. The probabilities sum to 1: a clone
        that is dead for a sample (an output is not finite) leaves its posterior mass to the others; where all are,
        every class has -inf.

        The loss is a scalar whose gradient is the mixture's for the features and each clone's own for the clone. In
        training mode, with targets, the switch is updated after the loss was computed: also under `torch.no_grad()`, as
        BatchNorm's statistics are, and once per call, so with gradient accumulation every micro-batch is one
        observation. In eval mode nothing changes.
        """
        if targets is None:
            # A copy: a later training step may update the posterior before this result's backward.
            posterior = self.switch.log_posterior.clone()
            return switch_mixture_log_prob(
                features, self.weight, self.bias, posterior, memory_budget=self.memory_budget
            )
        return self._loss(features, targets, ignore_index=self.ignore_index)


class RegressorClones(LinearClones):
    """N linear regressors with Gaussian noise of variance `sigma2` on each of the `out_features` outputs.

    The other arguments are those of `ClassifierClones`.
    """

    out_features: int
    _width = "out_features"
    _score = "squared_error"
    _stats = staticmethod(switch_mixture_gaussian_stats)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_clones: int = 10,
        bias: bool = True,
        *,
        sigma2: float = 1.0,
        theta: float = 0.999,
        evidence: Reduction = "mean",
        reduction: Reduction = "mean",
        memory_budget: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < sigma2 < math.inf:
            raise ValueError(f"sigma2: got {sigma2}, expected a finite variance > 0")
        super().__init__(locals())
        self.sigma2 = sigma2

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """The posterior's mean prediction `[..., K]` for features `[..., D]`, or with targets `[..., K]` the loss.

        Clones that are dead for a sample leave their posterior mass to the others; NaN where all are.

        The loss is the negative log-likelihood of the mixture of Gaussians; gradients and the switch as in
        `ClassifierClones.forward`.
        """
        if targets is None:
            posterior = self.switch.log_posterior.clone()
            return switch_mixture_mean(features, self.weight, self.bias, posterior)
        return self._loss(features, targets, sigma2=self.sigma2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma2={self.sigma2}"
