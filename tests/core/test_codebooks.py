"""The tables, against bitsandbytes' own."""

import numpy as np
import pytest

from q4jax import codebooks
from tests.support import oracle
from tests.support.vectors import DYNAMIC_MAP, npz

BLOCKWISE8 = npz("quant/blockwise8_dynamic.npz")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_is_bitsandbytes(quant_type):
    expected = BLOCKWISE8[f"{quant_type}_code"]
    assert oracle.same_bits(codebooks.CODE[quant_type], expected)
    assert oracle.same_bits(oracle.CODE[quant_type], expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_is_sorted_by_sorted_codes(quant_type):
    order = codebooks.SORTED_CODES[quant_type]
    assert sorted(order) == list(range(16))
    assert (np.diff(codebooks.CODE[quant_type][order]) >= 0).all()


def test_nf4_thresholds_are_the_published_ones():
    published = [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
        *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
        *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
        *(0.5016634166240692, 0.6427869200706482, 0.8614784479141235),
    ]
    assert oracle.same_bits(codebooks.THRESHOLDS["nf4"], np.float32(published))
    assert codebooks.THRESHOLDS["nf4"][-1].view("u4") == 0x3F5C89DA


def test_fp4_thresholds_are_exact_midpoints():
    twelfths = [
        -10,
        -7,
        -5,
        -3.5,
        -2.5,
        -1.03125,
        -0.03125,
        0,
        0.03125,
        1.03125,
        2.5,
        3.5,
        5,
        7,
        10,
    ]
    found = codebooks.THRESHOLDS["fp4"].astype(np.float64) * 12
    np.testing.assert_allclose(found, twelfths, rtol=2**-23)


def test_fp4_code_8_is_positive_zero():
    assert codebooks.CODE["fp4"][8].view("u4") == 0


def test_dynamic_map_is_bitsandbytes():
    assert oracle.same_bits(codebooks.DYNAMIC_MAP, DYNAMIC_MAP)
    assert (codebooks.DYNAMIC_MAP[127], codebooks.DYNAMIC_MAP[255]) == (0.0, 1.0)


@pytest.mark.parametrize(("n", "one_off"), [(5, 1), (256, 1), (1000, 3), (4096, 9)])
def test_dynamic_thresholds_find_the_codes_of_blockwise8(n, one_off):
    blocks = np.split(BLOCKWISE8[f"{n}/input"], range(256, n, 256))
    scaled = np.concatenate([block / np.abs(block).max() for block in blocks])
    found = (scaled[:, None] > codebooks.DYNAMIC_THRESHOLDS).sum(1)
    difference = found - BLOCKWISE8[f"{n}/q"].astype(int)
    assert (difference != 0).sum() == one_off  # those of bitsandbytes' lookup table


def test_tables_cannot_be_changed():
    tables = [codebooks.DYNAMIC_MAP, codebooks.DYNAMIC_THRESHOLDS]
    for by_type in (codebooks.CODE, codebooks.SORTED_CODES, codebooks.THRESHOLDS):
        tables += by_type.values()
    assert not any(table.flags.writeable for table in tables)
