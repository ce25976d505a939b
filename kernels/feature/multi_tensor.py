"""Many tensors in one launch: a table of pointers and layouts on the device, and the walk over it. Knows no op.

A program takes one chunk of one tensor. Full chunks of tensors on 16-byte addresses are read without a mask: only then
does the compiler emit 16-byte accesses. A chunk within two rows of the rate's layout reads two scalars for its rates;
any other looks each entry's up, dividing by multiplication with a reciprocal, in 32 bits.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import TYPES, accumulator, launch, round_to, widen

# Columns of a tensor's row in the table: pointers to the parameter, its states, master and rate, then its layout.
PARAM = tl.constexpr(0)
STATE = tl.constexpr(1)
MASTER = tl.constexpr(4)
RATE = tl.constexpr(5)
NUMEL = tl.constexpr(6)
INNER = tl.constexpr(7)
INNER_MAGIC = tl.constexpr(8)
INNER_SHIFT = tl.constexpr(9)
PERIOD = tl.constexpr(10)
PERIOD_MAGIC = tl.constexpr(11)
PERIOD_SHIFT = tl.constexpr(12)
SEED = tl.constexpr(13)
# The tensor's place in the op's lists: of its gradient, its step count and its seed.
INDEX = tl.constexpr(14)
COLUMNS = tl.constexpr(16)


@triton.jit
def cell(table, row, column: tl.constexpr):
    """What stands in a column of the table."""
    return tl.load(table + row * COLUMNS + column)


@triton.jit
def chunk_is_wide(table, row, grad_address, start, numel, CHUNK: tl.constexpr):
    """Whether the chunk is full and all its tensors begin on 16-byte addresses."""
    bits = grad_address
    for column in tl.static_range(PARAM, MASTER + 1):
        bits |= cell(table, row, column)
    return (bits % 16 == 0) & (start + CHUNK <= numel)


@triton.jit
def divide(value, magic, shift):
    """`value // d` for 0 <= value < 2^31 by the reciprocal of d (`reciprocal`)."""
    value = value.to(tl.uint32)
    quotient = (tl.umulhi(value, magic.to(tl.uint32)) + value) >> shift.to(tl.uint32)
    return quotient.to(tl.int32)


@triton.jit
def chunk_rates(table, row, start, offs, mask, R_DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    """Rates of the entries `start + offs`, 0 <= offs < CHUNK, `start` a multiple of CHUNK."""
    rate_ptr = cell(table, row, RATE).to(tl.pointer_type(R_DTYPE))
    inner = cell(table, row, INNER)
    period = cell(table, row, PERIOD)
    first_row = start // inner
    feature = first_row % period
    skipped = start - first_row * inner
    if inner >= CHUNK:
        # At most one row ends within the chunk.
        boundary = tl.minimum(inner - skipped, CHUNK).to(tl.int32)
        following = tl.where(feature + 1 == period, 0, feature + 1)
        rate = tl.where(offs < boundary, tl.load(rate_ptr + feature), tl.load(rate_ptr + following))
    else:
        magic = tl.load(table + row * COLUMNS + INNER_MAGIC)
        shift = tl.load(table + row * COLUMNS + INNER_SHIFT)
        rows = divide(offs + skipped.to(tl.int32), magic, shift)
        if period >= CHUNK:
            index = feature + rows
            index = tl.where(index >= period, index - period, index)
        else:
            magic = tl.load(table + row * COLUMNS + PERIOD_MAGIC)
            shift = tl.load(table + row * COLUMNS + PERIOD_SHIFT)
            rows += feature.to(tl.int32)
            index = (rows - divide(rows, magic, shift) * period.to(tl.int32)).to(tl.int64)
        rate = tl.load(rate_ptr + index, mask=mask, other=0.0)
    return rate


@triton.jit
def random_bits16(seed, step, start, BLOCK: tl.constexpr):
    """16 random bits for each of the entries start .. start + BLOCK, `start` a multiple of 8, as reference/rounding.py.

    One Philox call serves eight entries: low and high half of each of its four words, in order.
    """
    group = start // 8 + tl.arange(0, BLOCK // 8)
    zero = tl.zeros([BLOCK // 8], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        (group & 0xFFFFFFFF).to(tl.uint32),
        ((group >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero + (step & 0xFFFFFFFF).to(tl.uint32),
        zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def stochastic_round(value, bits, DTYPE: tl.constexpr):
    """Round float32 to DTYPE, up in magnitude with the probability of the remainder; NaN and infinity pass."""
    pattern = value.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = ((pattern + bits) & -65536).to(tl.float32, bitcast=True)
    else:
        # The spacing of fp16: 2^(e - 10) for 2^e <= |value|, 2^-24 among the subnormals. Both powers fit float32.
        exponent = tl.maximum(((pattern >> 23) & 0xFF) - 137, -24)
        spacing = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        units = tl.abs(value) * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        below = tl.floor(units)
        up = (units - below) + bits.to(tl.float32) * (1 / 65536) >= 1
        magnitude = (below + tl.where(up, 1.0, 0.0)) * spacing
        sign = pattern & -2147483648
        rounded = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, value)


@triton.jit
def read(ptr, offs, mask, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Entries in the arithmetic's DTYPE."""
    if MASKED:
        value = tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        value = tl.load(ptr + offs)
    return widen(value, DTYPE)


