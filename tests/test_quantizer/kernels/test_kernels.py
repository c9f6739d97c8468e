"""Products with packed weights, against weights that are expanded by the definition."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from quantizer.errors import KernelError
from quantizer.kernels import numba_matmul, path
from quantizer.kernels.path import (
    CPU,
    GPU,
    KERNELS_VARIABLE,
    REFERENCE,
    KernelPath,
    choose_kernel_path,
)
from quantizer.kernels.precision import matmul_autocast
from quantizer.modules import matmul_cpu, matmul_reference
from quantizer.modules.linear import QuantizedLinear
from quantizer.modules.matmul import matmul
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from tests.support.quantized import normal, random_weight

NAMES = (
    *("int2g32", "int3g64", "int4g128", "int8g64", "int2g64s6", "int3g32s8", "int8g32s6"),
    *("int2+3r0.4g32", "int2+4r0.25g64s6", "int3+8r0.3g32s8", "int2+8r0.99g64"),
    *("int2g64o0.01", "int2+3r0.4g32s6o0.05", "int3g64a5", "int2+4r0.3g64s6o0.02a3"),
)
SHAPES = ((1, 1), (17, 63), (63, 17), (100, 100), (33, 160))
FEW, MANY = (
    (1, matmul_cpu.SINGLE_ROWS, matmul_cpu.SINGLE_ROWS + 1, matmul_cpu.FEW_ROWS),
    (matmul_cpu.FEW_ROWS + 1, 40),
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `poison`."""
    poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with what shows in every sum that it enters."""
    with torch.device("meta"):
        torch.empty(
            1
        )  # torch notes here, once and for all, which functions a default device concerns
    empty, new_empty = torch.empty, Tensor.new_empty

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *size, **kind: filled(empty(*size, **kind)))
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *size, **kind: filled(new_empty(self, *size, **kind))
    )


@pytest.fixture
def threads() -> Iterator[None]:
    """Give torch three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def distance(found: Tensor, truth: Tensor) -> float:
    """Return the relative root mean square error."""
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def truth_of(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return x.double() @ weight.dequantize().double().t()


def tolerance(fidelity: Fidelity, dtype: torch.dtype) -> float:
    """Return what rounding explains.

    That of the result, and of sums of codes from which zero points are taken.
    """
    return float(torch.finfo(dtype).eps) + 2.0 ** (fidelity.bits_hi - 23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_expanded_weight(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fidelity = Fidelity.parse(name)
    weight = random_weight(fidelity, *shape)
    for rows in (*FEW, *MANY):
        x = normal(rows, shape[1], seed=rows).to(dtype)
        found = matmul_cpu.matmul(x, weight.tensors, fidelity, shape[0], None)
        assert found.dtype == dtype
        assert found.shape == (rows, shape[0])
        assert distance(found, truth_of(x, weight)) < tolerance(fidelity, dtype)


@pytest.mark.parametrize("shape", [(64, 4096), (4096, 64)])
def test_long_and_wide_layers_are_multiplied_alike(shape: tuple[int, int]) -> None:
    fidelity = Fidelity.parse("int2+3r0.4g64s6")
    weight = random_weight(fidelity, *shape)
    for rows in (1, 7, 40):
        x = normal(rows, shape[1])
        assert (
            distance(
                matmul_cpu.matmul(x, weight.tensors, fidelity, shape[0], None), truth_of(x, weight)
            )
            < 1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_many_rows_see_the_weights_of_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity, x = Fidelity.parse(name), torch.eye(100)
    weight = random_weight(fidelity, 90, 100)
    monkeypatch.setattr(
        matmul_cpu, "TILE_BYTES", 4 * 100 * 32
    )  # 90 outputs are two whole tiles and a ragged one
    for dtype, multiplied in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        monkeypatch.setattr(
            matmul_cpu, "fastest_matmul_dtype", lambda _, multiplied=multiplied: multiplied
        )
        expected = matmul_reference.matmul(x.to(dtype), weight.tensors, fidelity, 90, None)
        assert torch.equal(
            matmul_cpu.matmul(x.to(dtype), weight.tensors, fidelity, 90, None), expected
        )


def test_many_rows_are_multiplied_in_the_precision_of_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fidelity, x = Fidelity.parse("int2+3r0.4g64s6"), normal(40, 100)
    weight = random_weight(fidelity, 90, 100)
    monkeypatch.setattr(matmul_cpu, "fastest_matmul_dtype", lambda _: torch.bfloat16)
    rounded = matmul_cpu.matmul(x.bfloat16(), weight.tensors, fidelity, 90, None)
    with matmul_autocast(torch.bfloat16, x.device):
        found, expected = (
            each.matmul(x, weight.tensors, fidelity, 90, None)
            for each in (matmul_cpu, matmul_reference)
        )
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, rounded.float())
    assert distance(found, expected.double()) < torch.finfo(torch.bfloat16).eps
    assert (
        distance(matmul_cpu.matmul(x, weight.tensors, fidelity, 90, None), truth_of(x, weight))
        < 1e-5
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("name", ["int3g64", "int2+4r0.25g32s6o0.02a3"])
def test_threads_share_the_outputs_and_change_nothing(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity, x = Fidelity.parse(name), normal(rows, 70)
    weight = random_weight(fidelity, 201, 70)
    alone = matmul_cpu.matmul(x, weight.tensors, fidelity, 201, None)
    monkeypatch.setattr(matmul_cpu, "SHARED_PRODUCT", 1)
    monkeypatch.setattr(matmul_cpu, "SHARED_TILE", 1)
    assert torch.equal(matmul_cpu.matmul(x, weight.tensors, fidelity, 201, None), alone)


@pytest.mark.parametrize("rows", [2, 7, 40])
def test_what_is_no_number_shows_in_its_row_only(rows: int) -> None:
    fidelity, x = Fidelity.parse("int2+3r0.4g32o0.05"), normal(rows, 70)
    x[1, 5] = float("nan")
    found = matmul_cpu.matmul(x, random_weight(fidelity, 20, 70).tensors, fidelity, 20, None)
    assert bool(found[1].isnan().all())
    assert bool(found[[row for row in range(rows) if row != 1]].isfinite().all())


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_bias_is_added_and_leading_axes_are_kept(rows: int) -> None:
    fidelity, bias = Fidelity.parse("int4g32"), normal(20)
    weight = random_weight(fidelity, 20, 70)
    x = normal(2, rows, 70)
    found = matmul(x, weight.tensors, fidelity, 20, bias)
    assert found.shape == (2, rows, 20)
    assert torch.allclose(found, x @ weight.dequantize().t() + bias, atol=1e-4)
    assert matmul(x[:0], weight.tensors, fidelity, 20, bias).shape == (0, rows, 20)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names each path as it is taken."""
    taken: list[str] = []
    for name, module in ((CPU, matmul_cpu), (REFERENCE, matmul_reference)):
        original = module.matmul

        def told(
            *given: object, name: str = name, original: Callable[..., Tensor] = original
        ) -> Tensor:
            taken.append(name)
            return original(*given)

        monkeypatch.setattr(module, "matmul", told)
    return taken


def test_the_setting_forces_the_reference(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity, x = Fidelity.parse("int3g32"), normal(2, 70)
    tensors = random_weight(fidelity, 20, 70).tensors
    matmul(x, tensors, fidelity, 20)
    monkeypatch.setenv(KERNELS_VARIABLE, REFERENCE)
    assert KERNELS_VARIABLE in choose_kernel_path("cpu").reason
    matmul(x, tensors, fidelity, 20)
    assert calls == [CPU, REFERENCE]
    monkeypatch.setenv(KERNELS_VARIABLE, "fast")
    with pytest.raises(
        KernelError, match=f"{KERNELS_VARIABLE}='fast': use auto, reference or triton"
    ):
        matmul(x, tensors, fidelity, 20)


def test_a_gpu_has_kernels_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel_path("cuda").name == REFERENCE
    assert f"{KERNELS_VARIABLE}={GPU}" in choose_kernel_path("cuda").reason
    monkeypatch.setenv(KERNELS_VARIABLE, GPU)
    monkeypatch.setattr(path, "_installed", lambda _: True)
    assert choose_kernel_path("cuda").name == GPU
    assert choose_kernel_path("cpu").name == CPU
    monkeypatch.setattr(path, "_installed", lambda library: library != "triton")
    with pytest.raises(KernelError, match=r"install bitwright\[gpu\]"):
        choose_kernel_path("cuda")


def test_without_numba_the_reference_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "_installed", lambda library: library != "numba")
    assert choose_kernel_path("cpu") == KernelPath(REFERENCE, "numba is not installed")


def test_gradients_reach_the_inputs(calls: list[str]) -> None:
    fidelity, x = Fidelity.parse("int2+3r0.4g32o0.05a3"), normal(3, 70).requires_grad_()
    weight = random_weight(fidelity, 20, 70)
    matmul(x, weight.tensors, fidelity, 20).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, 70), atol=1e-5)
    with torch.no_grad():
        matmul(x, weight.tensors, fidelity, 20)
    assert calls == [CPU, CPU]


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_compiled_layer_is_one_graph_and_gives_the_same(rows: int, calls: list[str]) -> None:
    fidelity, linear = Fidelity.parse("int2+3r0.4g32s6"), nn.Linear(70, 20)
    layer = QuantizedLinear.from_linear(linear, random_weight(fidelity, 20, 70))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(normal(rows, 70)), layer(normal(rows, 70)))
    assert calls == [CPU, CPU]


def test_what_is_kept_follows_its_tensors() -> None:
    fidelity = Fidelity.parse("int2+3r0.4g32s6a2")
    layer = QuantizedLinear.from_linear(
        nn.Linear(70, 20, bias=False), random_weight(fidelity, 20, 70)
    )
    other = random_weight(fidelity, 20, 70, seed=1)
    x = normal(2, 70)
    before = layer(x)
    copied = copy.deepcopy(layer)
    layer.load_state_dict(dict(other.tensors))  # overwrites in place
    assert torch.equal(layer(x), matmul_cpu.matmul(x, other.tensors, fidelity, 20, None))
    assert torch.equal(copied(x), before)
    with torch.inference_mode():
        layer.row_scales = layer.row_scales * 2  # counts no changes
        layer.row_scales.mul_(2)
        dense = QuantizedWeight(
            fidelity, 20, 70, {name: layer.get_buffer(name) for name in other.tensors}
        ).dequantize()
        assert distance(layer(x), x.double() @ dense.double().t()) < 1e-5


@pytest.mark.parametrize("rows", [2, 7, 40])
@pytest.mark.parametrize("name", ["int3g32", "int2+3r0.4g32s6o0.05a3"])
def test_a_layer_that_was_cast_multiplies_by_what_it_then_holds(name: str, rows: int) -> None:
    layer, x = (
        QuantizedLinear.from_linear(nn.Linear(70, 20), random_weight(Fidelity.parse(name), 20, 70)),
        normal(rows, 70),
    )
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        truth = x.double() @ layer.dequantize(torch.float32).double().t() + layer.bias.double()
        assert distance(layer(x), truth) < 1e-5


def test_scales_of_any_finite_half_are_read() -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = patterns[patterns.isfinite()]
    values = torch.full((len(finite),), float("nan"))
    numba_matmul._float16_to_float32(finite.view(torch.uint16).numpy(), values.numpy())
    assert torch.equal(values, finite.float())


def test_where_nothing_can_be_kept_on_disk_loops_are_compiled_all_the_same() -> None:
    script = """
import numpy as np
from quantizer.kernels import jit, numba_matmul
assert not jit.CACHED_ON_DISK
values = np.empty(4, np.float32)
numba_matmul._unpack_row(np.array([0b11100100], np.uint32), 2, 0, values)
print(values.tolist())
"""
    environment = os.environ | {
        "NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"
    }  # which takes cells of notebooks only
    process = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment
    )
    assert process.stdout.strip() == "[0.0, 1.0, 2.0, 3.0]"
