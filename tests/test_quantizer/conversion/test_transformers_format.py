"""Promises of quantizer.conversion.transformers_format.

Transformers finds the format in any process, and invalid checkpoints are refused.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantizer.errors import CheckpointError
from tests.support.edited_models import tensors
from tests.support.paths import ROOT
from tests.support.quantized import PackedModel


@pytest.mark.parametrize(
    "imports", ["import quantizer, transformers", "import transformers, quantizer"]
)
def test_another_process_loads_it_whichever_package_comes_first(
    imports: str, packed: PackedModel
) -> None:
    code = (
        f"{imports}; import sys, torch\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], "
        "dtype=torch.float32)\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(packed("llama").folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["QuantizedLinear"]


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import quantizer, sys; print('quantizer' in sys.modules, 'torch' in sys.modules, "
        "'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "False", "False"]


def _edited(folder: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    edit(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_format_versions_are_refused(
    version: object, packed: PackedModel, tmp_path: Path
) -> None:
    folder = _edited(
        packed("llama").folder, tmp_path / "other", lambda config: config.update(version=version)
    )
    with pytest.raises(CheckpointError, match="version"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_that_names_no_layers_is_refused(packed: PackedModel, tmp_path: Path) -> None:
    folder = _edited(
        packed("llama").folder, tmp_path / "other", lambda config: config.update(layers={})
    )
    with pytest.raises(CheckpointError, match="no layers"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_without_the_field_layers_is_refused(
    packed: PackedModel, tmp_path: Path
) -> None:
    folder = _edited(
        packed("llama").folder, tmp_path / "other", lambda config: config.pop("layers")
    )
    with pytest.raises(CheckpointError, match="no layers"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("leaf", ["low_codes", "low_scales", "columns"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    leaf: str, packed: PackedModel, tmp_path: Path
) -> None:
    folder = _edited(packed("llama").folder, tmp_path / "other", lambda _: None)
    tensors(lambda all_: all_.pop(f"model.layers.0.mlp.up_proj.{leaf}"))(folder)
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_whose_columns_are_no_permutation_is_refused(
    packed: PackedModel, tmp_path: Path
) -> None:
    folder = _edited(packed("llama").folder, tmp_path / "other", lambda _: None)
    name = "model.layers.0.mlp.up_proj.columns"
    tensors(lambda all_: all_.update({name: torch.zeros_like(all_[name])}))(folder)
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.mlp.up_proj': the column order is no permutation"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(
    packed: PackedModel, tmp_path: Path
) -> None:
    folder = _edited(packed("llama").folder, tmp_path / "other", lambda _: None)
    name = "model.layers.0.mlp.up_proj.low_codes"
    tensors(lambda all_: all_.update({name: all_[name][:, :-1].contiguous()}))(folder)
    with pytest.raises((CheckpointError, RuntimeError), match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)
