"""gradient_clip_: gradients clipped by the norms of their segments (reference/gradient_clip.py).

Two launches for each dtype among the gradients: one sums chunks of them, a second adds up the sums of a segment, in
each of its programs anew, and scales what is too long. Sums are float64 and in order. A table says where the gradients
are; it is uploaded when one of them is somewhere else than before.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, accumulator, launch, round_to, widen

# So many chunks in all, or as many as there are of the least size.
_CHUNKS, _LEAST_CHUNK = 1024, 4096
_BLOCK = 1024
_FIELDS = tl.constexpr(8)
_TWO, _ONE, _LARGEST, _POWER = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def find_chunk(table_ptr):
    """Of this program: where its gradient is, its segment, the segment's sums and their number, its own among them,
    and its first and number of entries."""
    chunk = table_ptr + tl.program_id(0) * _FIELDS
    data = tl.load(chunk)
    segment = tl.load(chunk + 1)
    partial = tl.load(chunk + 2)
    count = tl.load(chunk + 3)
    own = tl.load(chunk + 4)
    begin = tl.load(chunk + 5)
    entries = tl.load(chunk + 6)
    return data, segment, partial, count, own, begin, entries


@triton.jit
def join_sums(value, KIND: tl.constexpr):
    """The sum or maximum of a block; a NaN stays."""
    if KIND == _LARGEST:
        wrong = tl.max((value != value).to(tl.int32), 0)
        largest = tl.max(tl.where(value == value, value, 0.0), 0)
        return tl.where(wrong > 0, float("nan"), largest)
    else:
        return tl.sum(value, 0)


@triton.jit
def join(a, b, KIND: tl.constexpr):
    if KIND == _LARGEST:
        return tl.where((b > a) | (b != b), b, a)
    else:
        return a + b


@triton.jit
def gradient_sums_kernel(
    table_ptr,
    partials_ptr,
    order: tl.float64,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    data, _segment, partial, _count, own, begin, entries = find_chunk(table_ptr)
    grad = data.to(tl.pointer_type(DTYPE)) + begin
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, entries, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        x = tl.abs(widen(tl.load(grad + offs, mask=offs < entries, other=0.0), tl.float64))
        if KIND == _TWO:
            x = x * x
        elif KIND == _POWER:
            x = tl.where(x == 0, 0.0, tl.exp(order * tl.log(x)))
        sums = join(sums, x, KIND)
    tl.store(partials_ptr + partial + own, join_sums(sums, KIND))


@triton.jit
def gradient_scale_kernel(
    table_ptr,
    partials_ptr,
    norms_ptr,
    root: tl.float64,
    max_norm: tl.float64,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    KIND: tl.constexpr,
    GIVEN: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With GIVEN by the norms that are there, else these are written, too; nothing but these without CLIP."""
    data, segment, partial, count, own, begin, entries = find_chunk(table_ptr)
    if GIVEN:
        norm = tl.load(norms_ptr + segment)
    else:
        sums = tl.zeros([BLOCK], tl.float64)
        for first in range(0, count, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            sums = join(
                sums, tl.load(partials_ptr + partial + offs, mask=offs < count, other=0.0), KIND
            )
        norm = join_sums(sums, KIND)
        if KIND == _TWO:
            norm = tl.sqrt(norm)
        elif KIND == _POWER:
            norm = tl.where(norm == 0, 0.0, tl.exp(root * tl.log(norm)))
        # One program of each segment.
        tl.store(norms_ptr + segment, norm, mask=own == 0)
    if CLIP:
        factor = max_norm / (norm + 1e-6)
        # Not where it is 1, and everywhere where it is NaN.
        entries = tl.where(factor >= 1, 0, entries)
        grad = data.to(tl.pointer_type(DTYPE)) + begin
        for first in range(0, entries, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            mask = offs < entries
            x = widen(tl.load(grad + offs, mask=mask, other=0.0), ACC) * factor.to(ACC)
            tl.store(grad + offs, round_to(x, DTYPE), mask=mask)


class _Group(NamedTuple):
    """The chunks of one dtype."""

    dtype: torch.dtype
    table: Tensor
    num_chunks: int


class _Layout(NamedTuple):
    groups: list[_Group]
    num_partials: int
    # Whether every segment has entries.
    complete: bool
    # Memory that the tables were copied from.
    staged: list[Tensor]


def _lay_out(
    grads: Sequence[Tensor], firsts: Sequence[int], counts: Sequence[int], segments: int
) -> _Layout:
    total = sum(grad.numel() for grad in grads)
    chunk = max(triton.cdiv(triton.cdiv(total, _CHUNKS), _LEAST_CHUNK), 1) * _LEAST_CHUNK
    filled = [0] * segments
    own = []
    for grad, first, count in zip(grads, firsts, counts):
        own.append(filled[first])
        for segment in range(first, first + count):
            filled[segment] += triton.cdiv(grad.numel() // count, chunk)
    begins = [sum(filled[:segment]) for segment in range(segments)]
    rows: dict[torch.dtype, list[list[int]]] = {}
    for grad, first, count, before in zip(grads, firsts, counts, own):
        inner, data = grad.numel() // count, grad.data_ptr()
        for segment in range(first, first + count):
            place = begins[segment], filled[segment]
            for number, begin in enumerate(range(0, inner, chunk)):
                at = (segment - first) * inner + begin
                entries = min(chunk, inner - begin)
                row = [data, segment, *place, before + number, at, entries, 0]
                rows.setdefault(grad.dtype, []).append(row)
    device, groups, staged = grads[0].device, [], []
    for dtype, chunks in rows.items():
        table = torch.tensor(chunks, dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            table = table.pin_memory()
            staged.append(table)
        groups.append(_Group(dtype, table.to(device, non_blocking=True), len(chunks)))
    return _Layout(groups, sum(filled), all(filled), staged)


# By everything that the tables hold, so that memory that was freed and taken again cannot mislead.
_layouts: OrderedDict[tuple[object, ...], _Layout] = OrderedDict()
_MAX_LAYOUTS = 16
# What captured graphs read, and copy from at each replay: kept for the life of the process.
_captured: list[_Layout] = []


def _find_layout(
    grads: Sequence[Tensor], firsts: Sequence[int], counts: Sequence[int], segments: int
) -> _Layout:
    device = grads[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Only the graph fills these tables.
        _captured.append(_lay_out(grads, firsts, counts, segments))
        return _captured[-1]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    looks = tuple([(grad.data_ptr(), grad.numel(), grad.dtype) for grad in grads])
    key = (device, stream, segments, tuple(firsts), tuple(counts), looks)
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _lay_out(grads, firsts, counts, segments)
        if len(_layouts) > _MAX_LAYOUTS:
            _layouts.popitem(last=False)
    else:
        _layouts.move_to_end(key)
    return layout


def _kind(order: float) -> Any:
    return {2.0: _TWO, 1.0: _ONE, float("inf"): _LARGEST}.get(order, _POWER).value


def _scale(
    layout: _Layout, partials: Tensor, norms: Tensor, order: float, max_norm: float, given: bool
) -> None:
    for dtype, table, num_chunks in layout.groups:
        launch(
            gradient_scale_kernel,
            (num_chunks,),
            table,
            partials,
            norms,
            1 / order,
            float(max_norm),
            num_warps=4,
            DTYPE=TYPES[dtype],
            ACC=TYPES[accumulator(dtype)],
            KIND=_kind(order),
            GIVEN=given,
            CLIP=max_norm < float("inf"),
            BLOCK=_BLOCK,
        )


def gradient_clip_(
    grads: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int],
    segments: int,
    norm_type: float,
    max_norm: float,
) -> Tensor:
    """The op, on checked arguments."""
    layout = _find_layout(grads, firsts, counts, segments)
    make = torch.empty if layout.complete else torch.zeros
    norms = make(segments, dtype=torch.float64, device=grads[0].device)
    partials = norms.new_empty(layout.num_partials)
    for dtype, table, num_chunks in layout.groups:
        launch(
            gradient_sums_kernel,
            (num_chunks,),
            table,
            partials,
            float(norm_type),
            num_warps=4,
            DTYPE=TYPES[dtype],
            KIND=_kind(norm_type),
            BLOCK=_BLOCK,
        )
    _scale(layout, partials, norms, norm_type, max_norm, given=False)
    return norms


def gradient_clip_by_(
    grads: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int],
    norms: Tensor,
    max_norm: float,
) -> None:
    """The op, on checked arguments."""
    layout = _find_layout(grads, firsts, counts, norms.size(0))
    _scale(layout, norms, norms, 2.0, max_norm, given=True)
