"""N clones of an adaptive softmax, for vocabularies of which most words are rare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alrao_fast.arguments import COUNT, Ascending, Number
from alrao_fast.nn.adaptive_losses import adaptive_stats, in_rows, pairs
from alrao_fast.nn.autocast import without_autocast
from alrao_fast.nn.chunks import in_chunks
from alrao_fast.nn.clones import ClassifierClones, Evidence, Reduction
from alrao_fast.nn.log_likelihood import of_predictions
from alrao_fast.nn.predictions import remember
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Classes
from alrao_fast.ops.mixture.weighting import Weighting, no_loss
from alrao_fast.reference import adaptive_mixture as reference
from alrao_fast.reference.switch_mixture import log_mixture_of_the_living
from alrao_fast.sharding import draw_row_, whole

# Tensors of the size of all logits of a chunk that stand at a time in a prediction.
_TENSORS = 4
_DIV_VALUE = Number(above=0)


class TailClones(nn.Module):
    """The tails of N clones for one cluster: `projection [N, H, D]` makes features narrower, `weight [N, C_k, H]` has
    the classes."""

    def __init__(
        self,
        num_clones: int,
        in_features: int,
        hidden: int,
        num_classes: int,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.Parameter(torch.empty(num_clones, hidden, in_features, **options))
        self.weight = nn.Parameter(torch.empty(num_clones, num_classes, hidden, **options))

    def extra_repr(self) -> str:
        clones, hidden, in_features = self.projection.shape
        return f"{in_features} -> {hidden} -> {self.weight.size(1)}, num_clones={clones}"


class AdaptiveClassifierClones(ClassifierClones):
    """N adaptive softmax classifiers (arXiv 1609.04309) in place of one: `torch.nn.AdaptiveLogSoftmaxWithLoss` cloned.

    The classes are sorted by frequency, class 0 being the most frequent. Each clone has a head, a softmax over the
    shortlist (the classes below the first cutoff) and the clusters, and for each cluster a tail, a softmax over its
    classes behind a projection to fewer features. One switch is over the N clones, each with its head and all of its
    tails; a clone's learning rate is that of all its parts.

    Args:
        in_features: D, the width of the features.
        num_classes: C.
        cutoffs: where the clusters begin: `[2000, 10000]` makes a shortlist of 2000 classes, a cluster of the next
            8000 and one of the rest.
        num_clones: N; the optimizer spreads their learning rates over its range.
        div_value: the k-th tail projects to `D // div_value ** k` features.
        head_bias: whether the heads have a bias; tails have none.
        theta, evidence, ignore_index, reduction, process_group, device, dtype: as for `ClassifierClones`.
        memory_budget: bytes that the logits of a chunk may take; None is the backend's default.

    `weight [N, S + K, D]` and `bias [N, S + K]` hold the heads, S being the size of the shortlist, K the number of
    clusters; `tail[k].projection [N, H, D]` and `tail[k].weight [N, C_k, H]` the tails. `cutoffs` has C at its end, as
    in torch.

    With targets only the head and the tails of the clusters that occur in the batch are computed, each tail for its
    own samples. All parameters get a gradient, 0 for those of clusters that do not occur. Which samples a tail has is
    looked up by the host: on a GPU a forward with targets waits for them once, and no CUDA graph can capture it.

    Label smoothing, class weights, z-loss, a softcap and targets of probabilities are sums over all classes, or change
    what a probability is made of: there are none. TypeError or ValueError, naming the argument, for one of another type
    or out of range.
    """

    _score = "greedy_accuracy"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        cutoffs: Sequence[int],
        num_clones: int = 10,
        div_value: float = 4.0,
        head_bias: bool = False,
        *,
        theta: float = 0.999,
        evidence: Evidence = "mean",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        memory_budget: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_classes = COUNT.check("num_classes", num_classes)
        # Before the module's own constructor, which makes the parameters.
        self.cutoffs = [*Ascending(1, num_classes - 1).check("cutoffs", cutoffs), num_classes]
        self.div_value = float(_DIV_VALUE.check("div_value", div_value))
        super().__init__(
            in_features,
            num_classes,
            num_clones,
            head_bias,
            theta=theta,
            evidence=evidence,
            ignore_index=ignore_index,
            reduction=reduction,
            memory_budget=memory_budget,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )

    @property
    def shortlist_size(self) -> int:
        """S, the number of classes that the head has itself."""
        return self.cutoffs[0]

    def _make_parameters(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        clones, width = self.num_clones, self.in_features
        self._make_layers(self.cutoffs[0] + len(self.cutoffs) - 1, bias, device, dtype)
        self.tail = nn.ModuleList()
        for k, (start, stop) in enumerate(pairwise(self.cutoffs)):
            hidden = int(width // self.div_value ** (k + 1))
            self.tail.append(TailClones(clones, width, hidden, stop - start, device, dtype))

    def _draw(self, n: int) -> None:
        super()._draw(n)
        for tail in self.tails():
            # A tail that projects to nothing has no entries.
            draw_row_(tail, n, 1 / math.sqrt(max(tail.size(-1), 1)))

    def tails(self) -> tuple[Tensor, ...]:
        tails: Iterable[Any] = self.tail
        return tuple([part for tail in tails for part in (tail.projection, tail.weight)])

    def finite_clones(self) -> Tensor:
        finite = super().finite_clones()
        for tail in self.tails():
            finite = finite & whole(tail.detach().isfinite().all((1, 2)))
        return finite

    def owners(self) -> list[nn.Module]:
        return [self, *self.tail]

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

        The targets are classes `[...]`, int64. All else is as in `ClassifierClones.forward`. The log-probabilities are
        computed for chunks of samples within the memory budget, from all tails; the loss needs those of the targets
        alone, in eval mode too. A clone is dead for a sample where one of the log-probabilities that are computed is
        not finite.
        """
        if targets is None:
            no_loss(sample_weight, num_items_in_batch, reduction)
            # A fresh tensor: a later training step may update the posterior before this result's backward.
            posterior, _, _ = self.switch.mixing_posterior(observing=False)
            return remember(self, features, self._log_prob(features, posterior))
        return self.loss(
            features,
            targets,
            observe=True,
            sample_weight=sample_weight,
            num_items_in_batch=num_items_in_batch,
            reduction=reduction,
        )

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
        reduction = self.reduction if reduction is None else reduction
        weighting = Weighting.of(reduction, sample_weight, num_items_in_batch, features)
        posterior, observing, impl = self.switch.mixing_posterior(
            observing=observe and self.training
        )
        loss, stats = adaptive_stats(self, features, targets, weighting, posterior, impl)
        if observing:
            self._observe(stats)
            self.watch.look(self, loss, features, targets, sample_weight)
        return loss

    def likelihood(self) -> Classes:
        likelihood = super().likelihood()
        if not likelihood.is_plain():
            raise ValueError(
                f"label_smoothing, z_loss, logit_softcap, class_weight: got {self.label_smoothing}, {self.z_loss}, "
                f"{self.logit_softcap} and {self.class_weight}, expected none of them: an adaptive softmax has no such "
                "options"
            )
        return likelihood

    def predict(self, features: Tensor) -> Tensor:
        """The likeliest class `[...]` under the mixture, int64, for features `[..., D]`.

        It is that of the log-probabilities, found without the tails where a class of the shortlist is likelier than
        each of the clusters. (There clones that overflow in nothing but a tail count, too.)
        """
        with torch.no_grad():
            posterior, _, _ = self.switch.mixing_posterior(observing=False)
            return self._predict(features, posterior)

    @without_autocast
    def _predict(self, features: Tensor, posterior: Tensor) -> Tensor:
        samples = features.shape[:-1]
        x, weight, bias, tails = in_rows(self, features)
        posterior = torch.where(self.finite_clones(), posterior, -math.inf)

        def chunk(x: Tensor) -> Tensor:
            whole = reference.in_one_dtype(x, weight, bias, pairs(tails))
            logp, alive = reference.log_probabilities(*whole[:3], ())
            found = log_mixture_of_the_living(logp, alive, posterior).argmax(1)
            rare = (found >= self.shortlist_size).nonzero().flatten()
            own = reference.adaptive_mixture_log_prob(x[rare], *whole[1:], posterior)
            return found.index_copy(0, rare, own.argmax(1))

        return torch.cat(in_chunks(chunk, self._chunk(x), x)).view(samples)

    def log_likelihood(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[...]` of the targets under the mixture, and entropies `[...]` of its predictions (nats).

        As `ClassifierClones.log_likelihood`, with all tails, which entropies need: in eval mode
        `-head(features, targets, reduction="none")` are the log-probabilities without.
        """
        posterior, _, _ = self.switch.mixing_posterior(observing=False)
        return self._log_likelihood(features, targets, posterior)

    @without_autocast
    def _log_likelihood(
        self, features: Tensor, targets: Tensor, posterior: Tensor
    ) -> tuple[Tensor, Tensor]:
        samples, likelihood = features.shape[:-1], self.likelihood()
        x, weight, bias, tails = in_rows(self, features, targets=targets)
        like = weight.new_empty(1, self.num_classes, 0)
        target = likelihood.rows(targets, samples, like)
        likelihood.check_target(target, x, like)
        checks.check_inputs(x, weight, bias, posterior, 1)

        def log_prob(x: Tensor) -> Tensor:
            inputs = x, weight, bias, pairs(tails)
            return reference.adaptive_mixture_log_prob(*inputs, posterior)

        found, entropy = of_predictions(log_prob, x, target, likelihood, self._chunk(x))
        return found.view(samples), entropy.view(samples)

    @without_autocast
    def _log_prob(self, features: Tensor, posterior: Tensor) -> Tensor:
        x, weight, bias, tails = in_rows(self, features)
        checks.check_inputs(x, weight, bias, posterior, 1)

        def chunk(x: Tensor) -> Tensor:
            inputs = x, weight, bias, pairs(tails)
            return reference.adaptive_mixture_log_prob(*inputs, posterior)

        found = torch.cat(in_chunks(chunk, self._chunk(x), x))
        return found.view(*features.shape[:-1], self.num_classes)

    def _chunk(self, x: Tensor) -> int:
        """How many samples' predictions are computed at a time."""
        wide = checks.accumulator(x.dtype)
        row = _TENSORS * self.num_clones * self.num_classes * wide.itemsize
        return max(checks.budget(x, self.memory_budget) // row, 1)

    def clone_outputs(self, features: Tensor) -> Tensor:
        """Log-probabilities `[N, ..., C]` of every clone, with plain gradients; NaN where the clone is dead."""
        _, weight, bias, tails = in_rows(self, features)
        return self.linear_outputs(features, weight, bias, *tails)

    @staticmethod
    def linear_outputs(
        features: Tensor, weight: Tensor, bias: Tensor | None, *tails: Tensor
    ) -> Tensor:
        """Log-probabilities `[N, ..., C]` of the clones with these parameters."""
        x = features.reshape(-1, features.size(-1))
        inputs = reference.in_one_dtype(x, weight, bias, pairs(tails))
        logp, alive = reference.log_probabilities(*inputs)
        found = torch.where(alive.unsqueeze(2), logp, math.nan).movedim(1, 0)
        return found.reshape(weight.size(0), *features.shape[:-1], found.size(-1))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, cutoffs={self.cutoffs[:-1]}, "
            f"num_clones={self.num_clones}, div_value={self.div_value}, head_bias={self.bias is not None}"
        )
