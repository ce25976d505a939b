"""The factors of the samples' losses, by their weights, those of the classes and the reduction.

Small operations of PyTorch on `[B]` and `[C]`, which wait for no device: the ops take their result as `row_weight`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast.arguments import Kind, Number, shown
from alrao_fast.ops import derivatives
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture.checks import REDUCTION

NUM_ITEMS = Number(above=0, live=True, words="a number of items > 0")


def _readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: on a GPU that would be a wait, and what is traced has none."""
    return tensor.device.type == "cpu" and not derivatives.is_traced(tensor)


class Weighting(NamedTuple):
    """How the losses of the samples are summed.

    `sample_weight` in rows `[B]`, or None; `num_items`, a number or a tensor of one, is divided by in place of what the
    reduction "mean" says. is_plain: every sample that counts has the same factor, which the op knows by itself.
    """

    reduction: str
    sample_weight: Tensor | None = None
    num_items: Any = None
    is_plain: bool = False
    per_sample: bool = False

    @classmethod
    def of(cls, reduction: str, sample_weight: Any, num_items: Any, x: Tensor) -> Weighting:
        """TypeError, ValueError or RuntimeError, naming the argument, for what does not fit the features `[..., D]`."""
        REDUCTION.check("reduction", reduction)
        if sample_weight is None and num_items is None:
            return _UNWEIGHTED[reduction]
        if num_items is not None:
            if reduction == "none":
                raise ValueError(
                    f"num_items_in_batch: got {num_items!r} with reduction='none', expected None: nothing is summed"
                )
            NUM_ITEMS.check("num_items_in_batch", num_items)
        if sample_weight is not None:
            check_together(x=x, sample_weight=sample_weight)
            if sample_weight.is_complex():
                raise TypeError(f"sample_weight: got {sample_weight.dtype}, expected real numbers")
            if sample_weight.shape != x.shape[:-1]:
                raise ValueError(
                    f"sample_weight: got shape {list(sample_weight.shape)}, expected {list(x.shape[:-1])}, that of x "
                    "without the features"
                )
            sample_weight = sample_weight.detach().reshape(-1)
        return cls(reduction, sample_weight, num_items, per_sample=reduction == "none")

    def of_samples(self, counted: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The samples' weights `[B]`, 0 where not `counted`: what does not count may have any weight, NaN too."""
        if self.sample_weight is None:
            return None
        weight = self.sample_weight.to(dtype)
        weight = weight if counted is None else torch.where(counted, weight, 0)
        if _readable(weight) and not weight.isfinite().all():
            position = int((~weight.isfinite()).nonzero()[0])
            raise ValueError(
                f"sample_weight: got {float(weight[position])} at position {position}, expected finite numbers"
            )
        return weight

    def of_rows(
        self, share: Tensor | None, divided: Tensor | None, rows: int, like: Tensor
    ) -> Tensor | None:
        """The factors `[B]` of the losses, from the samples' `share` in the sum, and what a mean divides by the sum of.

        None is 1 for every sample. The result is None where all factors are 1; else it has the dtype and device of
        `like`.
        """
        if self.num_items is not None:
            norm: Any = self.num_items
        elif self.reduction == "mean":
            norm = rows if divided is None else divided.sum()
        else:
            return share
        if isinstance(norm, Tensor):
            # Where nothing counts the loss is 0.
            norm = torch.where(norm == 0, 1, norm).reshape(()).to(like.dtype)
            one = like.new_ones(()) if share is None else share
            return (one / norm).expand(rows).contiguous()
        return like.new_full((rows,), 1 / (norm or 1)) if share is None else share / norm


# Made once: this runs in every training step.
_UNWEIGHTED = {
    reduction: Weighting(reduction, is_plain=reduction != "none", per_sample=reduction == "none")
    for reduction in REDUCTION.words
    if reduction is not None
}


def no_loss(sample_weight: Any, num_items: Any, reduction: Any) -> None:
    """ValueError where there are no targets, but something for their loss."""
    names = (
        ("sample_weight", sample_weight),
        ("num_items_in_batch", num_items),
        ("reduction", reduction),
    )
    for name, value in names:
        if value is not None:
            raise ValueError(
                f"{name}: got {shown(value)} without targets, expected None: there is no loss"
            )


class ClassWeight(Kind):
    """The weights of the classes; what they are is looked at on the CPU only."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.expected = (
            f"{num_classes} finite weights >= 0 in a tensor, one for each class, not all 0"
        )

    def check(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.is_complex():
            raise self.refuse(TypeError, name, value)
        if value.shape != (self.num_classes,) or value.layout is not torch.strided:
            raise self.refuse(ValueError, name, value)
        if _readable(value):
            if not (value >= 0).all() or not value.isfinite().all() or not value.any():
                raise ValueError(f"{name}: got {value.tolist()}, expected {self.expected}")
        return value.detach()


def distributions(
    target: Tensor, given: Tensor | None, class_weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Targets `[B, C]` that sum to 1, or are 0, and the share `[B]` of each sample in the sum of losses.

    A row that sums to S counts as its normalised with the weight S; `given [B]` are the samples' weights.
    """
    if given is not None:
        target = torch.where(given.unsqueeze(1) != 0, target, 0)
    total = target.sum(1)
    if _readable(target) and target.numel() and not (target.min() >= 0 and total.isfinite().all()):
        row = int((~((target >= 0).all(1) & total.isfinite())).nonzero()[0])
        raise RuntimeError(
            f"target: got {target[row].tolist()} for sample {row}, expected probabilities, or weights that are finite "
            "and >= 0"
        )
    target = target / torch.where(total == 0, 1, total).unsqueeze(1)
    # A target that is not finite makes every clone dead for the sample, and its loss inf: that must have a weight.
    share = torch.where(total.isfinite(), total, 1)
    if class_weight is not None:
        mean = target @ class_weight
        if smoothing != 0:
            mean = (1 - smoothing) * mean + smoothing * class_weight.mean()
        share = torch.where(mean.isfinite(), share * mean, share)
    return target, share if given is None else share * given
