"""The Triton kernels: what they compute, on a GPU or under Triton's interpreter.

And that they compile for GPUs that are not here.
"""

import json
import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch

from quantizer.kernels import triton_packing
from quantizer.kernels.triton_parts import TileShape
from quantizer.modules import matmul_gpu, matmul_reference
from quantizer.packed.rounded_packing import pack_part_reference
from quantizer.plans.fidelity import CODE_BITS, Fidelity
from tests.benchmarks.compiled_kernels import TARGETS
from tests.support.quantized import normal, random_weight
from tests.support.sampling import sampled
from tests.test_quantizer.kernels.test_kernels import NAMES, distance, poison, tolerance, truth_of

SMALL = TileShape(16, 32, 4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels without a search, on memory that is filled with what shows."""
    poison(monkeypatch)
    launch = matmul_gpu._launch
    monkeypatch.setattr(matmul_gpu, "_launch", lambda kernel, tiles: launch(kernel, tiles or SMALL))


@pytest.mark.parametrize(
    ("name", "shape"),
    sampled(
        product(NAMES, [(1, 1), (17, 63), (63, 17), (100, 100)]),
        lambda name, shape: shape == (17, 63) or (name == "int2+3r0.4g32" and shape != (100, 100)),
    ),
)
def test_products_are_those_of_the_expanded_weight(name: str, shape: tuple[int, int]) -> None:
    fidelity = Fidelity.parse(name)
    weight = random_weight(fidelity, *shape).to(DEVICE)
    for rows in (1, 40, 65):
        x = normal(rows, shape[1], seed=rows).to(DEVICE)
        found = matmul_gpu.matmul(x, weight.tensors, fidelity, shape[0], None)
        assert found.shape == (rows, shape[0])
        assert distance(found, truth_of(x, weight)) < tolerance(fidelity, torch.float32)


def test_no_rows_give_no_rows() -> None:
    fidelity = Fidelity.parse("int3g32")
    weight, x = random_weight(fidelity, 17, 63).to(DEVICE), normal(0, 63).to(DEVICE)
    assert matmul_gpu.matmul(x, weight.tensors, fidelity, 17, None).shape == (0, 17)


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(rows, dtype) for dtype in (torch.bfloat16, torch.float16) for rows in (1, 16, 17, 65)],
)
def test_half_precision_costs_what_its_rounding_costs(rows: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16 and rows in (16, 17):
        pytest.skip(
            "the interpreter takes the bits of a bfloat16 for a number where matrices are "
            "multiplied"
        )
    fidelity = Fidelity.parse("int2+3r0.4g32s6")
    weight, x = random_weight(fidelity, 40, 100).to(DEVICE), normal(rows, 100).to(DEVICE, dtype)
    found = matmul_gpu.matmul(x, weight.tensors, fidelity, 40, None)
    assert found.dtype == dtype
    assert distance(found, truth_of(x, weight)) < tolerance(fidelity, dtype)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((64, 4096), marks=pytest.mark.long),
        pytest.param((1000, 64), marks=pytest.mark.long),
        (70, 300),
    ],
)
@pytest.mark.parametrize("tiles", [SMALL, TileShape(32, 128, 8)])
def test_long_and_wide_layers_in_tiles_of_any_size(
    shape: tuple[int, int], tiles: TileShape
) -> None:
    fidelity = Fidelity.parse("int2+3r0.4g64s6")
    weight = random_weight(fidelity, *shape).to(DEVICE)
    for rows in (1, 5, 70):
        x = normal(rows, shape[1]).to(DEVICE)
        assert (
            distance(
                matmul_gpu.multiply_fused(x, weight.tensors, fidelity, shape[0], tiles),
                truth_of(x, weight),
            )
            < 1e-5
        )


@pytest.mark.parametrize("rows", [1, 3])
def test_columns_can_be_split_among_programs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity, x = Fidelity.parse("int2+3r0.4g32"), normal(rows, 1600).to(DEVICE)
    weight = random_weight(fidelity, 20, 1600).to(DEVICE)
    monkeypatch.setattr(matmul_gpu, "_split", lambda *_: 3)
    assert (
        distance(matmul_gpu.multiply_fused(x, weight.tensors, fidelity, 20), truth_of(x, weight))
        < 1e-5
    )


@pytest.mark.parametrize(
    "name",
    sampled(
        [name for name in NAMES if "o" not in name and "a" not in name],
        lambda name: name in {"int3g64", "int8g32s6", "int2+3r0.4g32", "int2+8r0.99g64"},
    ),
)
def test_expanded_weights_are_those_of_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity, x = Fidelity.parse(name), torch.eye(100, device=DEVICE)
    weight = random_weight(fidelity, 300, 100).to(DEVICE)
    monkeypatch.setattr(
        matmul_gpu, "TILE_BYTES", 4 * 100 * 128
    )  # 300 outputs are two whole tiles and a ragged one
    found = matmul_gpu.multiply_tiles(x, weight.tensors, fidelity, 300)
    assert torch.equal(found, matmul_reference.matmul(x, weight.tensors, fidelity, 300, None))


@pytest.mark.parametrize("rows", [1, 2, 65])
def test_what_a_search_is_kept_under_can_be_written(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **constants: launched.append(constants)

    monkeypatch.setattr(matmul_gpu, "_launch", lambda *_: (Kernel(), {}))
    fidelity = Fidelity.parse("int2+3r0.4g32s6")
    matmul_gpu.matmul(
        normal(rows, 63).to(DEVICE),
        random_weight(fidelity, 17, 63).to(DEVICE).tensors,
        fidelity,
        17,
        None,
    )
    assert all(json.loads(json.dumps(constants)) == constants for constants in launched)
    assert launched


@pytest.mark.parametrize(
    ("bits", "shape"),
    sampled(
        product(CODE_BITS, [(1, 1), (17, 63), (70, 200)]),
        lambda bits, shape: shape == (17, 63) or bits == CODE_BITS[0],
    ),
)
def test_values_are_rounded_clipped_and_packed(bits: int, shape: tuple[int, int]) -> None:
    steps = (normal(*shape).to(DEVICE) * 2**bits).round() / 2  # every other lies between two codes
    for values in (steps, steps.t().contiguous().t(), steps.clamp(0, 2**bits - 1).round()):
        assert torch.equal(
            triton_packing.pack_part(values, bits), pack_part_reference(values, bits)
        )


@pytest.mark.parametrize(
    "target",
    ["sm_90/one row/int2+3g64s6", *sampled(TARGETS, lambda _: False)],
)
def test_kernels_compile_for_gpus_that_are_not_here(target: str, record_property: Any) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.compiled_kernels", target],
        check=True,
        capture_output=True,
        env=environment,
    )
    for line in process.stdout.splitlines():
        row = json.loads(line)
        record_property(f"{row['kernel']} {row['format']}", line)
        assert (
            row["stack_bytes"] <= 16
        )  # the assembler leaves two words there at 56 of 255 registers
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 48 * 1024
