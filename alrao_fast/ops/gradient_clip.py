"""gradient_clip_: gradients clipped by the norms of their segments (reference/gradient_clip.py)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.arguments import COUNT, FLOATS, Number, checked
from alrao_fast.ops import dispatch
from alrao_fast.ops.checks import check, check_dtype, check_tensor
from alrao_fast.ops.feature_checks import as_list, check_entry, is_dense
from alrao_fast.reference import gradient_clip as reference

OP = "gradient_clip"


class _Order(Number):
    """The order of a norm; "inf" is taken, too, as by torch.nn.utils.clip_grad_norm_."""

    def __init__(self) -> None:
        super().__init__(above=0, high=math.inf, words="the order of a norm, > 0 or inf")

    def plain(self, name: str, value: Any) -> float:
        return math.inf if isinstance(value, str) and value == "inf" else super().plain(name, value)


KINDS = {
    "max_norm": Number(low=0, high=math.inf, words="a number >= 0, inf for none"),
    "norm_type": _Order(),
}
backends.OPS[OP] = "gradient_clip_"


def check_lengths(grads: Sequence[Tensor], firsts: Sequence[int], counts: Sequence[int]) -> None:
    for name, values in (("firsts", firsts), ("counts", counts)):
        check(
            len(values) == len(grads),
            f"{name}: got {len(values)} entries, expected {len(grads)}, one for each of grads",
        )


def _check(
    grads: Sequence[Tensor], firsts: Sequence[int], counts: Sequence[int], segments: int
) -> None:
    """For Triton and the reference; the compiled implementations check by themselves (csrc/gradient/checks.cpp)."""
    check_lengths(grads, firsts, counts)
    begins = [-1] * segments
    for t, (grad, first, count) in enumerate(zip(grads, firsts, counts)):
        name = f"grads[{t}]"
        check_dtype(name, grad, FLOATS)
        check(
            grad.device == grads[0].device,
            f"{name}: is not on the device of grads[0]; move both to the same device",
        )
        check(_is_laid_out(grad, count), f"{name}: got gaps or an overlap, expected a dense tensor")
        check(
            0 <= first and 1 <= count and first + count <= segments,
            f"{name}: got the segments {first} to {first + count - 1}, expected some of 0 to {segments - 1}",
        )
        check(
            count == 1 or (grad.dim() > 0 and grad.size(0) == count),
            f"{name}: got shape {list(grad.shape)} for {count} segments, expected one for each index of dim 0",
        )
        for segment in range(first, first + count):
            check(
                begins[segment] in (-1, first * segments + count),
                f"{name}: shares only some of its segments with another, expected all or none",
            )
            begins[segment] = first * segments + count


def _check_by(
    grads: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int],
    norms: Tensor,
    max_norm: float,
) -> None:
    check(norms.dim() == 1, f"norms: got shape {list(norms.shape)}, expected [segments]")
    check_tensor("norms", norms, norms.shape, (torch.float64,), grads[0].device)
    check(norms.is_contiguous(), "norms: got a strided tensor, expected a contiguous one")
    _check(grads, firsts, counts, norms.size(0))


def _is_laid_out(grad: Tensor, count: int) -> bool:
    """Whether the segments of a gradient are ranges of its memory."""
    if grad.is_contiguous():
        return True
    one = count == 1
    return one and (grad.is_contiguous(memory_format=torch.channels_last) or is_dense(grad))


_LISTS = "Tensor(a!)[] grads, int[] firsts, int[] counts"


def _fake(
    grads: Sequence[Tensor], firsts: object, counts: object, segments: int, *_: object
) -> Tensor:
    return grads[0].new_empty(segments, dtype=torch.float64)


_SCHEMA = f"gradient_clip_({_LISTS}, int segments, float norm_type, float max_norm) -> Tensor"
dispatch.define(_SCHEMA, _fake)
dispatch.define_triton(_SCHEMA, _fake, OP, lambda *args: _check(*args[:4]))
_SCHEMA_BY = f"gradient_clip_by_({_LISTS}, Tensor norms, float max_norm) -> ()"
dispatch.define(_SCHEMA_BY, dispatch.no_result)
dispatch.define_triton(_SCHEMA_BY, dispatch.no_result, OP, _check_by)


def gradient_clip_(
    grads: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int],
    segments: int,
    *,
    max_norm: float,
    norm_type: float = 2.0,
    norms: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scale each segment of the gradients, in place, to a norm of at most `max_norm`; return the norms before that.

    Args:
        grads: of one device; float64, float32, bfloat16 or float16, mixed at will, of any strides.
        firsts, counts: `grads[t]` is that of segment `firsts[t]` with `counts[t]` 1, else index n of its dim 0 is that
            of segment `firsts[t] + n`. Two gradients share all of their segments or none.
        segments: how many there are; one without entries has the norm 0.
        max_norm: >= 0; inf writes nothing.
        norm_type: the order of the norm, > 0 or inf.
        norms: `[segments]` float64 to scale by, instead of the gradients' own.
        impl: "auto", or the backend that must run it.

    Sums are float64, the product is rounded once to the gradient's dtype. A norm of NaN makes its segment NaN, an
    infinite one makes it 0 and NaN, as in torch.nn.utils.clip_grad_norm_; other segments do not change. RuntimeError,
    with nothing written, for gradients that are sparse, on several devices, of another dtype or whose entries share
    memory.
    """
    tensors = as_list("gradient_clip_", "grads", grads)
    firsts = as_list("gradient_clip_", "firsts", firsts, integers=True)
    counts = as_list("gradient_clip_", "counts", counts, integers=True)
    options = checked(KINDS, {"max_norm": max_norm, "norm_type": norm_type})
    segments = COUNT.check("segments", segments)
    if norms is not None:
        check_entry("gradient_clip_", "norms", norms)
    if not tensors:
        return torch.zeros(segments, dtype=torch.float64) if norms is None else norms
    check_lengths(tensors, firsts, counts)
    return clip(tensors, firsts, counts, segments, norms=norms, impl=impl, **options)


