"""Many tensors in one launch: the table of pointers and layouts (plan.py), as the device reads it. Knows no op.

A program takes one chunk of one tensor. Full chunks of tensors on 16-byte addresses are read without a mask: only then
does the compiler emit 16-byte accesses. A chunk within two rows of the rate's layout reads two scalars for its rates;
any other looks each entry's up, dividing by multiplication with a reciprocal, in 32 bits.
"""

import triton
import triton.language as tl

from ..launch import round_to, widen

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
AVERAGE = tl.constexpr(15)
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
    bits |= cell(table, row, AVERAGE)
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
        n_rounds=7,
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
    return tl.where(value == value, rounded, value)


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
def master_value(master, param, DTYPE: tl.constexpr):
    """The master where the (widened) parameter still is that rounded to DTYPE; else what was written there."""
    return tl.where(widen(round_to(master, DTYPE), tl.float32) == param, master, param)


@triton.jit
def average_weight(step, averaging):
    """What the value after that update weighs in the running average (reference/feature_sgd.py), float64."""
    power = averaging + 1
    stride = (step.to(tl.float64) / (1024 * power)).to(tl.int64)
    # The largest power of two up to that.
    for bits in tl.static_range(6):
        stride |= stride >> (1 << bits)
    stride = tl.maximum(stride - (stride >> 1), 1)
    values = (step // stride).to(tl.float64)
    return tl.where((step & (stride - 1)) == 0, power / (values + power), 0.0)


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
