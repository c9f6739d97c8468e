"""Whatever is wrong with a model, one ModelError says so; only what was checked is loaded."""

import pytest
import torch

from quantizer.errors import ModelError
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from tests.support.edited_models import FILE, SHARD, Edit, config, find, index, tensors
from tests.support.quantized import Edited, TinyFolder


@pytest.mark.parametrize(
    "reference", ["~no-such-user/model", "a" * 300], ids=["no such user", "too long"]
)
def test_references_that_no_file_system_knows_are_refused(
    reference: str, tiny_folder: TinyFolder
) -> None:
    with pytest.raises(ModelError):
        find_model(reference, tiny_folder("llama").path)


@pytest.mark.parametrize(
    "edit",
    [
        config(model_type=["llama"]),
        index([1]),
        index(5),
        index({"weight_map": {"a": 5}}),
        index({"weight_map": {"a": SHARD, "b": 5}}),
        index({"weight_map": {}}),
        tensors(
            lambda all_: all_.update(
                {name: each.to(torch.float8_e4m3fn) for name, each in all_.items()}
            )
        ),
        lambda folder: (tensors(dict.clear)(folder), config(dtype=...)(folder)),
    ],
    ids=[
        "type is a list",
        "index is a list",
        "index is a number",
        "shard is a number",
        "shards mixed",
        "no shards",
        "8-bit",
        "empty",
    ],
)
def test_folders_that_make_no_sense_are_refused(edit: Edit, edited: Edited) -> None:
    folder = edited(edit)
    with pytest.raises(ModelError):
        find(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_size": "64"},
        {"hidden_size": 63},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
    ],
)
def test_configurations_that_make_no_sense_are_refused(
    field: dict[str, object], edited: Edited
) -> None:
    found = find(edited(config(**field)))
    with pytest.raises(ModelError):
        load_model(found, torch.float32, "cpu")


def test_the_weights_that_are_checked_are_those_that_are_loaded(edited: Edited) -> None:
    folder = edited(
        index({"weight_map": {"model.norm.weight": SHARD}}),
        lambda folder: (folder / FILE).write_bytes((folder / SHARD).read_bytes()),
        tensors(lambda all_: all_["model.norm.weight"].fill_(float("nan"))),
    )
    try:
        model = load_model(find(folder), torch.float32, "cpu")
    except ModelError:
        return
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_no_file_in_a_folder_switches_the_checks_off(edited: Edited) -> None:
    folder = edited(
        lambda folder: (folder / "outline").touch(),
        tensors(lambda all_: all_["model.norm.weight"].fill_(float("nan"))),
    )
    with pytest.raises(ModelError):
        find(folder)
