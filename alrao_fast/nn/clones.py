"""The N clones of the last layer, each with its own learning rate, mixed by the switch (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alrao_fast import fsdp1, live
from alrao_fast.arguments import COUNT, Choice, Flag, FloatDtype, Integer, Optional, checked
from alrao_fast.nn.clone_loss import CRITERION, mixture_of_losses
from alrao_fast.nn.log_likelihood import log_likelihood
from alrao_fast.nn.over_ranks import OverRanks, all_clones, copies
from alrao_fast.nn.predictions import remember
from alrao_fast.nn.rates_agreement import Agreement
from alrao_fast.nn.retiring import Retiring
from alrao_fast.nn.switch import SWITCH_KINDS, Switch
from alrao_fast.nn.watch import Watch
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import switch_mixture_log_prob
from alrao_fast.ops.mixture.checks import REDUCTION, SOFTCAP, accumulator
from alrao_fast.ops.mixture.likelihood import (
    IGNORE_INDEX,
    LABEL_SMOOTHING,
    Z_LOSS,
    Classes,
    Likelihood,
)
from alrao_fast.ops.mixture.loss import Observer, mixture_stats
from alrao_fast.ops.mixture.weighting import ClassWeight, Weighting, no_loss
from alrao_fast.reference.switch_mixture import soft_capped
from alrao_fast.sharding import is_sharded, whole
from alrao_fast.tracing import refuse_script

Evidence = Literal["mean", "sum"]
Reduction = Literal["mean", "sum", "none"]
_CHOICES = {"evidence": Choice("mean", "sum"), "reduction": REDUCTION}
_KINDS = {
    **SWITCH_KINDS,
    **_CHOICES,
    "in_features": COUNT,
    "bias": Flag(),
    "memory_budget": Optional(Integer(low=1, words="bytes > 0")),
    "dtype": Optional(FloatDtype()),
}


class LinearClones(Retiring):
    """What classification and regression share: N linear layers in one tensor, their switch, rates and statistics.

    `weight [N, C, D]` and `bias [N, C]` hold the clones; `clone_lr [N]` (float32) their learning rates, NaN until an
    optimizer sets them. In training mode every loss is one observation of the switch, and its statistics are added to
    `running` on the device. A loss that is not finite warns once for each cause (`watch.py`).
    """

    evidence: Evidence
    reduction: Reduction
    memory_budget: int | None
    running: Tensor
    # Name of the second row of the statistics, divided by the number of samples.
    _score: str
    # How it computes where its clones, or classes, lie over ranks (alrao_fast/distributed.py).
    over_ranks: OverRanks | None = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: the `locals()` of a subclass's constructor, which has named and typed them."""
        super().__init__()
        arguments = checked({**_KINDS, self._width: COUNT}, arguments)
        for name in ("in_features", self._width, "num_clones", *_CHOICES, "memory_budget"):
            setattr(self, name, arguments[name])
        device, dtype = arguments["device"], arguments["dtype"]
        num_clones, group = self.num_clones, arguments["process_group"]
        self.switch = Switch(num_clones, arguments["theta"], process_group=group, device=device)
        self._make_parameters(arguments["bias"], device, dtype)
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
        with torch.no_grad():
            # Clone by clone: the same values as N nn.Linear made one after the other.
            for n in range(self.num_clones):
                self._draw(n)
        self.watch = Watch()
        self.agreement = Agreement()
        self.get_buffer("clone_lr").fill_(math.nan)
        self.running.zero_()
        self.switch.reset_parameters()

    def clone_outputs(self, features: Tensor) -> Tensor:
        """Outputs `[N, ..., C]` of every clone for features `[..., D]`, by one matrix product, with plain gradients."""
        weight, bias = all_clones(self)
        check_together("bias", features=features, weight=weight, bias=bias)
        return self.capped(self.linear_outputs(features, weight, bias))

    def capped(self, outputs: Tensor) -> Tensor:
        """The clones' outputs from those of their linear layers; what is not finite stays so."""
        return outputs

    @staticmethod
    def linear_outputs(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs `[N, ..., C]` of the linear layers of these weights `[N, C, D]` and biases `[N, C]`."""
        joint = F.linear(features, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return joint.unflatten(-1, weight.shape[:2]).movedim(-2, 0)

    def clone_loss(self, features: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Alrao with a criterion of your own, in place of the built-in likelihood.

        `criterion(outputs [N, ..., C]) -> losses [N, ...]` gives the loss of each clone for each sample, a negative
        log-likelihood, without reduction; it may leave samples out. It is called twice and must be free of
        randomness and of parameters. Example, an L1 loss:

            loss = head.clone_loss(backbone(x), lambda out: (out - y).abs().sum(-1))

        Returns the mixture's loss `-reduction_b logsumexp_n(log_posterior[n] - losses[n, b])`, with the reduction
        "none" `[...]`. Its gradient goes to the features; each clone gets the gradient of its own mean (or sum) loss.
        Of the head's other options only `logit_softcap` has a part in it.

        As with `forward`, the switch is updated in training mode, a clone with a non-finite loss or output gradient is
        dead for the sample, and the loss has one backward and no second or forward-mode derivative. TypeError or
        ValueError for a criterion, or losses, of another kind.
        """
        CRITERION.check("criterion", criterion)
        weight, bias = all_clones(self)
        clones = weight, bias, *self.tails()
        check_together("bias", features=features, weight=weight, bias=bias)
        posterior, observing, _ = self.switch.mixing_posterior(observing=self.training)
        loss, stats = mixture_of_losses(self, features, clones, criterion, posterior)
        if observing:
            self._observe(stats)
            self.watch.look(self, loss, features, None)
        return loss

    def _observer(self) -> Observer:
        # This runs in every training step: past nn.Module's __getattr__, which costs as much as a small kernel.
        modules: dict[str, Any] = self._modules
        switch = modules["switch"]
        own: dict[str, Any] = self._buffers
        state: dict[str, Any] = switch._buffers
        return Observer(
            state["logw"],
            state["log_posterior"],
            state["t"],
            own["running"],
            self.evidence == "mean",
            switch.theta,
        )

    def _observe(self, stats: Tensor) -> None:
        """One observation of the switch from the statistics `[3, N]` of a batch."""
        if not self.switch.is_alone():
            stats = self.agreement.sum_over_processes(self, self.switch, stats)
            if self.over_ranks is not None:
                stats = stats / copies(self)
        self._observer().observe(stats)
        self.switch.note_observation()

    def likelihood(self) -> Likelihood:
        """The likelihood of the targets, and what the loss is made of, as the options are now."""
        raise NotImplementedError

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        *,
        observe: bool,
        sample_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """What `forward` returns with targets; `observe`: in training mode, update the switch."""
        # Past nn.Module's __getattr__, as below.
        modules: dict[str, Any] = self._modules
        switch: Switch = modules["switch"]
        if self.over_ranks is not None:
            features = self.over_ranks.entered(self, features)
        reduction = self.reduction if reduction is None else reduction
        weighting = Weighting.of(reduction, sample_weight, num_items_in_batch, features)
        posterior, observing, impl = switch.mixing_posterior(observing=observe and self.training)
        if self.over_ranks is not None:
            loss, stats = self.over_ranks.loss(self, features, targets, weighting, posterior, impl)
            if observing:
                self._observe(stats)
                self.watch.look(self, loss, features, targets, sample_weight)
            return loss
        # With other processes the statistics must be summed first.
        alone = observing and switch.is_alone()
        loss, stats = mixture_stats(
            self.likelihood(),
            (features, self.weight, self.bias, posterior),
            targets,
            weighting,
            self.memory_budget,
            impl,
            observer=self._observer() if alone else None,
        )
        if observing:
            if alone:
                switch.note_observation()
            else:
                self._observe(stats)
            self.watch.look(self, loss, features, targets, sample_weight)
        return loss

    def finite_clones(self) -> Tensor:
        """Which clones `[N]` have finite parameters only: the others are dead for good.

        Of a sharded head all ranks have to ask. RuntimeError where FullyShardedDataParallel (FSDP1) has flattened it.
        """
        fsdp1.check_there(self.weight, self.__dict__)
        finite = whole(self.weight.detach().isfinite().all((1, 2)))
        return finite if self.bias is None else finite & whole(self.bias.detach().isfinite().all(1))

    def clones_seen_finite(self) -> Tensor:
        """The same as far as it is known on this rank: of a sharded head, which clones had finite losses only."""
        there = not is_sharded(self.weight) and fsdp1.is_there(self.weight, self.__dict__)
        return self.finite_clones() if there else self.running[0].isfinite()

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

    def counted(
        self, features: Tensor, targets: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        """Those of the features `[B, D]` that count in the loss with `targets`."""
        return features if sample_weight is None else features[sample_weight.flatten() != 0]

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
        reduction: of the loss over the counted samples, "mean", "sum" or "none": one loss for each sample, 0
            for what does not count. A mean is the weighted one of F.cross_entropy.
        label_smoothing: 0 to 1, the share of the target that is spread evenly over the classes.
        class_weight: `[C]` factors >= 0 of the classes, as the weight of F.cross_entropy; a buffer, float32 at least. A
            sample whose loss they make 0 counts nowhere.
        z_loss: factor >= 0 of the square of the logits' logsumexp.
        logit_softcap: k > 0 makes the logits `k tanh(logits / k)`, in predictions, too.
        memory_budget: bytes that the logits of a chunk may take; None is the backend's default.
        process_group: see `Switch`.
        device, dtype: of the parameters; float64, float32, bfloat16 or float16.

    TypeError or ValueError, naming the argument, for one of another type or out of range.
    """

    num_classes: int
    class_weight: Tensor | None
    _width = "num_classes"
    _score = "accuracy"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_clones: int = 10,
        bias: bool = True,
        *,
        theta: float = 0.999,
        evidence: Evidence = "mean",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        memory_budget: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(locals())
        self.ignore_index = IGNORE_INDEX.check("ignore_index", ignore_index)
        self.label_smoothing = LABEL_SMOOTHING.check("label_smoothing", label_smoothing)
        self.z_loss = Z_LOSS.check("z_loss", z_loss)
        self.logit_softcap = SOFTCAP.check("logit_softcap", logit_softcap)
        if class_weight is not None:
            kind = ClassWeight(self.num_classes)
            like = self.weight
            wide = accumulator(like.dtype)
            class_weight = kind.check("class_weight", class_weight).to(like.device, wide, copy=True)
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        features: Tensor,
        targets: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Mixture log-probabilities `[..., C]` of features `[..., D]`, or with targets the mixture's loss.

        The targets are classes `[...]`, or probabilities `[..., C]` in any floating dtype: a row that sums to S stands
        for its normalised with the weight S, a row of zeros for a sample that does not count.

        The log-probabilities are differentiable in the features and in all clones. The probabilities sum to 1: a clone
        that is dead for a sample (an output is not finite) leaves its posterior mass to the others; where all are,
        every class has -inf.

        The loss is a scalar whose gradient is the mixture's for the features and each clone's own for the clone. In
        training mode, with targets, the switch is updated after the loss was computed: also under `torch.no_grad()`, as
        BatchNorm's statistics are, and once per call, so with gradient accumulation every micro-batch is one
        observation. In eval mode nothing changes. The loss has one backward: a second or forward-mode derivative of it
        raises RuntimeError, and in training mode so does torch.func.vmap.

        `sample_weight [...]` (any real dtype) are factors of the samples' losses; where it is 0 the sample does not
        count. `num_items_in_batch`, a number or a tensor of one, is what the sum is divided by in place of the mean's
        divisor: the items of all the micro-batches of a step. `reduction` stands for the head's in this call. What the
        switch observes, and `clone_metrics` show, is the likelihood of the targets that count: no weight, smoothing or
        z-loss changes it.
        """
        if targets is None:
            no_loss(sample_weight, num_items_in_batch, reduction)
            # A fresh tensor: a later training step may update the posterior before this result's backward.
            posterior, _, impl = self.switch.mixing_posterior(observing=False)
            if self.over_ranks is not None:
                log_prob = self.over_ranks.log_prob(self, features, posterior, impl)
                return remember(self, features, log_prob)
            log_prob = switch_mixture_log_prob(
                features,
                self.weight,
                self.bias,
                posterior,
                logit_softcap=self.logit_softcap,
                memory_budget=self.memory_budget,
                impl=impl,
            )
            return remember(self, features, log_prob)
        return self.loss(
            features,
            targets,
            observe=True,
            sample_weight=sample_weight,
            num_items_in_batch=num_items_in_batch,
            reduction=reduction,
        )

    def likelihood(self) -> Classes:
        # This runs in every training step: past nn.Module's __getattr__, which costs as much as a small kernel.
        class_weight = self._buffers["class_weight"]
        return Classes.of(
            self.ignore_index, class_weight, self.label_smoothing, self.z_loss, self.logit_softcap
        )

    def capped(self, outputs: Tensor) -> Tensor:
        bounded = soft_capped(outputs, self.logit_softcap)
        return bounded if bounded is outputs else torch.where(outputs.isfinite(), bounded, outputs)

    def log_likelihood(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[...]` of the targets under the mixture, and entropies `[...]` of its predictions (nats).

        `targets [...]` are classes, or probabilities `[..., C]` (of which it is the expected log-probability). Both are
        differentiable as the log-probabilities of `forward` are, float32 at least, and 0 for targets `ignore_index`;
        -inf and 0 where every clone is dead. Computed in chunks of `memory_budget`, never of all samples and classes at
        once. No option of the loss but `logit_softcap` has a part in them, and the switch observes nothing.
        """
        posterior, _, impl = self.switch.mixing_posterior(observing=False)
        weight, bias = all_clones(self)
        options = targets, self.likelihood(), self.memory_budget, impl
        return log_likelihood(features, weight, bias, posterior, *options)

    def counted(
        self, features: Tensor, targets: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        features = super().counted(features, None, sample_weight)
        if targets is None:
            return features
        soft = targets.is_floating_point()
        rows = targets.flatten(0, -2) if soft else targets.flatten()
        rows = super().counted(rows, None, sample_weight)
        return features[self.likelihood().counted(rows)]

    def describe_targets(self, targets: Tensor | None) -> str:
        if targets is None:
            return super().describe_targets(targets)
        if targets.is_floating_point():
            return "Look for probabilities that are negative or not finite, and for weights that are not finite"
        return f"Look for targets outside of the classes 0 to {self.num_classes - 1}"

    def extra_repr(self) -> str:
        options = [
            f"{name}={getattr(self, name)}"
            for name in ("label_smoothing", "z_loss", "logit_softcap")
            if getattr(self, name)
        ]
        weight = self.class_weight
        weighted = [] if weight is None else [f"class_weight={list(weight.shape)}"]
        return ", ".join([super().extra_repr(), *options, *weighted])
