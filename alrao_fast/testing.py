"""Inputs and error budgets, shared by the tests, the benchmarks and the doctor's self-test.

Budget: a backend may be as far from the float64 truth as the same-dtype reference is, plus a small constant. No
tolerance is guessed per test.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.arguments import (
    COUNT,
    Device,
    Flag,
    FloatDtype,
    Instance,
    Integer,
    Interval,
    Number,
    Optional,
    checked,
)

_INPUTS = {
    "dtype": FloatDtype(),
    "device": Device(),
    "seed": Integer(),
}
_SIZE = Integer(low=0)
_FEATURE = {**_INPUTS, "names": Instance(Iterable, "names of FEATURE_CASES")}
_CLIP = {
    **_INPUTS,
    "dtype": Optional(FloatDtype()),
    "names": Instance(Iterable, "names of CLIP_CASES"),
    "scale": Number(),
}
_MIXTURE = {
    **_INPUTS,
    "batch": _SIZE,
    "features": _SIZE,
    "classes": COUNT,
    "clones": COUNT,
    "bias": Flag(),
    "scale": Number(),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Slack over the reference's own error, in units of the largest true magnitude: a few roundings of that dtype.
SLACK = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest |actual - truth| over the finite entries, relative to the largest finite |truth| (at least 1e-30).

    inf where NaN or infinities do not stand in the same places.
    """
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    finite = truth.isfinite()
    same = torch.equal(actual[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5))
    if not same or not actual[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().clamp(min=1e-30)
    return float((actual[finite] - truth[finite]).abs().max() / scale)


def assert_within_budget(
    actual: Tensor, reference: Tensor, truth: Tensor, name: str, *, slack: float | None = None
) -> None:
    """Fail unless `actual` is as near to the float64 `truth` as `reference`, of the same dtype, plus a small slack."""
    if slack is None:
        slack = SLACK[actual.dtype]
    error, own = relative_error(actual, truth), relative_error(reference, truth)
    if not error <= 1.5 * own + slack:
        raise AssertionError(
            f"{name}: error {error:.2e}, the reference's own {own:.2e} + {slack:.0e}"
        )


def require(op: str, backend: str) -> str | None:
    """Why `backend` cannot be tested for `op` here, or None; raises if ALRAO_REQUIRE names the backend."""
    state = backends.status(op, backend)
    if state.available:
        return None
    if backend in os.environ.get("ALRAO_REQUIRE", "").split(","):
        raise AssertionError(
            f"ALRAO_REQUIRE names {backend}, which cannot run {op}: {state.reason}"
        )
    return state.reason


class MixtureInputs(NamedTuple):
    """Inputs of switch_mixture: `x [B, D]`, `weight [N, C, D]`, `bias [N, C]`, `log_posterior [N]`, `target [B]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    log_posterior: Tensor
    target: Tensor


def mixture_inputs(
    batch: int,
    features: int,
    classes: int,
    clones: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> MixtureInputs:
    """Random inputs whose logits have a standard deviation of about `scale`; errors as those of the ops' options."""
    checked(_MIXTURE, locals())
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(batch, features)
    weight = normal(clones, classes, features) * (scale / max(features, 1) ** 0.5)
    offset = normal(clones, classes) * scale if bias else None
    log_posterior = normal(clones).log_softmax(0)
    target = torch.randint(classes, (batch,), generator=generator)
    return MixtureInputs(
        x.to(device, dtype),
        weight.to(device, dtype),
        None if offset is None else offset.to(device, dtype),
        log_posterior.to(device),
        target.to(device),
    )


# What each adds to the inputs and to the options of switch_mixture_stats.
_OPTIONS: dict[str, Callable[[MixtureInputs, torch.Generator], dict[str, Any]]] = {
    "sum": lambda inputs, generator: {"reduction": "sum"},
    "none": lambda inputs, generator: {"reduction": "none"},
    "num_items": lambda inputs, generator: {"num_items_in_batch": 7},
    "num_items in a tensor": lambda inputs, generator: {
        "num_items_in_batch": torch.tensor(7, device=inputs.x.device)
    },
    "label smoothing": lambda inputs, generator: {"label_smoothing": 0.1},
    "label smoothing of 1": lambda inputs, generator: {"label_smoothing": 1.0},
    "z-loss": lambda inputs, generator: {"z_loss": 0.02},
    "softcap": lambda inputs, generator: {"logit_softcap": 2.5},
    "class weights": lambda inputs, generator: {
        "class_weight": _uniform(inputs.weight.size(1), inputs, generator)
    },
    "a class of weight 0": lambda inputs, generator: {
        "class_weight": (torch.arange(inputs.weight.size(1)) % 3 + 1).fmod(3).to(inputs.weight)
    },
    "sample weights": lambda inputs, generator: {
        "sample_weight": _uniform(len(inputs.x), inputs, generator)
    },
    "negative weights": lambda inputs, generator: {
        "sample_weight": _uniform(len(inputs.x), inputs, generator) - 1
    },
    "weights of 0 or 1": lambda inputs, generator: {
        "sample_weight": _uniform(len(inputs.x), inputs, generator) > 1
    },
    "ignored": lambda inputs, generator: {"ignore_index": 0},
    "probabilities": lambda inputs, generator: {},
    "probabilities of other sums": lambda inputs, generator: {},
}
# Cases of the loss's options: combinations of the above.
LOSS_CASES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in _OPTIONS},
    "weighted classes, smoothed": ("class weights", "label smoothing"),
    "weighted classes and samples, smoothed": (
        "class weights",
        "label smoothing",
        "weights of 0 or 1",
        "ignored",
    ),
    "a class of weight 0, smoothed": ("a class of weight 0", "label smoothing"),
    "smoothed probabilities": ("probabilities", "label smoothing"),
    "weighted probabilities": ("probabilities", "class weights"),
    "capped z-loss": ("z-loss", "softcap"),
    "losses one by one": ("none", "sample weights", "ignored"),
    "all": (
        "ignored",
        "class weights",
        "label smoothing",
        "z-loss",
        "softcap",
        "sample weights",
        "num_items",
    ),
    "all, one by one": (
        "none",
        "a class of weight 0",
        "label smoothing",
        "z-loss",
        "softcap",
        "weights of 0 or 1",
    ),
    "all of probabilities": (
        "probabilities of other sums",
        "class weights",
        "label smoothing",
        "z-loss",
        "softcap",
        "weights of 0 or 1",
    ),
    "all of probabilities, one by one": (
        "none",
        "probabilities",
        "class weights",
        "label smoothing",
        "z-loss",
        "softcap",
        "negative weights",
    ),
}


