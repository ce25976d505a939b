"""N clones of the last layer that are regressors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from alrao_fast.nn.clones import Evidence, LinearClones, Reduction
from alrao_fast.nn.predictions import remember
from alrao_fast.ops.mixture import switch_mixture_mean
from alrao_fast.ops.mixture.likelihood import SIGMA2, Values
from alrao_fast.ops.mixture.weighting import no_loss


class RegressorClones(LinearClones):
    """N linear regressors with Gaussian noise of variance `sigma2` on each of the `out_features` outputs.

    The other arguments are those of `ClassifierClones`.
    """

    out_features: int
    _width = "out_features"
    _score = "squared_error"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_clones: int = 10,
        bias: bool = True,
        *,
        sigma2: float = 1.0,
        theta: float = 0.999,
        evidence: Evidence = "mean",
        reduction: Reduction = "mean",
        memory_budget: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(locals())
        self.sigma2 = float(SIGMA2.check("sigma2", sigma2))

    def forward(
        self,
        features: Tensor,
        targets: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """The posterior's mean prediction `[..., K]` for features `[..., D]`, or with targets `[..., K]` the loss.

        Clones to which the last observation has left no evidence of their own have no part in the mean: the least share
        of one that has diverged would be all that is seen of it.

        Clones that are dead for a sample leave their posterior mass to the others; NaN where all are.

        The loss is the negative log-likelihood of the mixture of Gaussians; gradients, the switch and the keywords as
        in `ClassifierClones.forward`.
        """
        if targets is None:
            no_loss(sample_weight, num_items_in_batch, reduction)
            posterior, _, impl = self.switch.mixing_posterior(observing=False, means=True)
            if self.over_ranks is not None:
                mean = self.over_ranks.mean(self, features, posterior, impl)
                return remember(self, features, mean)
            mean = switch_mixture_mean(features, self.weight, self.bias, posterior, impl=impl)
            return remember(self, features, mean)
        return self.loss(
            features,
            targets,
            observe=True,
            sample_weight=sample_weight,
            num_items_in_batch=num_items_in_batch,
            reduction=reduction,
        )

    def likelihood(self) -> Values:
        return Values.of(self.sigma2)

    def describe_targets(self, targets: Tensor | None) -> str:
        if targets is None:
            return super().describe_targets(targets)
        bad = int((~targets.isfinite().flatten(0, -2).all(1)).sum())
        return f"{bad} samples have targets that are not finite"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma2={self.sigma2}"
