"""The N clones of the last layer, each with its own learning rate, mixed by the switch (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alrao_fast import live
from alrao_fast.arguments import (
    COUNT,
    Flag,
    FloatDtype,
    Function,
    Integer,
    Optional,
    checked,
    shown,
)
from alrao_fast.nn.clone_rates import WithRates
from alrao_fast.nn.predictions import remember
from alrao_fast.nn.switch import SWITCH_KINDS, Switch
from alrao_fast.nn.watch import Watch
from alrao_fast.ops import derivatives
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import (
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_stats,
)
from alrao_fast.ops.mixture.checks import REDUCTION
from alrao_fast.ops.mixture.likelihood import IGNORE_INDEX, SIGMA2
from alrao_fast.ops.mixture.loss import NO_OTHER_DERIVATIVE, Observer
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.tracing import refuse_script

Reduction = Literal["mean", "sum"]
_CRITERION = Function("a function outputs [N, ..., C] -> losses [N, ...]")
_CHOICES = {"evidence": REDUCTION, "reduction": REDUCTION}
_KINDS = {
    **SWITCH_KINDS,
    **_CHOICES,
    "in_features": COUNT,
    "bias": Flag(),
    "memory_budget": Optional(Integer(low=1, words="bytes > 0")),
    "dtype": Optional(FloatDtype()),
}


class LinearClones(WithRates):
    """What classification and regression share: N linear layers in one tensor, their switch, rates and statistics.

    `weight [N, C, D]` and `bias [N, C]` hold the clones; `clone_lr [N]` (float32) their learning rates, NaN until an
    optimizer sets them. In training mode every loss is one observation of the switch, and its statistics are added to
    `running` on the device. A loss that is not finite warns once for each cause (`watch.py`).
    """

    in_features: int
    num_clones: int
    evidence: Reduction
    reduction: Reduction
    memory_budget: int | None
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
        arguments = checked({**_KINDS, self._width: COUNT}, arguments)
        for name in ("in_features", self._width, "num_clones", *_CHOICES, "memory_budget"):
            setattr(self, name, arguments[name])
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
        self.register_buffer(
            "clone_lr", torch.empty(num_clones, device=device, dtype=torch.float32)
        )
        running = torch.empty(3, num_clones, device=device, dtype=torch.float64)
        self.register_buffer("running", running, persistent=False)
        self.reset_parameters()
        live.heads.enter(self)

    __prepare_scriptable__ = refuse_script

    def reset_parameters(self) -> None:
        """Draw each clone anew as `nn.Linear` does; forget the switch, the clones' rates and statistics."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            # Clone by clone: the same values as N nn.Linear made one after the other.
            for n in range(self.num_clones):
                self.weight[n].uniform_(-bound, bound)
                if self.bias is not None:
                    self.bias[n].uniform_(-bound, bound)
        self.watch = Watch()
        self.get_buffer("clone_lr").fill_(math.nan)
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
        As there the loss has one backward, and no second or forward-mode derivative. TypeError or ValueError for a
        criterion, or losses, of another kind.
        """
        _CRITERION.check("criterion", criterion)
        check_together("bias", features=features, weight=self.weight, bias=self.bias)
        # Each branch detaches, and makes finite, what it has no gradient for: 0 * inf would be NaN in its backward.
        x, weight, bias = derivatives.once(NO_OTHER_DERIVATIVE, features, self.weight, self.bias)
        own_outputs = self._outputs(_finite_rows(x.detach(), -1), weight, bias)
        weight = _finite_rows(weight.detach(), (1, 2))
        bias = None if bias is None else _finite_rows(bias.detach(), 1)
        mixture_outputs = self._outputs(x, weight, bias)
        own = _per_sample(criterion(own_outputs), self.num_clones)
        mixture = _per_sample(criterion(mixture_outputs), self.num_clones)
        alive = own.detach().isfinite() & mixture.detach().isfinite()
        never_dead = alive.all(0).view(-1, *[1] * (own_outputs.dim() - 1))
        posterior, observing = self.switch.mixing_posterior(observing=self.training)

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
            posterior,
            self.reduction,
        )
        if observing:
            self._observe(stats)
            self.watch.look(self, loss, features, None)
        return loss

    def _observer(self) -> Observer:
        switch = self.switch
        switch.note_observation()
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

    def loss(self, features: Tensor, targets: Tensor, *, observe: bool) -> Tensor:
        """What `forward` returns with targets; `observe`: in training mode, update the switch."""
        raise NotImplementedError

    def _loss(self, features: Tensor, targets: Tensor, observe: bool, **options: Any) -> Tensor:
        switch = self.switch
        posterior, observing = switch.mixing_posterior(observing=observe and self.training)
        # With other processes the statistics must be summed first.
        alone = observing and switch.is_alone()
        loss, stats = self._stats(
            features,
            self.weight,
            self.bias,
            posterior,
            targets,
            reduction=self.reduction,
            memory_budget=self.memory_budget,
            observer=self._observer() if alone else None,
            **options,
        )
        if observing:
            if not alone:
                self._observe(stats)
            self.watch.look(self, loss, features, targets)
        return loss

    def finite_clones(self) -> Tensor:
        """Which clones `[N]` have finite parameters only: the others are dead for good."""
        finite = self.weight.detach().isfinite().all((1, 2))
        return finite if self.bias is None else finite & self.bias.detach().isfinite().all(1)

    def living_posterior(self) -> Tensor:
        """Posterior `[N]` of the clones with finite parameters, 0 for the others; RuntimeError if there is none."""
        finite = self.finite_clones()
        if not finite.any():
            raise RuntimeError(
                "every clone has parameters that are not finite: the training has diverged; go back to a checkpoint, "
                "and lower the upper end of lr_range"
            )
        p = torch.where(finite, self.switch.posterior(), 0)
        if not (p.sum() > 0):
            raise RuntimeError(
                f"the posterior of the clones is {self.switch.posterior().tolist()}: no clone with finite parameters "
                "has a probability above 0"
            )
        return p / p.sum()

    def counted(self, features: Tensor, targets: Tensor | None) -> Tensor:
        """Those of the features `[B, D]` that count in the loss with `targets`."""
        return features

    def describe_targets(self, targets: Tensor | None) -> str:
        """Why finite features and clones may have no finite loss with `targets`, None those of a user's criterion."""
        return "Look at the criterion and its targets"

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


