"""Promises of quantizer.models.source.

Good models are found and loaded, others are refused, and nothing that they bring is run.
"""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from quantizer.errors import ModelError
from quantizer.models.loading import load_model, load_tokenizer
from quantizer.models.source import find_model
from tests.support.edited_models import (
    FILE,
    INDEX,
    SHARD,
    Edit,
    code_of_its_own,
    config,
    find,
    index,
    pickled,
    tensors,
    without,
)
from tests.support.quantized import PACKED_TOKENS, Edited, TinyFolder, TinyModel, logits_of


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_good_folder_is_found_and_loaded(edited: Edited) -> None:
    folder = edited()
    found = find(folder)
    assert (found.path, found.name, found.dtype) == (folder, str(folder), "bfloat16")
    model = load_model(found, torch.float32, "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load_tokenizer(found)("assert", add_special_tokens=False)["input_ids"]


def test_a_model_in_shards_is_the_same_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = load_model(find(tmp_path / "sharded"), torch.float32, "cpu")
    assert torch.equal(logits_of(loaded, PACKED_TOKENS), logits_of(model, PACKED_TOKENS))


def test_a_model_named_without_dtype_has_that_of_its_weights(edited: Edited) -> None:
    assert find(edited(config(dtype=...))).dtype == "bfloat16"


def test_the_digest_is_of_the_content_not_of_the_place(
    edited: Edited, tiny_folder: TinyFolder
) -> None:
    folder = edited(lambda folder: (folder / "README.md").write_text("Hello"))
    assert find(folder).sha256 == tiny_folder("llama").sha256


@pytest.mark.parametrize(
    "edit",
    [
        config(rms_norm_eps=1e-5),
        tensors(lambda all_: all_["model.norm.weight"].add_(1)),
    ],
    ids=["config", "weights"],
)
def test_the_digest_changes_with_what_the_model_computes(
    edit: Edit, edited: Edited, tiny_folder: TinyFolder
) -> None:
    assert find(edited(edit)).sha256 != tiny_folder("llama").sha256


@pytest.mark.parametrize(
    "reference",
    [
        "no-such-org/no-such-model",
        "no/such/folder",
        "",
        "a model",
        "./nothing",
        "../nothing",
        "a\0b",
    ],
)
def test_an_unknown_model_is_refused_by_name(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"model|folder") as caught:
        find_model(reference, tmp_path / "cache")
    assert repr(reference) in str(caught.value) or not reference


def _shard_elsewhere(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes((folder / FILE).read_bytes())
    index({"weight_map": {"a": "../secret.safetensors"}})(folder)


REFUSED: dict[str, tuple[Edit, str]] = {
    "no config": (without("config.json"), r"no config\.json"),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json.*cannot be read",
    ),
    "config is no text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        r"config\.json.*cannot be read",
    ),
    "config is no object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "not a JSON object",
    ),
    "no weights": (without(FILE), "has no weights"),
    "pickled": (pickled, r"pickled weights only \(pytorch_model\.bin\).*Convert them"),
    "own code": (
        lambda folder: (code_of_its_own(folder), config(model_type="own")(folder)),
        "code of its own.*never run",
    ),
    "unknown type": (config(model_type="no-such-type"), "'no-such-type', unknown"),
    "no type": (config(model_type=...), "None, unknown"),
    "t5": (config(model_type="t5"), "'t5', which is no decoder-only language model"),
    "vit": (config(model_type="vit"), "'vit', which is no decoder-only language model"),
    "quantized": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized already; give the original",
    ),
    "truncated": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100]),
        "damaged or truncated",
    ),
    "header only": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:50]),
        "damaged or truncated",
    ),
    "empty file": (lambda folder: (folder / FILE).write_bytes(b""), "damaged or truncated"),
    "NaN": (
        tensors(lambda all_: all_["model.norm.weight"][3:4].fill_(float("nan"))),
        r"'model\.norm\.weight'.*NaN or infinite",
    ),
    "infinity": (
        tensors(lambda all_: all_["model.norm.weight"][3:4].fill_(float("-inf"))),
        r"'model\.norm\.weight'.*NaN or infinite",
    ),
    "missing shard": (
        index({"weight_map": {"a": SHARD, "b": "model-00002.safetensors"}}),
        r"lacks 'model-00002\.safetensors'",
    ),
    "shard elsewhere": (_shard_elsewhere, r"names '\.\./secret\.safetensors', no safetensors file"),
    "index is no JSON": (
        lambda folder: (index(0)(folder), (folder / INDEX).write_text("{")),
        r"index\.json.*cannot be read",
    ),
    "index without map": (index({}), "not a safetensors index"),
    "map is a list": (index({"weight_map": [SHARD]}), "not a safetensors index"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(case: str, edited: Edited) -> None:
    edit, reason = REFUSED[case]
    folder = edited(edit)
    with pytest.raises(ModelError, match=reason) as caught:
        find(folder)
    assert str(folder) in str(caught.value)
    assert not (folder / "trace").exists()


NOT_LOADED: dict[str, tuple[Edit, str]] = {
    "a tensor is missing": (
        tensors(lambda all_: all_.pop("model.layers.1.mlp.up_proj.weight")),
        r"lacks 1 tensors, 'model\.layers\.1\.mlp\.up",
    ),
    "more layers than stored": (
        config(num_hidden_layers=4),
        r"lacks 9 tensors, 'model\.layers\.3\.",
    ),
    "other shapes than stored": (
        config(vocab_size=400),
        r"'model\.embed_tokens\.weight' with shape \(320, 64\), its configuration says \(400, 64\)",
    ),
    "more weights than bytes": (
        config(intermediate_size=10**9),
        r"has 576000057792 weights by its configuration",
    ),
    "unknown activation": (config(hidden_act="no-such-act"), "cannot be loaded.*no-such-act"),
}


@pytest.mark.parametrize("case", list(NOT_LOADED))
def test_a_model_whose_files_are_incomplete_is_not_loaded(case: str, edited: Edited) -> None:
    edit, reason = NOT_LOADED[case]
    found = find(edited(edit))
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(found, torch.float32, "cpu")
    assert repr(found.name) in str(caught.value)


def test_code_in_the_folder_is_not_run_for_a_type_that_transformers_knows(edited: Edited) -> None:
    folder = edited(code_of_its_own)
    model = load_model(find(folder), torch.float32, "cpu")
    assert type(model).__module__.startswith("transformers.")
    assert not (folder / "trace").exists()


TOKENIZERS: dict[str, Edit] = {
    "none": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "panic in Rust": lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json")
        .read_text()
        .replace('"continuing_subword_prefix": null', '"continuing_subword_prefix": "prefixes"')
    ),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "own code": lambda folder: (
        code_of_its_own(folder),
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
        ),
    ),
}


@pytest.mark.parametrize("case", list(TOKENIZERS))
def test_a_tokenizer_that_cannot_be_used_is_refused(case: str, edited: Edited) -> None:
    found = find(edited(TOKENIZERS[case]))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(found)
    assert not (found.path / "trace").exists()


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model.safetensors"])
def test_a_file_that_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUFnonsense")
    with pytest.raises(ModelError, match=r"GGUF file|is a file; give a folder"):
        find_model(str(tmp_path / name), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))