def clip(
    grads: list[Tensor],
    firsts: list[int],
    counts: list[int],
    segments: int,
    *,
    max_norm: float,
    norm_type: float,
    norms: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`gradient_clip_` of checked arguments: at least one gradient, none sparse."""
    # Gradients whose segments are scattered in memory, which are few, go through copies.
    copied = [t for t, (grad, n) in enumerate(zip(grads, counts)) if not _is_laid_out(grad, n)]
    given = grads
    if copied:
        grads = [*grads]
        for t in copied:
            check(
                all(stride for stride, size in zip(grads[t].stride(), grads[t].shape) if size > 1),
                f"grads[{t}]: has entries that share memory, expected one of its own for each: use .contiguous()",
            )
            grads[t] = grads[t].contiguous()
    with torch.no_grad():
        norms = _run(grads, firsts, counts, segments, norms, impl, max_norm, norm_type)
        if max_norm < math.inf:
            for t in copied:
                given[t].copy_(grads[t])
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(given)
    return norms


def _run(
    grads: list[Tensor],
    firsts: list[int],
    counts: list[int],
    segments: int,
    norms: Tensor | None,
    impl: str,
    max_norm: float,
    norm_type: float,
) -> Tensor:
    """The op on gradients in memory order; returns the norms."""
    backend = backends.select(OP, grads[0].device, impl)
    lists = grads, firsts, counts
    if backend != "reference":
        if norms is None:
            op = dispatch.overload("gradient_clip_", backend)
            return op(*lists, segments, float(norm_type), float(max_norm))
        dispatch.overload("gradient_clip_by_", backend)(*lists, norms, float(max_norm))
        return norms
    if norms is None:
        _check(*lists, segments)
        norms = reference.gradient_norms(*lists, segments, norm_type)
    else:
        _check_by(*lists, norms, max_norm)
    reference.gradient_clip_by_(*lists, norms, max_norm)
    return norms
