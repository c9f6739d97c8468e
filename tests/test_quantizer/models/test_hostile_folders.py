"""Hostile model folders are refused by name, honest ones load."""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from quantizer.durable import file_sha256
from quantizer.errors import ModelError
from quantizer.models.loading import load_config, load_model, load_tokenizer
from quantizer.models.safetensors_header import MAX_HEADER_BYTES, check_safetensors
from quantizer.models.source import check_checkpoint, find_model
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
)
from tests.support.quantized import Edited, PackedModel, TinyFolder
from tests.support.tiny_models import CONFIGS

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I8", "shape": [5], "data_offsets": [24, 29]},
}


def weights(header: object, data_bytes: int = 29) -> bytes:
    """Return a safetensors file of this header, JSON or bytes, and as many zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def _changed(**values: object) -> bytes:
    return weights(GOOD | {"a": GOOD["a"] | values})


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "should take 0 bytes"),
    "no header": (weights(b""), "should take 0 bytes"),
    "too long": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1),
        f"take {MAX_HEADER_BYTES + 1} bytes of 8",
    ),
    "beyond the file": (struct.pack("<Q", 1000) + b"{}", "take 1000 bytes of 10"),
    "no UTF-8": (weights(b'{"\xff":{}}'), "utf-8"),
    "no object": (weights([]), "no JSON object"),
    "no JSON": (weights(b'{"a":'), "byte 1 of the header"),
    "bomb": (weights(b'{"a":' + b"[" * 100_000), "byte 1 of the header"),
    "bomb in an entry": (
        weights(b'{"a":{"shape":' + b"[" * 2000 + b"]" * 2000 + b"}}"),
        "nested too deeply",
    ),
    "long entry": (weights(b'{"a":{"shape":[' + b"1," * 4000 + b"1]}}"), "byte 1 of the header"),
    "metadata of objects": (
        weights(GOOD | {"__metadata__": {"a": {}}}),
        "of the header begins no entry",
    ),
    "words after the end": (weights(json.dumps(GOOD).encode() + b"{}"), "follows its end"),
    "twice the same": (
        weights(json.dumps(GOOD).encode().replace(b'"b"', b'"a"')),
        "names 'a' twice",
    ),
    "twice the same, escaped": (
        weights(json.dumps(GOOD).encode().replace(b'"b"', rb'"\u0061"')),
        "names 'a' twice",
    ),
    "two shapes": (
        weights(json.dumps(GOOD).encode().replace(b'"shape": [5]', b'"shape": [5], "shape": [5]')),
        "something twice",
    ),
    "more fields": (_changed(strides=[1]), "not exactly a dtype"),
    "fewer fields": (weights({"a": {"dtype": "F32"}}), "not exactly a dtype"),
    "unknown dtype": (_changed(dtype="F33"), "unknown dtype 'F33'"),
    "dtype is a list": (_changed(dtype=["F32"]), "unknown dtype"),
    "negative": (_changed(shape=[-2, -3]), r"impossible shape \[-2, -3\]"),
    "fraction": (_changed(shape=[2.0, 3]), "impossible shape"),
    "truth": (_changed(shape=[6, True]), "impossible shape"),
    "text": (_changed(shape=["2", 3]), "impossible shape"),
    "shape is a number": (_changed(shape=6), "impossible shape"),
    "NaN": (_changed(shape=[float("nan")]), "NaN for a number"),
    "overflow": (_changed(shape=[2**32, 2**32]), "impossible shape"),
    "overflow of nothing": (_changed(shape=[2**62, 4, 0], data_offsets=[0, 0]), "impossible shape"),
    "digits": (
        weights(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}' % (b"9" * 4000)),
        "impossible shape",
    ),
    "dimensions": (_changed(shape=[1] * 9), "impossible shape"),
    "other size": (_changed(shape=[2, 2]), r"24 bytes, which are not F32 \[2, 2\]"),
    "backwards": (_changed(data_offsets=[24, 0]), "impossible data_offsets"),
    "three offsets": (_changed(data_offsets=[0, 24, 24]), "impossible data_offsets"),
    "negative offset": (_changed(data_offsets=[-24, 0]), "impossible data_offsets"),
    "overlap": (weights(GOOD | {"b": GOOD["b"] | {"data_offsets": [20, 25]}}), "begin at byte 20"),
    "hole": (weights(GOOD | {"b": GOOD["b"] | {"data_offsets": [25, 30]}}, 30), "begin at byte 25"),
    "late start": (weights({"b": GOOD["b"]}), "begin at byte 24"),
    "data beyond": (weights(GOOD, 28), "take 29 bytes, the file holds 28"),
    "data unclaimed": (weights(GOOD, 30), "take 29 bytes, the file holds 30"),
}


@pytest.mark.parametrize("case", list(WEIGHTS))
def test_a_header_that_cannot_be_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    content, reason = WEIGHTS[case]
    file = tmp_path / FILE
    file.write_bytes(content)
    with pytest.raises(
        ModelError, match=rf"{FILE}' are damaged or truncated: .*{reason}"
    ) as caught:
        check_safetensors(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "tensors"),
    [
        (weights(GOOD), 2),
        (weights(b" \n".join([json.dumps(GOOD).encode().replace(b":", b" : "), b"    "])), 2),
        (weights(dict(reversed(GOOD.items())) | {"__metadata__": {"a{": '}"[', "b": "\\"}}), 2),
        (weights({"__metadata__": {}}, 0), 0),
        (weights({}, 0), 0),
        (weights({"x": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, 8), 1),
        (
            weights(
                {name: {"dtype": "F4", "shape": [0, 7], "data_offsets": [0, 0]} for name in "xy"}, 0
            ),
            2,
        ),
    ],
)
def test_a_header_that_can_be_is_accepted(content: bytes, tensors: int, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert check_safetensors(tmp_path / FILE) == tensors


@pytest.mark.parametrize(
    "text",
    [
        b"{" + b" " * 30_000_000,
        b'{"' + b"a" * 30_000_000,
        b'{"a":' + b"[" * 30_000_000,
        b'{"a":{"shape":[' + b"[]," * 10_000_000 + b"0]}}",
        b'{"__metadata__":{' + b'"":"",' * 5_000_000 + b'"":""}',
    ],
    ids=["spaces", "name", "depth", "breadth", "metadata"],
)
def test_a_large_header_takes_no_more_memory_than_its_bytes(text: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(weights(text))
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            check_safetensors(tmp_path / FILE)
        assert tracemalloc.get_traced_memory()[1] < 2.2 * len(text)
    finally:
        tracemalloc.stop()


def _link(name: str, content: bytes) -> Edit:
    """Move a file out of the folder, and leave a link."""

    def edit(folder: Path) -> None:
        (folder.parent / "outside").write_bytes(
            (folder / name).read_bytes() if (folder / name).exists() else content
        )
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "outside")

    return edit


def _pipe(name: str) -> Edit:
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


def _write(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def _shard(name: object) -> Edit:
    return index({"weight_map": {"model.norm.weight": SHARD, "x": name}})


BOMB = "[" * 100_000 + "]" * 100_000
LADDER = '{"a":' * 40 + "0" + "}" * 40

FOLDERS: dict[str, tuple[Edit, str]] = {
    "parent": (_shard("../model.safetensors"), r"names '\.\./model"),
    "absolute": (_shard("/etc/model.safetensors"), "names '/etc"),
    "backslash": (_shard("..\\model.safetensors"), "beside it"),
    "null byte": (_shard("a\0.safetensors"), "beside it"),
    "pickle": (_shard("pytorch_model.bin"), r"names 'pytorch_model\.bin', no safetensors"),
    "no name": (_shard(None), "names None"),
    "missing": (_shard("other.safetensors"), r"lacks 'other\.safetensors'"),
    "linked shard": (
        lambda folder: (_shard("x.safetensors")(folder), _link("x.safetensors", b"")(folder)),
        "out of its folder",
    ),
    "linked weights": (_link(FILE, b""), "out of its folder"),
    "linked config": (_link("config.json", b""), "out of its folder"),
    "linked tokenizer": (_link("tokenizer.json", b""), "out of its folder"),
    "pipe for weights": (_pipe(FILE), "no ordinary file"),
    "pipe for config": (_pipe("config.json"), "no ordinary file"),
    "pipe for tokenizer": (_pipe("tokenizer.model"), "no ordinary file"),
    "deep index": (
        lambda folder: (index(0)(folder), _write(INDEX, BOMB)(folder)),
        "more than 100000 objects|nested",
    ),
    "huge index": (
        lambda folder: (index(0)(folder), os.truncate(folder / INDEX, 32_000_001)),
        "larger than 32000000",
    ),
    "deep config": (_write("config.json", BOMB[50_001:-50_001]), "nested too deeply"),
    "ladder": (_write("config.json", LADDER), "nested more than 32"),
    "wide config": (
        _write("config.json", json.dumps({"a": [[]] * 100_000})),
        "more than 100000 objects",
    ),
    "huge config": (
        lambda folder: os.truncate(folder / "config.json", 10_000_001),
        "larger than 10000000",
    ),
    "huge tokenizer": (
        lambda folder: os.truncate(folder / "tokenizer.json", 64_000_001),
        "larger than 64000000",
    ),
    "wide tokenizer": (_write("tokenizer.json", "[" * 2_000_001), "more than 2000000 objects"),
    "deep tokenizer config": (
        _write("tokenizer_config.json", BOMB[50_001:-50_001]),
        "nested too deeply",
    ),
    "special tokens": (_write("special_tokens_map.json", "[]"), "not a JSON object"),
    "adapter": (_write("adapter_config.json", '{"base_model_name_or_path": "x/y"}'), "merge it"),
    "distributed": (
        _write("shard-00001-model-00001-of-00001.safetensors", ""),
        "distributed checkpoint",
    ),
    "attention kernel": (
        config(attn_implementation="someone/kernel"),
        "names code from elsewhere, attn_implementation",
    ),
    "private attention": (
        config(_attn_implementation="someone/kernel"),
        "names code from elsewhere",
    ),
    "internal attention": (
        config(_attn_implementation_internal="someone/kernel@v1:f"),
        "names code from elsewhere",
    ),
    "experts kernel": (
        config(experts_implementation={"": "someone/kernel"}),
        "names code from elsewhere",
    ),
    "nested kernel": (
        config(text_config={"_attn_implementation": "someone/kernel"}),
        "names code from elsewhere",
    ),
    "listed kernel": (
        config(layers=[{"attn_implementation": ["eager"]}]),
        "names code from elsewhere",
    ),
    "other weights": (
        config(transformers_weights="other.safetensors"),
        "refers to other files by transformers_weights",
    ),
    "other config": (
        config(configuration_files=["config.4.0.0.json"]),
        "refers to other files by configuration_files",
    ),
    "address": (config(_name_or_path="https://example.com/model"), "names an address"),
    "nested quantization": (
        config(text_config={"quantization_config": {"quant_method": "gptq"}}),
        "quantized already",
    ),
    "compression": (
        config(compression_config={"quant_method": "compressed-tensors"}),
        "quantized already",
    ),
    "layers": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers 1000000000, more than the 29 tensors",
    ),
    "other tokenizer": (
        _write("tokenizer_config.json", '{"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}'),
        "other files",
    ),
    "other vocabulary": (
        _write("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}'),
        "'/etc/passwd', outside of it",
    ),
}


@pytest.mark.parametrize("read_weights", [True, False])
@pytest.mark.parametrize("case", list(FOLDERS))
def test_a_hostile_folder_is_refused_in_one_sentence(
    case: str, read_weights: bool, edited: Edited
) -> None:
    edit, reason = FOLDERS[case]
    folder = edited(edit)
    with pytest.raises(ModelError, match=reason) as caught:
        find_model(str(folder), folder.parent / "cache", read_weights=read_weights)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("family", list(CONFIGS))
def test_what_transformers_saves_is_accepted(family: str, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder(family)
    assert load_config(folder).model_type == CONFIGS[family].model_type


OLD = {
    "_name_or_path": "/fsx/checkpoints/step-240000",
    "_commit_hash": None,
    "_attn_implementation_autoset": True,
    "_attn_implementation": "flash_attention_2",
    "attn_implementation": None,
    "torch_dtype": "bfloat16",
    "dtype": ...,
    "transformers_version": "4.40.0",
    "auto_map": {
        "AutoConfig": "someone/else--own.Config",
        "AutoModelForCausalLM": "own.LlamaForCausalLM",
    },
    "custom_pipelines": {"text-generation": {"impl": "own.Pipeline", "pt": "AutoModelForCausalLM"}},
    "trust_remote_code": True,
    "quantization_config": None,
    "id2label": {"0": "_LABEL"},
}
OLD_TOKENIZER = {
    "auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]},
    "name_or_path": "/fsx/tokenizer",
    "special_tokens_map_file": "/etc/hostname",
    "tokenizer_file": "/no/such/machine/tokenizer.json",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<eos>",
    "trust_remote_code": False,
}


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_what_old_hub_models_say_is_ignored_and_left_in_the_folder(edited: Edited) -> None:
    folder = edited(
        code_of_its_own, config(**OLD), _write("tokenizer_config.json", json.dumps(OLD_TOKENIZER))
    )
    before = _digests(folder)
    found = find(folder)
    model = load_model(found, torch.float32, "cpu")
    assert load_tokenizer(found)("assert")["input_ids"]
    assert type(model).__module__.startswith("transformers.")
    assert model.config._attn_implementation == "sdpa"
    assert model.config.name_or_path == str(folder)
    assert not {"auto_map", "custom_pipelines", "trust_remote_code", "_commit_hash"} & set(
        model.config.to_dict()
    )
    assert not (folder / "trace").exists()
    assert _digests(folder) == before


def test_a_checkpoint_of_this_package_is_accepted(packed: PackedModel) -> None:
    check_checkpoint(packed("llama").folder)


@pytest.mark.parametrize("case", ["gptq", "kernel", "pickle", "truncated"])
def test_a_checkpoint_that_cannot_be_of_this_package_is_refused(
    case: str, packed: PackedModel, tmp_path: Path
) -> None:
    edits: dict[str, Edit] = {
        "gptq": config(quantization_config={"quant_method": "gptq"}),
        "kernel": config(attn_implementation="someone/kernel"),
        "pickle": pickled,
        "truncated": lambda folder: os.truncate(folder / FILE, 5000),
    }
    folder = tmp_path / "checkpoint"
    shutil.copytree(packed("llama").folder, folder)
    edits[case](folder)
    with pytest.raises(ModelError, match=str(folder)):
        check_checkpoint(folder)
    assert not (folder / "trace").exists()


def test_pickles_beside_safetensors_are_not_read(edited: Edited) -> None:
    folder = edited(
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    )
    load_model(find(folder), torch.float32, "cpu")


def test_links_within_the_folder_and_into_the_cache_of_the_hub_are_followed(
    edited: Edited, tmp_path: Path
) -> None:
    folder = edited(
        lambda folder: ((folder / FILE).rename(folder / "data"), (folder / FILE).symlink_to("data"))
    )
    found = find(folder)
    blobs, snapshot = (
        tmp_path / "models--x" / "blobs",
        tmp_path / "models--x" / "snapshots" / "0a1b",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for position, path in enumerate(folder.iterdir()):
        (blobs / str(position)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(position))
    assert find(snapshot).sha256 == found.sha256


def test_a_shard_may_hold_any_number_of_tensors_of_the_index(edited: Edited) -> None:
    folder = edited(index({"weight_map": {f"layer.{number}": SHARD for number in range(50_000)}}))
    assert find_model(str(folder), folder.parent / "cache", read_weights=False).path == folder
