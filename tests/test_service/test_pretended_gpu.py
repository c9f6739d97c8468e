"""What runs on a GPU stays there.

No operation gets tensors of two devices, whatever way a model is quantized.
"""

from pathlib import Path

import pytest
import torch

from tests.support.commands import bitwright, bitwright_json, run_options
from tests.support.pretended_gpu import GPU, DevicesMixedError, PretendedGpu, pretended_gpu
from tests.test_service.stages.test_embeddings import TIGHT
from tests.test_service.stages.test_recipes import (
    ADAPTED,
    PLAIN,
    SPARSE,
    quantize_options,
    save_plan,
)

__all__ = ["pretended_gpu"]
ON_GPU = ("--device", "cuda")


def test_tensors_of_two_devices_do_not_meet(pretended_gpu: PretendedGpu) -> None:
    here = torch.arange(6.0).view(2, 3)
    there = here.to("cuda")
    assert (there.device, here.device) == (GPU, torch.device("cpu"))
    assert torch.equal(there.cpu(), here)
    for made in (
        there * 2,
        there[0],
        there.t() @ there,
        torch.zeros(2, device="cuda"),
        torch.ones_like(there),
    ):
        assert pretended_gpu.holds(made)
    assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
    assert torch.equal(there[torch.tensor([0])].cpu(), here[:1])
    assert torch.equal(torch.zeros(2, 3).copy_(there), here)
    for mixed in (
        lambda: here + there,
        lambda: here[there[0].long()],
        lambda: torch.cat([here, there]),
        there.numpy,
    ):
        with pytest.raises(DevicesMixedError):
            mixed()


def test_modules_and_gradients_are_where_they_were_put(pretended_gpu: PretendedGpu) -> None:
    linear = torch.nn.Linear(3, 2)
    with pytest.raises(DevicesMixedError):
        linear(torch.ones(1, 3, device="cuda"))
    shared = torch.nn.ModuleList([linear, torch.nn.Linear(3, 2)])
    shared[1].weight = linear.weight
    assert shared.to("cuda")[1].weight is linear.weight
    linear(torch.ones(1, 3, device="cuda")).sum().backward()
    assert linear.weight.grad is not None
    assert pretended_gpu.holds(linear.weight.grad)


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("effort", ["fast", pytest.param("balanced", marks=pytest.mark.long)])
def test_runs(effort: str, tiny_llama: Path, tmp_path: Path) -> None:
    options = [
        *run_options(tiny_llama, tmp_path / "cache", tmp_path / "out", TIGHT),
        "--embeddings",
        "join",
    ]
    done = bitwright(*options, "--effort", effort, *ON_GPU)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("sgr-q", PLAIN),
        pytest.param("blockwise", SPARSE, marks=pytest.mark.long),
        pytest.param("signiq", ADAPTED, marks=pytest.mark.long),
        ("requant", SPARSE),
        ("rtn", PLAIN),
    ],
)
def test_recipes(recipe: str, kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    effort = "fast" if recipe in ("requant", "rtn") else "balanced"
    options = quantize_options(tmp_path, save_plan(tiny_llama, tmp_path, kind), recipe, effort)
    done = bitwright("quantize", tiny_llama, *options, *ON_GPU)
    assert done.returncode == 0, done.stderr
    scores = bitwright_json(
        "evaluate",
        tiny_llama,
        tmp_path / recipe,
        "--tokens",
        "64",
        "--cache",
        tmp_path / "cache",
        *ON_GPU,
    )
    assert scores[str(tmp_path / recipe)]["kl_nats_per_token"] > 0