def _per_sample(losses: Any, num_clones: int) -> Tensor:
    """The criterion's losses as `[B, N]`, float32 at least."""
    expected = f"[{num_clones}, ...]: one per clone and sample, without reduction"
    if not isinstance(losses, Tensor) or losses.is_complex() or losses.layout is not torch.strided:
        raise TypeError(
            f"criterion: returned {shown(losses)}, expected a tensor of real losses {expected}"
        )
    if losses.dim() < 2 or losses.size(0) != num_clones:
        raise ValueError(
            f"criterion: returned losses of shape {list(losses.shape)}, expected {expected}"
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
        device, dtype: of the parameters; float64, float32, bfloat16 or float16.

    TypeError or ValueError, naming the argument, for one of another type or out of range.
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
        self.ignore_index = IGNORE_INDEX.check("ignore_index", ignore_index)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mixture log-probabilities `[..., C]` of features `[..., D]`, or with targets `[...]` the mixture's loss.

        The log-probabilities are differentiable in the features and in all clones. The probabilities sum to 1: a clone
        that is dead for a sample (an output is not finite) leaves its posterior mass to the others; where all are,
        every class has -inf.

        The loss is a scalar whose gradient is the mixture's for the features and each clone's own for the clone. In
        training mode, with targets, the switch is updated after the loss was computed: also under `torch.no_grad()`, as
        BatchNorm's statistics are, and once per call, so with gradient accumulation every micro-batch is one
        observation. In eval mode nothing changes. The loss has one backward: a second or forward-mode derivative of it
        raises RuntimeError, and in training mode so does torch.func.vmap.
        """
        if targets is None:
            # A fresh tensor: a later training step may update the posterior before this result's backward.
            posterior, _ = self.switch.mixing_posterior(observing=False)
            log_prob = switch_mixture_log_prob(
                features, self.weight, self.bias, posterior, memory_budget=self.memory_budget
            )
            return remember(self, features, log_prob)
        return self.loss(features, targets, observe=True)

    def loss(self, features: Tensor, targets: Tensor, *, observe: bool) -> Tensor:
        return self._loss(features, targets, observe, ignore_index=self.ignore_index)

    def counted(self, features: Tensor, targets: Tensor | None) -> Tensor:
        return features if targets is None else features[targets.flatten() != self.ignore_index]

    def describe_targets(self, targets: Tensor | None) -> str:
        if targets is None:
            return super().describe_targets(targets)
        return f"Look for targets outside of the classes 0 to {self.num_classes - 1}"


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
        super().__init__(locals())
        self.sigma2 = float(SIGMA2.check("sigma2", sigma2))

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """The posterior's mean prediction `[..., K]` for features `[..., D]`, or with targets `[..., K]` the loss.

        Clones to which the last observation has left no evidence of their own have no part in the mean: the least share
        of one that has diverged would be all that is seen of it.

        Clones that are dead for a sample leave their posterior mass to the others; NaN where all are.

        The loss is the negative log-likelihood of the mixture of Gaussians; gradients and the switch as in
        `ClassifierClones.forward`.
        """
        if targets is None:
            posterior, _ = self.switch.mixing_posterior(observing=False, means=True)
            mean = switch_mixture_mean(features, self.weight, self.bias, posterior)
            return remember(self, features, mean)
        return self.loss(features, targets, observe=True)

    def loss(self, features: Tensor, targets: Tensor, *, observe: bool) -> Tensor:
        return self._loss(features, targets, observe, sigma2=self.sigma2)

    def describe_targets(self, targets: Tensor | None) -> str:
        if targets is None:
            return super().describe_targets(targets)
        bad = int((~targets.isfinite().flatten(0, -2).all(1)).sum())
        return f"{bad} samples have targets that are not finite"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma2={self.sigma2}"
