"""The likelihoods of the mixture: classes by softmax, and values with Gaussian noise.

Each declares its op, its options and its target here. The ops' schemas, fakes, checks and lists of arguments follow
from that; csrc/mixture/likelihood.h declares the same options for the compiled implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from alrao_fast.arguments import Integer, Number
from alrao_fast.ops import derivatives
from alrao_fast.ops.checks import check, check_tensor, dtype_name
from alrao_fast.ops.mixture import checks

IGNORE_INDEX = Integer()
SIGMA2 = Number(above=0, words="a finite variance > 0")


@dataclass(frozen=True)
class Likelihood:
    """The fields of a subclass are the options of its op.

    In the schema the first follows the target. The others have defaults and stand at the end, where an option that is
    added leaves every call of the op, and every exported graph, as good as it was.
    """

    OP: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """The options by name."""
        # Not vars(self), which torch.compile of torch 2.11 cannot trace. These are a dataclass's fields.
        names: tuple[str, ...] = self.__match_args__
        return {name: getattr(self, name) for name in names}

    def rows(self, target: Tensor, samples: torch.Size, weight: Tensor) -> Tensor:
        """The target of the samples `[...]` in rows, as the op takes it; ValueError unless it fits the samples."""
        raise NotImplementedError

    def check_target(self, target: Tensor, x: Tensor, weight: Tensor) -> None:
        """Raise RuntimeError unless the options and the target are what the op takes."""
        raise NotImplementedError

    @classmethod
    def schema(cls, *, observed: bool = False) -> str:
        """The op's schema; `observed`: with the observation of the switch as its tail."""
        own, *added = fields(cls)
        name, inputs, observer = cls.OP, checks.INPUTS, []
        if observed:
            name += "_observe_"
            inputs = inputs.replace("Tensor log_posterior", "Tensor(a!) log_posterior")
            observer = ["Tensor(b!) logw", "Tensor(c!) t", "Tensor(d!) running"]
            observer += ["bool mean_evidence", "float theta"]
        needs = "bool mean, bool need_dx, bool need_dw, int memory_budget"
        options = [f"{option.type} {option.name}={option.default}" for option in added]
        arguments = [inputs, f"Tensor target, {own.type} {own.name}", needs, *observer, *options]
        result = "(Tensor loss, Tensor stats, Tensor dx, Tensor dweight, Tensor dbias)"
        return f"{name}({', '.join(arguments)}) -> {result}"

    def arguments(
        self, inputs: tuple[Any, ...], needs: tuple[Any, ...], observer: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        """The arguments of the op in the order of its schema; the target is the last of the inputs."""
        own, *added = self.options().values()
        return *inputs, own, *needs, *observer, *added

    @classmethod
    def check(cls, *arguments: Any) -> None:
        """Raise RuntimeError unless the op takes these arguments, in the order of its schema."""
        x, weight, bias, log_posterior, target, own, *needs = arguments
        _mean, _need_dx, _need_dw, memory_budget, *added = needs
        checks.check_inputs(x, weight, bias, log_posterior, memory_budget)
        make: Callable[..., Likelihood] = cls
        make(own, *added).check_target(target, x, weight)


@dataclass(frozen=True)
class Classes(Likelihood):
    """A class `target [...]` by softmax, int64 for the op; a target `ignore_index` does not count."""

    OP: ClassVar[str] = "switch_mixture_nll"

    ignore_index: int

    @classmethod
    def of(cls, ignore_index: Any) -> Classes:
        """TypeError for an index that is no integer."""
        return cls(IGNORE_INDEX.check("ignore_index", ignore_index))

    def rows(self, target: Tensor, samples: torch.Size, weight: Tensor) -> Tensor:
        _check_shape(target, samples, ", that of x without the features")
        if target.dtype in (torch.uint8, torch.int32):
            target = target.long()
        return target if target.dim() == 1 else target.reshape(-1)

    def check_target(self, target: Tensor, x: Tensor, weight: Tensor) -> None:
        check_tensor("target", target, x.shape[:1], (torch.int64,), x.device)
        # Reading classes on a GPU would wait for it: there the loss is inf. Traced tensors have none to read.
        if x.device.type == "cpu" and not derivatives.is_traced(x):
            classes = weight.size(1)
            outside = ((target < 0) | (target >= classes)) & (target != self.ignore_index)
            if outside.any():
                position = int(outside.nonzero()[0])
                check(
                    False,
                    f"target: got {int(target[position])} at position {position}, expected a class "
                    f"from 0 to {classes - 1} or ignore_index {self.ignore_index}",
                )


@dataclass(frozen=True)
class Values(Likelihood):
    """Values `target [..., K]` with Gaussian noise of variance `sigma2`."""

    OP: ClassVar[str] = "switch_mixture_gaussian_nll"

    sigma2: float

    @classmethod
    def of(cls, sigma2: Any) -> Values:
        """TypeError for a variance that is no number."""
        return cls(float(SIGMA2.plain("sigma2", sigma2)))

    def rows(self, target: Tensor, samples: torch.Size, weight: Tensor) -> Tensor:
        where = ": that of x with the clones' outputs in place of the features"
        _check_shape(target, (*samples, weight.size(1)), where)
        if target.is_complex():
            raise RuntimeError(
                f"target: got dtype {dtype_name(target.dtype)}, expected real numbers"
            )
        return target.detach().reshape(-1, weight.size(1)).to(weight.dtype)

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
