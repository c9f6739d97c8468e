"""Tiny real models that the tests of the quantizer share."""

import shutil
from pathlib import Path

import pytest
import torch

from quantizer.conversion.checkpoint import save_checkpoint
from quantizer.conversion.pack import pack_model
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from tests.support.edited_models import Edit
from tests.support.quantized import (
    PACKED_TOKENS,
    Edited,
    Packed,
    PackedModel,
    TinyFolder,
    TinyModel,
    logits_of,
    mixed_plan,
)
from tests.support.tiny_models import save_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """Return the checked folder of a tiny family, saved once; no test writes to it."""
    made: dict[str, ModelFolder] = {}

    def get(family: str) -> ModelFolder:
        if family not in made:
            folder = save_tiny(tmp_path_factory.mktemp("models") / family, family)
            made[family] = find_model(str(folder), tmp_path_factory.mktemp("cache"))
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: TinyFolder) -> TinyModel:
    """Return a fresh model of a tiny family in float32, the test's own."""
    return lambda family: load_model(tiny_folder(family), torch.float32, "cpu")


@pytest.fixture(scope="session")
def packed(
    tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> PackedModel:
    """Return the saved packed model of a family, made once."""
    made: dict[str, Packed] = {}

    def get(family: str) -> Packed:
        if family not in made:
            model, source = tiny_model(family), tiny_folder(family)
            plan, weights = mixed_plan(model)
            pack_model(model, plan, weights)
            logits, folder = (
                logits_of(model, PACKED_TOKENS),
                tmp_path_factory.mktemp("packed") / family,
            )
            save_checkpoint(model, source, plan, folder)
            made[family] = Packed(folder, source, plan, weights, logits)
        return made[family]

    return get


@pytest.fixture
def edited(tiny_folder: TinyFolder, tmp_path: Path) -> Edited:
    """Return a copy of the tiny llama after some edits."""

    def make(*edits: Edit) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder("llama").path, folder)
        for edit in edits:
            edit(folder)
        return folder

    return make
