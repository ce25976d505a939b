"""MixtureLoss: the head's own loss as a criterion, for training loops that call `criterion(net(x), y)`."""

from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast import compiler
from alrao_fast.nn.clones import LinearClones, Reduction
from alrao_fast.nn.heads import head_of
from alrao_fast.nn.predictions import origin_of
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture.likelihood import Classes, Values
from alrao_fast.ops.mixture.weighting import Weighting
from alrao_fast.reference import switch_mixture as reference


class MixtureLoss(nn.Module):
    """The loss `net(x, targets=y)` as `criterion(net(x), y)`, for loops that own the criterion.

        criterion = alrao.MixtureLoss(net)
        loss = criterion(net(x), y)              # skorch, ignite, fastai, a Trainer's compute_loss_func, ...

    Args:
        net: an `AlraoModel`, or any module with one `ClassifierClones` or `RegressorClones` in it (the criterion does
            not register it: its parameters are not the criterion's).

    Of a prediction made in training mode the result is, bit for bit, what the head makes of the same features and
    targets: the mixture's gradient goes to the backbone, its own to each clone, and the switch observes the batch. A
    prediction is observed once, by the first loss computed of it. It must be the very tensor that the head returned, or
    the tuple (prediction, *extras) of the model; it is known to be one while it lives.

    In eval mode, and for other tensors while the head is in eval mode, it is the negative log-likelihood of the
    prediction itself, reduced as the head says: of the given log-probabilities `[..., C]`, without the targets
    `ignore_index`, with the head's `label_smoothing` and `class_weight`; in regression of a Gaussian around the given
    mean `[..., K]` with variance `sigma2`. Nothing is observed. `sample_weight`, `num_items_in_batch` and `reduction`
    are those of the head's forward.

    Raises RuntimeError in training mode for a tensor that is no prediction of a head any more (indexed, reshaped,
    copied, as `DistributedDataParallel(find_unused_parameters=True)` does, changed in place, or made under
    `torch.compile`: compile `net.backbone` in place of `net`); TypeError for what is no tensor; ValueError for targets
    of another shape, and for a `net` without clones or with several heads.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        head_of(net)
        # In a tuple nn.Module does not register it.
        self._net = (net,)

    def forward(
        self,
        prediction: Tensor | tuple[Any, ...],
        targets: Tensor,
        *,
        sample_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        first: Any = prediction
        if isinstance(prediction, tuple) and prediction:
            first = prediction[0]
        check_together(prediction=first, targets=targets)
        return self._loss(
            first,
            targets,
            sample_weight=sample_weight,
            num_items_in_batch=num_items_in_batch,
            reduction=reduction,
        )

    @compiler.disable("what a prediction is made of is known to Python alone")
    def _loss(self, prediction: Tensor, targets: Tensor, **given: Any) -> Tensor:
        origin = origin_of(prediction)
        head = head_of(self._net[0]) if origin is None else origin.head
        if origin is None or origin.features is None:
            if origin is None and head.training:
                raise RuntimeError(
                    f"prediction: got a tensor of shape {list(prediction.shape)} that is not what the head returned: "
                    "pass net(x) as it is (not indexed, reshaped, converted or copied), and compile net.backbone in "
                    "place of net; or use net(x, targets=y)"
                )
            return _likelihood(head, prediction, targets, **given)
        if not origin.describes(prediction):
            raise RuntimeError(
                "prediction: it or its features were changed in place, or recomputed, since the head returned it; use "
                "net(x, targets=y)"
            )
        loss = head.loss(origin.features, targets, observe=not origin.observed, **given)
        origin.observed = True
        return loss


def _likelihood(head: LinearClones, prediction: Tensor, targets: Tensor, **given: Any) -> Tensor:
    """-log of the targets' likelihood under a prediction, weighted and reduced as the head's loss is."""
    # The targets' check asks a clone's weight for the number of outputs.
    weight = prediction.new_empty(1, getattr(head, head._width), 0)
    likelihood, samples = head.likelihood(), prediction.shape[:-1]
    weighting = Weighting.of(
        given["reduction"] or head.reduction,
        given["sample_weight"],
        given["num_items_in_batch"],
        prediction,
    )
    target = likelihood.rows(targets, samples, weight)
    likelihood, target, mean = likelihood.weighed(target, weight, weighting, "reference")
    outputs = prediction.reshape(-1, prediction.size(-1))
    if isinstance(likelihood, Values):
        scale, constant = likelihood.density(target.size(1))
        each = 0.5 * scale * (target - outputs).square().sum(1) + constant
        counted = torch.ones_like(each, dtype=torch.bool)
    else:
        assert isinstance(likelihood, Classes)
        counted = likelihood.counted(target)
        target = torch.where(counted.view(-1, *[1] * (target.dim() - 1)), target, 0)
        options = likelihood.class_weight, likelihood.label_smoothing
        each = -reference.likelihoods(outputs.unsqueeze(1), target, *options)[1].squeeze(1)
    factors = likelihood.row_weight
    if factors is not None:
        counted = counted & (factors != 0)
        each = factors * each
    each = torch.where(counted, each, 0)
    if weighting.per_sample:
        return each.view(samples)
    # As the head: 0 where nothing counts.
    return each.sum() / counted.sum().clamp(min=1) if mean else each.sum()
