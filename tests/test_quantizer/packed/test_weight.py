"""Promises of quantizer.packed.weight.

What the stored tensors stand for, and that wrong ones are refused.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizer.errors import CheckpointError
from quantizer.modules import matmul_cpu
from quantizer.packed.adapter import Adapter
from quantizer.packed.dequantize import check_indices
from quantizer.packed.layout import TensorSpec, named_parts, tensor_specs
from quantizer.packed.weight import PartCodes, QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from tests.support.quantized import OPTION_NAMES, few, fidelities, normal, random_weight
from tests.support.slow_references import dequantize_slowly

SHAPES = [(1, 1), (1, 32), (7, 33), (5, 100), (33, 64), (3, 129)]
FIDELITIES = [
    Fidelity.uniform(2, 32),
    Fidelity.uniform(3, 64),
    Fidelity.uniform(8, 32),
    Fidelity(2, 4, 0.3, 32),
    Fidelity(3, 8, 0.9, 64),
    *(Fidelity.parse(name) for name in OPTION_NAMES),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fidelity", FIDELITIES, ids=lambda fidelity: fidelity.name)
def test_dequantize_follows_the_documented_format(
    fidelity: Fidelity, shape: tuple[int, int]
) -> None:
    weight = random_weight(fidelity, *shape)
    assert weight.dequantize().dtype == torch.float32
    assert weight.dequantize().tolist() == dequantize_slowly(weight)


@few
@given(fidelities(), st.integers(1, 12), st.integers(1, 140), st.integers(0, 2**32))
def test_dequantize_follows_the_documented_format_for_any_layer(
    fidelity: Fidelity, out: int, columns: int, seed: int
) -> None:
    weight = random_weight(fidelity, out, columns, seed)
    assert weight.dequantize().tolist() == dequantize_slowly(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shorter_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    weight = random_weight(Fidelity(2, 4, 0.3, 32), 7, 100)
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


@few
@given(fidelities(), st.integers(1, 70), st.integers(1, 300))
def test_tensor_specs_equal_the_stored_tensors(fidelity: Fidelity, out: int, columns: int) -> None:
    tensors = random_weight(fidelity, out, columns).tensors
    found = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert found == tensor_specs(fidelity, out, columns)


def test_a_uniform_layer_has_a_low_part_only() -> None:
    assert list(named_parts(Fidelity.uniform(3, 64), 100)) == [("low", 100, 3)]
    assert list(named_parts(Fidelity(2, 4, 0.5, 64), 32)) == [("low", 32, 2)]
    assert list(named_parts(Fidelity(2, 4, 0.5, 64), 100)) == [("high", 64, 4), ("low", 36, 2)]


@pytest.mark.parametrize(
    ("in_features", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)]
)
def test_columns_of_wide_layers_are_not_cut(in_features: int, dtype: torch.dtype) -> None:
    weight = random_weight(Fidelity.uniform(2, 128), 1, in_features)
    assert weight.tensors["columns"].dtype == dtype
    assert sorted(weight.tensors["columns"].tolist()) == list(range(in_features))
    dense = weight.dequantize()
    last = weight.tensors["columns"].tolist().index(in_features - 1)
    code = (int(weight.tensors["low_codes"][last // 16, 0]) >> (2 * (last % 16))) & 3
    zero = int(weight.tensors["low_zeros"][last // 128, 0]) & 3
    assert float(dense[0, -1]) == float(weight.tensors["low_scales"][last // 128, 0]) * (
        code - zero
    )


def test_an_adapter_of_any_halves_is_multiplied_in_float32() -> None:
    weight = random_weight(Fidelity.uniform(3, 32), 33, 70)
    adapter = Adapter(normal(5, 70).half(), normal(33, 5, seed=1).half())
    expected = weight.dequantize().double() + adapter.b.double() @ adapter.a.double()
    with_adapter = weight.with_adapter(5, adapter)
    assert with_adapter.fidelity.name == "int3g32a5"
    assert torch.allclose(with_adapter.dequantize().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTION_NAMES[:4])
def test_parts_without_what_an_option_needs_are_refused(name: str) -> None:
    codes = PartCodes(torch.zeros(4, 32), torch.ones(1, 4), torch.zeros(1, 4))
    with pytest.raises(CheckpointError, match=f"do not make a {name} layer"):
        QuantizedWeight.from_codes(Fidelity.parse(name), torch.arange(32), (codes,))


def _layer(name: str = "int2+4r0.3g32") -> QuantizedWeight:
    return random_weight(Fidelity.parse(name), 7, 100)


_STORED = [
    (name, key)
    for name in ("int2+4r0.3g32", "int2+4r0.3g32s6o0.01a3")
    for key in _layer(name).tensors
]


@pytest.mark.parametrize(("name", "key"), _STORED)
def test_missing_tensors_are_refused(name: str, key: str) -> None:
    weight = _layer(name)
    rest = {other: tensor for other, tensor in weight.tensors.items() if other != key}
    with pytest.raises(CheckpointError, match=f"expected.*{key}"):
        QuantizedWeight(weight.fidelity, 7, 100, rest)


@pytest.mark.parametrize(("name", "key"), _STORED)
def test_tensors_of_another_shape_are_refused(name: str, key: str) -> None:
    weight = _layer(name)
    with pytest.raises(CheckpointError, match=r"int2\+4r0\.3g32"):
        QuantizedWeight(weight.fidelity, 7, 100, {**weight.tensors, key: weight.tensors[key][:-1]})


@pytest.mark.parametrize(("name", "key"), _STORED)
def test_tensors_of_another_dtype_are_refused(name: str, key: str) -> None:
    weight = _layer(name)
    with pytest.raises(CheckpointError):
        QuantizedWeight(
            weight.fidelity, 7, 100, {**weight.tensors, key: weight.tensors[key].to(torch.float64)}
        )


def test_surplus_tensors_are_refused() -> None:
    weight = _layer()
    with pytest.raises(CheckpointError):
        QuantizedWeight(weight.fidelity, 7, 100, {**weight.tensors, "bias": torch.zeros(7)})


@pytest.mark.parametrize(
    ("fidelity", "out_features", "in_features"),
    [
        (Fidelity(2, 4, 0.3, 32), 8, 100),
        (Fidelity(2, 4, 0.3, 32), 7, 101),
        (Fidelity(3, 4, 0.3, 32), 7, 100),
        (Fidelity.uniform(2, 32), 7, 100),
        (Fidelity(2, 4, 0.3, 32, scale_bits=8), 7, 100),
        (Fidelity(2, 4, 0.3, 32, outlier_share=0.01), 7, 100),
        (Fidelity(2, 4, 0.3, 32, adapter_rank=1), 7, 100),
    ],
)
def test_tensors_of_another_layer_are_refused(
    fidelity: Fidelity, out_features: int, in_features: int
) -> None:
    with pytest.raises(CheckpointError):
        QuantizedWeight(fidelity, out_features, in_features, _layer().tensors)


@pytest.mark.parametrize(
    ("leaf", "places"),
    [
        ("outlier_columns", {0: 70}),
        ("outlier_columns", {5: 65535}),
        ("outlier_starts", {0: -1}),
        ("outlier_starts", {3: 10**6}),
        ("outlier_starts", {-1: 0}),
        ("columns", {0: 70}),
    ],
)
def test_numbers_that_point_outside_a_layer_are_refused(leaf: str, places: dict[int, int]) -> None:
    fidelity = Fidelity.parse("int2+3r0.4g32o0.05")
    tensors = dict(random_weight(fidelity, 20, 70).tensors)
    check_indices("a.layer", tensors, 20, 70)
    changed = tensors[leaf].to(torch.int64)
    for at, value in places.items():
        changed[at] = value
    tensors[leaf] = changed.to(tensors[leaf].dtype)
    with pytest.raises(CheckpointError, match=r"layer 'a.layer'"):
        check_indices("a.layer", tensors, 20, 70)
    for rows in (
        1,
        40,
    ):  # who loads tensors past that gets an error all the same, and no memory of others
        with pytest.raises(IndexError):
            matmul_cpu.matmul(normal(rows, 70), tensors, fidelity, 20, None)
