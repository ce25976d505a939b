"""The factors of the samples' losses, by their weights, those of the classes and the reduction.

The ops take them as `row_weight`. Nothing waits for a device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast.arguments import Kind, Number, shown
from alrao_fast.ops import derivatives, dispatch
from alrao_fast.ops.checks import check, check_dtype, check_tensor, check_together
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
    """Targets of which rows of probabilities sum to 1 or are 0, factors `[B]`, for the losses themselves the weights
    `[C]` of the classes, of mean 1, and of probabilities the likeliest classes `[B]` where somebody looked for them.

    Without factors the sum is divided by the number `divisor` and by `num_items`, a tensor of one.
    """

    target: Tensor
    row_weight: Tensor | None
    class_weight: Tensor | None = None
    likeliest: Tensor | None = None
    divisor: float = 1.0
    num_items: Tensor | None = None


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
            if isinstance(num_items, Tensor):
                if derivatives.is_readable(num_items):
                    num_items = float(num_items)
                elif num_items.device != x.device:
                    num_items = num_items.to(x.device)
        if sample_weight is not None:
            check_together(x=x, sample_weight=sample_weight)
            if sample_weight.is_complex():
                raise TypeError(f"sample_weight: got {sample_weight.dtype}, expected real numbers")
            if sample_weight.shape != x.shape[:-1]:
                raise ValueError(
                    f"sample_weight: got shape {list(sample_weight.shape)}, expected {list(x.shape[:-1])}, that of x "
                    "without the features"
                )
            # This runs in every training step: no call that does nothing.
            if sample_weight.requires_grad:
                sample_weight = sample_weight.detach()
            if sample_weight.dim() != 1:
                sample_weight = sample_weight.reshape(-1)
        return cls(reduction, sample_weight, num_items, False, reduction == "none")

    def is_left_to_op(self, target: Tensor, ignore_index: int, backend: str) -> bool:
        """Whether the op of the loss makes the factors itself; RuntimeError for values that it would not look at.

        Of losses one by one the backward runs the op again, with other factors.
        """
        if backend == "reference" or self.per_sample:
            return False
        if backend != "cpu" and derivatives.is_readable(target):
            check_values(target, self.sample_weight, ignore_index)
        return True

    def given(self, dtype: torch.dtype) -> tuple[Tensor | None, bool, float, Tensor | None]:
        """The samples' weights, whether a sum is divided by the mean's divisor, and what else it is divided by: a
        number, and a tensor of one or None."""
        weight, items = self.sample_weight, self.num_items
        if weight is not None and weight.dtype != dtype:
            weight = weight.to(dtype)
        if items is None:
            return weight, self.reduction == "mean", 1.0, None
        if isinstance(items, Tensor):
            return weight, False, 1.0, self._live_items(dtype)
        return weight, False, float(items), None

    def factors(self, target: Any, options: Factors, backend: str) -> Prepared:
        """What the op takes of targets in rows and their weights; 1 for every sample that counts is None.

        `target` may be None where no sample has a weight; for the backend reference it has a use all the same.
        """
        weight, by_mean, divisor, items = self.given(options.dtype)
        if weight is None and options.class_weight is None and not _is_soft(target):
            if self.num_items is None:
                return Prepared(target, None)
            if backend != "reference":
                return Prepared(target, None, None, None, divisor, items)
            factors = options.full(target, 1 / divisor)
            return Prepared(target, factors if items is None else factors / items)
        arguments: tuple[Any, ...] = (
            target,
            weight,
            options.class_weight,
            options.ignore_index,
            options.label_smoothing,
            by_mean,
            divisor,
            items,
        )
        if backend == "reference":
            return weights(*arguments)
        if backend != "cpu" and derivatives.is_readable(target):
            check_values(target, weight, options.ignore_index)
        op = _twin if backend == "triton" else _op
        # Losses one by one keep the targets for their backward, and whoever gave them may write into them: a copy.
        found, rows, scaled, likeliest = op(*arguments)
        scaled = scaled if scaled.numel() else None
        if not _is_soft(target):
            return Prepared(target, rows, scaled)
        return Prepared(found, rows, scaled, likeliest)

    def _live_items(self, wide: torch.dtype) -> Tensor:
        """The number of items as the ops take it, of which nobody on a GPU has looked at the value."""
        items: Tensor = self.num_items.detach()
        if items.dim() != 0:
            items = items.reshape(())
        return items if items.dtype in (wide, torch.int64) else items.to(wide)


def _is_soft(target: Tensor | None) -> bool:
    return target is not None and target.is_floating_point()


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


def check_values(target: Tensor, sample_weight: Tensor | None, ignore_index: int) -> None:
    """Raise RuntimeError unless what counts has a finite weight, and a target of probabilities."""
    if sample_weight is not None:
        # What does not count may have any weight, NaN too.
        counted = sample_weight if _is_soft(target) else sample_weight[target != ignore_index]
        if not counted.isfinite().all():
            wrong = ~sample_weight.isfinite()
            if not _is_soft(target):
                wrong = wrong & (target != ignore_index)
            position = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"sample_weight: got {float(sample_weight[position])} at position {position}, expected finite numbers"
            )
    if not _is_soft(target) or not target.numel():
        return
    if sample_weight is not None:
        target = torch.where((sample_weight != 0).unsqueeze(1), target, 0)
    total = target.sum(1)
    if not (target.min() >= 0 and total.isfinite().all()):
        negative = (target < 0).any(1)
        row = int((negative | ~total.isfinite()).nonzero()[0])
        what = "negative entries" if negative[row] else "entries that are not finite"
        raise RuntimeError(
            f"target: got {what} for sample {row}, expected probabilities, or weights that are finite and >= 0"
        )


def weights(
    target: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    divisor: float,
    num_items: Tensor | None = None,
) -> Prepared:
    """`switch_mixture_weights` in operations of PyTorch, for all devices."""
    if derivatives.is_readable(target):
        check_values(target, sample_weight, ignore_index)
    soft = target.is_floating_point()
    like = next(t for t in (sample_weight, class_weight, target) if t is not None)
    given = like.new_ones(target.size(0)) if sample_weight is None else sample_weight
    if not soft:
        given = torch.where(target != ignore_index, given, 0)
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
    norm: Any = divisor
    if mean:
        # Where nothing counts the loss is 0.
        norm = divided.sum()
        norm = torch.where(norm == 0, 1, norm)
    return Prepared(target, share / (norm if num_items is None else norm * num_items), scaled)


def _distributions(target: Tensor) -> tuple[Tensor, Tensor]:
    """Targets `[B, C]` that sum to 1, or are 0, and what they summed to, `[B]`."""
    total = target.sum(1)
    target = target / torch.where(total == 0, 1, total).unsqueeze(1)
    # One that is not finite makes every clone dead for the sample, and its loss inf: that must have a weight.
    return target, torch.where(total.isfinite(), total, 1)


def _fake(
    target,
    sample_weight,
    class_weight,
    ignore_index,
    label_smoothing,
    mean,
    divisor,
    num_items=None,
    copy=True,
):
    soft = target.is_floating_point()
    like = next(t for t in (target if soft else None, sample_weight, class_weight) if t is not None)
    within = class_weight is not None and (soft or label_smoothing != 0)
    return (
        target.new_empty(target.shape if copy else (0,)) if soft else like.new_empty(0),
        like.new_empty(target.size(0)),
        class_weight.new_empty(class_weight.shape) if within else like.new_empty(0),
        target.new_empty(target.shape[:1] if soft else (0,), dtype=torch.int64),
    )


def _check(target, sample_weight, class_weight, *options, num_items=None, copy=True):
    """Raise RuntimeError unless the op takes these arguments."""
    soft = target.is_floating_point()
    check(
        target.dim() == (2 if soft else 1),
        f"target: got shape {list(target.shape)}, expected classes [B], or distributions [B, C]",
    )
    given = [t for t in (target if soft else None, sample_weight, class_weight) if t is not None]
    check(bool(given), "sample_weight: got None, expected weights of samples or of classes")
    wide = given[0].dtype
    check_dtype("weights", given[0], (torch.float32, torch.float64))
    if not soft:
        check_dtype("target", target, (torch.int64,))
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, target.shape[:1], (wide,), target.device)
    if class_weight is not None:
        classes = target.shape[1:] if soft else class_weight.shape
        check_tensor("class_weight", class_weight, classes, (wide,), target.device)


SCHEMA = (
    "switch_mixture_weights(Tensor target, Tensor? sample_weight, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, bool mean, float divisor, Tensor? num_items=None, bool copy=True) -> "
    "(Tensor target, Tensor row_weight, Tensor class_weight, Tensor likeliest)"
)
# The same in one pass or two: a dozen small operations cost a small network a third of its step. copy: False returns
# no target where the one that is given will do. In a graph it is True, for what that depends on is in the values.
dispatch.outside_graphs(
    define(SCHEMA, _fake), dispatch.define_triton(SCHEMA, _fake, "mixture.weights", _check)
)
_op = dispatch.overload("switch_mixture_weights")
_twin = dispatch.overload("switch_mixture_weights", "triton")
