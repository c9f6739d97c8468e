"""Promises of quantizer.packed.packing.

The bit stream is the documented one, and unpacking undoes packing.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizer.packed.packing import pack, unpack
from quantizer.plans.fidelity import word_count
from tests.support.quantized import fixed
from tests.support.slow_references import pack_slowly, unpack_slowly

SIZES = (1, 2, 8, 17, 31, 32, 33, 63, 64, 100, 545)
WIDTHS = range(1, 9)


def _codes(rows: int, values: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, values), generator=torch.Generator().manual_seed(values))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("values", SIZES)
def test_pack_writes_the_little_endian_bit_stream(bits: int, values: int) -> None:
    codes = _codes(3, values, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, word_count(values, bits))
    for row, written in zip(codes.tolist(), packed, strict=True):
        assert written.numpy().astype("<i4").tobytes() == pack_slowly(row, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("values", SIZES)
def test_unpack_undoes_pack(bits: int, values: int) -> None:
    codes = _codes(3, values, bits)
    unpacked = unpack(pack(codes, bits), bits, values)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_reads_any_words_by_the_definition(bits: int) -> None:
    packed = torch.randint(
        -(2**31), 2**31, (2, 9), generator=torch.Generator().manual_seed(bits)
    ).to(torch.int32)
    values = 9 * 32 // bits
    assert unpack(packed, bits, values).tolist() == [
        unpack_slowly(row, bits, values) for row in packed
    ]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("values", SIZES)
def test_largest_codes_neither_overflow_nor_leak_into_the_padding(bits: int, values: int) -> None:
    codes = torch.full((1, values), 2**bits - 1)
    packed = pack(codes, bits)
    stream = int.from_bytes(packed.numpy().astype("<i4").tobytes(), "little")
    assert stream == 2 ** (bits * values) - 1


@fixed
@given(
    st.integers(1, 8).flatmap(
        lambda bits: st.tuples(
            st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=200)
        )
    )
)
def test_pack_agrees_with_its_twin_on_any_codes(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor([codes]), bits)
    assert packed.numpy().astype("<i4").tobytes() == pack_slowly(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_integer_type_of_the_codes_does_not_matter(dtype: torch.dtype) -> None:
    codes = _codes(2, 45, 3)
    assert torch.equal(pack(codes.to(dtype), 3), pack(codes, 3))


def test_rows_are_packed_apart() -> None:
    codes = _codes(4, 33, 3)
    together = pack(codes, 3)
    assert torch.equal(together, torch.cat([pack(codes[row : row + 1], 3) for row in range(4)]))


def test_pack_leaves_its_argument_alone() -> None:
    codes = _codes(2, 50, 4)
    before = codes.clone()
    pack(codes, 4)
    assert torch.equal(codes, before)
