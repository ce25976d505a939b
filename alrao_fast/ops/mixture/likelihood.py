"""The likelihoods of the mixture: classes by softmax, and values with Gaussian noise.

Each declares its op, its options and its target here. The ops' schemas, fakes, checks and lists of arguments follow
from that; csrc/mixture declares the same options for the compiled implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from alrao_fast.arguments import Integer, Number
from alrao_fast.ops import derivatives
from alrao_fast.ops.checks import check, check_tensor, dtype_name
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.weighting import Factors, Weighting

IGNORE_INDEX = Integer(-(2**63), 2**63 - 1, "an integer of 64 bits")
SIGMA2 = Number(above=0, words="a finite variance > 0")
LABEL_SMOOTHING = Number(low=0, high=1)
Z_LOSS = Number(low=0)
# What an option's annotation is in a schema, where it is not the same.
_SCHEMA_TYPES = {"Tensor | None": "Tensor?"}


@dataclass
class Likelihood:
    """The fields of a subclass are the options of its op.

    In the schema the first follows the target. The others have defaults and stand at the end, where an option that is
    added leaves every call of the op, and every exported graph, as good as it was. Those of `DEFINING` are the
    reference's, too, in which weights of samples say what the rest of them does.
    """

    OP: ClassVar[str]
    DEFINING: ClassVar[tuple[str, ...]]

    def options(self) -> dict[str, Any]:
        """The options by name."""
        # Not vars(self), which torch.compile of torch 2.11 cannot trace. These are a dataclass's fields.
        names: tuple[str, ...] = self.__match_args__
        return {name: getattr(self, name) for name in names}

    def defining(self) -> dict[str, Any]:
        """Those of the reference."""
        return {name: getattr(self, name) for name in self.DEFINING}

    def one_by_one(self, row_weight: Tensor | None) -> Likelihood:
        """The same for losses that are not summed, with these factors."""
        sums = {"row_weight": row_weight, "per_sample": True, "divisor": 1.0, "num_items": None}
        return replace(self, **sums)

    def is_plain(self) -> bool:
        """Whether all options but the first have their defaults."""
        raise NotImplementedError

    def rows(self, target: Tensor, samples: torch.Size, weight: Tensor) -> Tensor:
        """The target of the samples `[...]` in rows; ValueError unless it fits the samples."""
        raise NotImplementedError

    def weighed(
        self, target: Tensor, weight: Tensor, weighting: Weighting, backend: str
    ) -> tuple[Likelihood, Tensor, bool]:
        """The op's options with the weights `[B]` of the samples, its target in rows, and whether it takes the mean."""
        raise NotImplementedError

    def counted(self, target: Tensor) -> Tensor:
        """Which samples `[B]` count by their targets in rows."""
        raise NotImplementedError

    def check_target(self, target: Tensor, x: Tensor, weight: Tensor) -> None:
        """Raise RuntimeError unless the options and the target are what the op takes."""
        raise NotImplementedError

    @classmethod
    def schema(cls, *, observed: bool = False) -> str:
        """The op's schema; `observed`: of the op that observes."""
        own, *added = fields(cls)
        name, inputs, observer = cls.OP, checks.INPUTS, []
        if observed:
            name += "_observe_"
            inputs = inputs.replace("Tensor log_posterior", "Tensor(a!) log_posterior")
            observer = ["Tensor(b!) logw", "Tensor(c!) t", "Tensor(d!) running"]
            observer += ["bool mean_evidence", "float theta"]
        needs = "bool mean, bool need_dx, bool need_dw, int memory_budget"
        options = [
            f"{_SCHEMA_TYPES.get(str(option.type), option.type)} {option.name}={option.default}"
            for option in added
        ]
        arguments = [inputs, f"Tensor target, {own.type} {own.name}", needs, *observer, *options]
        result = "(Tensor loss, Tensor stats, Tensor dx, Tensor dweight, Tensor dbias)"
        return f"{name}({', '.join(arguments)}) -> {result}"

    def arguments(
        self, inputs: tuple[Any, ...], needs: tuple[Any, ...], observer: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        """The arguments of the op in the order of its schema; the target is the last of the inputs."""
        names: tuple[str, ...] = self.__match_args__
        if self.is_plain():
            # Every argument of a call costs; the dispatcher has the defaults.
            return *inputs, getattr(self, names[0]), *needs, *observer
        own, *added = [getattr(self, name) for name in names]
        return *inputs, own, *needs, *observer, *added

    @classmethod
    def check(cls, *arguments: Any) -> None:
        """Raise RuntimeError unless the op takes these arguments, in the order of its schema."""
        x, weight, bias, log_posterior, target, own, *needs = arguments
        mean, need_dx, need_dw, memory_budget, *added = needs
        checks.check_inputs(x, weight, bias, log_posterior, memory_budget)
        make: Callable[..., Likelihood] = cls
        likelihood = make(own, *added)
        likelihood.check_target(target, x, weight)
        likelihood.check_weights(x, mean, need_dx or need_dw)

    def check_weights(self, x: Tensor, mean: bool, need_gradients: bool) -> None:
        """Raise RuntimeError unless the samples' weights are what the op takes, and fit `mean` and the gradients."""
        options = self.options()
        row_weight, per_sample = options["row_weight"], options["per_sample"]
        if row_weight is not None:
            wide = (checks.accumulator(x.dtype),)
            check_tensor("row_weight", row_weight, x.shape[:1], wide, x.device)
        # Samples' weights are no factors yet where these are to be made of them.
        weighed = row_weight is not None and not options.get("make_factors", False)
        check(
            not mean or not (weighed or per_sample),
            "mean: got True, expected False with row_weight or per_sample",
        )
        check(
            not (per_sample and need_gradients),
            "per_sample: got True, expected False where gradients are needed",
        )
        divisor, num_items = options["divisor"], options["num_items"]
        check(divisor > 0, f"divisor: got {divisor:g}, expected a number > 0")
        if num_items is not None:
            dtypes = checks.accumulator(x.dtype), torch.int64
            check_tensor("num_items", num_items, (), dtypes, x.device)
        check(
            not (divisor != 1 or num_items is not None) or not (mean or weighed or per_sample),
            "divisor: got one, expected none with mean, row_weight or per_sample",
        )


@dataclass
class Classes(Likelihood):
    """A class by softmax: `target [...]` int64 for the op, or probabilities `[..., C]`; a class `ignore_index` does not
    count.

    `row_weight [B]` are the factors of the samples' losses; a sample of factor 0 does not count. `class_weight [C]`:
    at first the user's, for the op of mean 1 and None where all that it does is in row_weight. softcap 0: none.

    Without row_weight a sum is divided by the number `divisor` and by `num_items`, a tensor of one. `likeliest [B]` are
    the classes of the largest probabilities; None: the op looks for them.

    make_factors: row_weight are the samples' weights, class_weight the user's, and probabilities have any sums; the op
    makes of them what `switch_mixture_weights` does, with the divisors and where `mean` says so the mean's.
    """

    OP: ClassVar[str] = "switch_mixture_nll"
    DEFINING: ClassVar[tuple[str, ...]] = (
        "ignore_index",
        "row_weight",
        "class_weight",
        "label_smoothing",
        "z_loss",
        "softcap",
        "per_sample",
    )

    ignore_index: int
    row_weight: Tensor | None = None
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    per_sample: bool = False
    divisor: float = 1.0
    num_items: Tensor | None = None
    likeliest: Tensor | None = None
    make_factors: bool = False

    @classmethod
    def of(
        cls,
        ignore_index: Any,
        class_weight: Tensor | None = None,
        label_smoothing: Any = 0.0,
        z_loss: Any = 0.0,
        logit_softcap: Any = None,
    ) -> Classes:
        """TypeError for an index that is no integer, and other options that are no numbers."""
        ignore_index = IGNORE_INDEX.check("ignore_index", ignore_index)
        if type(label_smoothing) is type(z_loss) is float and logit_softcap is None:
            # As in every training step of a head: their ranges are the op's to check.
            return cls(ignore_index, None, class_weight, label_smoothing, z_loss)
        return cls(
            ignore_index,
            None,
            class_weight,
            float(LABEL_SMOOTHING.plain("label_smoothing", label_smoothing)),
            float(Z_LOSS.plain("z_loss", z_loss)),
            checks.softcap(logit_softcap),
        )

    def is_plain(self) -> bool:
        return (
            not self.make_factors
            and self.row_weight is None
            and self.class_weight is None
            and self.label_smoothing == self.z_loss == self.softcap == 0
            and not self.per_sample
            and self.divisor == 1
            and self.num_items is None
        )

    def rows(self, target: Tensor, samples: torch.Size, weight: Tensor) -> Tensor:
        if target.is_floating_point() and target.shape != samples:
            where = ", probabilities of the classes (or classes, int64), with the samples of x"
            _check_shape(target, (*samples, weight.size(1)), where)
            wide = checks.accumulator(weight.dtype)
            # No call that does nothing, as this runs in every training step.
            if target.requires_grad:
                target = target.detach()
            if target.dim() != 2:
                target = target.reshape(-1, weight.size(1))
            return target if target.dtype == wide else target.to(wide)
        _check_shape(target, samples, ", that of x without the features, its last dimension")
        if target.is_floating_point():
            # For the op it would be one dimension short.
            raise RuntimeError(
                f"target: got dtype {dtype_name(target.dtype)}, expected Long for classes of shape "
                f"{list(samples)}, or probabilities of shape {[*samples, weight.size(1)]}"
            )
        if target.dtype in (torch.uint8, torch.int32):
            target = target.long()
        return target if target.dim() == 1 else target.reshape(-1)

    def weighed(
        self, target: Tensor, weight: Tensor, weighting: Weighting, backend: str
    ) -> tuple[Classes, Tensor, bool]:
        soft = target.is_floating_point()
        if weighting.is_plain and self.class_weight is None and not soft:
            return self, target, weighting.reduction == "mean"
        wide = checks.accumulator(weight.dtype)
        weights = self.class_weight
        if weights is not None and weights.dtype != wide:
            weights = weights.to(wide)
        is_weighed = weighting.sample_weight is not None or weights is not None or soft
        if is_weighed and weighting.is_left_to_op(target, self.ignore_index, backend):
            sample_weight, mean, divisor, num_items = weighting.given(wide)
            likelihood = Classes(
                self.ignore_index,
                sample_weight,
                weights,
                self.label_smoothing,
                self.z_loss,
                self.softcap,
                False,
                divisor,
                num_items,
                None,
                True,
            )
            return likelihood, target, mean
        options = Factors(wide, weights, self.ignore_index, self.label_smoothing)
        found = weighting.factors(target, options, backend)
        likelihood = Classes(
            self.ignore_index,
            found.row_weight,
            found.class_weight,
            self.label_smoothing,
            self.z_loss,
            self.softcap,
            weighting.per_sample,
            found.divisor,
            found.num_items,
            found.likeliest,
        )
        return likelihood, found.target, False

    def counted(self, target: Tensor) -> Tensor:
        """Not those of class ignore_index, nor those of no mass."""
        return target != self.ignore_index if target.dim() == 1 else (target != 0).any(1)

    def check_target(self, target: Tensor, x: Tensor, weight: Tensor) -> None:
        classes = weight.size(1)
        wide = checks.accumulator(x.dtype)
        if target.is_floating_point():
            check_tensor("target", target, (x.size(0), classes), (wide,), x.device)
        else:
            check_tensor("target", target, x.shape[:1], (torch.int64,), x.device)
        # Reading classes on a GPU would wait for it: there the loss is inf. Traced tensors have none to read.
        if not target.is_floating_point() and derivatives.is_readable(x):
            outside = ((target < 0) | (target >= classes)) & (target != self.ignore_index)
            if outside.any():
                position = int(outside.nonzero()[0])
                check(
                    False,
                    f"target: got {int(target[position])} at position {position}, expected a class "
                    f"from 0 to {classes - 1} or ignore_index {self.ignore_index}",
                )
        if self.class_weight is not None:
            check_tensor("class_weight", self.class_weight, (classes,), (wide,), x.device)
        if self.likeliest is not None:
            check(
                target.is_floating_point(),
                "likeliest: got classes, expected None without probabilities",
            )
            check_tensor("likeliest", self.likeliest, x.shape[:1], (torch.int64,), x.device)
        given = self.row_weight, self.class_weight
        has_weights = target.is_floating_point() or any(w is not None for w in given)
        check(
            not self.make_factors
            or (has_weights and not self.per_sample and self.likeliest is None),
            "make_factors: got True, expected False without weights or probabilities, with per_sample and with "
            "likeliest",
        )
        for name, kind in (("label_smoothing", LABEL_SMOOTHING), ("z_loss", Z_LOSS)):
            value = getattr(self, name)
            check(kind.holds(value), f"{name}: got {value:g}, expected {kind.expected}")
        checks.check_softcap(self.softcap)


@dataclass
class Values(Likelihood):
    """Values `target [..., K]` with Gaussian noise of variance `sigma2`; row_weight as for `Classes`."""

    OP: ClassVar[str] = "switch_mixture_gaussian_nll"
    DEFINING: ClassVar[tuple[str, ...]] = ("sigma2", "row_weight", "per_sample")

    sigma2: float
    row_weight: Tensor | None = None
    per_sample: bool = False
    divisor: float = 1.0
    num_items: Tensor | None = None

    @classmethod
    def of(cls, sigma2: Any) -> Values:
        """TypeError for a variance that is no number."""
        return cls(float(SIGMA2.plain("sigma2", sigma2)))

    def is_plain(self) -> bool:
        return (
            self.row_weight is None
            and not self.per_sample
            and self.divisor == 1
            and self.num_items is None
        )

    def rows(self, target: Tensor, samples: torch.Size, weight: Tensor) -> Tensor:
        where = ": that of x with the clones' outputs in place of the features"
        _check_shape(target, (*samples, weight.size(1)), where)
        if target.is_complex():
            raise RuntimeError(
                f"target: got dtype {dtype_name(target.dtype)}, expected real numbers"
            )
        return target.detach().reshape(-1, weight.size(1)).to(weight.dtype)

    def weighed(
        self, target: Tensor, weight: Tensor, weighting: Weighting, backend: str
    ) -> tuple[Values, Tensor, bool]:
        if weighting.is_plain:
            return self, target, weighting.reduction == "mean"
        wide = checks.accumulator(weight.dtype)
        classes = None
        if weighting.sample_weight is not None or backend == "reference":
            # As of one class.
            classes = target.new_zeros(target.size(0), dtype=torch.int64)
        found = weighting.factors(classes, Factors(wide, None, -1, 0.0), backend)
        likelihood = Values(
            self.sigma2, found.row_weight, weighting.per_sample, found.divisor, found.num_items
        )
        return likelihood, target, False

    def counted(self, target: Tensor) -> Tensor:
        return target.new_ones(target.size(0), dtype=torch.bool)

    def check_target(self, target: Tensor, x: Tensor, weight: Tensor) -> None:
        check_tensor("target", target, (x.size(0), weight.size(1)), (x.dtype,), x.device)
        check(
            0 < self.sigma2 < math.inf,
            f"sigma2: got {self.sigma2:g}, expected a positive variance that is finite",
        )

    def density(self, outputs: int) -> tuple[float, float]:
        """1 / sigma2 and minus the log of the density at its peak."""
        return 1 / self.sigma2, 0.5 * outputs * math.log(2 * math.pi * self.sigma2)


def _check_shape(target: Tensor, expected: tuple[int, ...], why: str) -> None:
    if target.shape != expected:
        raise ValueError(f"target: got shape {list(target.shape)}, expected {list(expected)}{why}")