def loss_case(
    name: str, inputs: MixtureInputs, *, seed: int = 0
) -> tuple[MixtureInputs, dict[str, Any]]:
    """The inputs of a case of `LOSS_CASES`, and the options of `switch_mixture_stats`.

    What does not count has features that are NaN. ValueError for a name that is not one of `LOSS_CASES`.
    """
    if name not in LOSS_CASES:
        raise ValueError(f"name: got {name!r}, expected one of LOSS_CASES")
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {}
    for part in LOSS_CASES[name]:
        options |= _OPTIONS[part](inputs, generator)
        if part.startswith("probabilities"):
            inputs = inputs._replace(target=_distributions(inputs, generator, part))
    unseen = torch.zeros(len(inputs.x), dtype=torch.bool, device=inputs.x.device)
    if "ignore_index" in options:
        unseen |= inputs.target == options["ignore_index"]
    if "sample_weight" in options:
        unseen |= options["sample_weight"] == 0
    if unseen.any():
        inputs = inputs._replace(x=inputs.x.masked_fill(unseen.unsqueeze(1), math.nan))
    return inputs, options


def _uniform(size: int, inputs: MixtureInputs, generator: torch.Generator) -> Tensor:
    values = 2 * torch.rand(size, generator=generator, dtype=torch.float64)
    return values.to(inputs.x.device)