@triton.jit
def write(ptr, offs, mask, value, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + offs, round_to(value, DTYPE), mask=mask)
    else:
        tl.store(ptr + offs, round_to(value, DTYPE))


@triton.jit
def store_parameter(
    param_ptr,
    master_ptr,
    offs,
    mask,
    value,
    seed,
    step,
    start,
    DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the new parameter: through its master, stochastically, or rounded to nearest."""
    if STOCHASTIC:
        bits = random_bits16(seed, step, start, BLOCK)
        # A value of DTYPE already: the conversion on the way to memory is exact.
        stored = stochastic_round(value, bits, DTYPE)
    else:
        stored = value
    write(param_ptr, offs, mask, stored, DTYPE, MASKED)
    if HAS_MASTER:
        write(master_ptr, offs, mask, value, tl.float32, MASKED)


@triton.jit
def scalar(given, tensor_ptr, DTYPE: tl.constexpr, HAS_TENSOR: tl.constexpr):
    """A hyper-parameter in DTYPE: from its one-element tensor if it has one."""
    if HAS_TENSOR:
        return tl.load(tensor_ptr).to(DTYPE)
    else:
        return tl.full([], given, DTYPE)


@triton.jit
def root(value):
    """The square root, rounded to nearest."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def quotient(numerator, denominator):
    """The quotient, rounded to nearest."""
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit(do_not_specialize=["num"])
def count_steps_kernel(steps_ptr, found_inf_ptr, num, HAS_FOUND: tl.constexpr, BLOCK: tl.constexpr):
    """steps += 1, unless found_inf. Apart from the update, whose every program reads the counts."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num
    one = tl.full([], 1, tl.int64)
    if HAS_FOUND:
        one = tl.where(tl.load(found_inf_ptr) == 0, one, 0)
    tl.store(steps_ptr + offs, tl.load(steps_ptr + offs, mask=mask, other=0) + one, mask=mask)


def count_steps(steps: Tensor, found_inf: Tensor | None) -> None:
    """steps += 1 on the device, unless found_inf is not 0."""
    num = steps.numel()
    launch(
        count_steps_kernel,
        (triton.cdiv(num, 256),),
        steps,
        steps if found_inf is None else found_inf,
        num,
        num_warps=1,
        HAS_FOUND=found_inf is not None,
        BLOCK=256,
    )


def reciprocal(divisor: int) -> tuple[int, int]:
    """(magic, shift) with n // divisor == (umulhi(n, magic) + n) >> shift for 0 <= n < 2^31; 1 <= divisor < 2^31."""
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift


class Lists(NamedTuple):
    """The tensor lists of a feature op, as in its schema."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: tuple[Sequence[Tensor], ...]
    masters: Sequence[Tensor]
    rates: Sequence[Tensor]
    inners: Sequence[int]
    seeds: Sequence[int]
    steps: Tensor


class Group(NamedTuple):
    """Tensors that one launch serves: those of the same dtypes."""

    table: Tensor
    chunks: Tensor
    num_chunks: int
    constants: dict[str, object]
    num_warps: int


# Below this many entries in all, small chunks give every multiprocessor its share.
SMALL = 1 << 22


def _configuration(total: int, wide: bool) -> tuple[int, int, int]:
    """(CHUNK, BLOCK, warps) for `total` entries; `wide` arithmetic takes twice the registers."""
    if wide:
        return 1024, 512, 4
    return (1024, 1024, 4) if total < SMALL else (4096, 1024, 4)


class Plan:
    """The device tables of a list of tensors, and the gradients' pointers, which alone change from step to step."""

    def __init__(self, lists: Lists) -> None:
        if _capturing(lists.steps):
            raise RuntimeError(
                "an optimizer step with new tensors during CUDA graph capture: take one step before capturing"
            )
        self.groups = self._make_groups(lists)
        self._pointers: list[int] = []
        self._grads: Tensor | None = None
        # What captured graphs read, kept as it was at capture for as long as the plan lives.
        self._captured: list[tuple[Tensor, ...]] = []
        self.captured = False

    @staticmethod
    def _make_groups(lists: Lists) -> list[Group]:
        members: dict[tuple[object, ...], list[int]] = {}
        for t, param in enumerate(lists.params):
            if param.numel():
                master = bool(lists.masters) and lists.masters[t].numel() > 0
                states = tuple(state[t].dtype for state in lists.states)
                key = (param.dtype, states, lists.rates[t].dtype, master)
                members.setdefault(key, []).append(t)
        groups = []
        device = lists.steps.device
        for (dtype, states, rate_dtype, master), indices in members.items():
            total = sum(lists.params[t].numel() for t in indices)
            chunk, block, warps = _configuration(total, dtype == torch.float64)
            # Largest tensors first, so that the last programs are not all of one large tensor.
            indices.sort(key=lambda t: -lists.params[t].numel())
            rows = [_row(lists, t, chunk) for t in indices]
            counts = torch.tensor([-(-lists.params[t].numel() // chunk) for t in indices])
            owner = torch.repeat_interleave(torch.arange(len(indices)), counts)
            within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[owner]
            low = dtype in (torch.bfloat16, torch.float16)
            constants = {
                "P_DTYPE": TYPES[dtype],
                "R_DTYPE": TYPES[rate_dtype],
                "ACC": TYPES[accumulator(dtype)],
                "HAS_MASTER": master,
                "STOCHASTIC": bool(lists.seeds) and low and not master,
                "CHUNK": chunk,
                "BLOCK": block,
            }
            for k, state in enumerate(states, 1):
                constants[f"S{k}_DTYPE"] = TYPES[state]
            groups.append(
                Group(
                    torch.tensor(rows, dtype=torch.int64).to(device),
                    torch.stack([owner, within], 1).to(device),
                    owner.numel(),
                    constants,
                    warps,
                )
            )
        return groups

    def gradients(self, grads: Sequence[Tensor], device: torch.device) -> Tensor:
        """Device vector of the gradients' addresses; uploaded only when one has changed."""
        pointers = [grad.data_ptr() for grad in grads]
        if pointers != self._pointers or self._grads is None:
            staged = torch.tensor(pointers, dtype=torch.int64)
            if device.type == "cuda":
                staged = staged.pin_memory()
            # A vector that a captured graph reads is never written again.
            frozen = any(entry[0] is self._grads for entry in self._captured)
            if self._grads is None or frozen or _capturing_on(device):
                self._grads = torch.empty(len(pointers), dtype=torch.int64, device=device)
            self._grads.copy_(staged, non_blocking=True)
            self._pointers = pointers
            if _capturing_on(device):
                # Replays copy from the staging memory again.
                self._captured.append((self._grads, staged))
        if _capturing_on(device):
            self.captured = True
            if not any(entry[0] is self._grads for entry in self._captured):
                self._captured.append((self._grads,))
        return self._grads


def _row(lists: Lists, t: int, chunk: int) -> list[int]:
    numel, period, inner = lists.params[t].numel(), lists.rates[t].numel(), lists.inners[t]
    if period == 1:
        inner = numel
    # Used only where they are below the chunk.
    inner_magic, inner_shift = reciprocal(min(inner, chunk))
    period_magic, period_shift = reciprocal(min(period, chunk))
    states = [state[t].data_ptr() for state in lists.states]
    return [
        lists.params[t].data_ptr(),
        *states,
        *[0] * (3 - len(states)),
        lists.masters[t].data_ptr() if lists.masters else 0,
        lists.rates[t].data_ptr(),
        numel,
        inner,
        inner_magic,
        inner_shift,
        period,
        period_magic,
        period_shift,
        lists.seeds[t] if lists.seeds else 0,
        t,
        0,
    ]


def _capturing_on(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _capturing(tensor: Tensor) -> bool:
    return _capturing_on(tensor.device)


# Plans by everything their tables hold, so that memory that was freed and taken again cannot mislead.
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
_MAX_PLANS = 64


def find_plan(lists: Lists, scalars: Sequence[Tensor | None], check: Callable[[], None]) -> Plan:
    """The plan of these tensors, made at first use; the least recently used go, but never one that a graph reads.

    `check` raises where the lists do not fit together; it is called unless they are known to.
    """
    tensors = [*lists.params, *(s for state in lists.states for s in state), *lists.masters]
    if not _gradients_fit(lists) or any(t.layout != torch.strided for t in tensors):
        check()
    key = (
        lists.steps.device,
        lists.steps.shape,
        lists.steps.dtype,
        len(lists.params),
        tuple([len(state) for state in lists.states]),
        len(lists.masters),
        tuple([(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]),
        tuple([(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in lists.rates]),
        tuple(lists.inners),
        tuple(lists.seeds),
        tuple([None if t is None else (t.dtype, t.numel()) for t in scalars]),
    )
    plan = _plans.get(key)
    if plan is None:
        check()
        plan = _plans[key] = Plan(lists)
        for old in [k for k, p in _plans.items() if not p.captured][: len(_plans) - _MAX_PLANS]:
            del _plans[old]
    else:
        _plans.move_to_end(key)
    return plan


def _gradients_fit(lists: Lists) -> bool:
    return len(lists.grads) == len(lists.params) and all(
        grad.layout == torch.strided
        and grad.dtype == param.dtype
        and grad.shape == param.shape
        and grad.device == param.device
        for grad, param in zip(lists.grads, lists.params)
    )


def in_layout_of(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's memory order: itself, or a copy where their strides differ."""
    if grad.stride() == param.stride():
        return grad
    strided = torch.empty_strided(
        param.size(), param.stride(), dtype=grad.dtype, device=grad.device
    )
    return strided.copy_(grad)
