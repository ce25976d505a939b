"""Protects csrc's rounding into bf16 and fp16, of any number (hypothesis), against torch and the reference.

From and to, for every pattern and around every boundary; a master counts where its parameter is the master rounded;
stochastic rounding gives one of the two neighbours, up as often as the remainder says, by the reference's bits. In
every build of test_element_math.py.
"""

import math

import numpy as np
import pytest
import torch
from element_math import build
from element_math.loaded import any_numbers, load
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alrao_fast.reference.rounding import random_bits16, stochastic_round

pytestmark = [pytest.mark.xdist_group("element_math"), pytest.mark.long(15)]
INF, NAN = math.inf, math.nan
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module", params=build.BUILDS)
def module(request):
    return load(request.param)


def patterns(values):
    """The bits of a NumPy float32 array's numbers in one of torch's halves."""
    return values.view(torch.int16).numpy().view(np.uint16)


def rounded(values, half):
    return patterns(torch.from_numpy(values).to(HALVES[half]))


@pytest.mark.parametrize("half", HALVES)
def test_every_half_is_widened_exactly(module, half):
    bits = np.arange(2**16, dtype=np.uint16)
    actual = getattr(module, f"{half}_to_float")(bits)
    expected = torch.from_numpy(bits.view(np.int16)).view(HALVES[half]).float().numpy()
    np.testing.assert_array_equal(actual, expected)
    signs = np.signbit(actual) == np.signbit(expected)
    assert signs[~np.isnan(expected)].all()


def assert_rounds_as_torch(module, half, bits):
    values = bits.view(np.float32)
    actual, expected = getattr(module, f"float_to_{half}")(values), rounded(values, half)
    nan = np.isnan(values)
    assert np.array_equal(actual[~nan], expected[~nan])
    widened = getattr(module, f"{half}_to_float")(actual[nan])
    assert np.isnan(widened).all()


@pytest.mark.parametrize("half", HALVES)
def test_to_nearest_around_every_boundary(module, half):
    dropped = {"bf16": 16, "fp16": 13}[half]
    kept = np.arange(2 ** (32 - dropped), dtype=np.uint32) << dropped
    middle = 1 << (dropped - 1)
    for low in (0, 1, middle - 1, middle, middle + 1, 2 * middle - 1):
        assert_rounds_as_torch(module, half, kept | np.uint32(low))


@any_numbers
@given(hnp.arrays(np.uint32, 64))
def test_to_nearest(module, bits):
    for half in HALVES:
        assert_rounds_as_torch(module, half, bits)


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_every_float_is_rounded_to_nearest(module, half):
    for high in range(256):
        bits = np.arange(high << 24, (high + 1) << 24, dtype=np.uint32)
        assert_rounds_as_torch(module, half, bits)


@pytest.mark.parametrize("half", HALVES)
@any_numbers
@given(bits=hnp.arrays(np.uint32, 64), other=hnp.arrays(np.uint16, 64))
def test_a_master_counts_where_the_parameter_is_the_master_rounded(module, half, bits, other):
    masters, value_of = bits.view(np.float32), getattr(module, f"master_value_{half}")
    np.testing.assert_array_equal(value_of(masters, rounded(masters, half)), masters)
    # Any other number, NaN included, is what was written; zeros of either sign are one number.
    widened = getattr(module, f"{half}_to_float")
    written, kept = widened(other), widened(rounded(masters, half))
    expected = np.where(written == kept, masters, written)
    np.testing.assert_array_equal(value_of(masters, other), expected)


def toward_zero(values, half):
    """The pattern of the neighbour that is not larger in magnitude."""
    if half == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        nearest = np.abs(values).astype(np.float16)
    larger = nearest.astype(np.float32) > np.abs(values)
    return (nearest.view(np.uint16) - larger) | (np.signbit(values).astype(np.uint16) << 15)


@pytest.mark.parametrize("half", HALVES)
@any_numbers
@given(
    values=hnp.arrays(np.float32, 64, elements=st.floats(-65535, 65535, width=32)),
    random=hnp.arrays(np.uint16, 64),
)
def test_stochastic_rounding(module, half, values, random):
    actual = getattr(module, f"float_to_{half}_stochastic")(values, random.astype(np.uint32))
    below = toward_zero(values, half)
    assert np.isin(actual - below, (0, 1)).all()
    exact = getattr(module, f"{half}_to_float")(below) == values
    assert np.array_equal(actual[exact], below[exact])
    bits = torch.from_numpy(random.astype(np.int64))
    expected = patterns(stochastic_round(torch.from_numpy(values), HALVES[half], bits))
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_stochastic_rounding_passes_what_is_not_finite(module, half, value):
    random = np.arange(0, 2**16, 255, dtype=np.uint32)
    bits = getattr(module, f"float_to_{half}_stochastic")(np.float32(value), random)
    np.testing.assert_array_equal(getattr(module, f"{half}_to_float")(bits), np.float32(value))


@pytest.mark.parametrize("half", HALVES)
@any_numbers
@given(value=st.floats(2**-13, 65503, width=32))
def test_stochastic_rounding_goes_up_as_often_as_the_remainder_says(module, half, value):
    value = np.float32(value)
    random = np.arange(2**16, dtype=np.uint32)
    actual = getattr(module, f"float_to_{half}_stochastic")(value, random)
    below = toward_zero(value[None], half)[0]
    dropped = {"bf16": 16, "fp16": 13}[half]
    remainder = int(value.view(np.uint32)) % 2**dropped
    assert int((actual == below + 1).sum()) == remainder << (16 - dropped)


@any_numbers
@given(
    block=st.integers(0, 63),
    step=st.integers(0, 2**62),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_random_bits_are_the_references(module, block, step, seed):
    expected = random_bits16(8 * (block + 1), seed, step, torch.device("cpu"))[8 * block :]
    assert module.random_bits(block, step, seed % 2**64).tolist() == expected.tolist()