def _distributions(inputs: MixtureInputs, generator: torch.Generator, name: str) -> Tensor:
    """Probabilities `[B, C]`, float32, with one impossible class; of other sums: rows up to 2, the last of zeros."""
    shape = len(inputs.x), inputs.weight.size(1)
    target = torch.randn(shape, generator=generator).softmax(1)
    if shape[1] > 1:
        target[:, 0] = 0
        target /= target.sum(1, keepdim=True)
    if "sums" in name:
        target *= 2 * torch.rand(shape[0], 1, generator=generator)
        target[-1:] = 0
    return target.to(inputs.x.device)


class FeatureProblem(NamedTuple):
    """Arguments of one feature_sgd or feature_adam call; `names` say what each parameter stresses."""

    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    rates: list[Tensor]
    inners: list[int]

    def to(self, dtype: torch.dtype) -> FeatureProblem:
        """A copy with parameters and gradients of another dtype, strides kept, rates as they are."""
        return self._replace(
            params=[p.to(dtype, copy=True) for p in self.params],
            grads=[g.to(dtype, copy=True) for g in self.grads],
        )


# name: shape, number of rates, inner (in elements of memory order); changed by _arrange where the name says so.
FEATURE_CASES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "rows of a linear layer": ((7, 33), 7, 33),
    "long rows, more than one piece": ((3, 6011), 3, 6011),
    "short rows: a depthwise 3x3 convolution": ((70, 1, 3, 3), 70, 9),
    "short rows: a first convolution": ((21, 3, 3, 3), 21, 27),
    "gates share the units' rates": ((4 * 13, 10), 13, 10),
    "gates with long rows": ((4 * 5, 40), 5, 40),
    "bias of gates": ((4 * 13,), 13, 1),
    "columns of an embedding": ((11, 100), 100, 1),
    "few columns": ((50, 9), 9, 1),
    "transposed convolution": ((3, 8, 2, 2), 8, 4),
    "one rate": ((5, 7), 1, 35),
    "a rate per weight": ((37, 41), 37 * 41, 1),
    "one element": ((1,), 1, 1),
    "no dimension": ((), 1, 1),
    "empty": ((0, 3), 3, 1),
    "vector body and tail": ((3, 67), 3, 67),
    "channels_last": ((6, 5, 3, 3), 6, 45),
    "transposed": ((9, 30), 9, 1),
    "unaligned": ((5, 40), 5, 40),
    "gradient with other strides": ((12, 10), 12, 10),
    "gradient expanded": ((4, 6), 4, 6),
    **{f"small tensor {n}": ((n,), n, 1) for n in range(2, 40, 3)},
}


def _arrange(tensor: Tensor, name: str, is_grad: bool) -> Tensor:
    if name == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if name == "with gaps":
        room = tensor.new_full((tensor.size(0), 2 * tensor.size(1)), 777.0)
        return room[:, ::2].copy_(tensor)
    if name in ("transposed", "transposed clones") or (
        name == "gradient with other strides" and is_grad
    ):
        return tensor.t().contiguous().t()
    if name == "unaligned":
        room = tensor.new_zeros(tensor.numel() + 1)
        return room[1:].view_as(tensor).copy_(tensor)
    if name == "gradient expanded" and is_grad:
        return tensor[:1].expand_as(tensor)
    return tensor


