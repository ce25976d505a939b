"""The factors of the samples' losses, by their weights, those of the classes and the reduction.

The ops take them as `row_weight`. Nothing waits for a device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast.arguments import Kind, Number, shown
from alrao_fast.ops import derivatives, dispatch
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.dispatch import define
from alrao_fast.ops.mixture.checks import REDUCTION

NUM_ITEMS = Number(above=0, live=True, words="a number of items > 0")


class Factors(NamedTuple):
    """The options that the factors of the losses depend on; `class_weight [C]` in `dtype`, that of the arithmetic."""

    dtype: torch.dtype
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def full(self, target: Tensor, value: float) -> Tensor:
        return torch.full(target.shape[:1], value, dtype=self.dtype, device=target.device)


class Prepared(NamedTuple):
    """Targets of which rows of probabilities sum to 1 or are 0, factors `[B]`, and for the losses themselves the
    weights `[C]` of the classes, of mean 1.
    """

    target: Tensor
    row_weight: Tensor | None
    class_weight: Tensor | None = None


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

    def factors(self, target: Tensor, options: Factors, backend: str) -> Prepared:
        """What the op takes of targets in rows and their weights; 1 for every sample that counts is None."""
        weight = None if self.sample_weight is None else self.sample_weight.to(options.dtype)
        by_mean = self.num_items is None and self.reduction == "mean"
        live = isinstance(self.num_items, Tensor)
        divisor = 1.0 if self.num_items is None or live else float(self.num_items)
        if weight is None and options.class_weight is None and not target.is_floating_point():
            if self.num_items is None:
                return Prepared(target, None)
            prepared = Prepared(target, options.full(target, 1 / divisor))
        else:
            arguments: tuple[Any, ...] = (
                target,
                weight,
                options.class_weight,
                options.ignore_index,
                options.label_smoothing,
                by_mean,
                divisor,
            )
            if backend == "cpu" and derivatives.is_readable(target):
                found, rows, scaled = _op(*arguments)
                found = found if target.is_floating_point() else target
                prepared = Prepared(found, rows, scaled if scaled.numel() else None)
            else:
                prepared = weights(*arguments)
        if live and prepared.row_weight is not None:
            # On a GPU nobody has looked at it.
            items = self.num_items.reshape(()).to(options.dtype)
            prepared = prepared._replace(row_weight=prepared.row_weight / items)
        return prepared


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
        if derivatives.is_readable(value):
            if not (value >= 0).all() or not value.isfinite().all() or not value.any():
                raise ValueError(f"{name}: got {value.tolist()}, expected {self.expected}")
        return value.detach()


def weights(
    target: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    divisor: float,
) -> Prepared:
    """`switch_mixture_weights` in operations of PyTorch, for all devices."""
    soft = target.is_floating_point()
    like = next(t for t in (sample_weight, class_weight, target) if t is not None)
    given = like.new_ones(target.size(0)) if sample_weight is None else sample_weight
    if not soft:
        # What does not count may have any weight, NaN too.
        given = torch.where(target != ignore_index, given, 0)
    if derivatives.is_readable(given) and not given.isfinite().all():
        position = int((~given.isfinite()).nonzero()[0])
        raise RuntimeError(
            f"sample_weight: got {float(given[position])} at position {position}, expected finite numbers"
        )
    share = divided = given
    if soft:
        target, sums = _distributions(torch.where(given.unsqueeze(1) != 0, target, 0))
        share = given * sums
    scaled = None
    if class_weight is not None:
        average = class_weight.mean()
        if soft:
            of_target = target @ class_weight
        else:
            # A class that does not exist is the loss's to refuse.
            of_target = class_weight.index_select(0, target.clamp(0, len(class_weight) - 1))
            divided = given * of_target
        smoothed = (1 - label_smoothing) * of_target + label_smoothing * average
        share = torch.where(smoothed.isfinite(), share * smoothed, share)
        scaled = class_weight / average if soft or label_smoothing != 0 else None
    if not mean:
        return Prepared(target, share / divisor, scaled)
    norm = divided.sum()
    # Where nothing counts the loss is 0.
    return Prepared(target, share / torch.where(norm == 0, 1, norm), scaled)


def _distributions(target: Tensor) -> tuple[Tensor, Tensor]:
    """Targets `[B, C]` that sum to 1, or are 0, and what they summed to, `[B]`."""
    total = target.sum(1)
    if (
        derivatives.is_readable(target)
        and target.numel()
        and not (target.min() >= 0 and total.isfinite().all())
    ):
        negative = (target < 0).any(1)
        row = int((negative | ~total.isfinite()).nonzero()[0])
        what = "negative entries" if negative[row] else "entries that are not finite"
        raise RuntimeError(
            f"target: got {what} for sample {row}, expected probabilities, or weights that are finite and >= 0"
        )
    target = target / torch.where(total == 0, 1, total).unsqueeze(1)
    # One that is not finite makes every clone dead for the sample, and its loss inf: that must have a weight.
    return target, torch.where(total.isfinite(), total, 1)


def _fake(target, sample_weight, class_weight, ignore_index, label_smoothing, mean, divisor):
    like = next(t for t in (sample_weight, class_weight, target) if t is not None)
    soft = target.is_floating_point()
    within = class_weight is not None and (soft or label_smoothing != 0)
    return (
        target.new_empty(target.shape) if soft else like.new_empty(0),
        like.new_empty(target.size(0)),
        class_weight.new_empty(class_weight.shape) if within else like.new_empty(0),
    )


# The same in one pass, on the CPU: a dozen small operations cost a small network a third of its step.
define(
    "switch_mixture_weights(Tensor target, Tensor? sample_weight, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, bool mean, float divisor) -> (Tensor target, Tensor row_weight, Tensor class_weight)",
    _fake,
)
_op = dispatch.overload("switch_mixture_weights")