def feature_problem(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    names: Iterable[str] = FEATURE_CASES,
    low: float = 1e-4,
    high: float = 1.0,
    seed: int = 0,
) -> FeatureProblem:
    """The named cases in one list, standard normal, with log-uniform rates in [low, high].

    ValueError for a name that is not one of `FEATURE_CASES`.
    """
    checked(_FEATURE, locals())
    Interval().check("(low, high)", (low, high))
    names = list(names)
    if unknown := [name for name in names if name not in FEATURE_CASES]:
        raise ValueError(f"names: got {unknown!r}, expected some of FEATURE_CASES")
    generator = torch.Generator().manual_seed(seed)
    problem = FeatureProblem([], [], [], [], [])
    for name in names:
        shape, period, inner = FEATURE_CASES[name]
        for tensors, is_grad in ((problem.params, False), (problem.grads, True)):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors.append(_arrange(values.to(device, dtype), name, is_grad))
        exponent = torch.rand(period, generator=generator)
        problem.rates.append((low * (high / low) ** exponent).to(device))
        problem.names.append(name)
        problem.inners.append(inner)
    return problem


# Beyond the reference's own error: two roundings of the storage dtype, in units of the largest true magnitude.
FEATURE_SLACK = {
    torch.float64: 1e-15,
    torch.float32: 5e-7,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def assert_feature_within_budget(
    actual: list[Tensor],
    reference: list[Tensor],
    truth: list[Tensor],
    names: list[str],
    what: str,
) -> None:
    """`assert_within_budget` for one kind of tensor (`what`) of every parameter of a `FeatureProblem`.

    The slack is in units of 1, the size of the numbers that went in, where what came out is smaller: cancellation.
    """
    for t, name in enumerate(names):
        largest = float(truth[t].abs().nan_to_num(0.0).max()) if truth[t].numel() else 1.0
        slack = FEATURE_SLACK[actual[t].dtype] / min(max(largest, 1e-30), 1.0)
        assert_within_budget(actual[t], reference[t], truth[t], f"{what} of {name!r}", slack=slack)


class ClipProblem(NamedTuple):
    """Arguments of one gradient_clip call; `names` say what each gradient stresses."""

    names: list[str]
    grads: list[Tensor]
    firsts: list[int]
    counts: list[int]
    segments: int


# name: shape, first segment, number of segments; strides are arranged by the name. The last segment has no gradient.
CLIP_CASES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "a weight": ((7, 33), 0, 1),
    "several pieces": ((3, 6011), 0, 1),
    "channels_last": ((6, 5, 3, 3), 0, 1),
    "transposed": ((9, 30), 0, 1),
    "with gaps": ((8, 5), 0, 1),
    "unaligned": ((5, 41), 0, 1),
    "no dimension": ((), 0, 1),
    "empty": ((0, 3), 0, 1),
    "clones": ((4, 3, 7), 1, 4),
    "bias of clones": ((4, 3), 1, 4),
    "a second head": ((3, 5, 2), 5, 3),
    "transposed clones": ((3, 5), 5, 3),
    "one clone": ((1, 6), 8, 1),
    "empty clones": ((3, 0), 5, 3),
    **{f"small {n}": ((n,), 0, 1) for n in range(1, 20, 3)},
}
_CLIP_SEGMENTS = 10


def clip_problem(
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    names: Iterable[str] = CLIP_CASES,
    scale: float = 1.0,
    seed: int = 0,
) -> ClipProblem:
    """The named cases in one list, normal with the standard deviation `scale`; of all dtypes in turns for None."""
    checked(_CLIP, locals())
    names = list(names)
    if unknown := [name for name in names if name not in CLIP_CASES]:
        raise ValueError(f"names: got {unknown!r}, expected some of CLIP_CASES")
    generator = torch.Generator().manual_seed(seed)
    problem = ClipProblem(names, [], [], [], _CLIP_SEGMENTS)
    for number, name in enumerate(names):
        shape, first, count = CLIP_CASES[name]
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        own = DTYPES[number % len(DTYPES)] if dtype is None else dtype
        problem.grads.append(_arrange(values.to(device, own), name, is_grad=True))
        problem.firsts.append(first)
        problem.counts.append(count)
    return problem
