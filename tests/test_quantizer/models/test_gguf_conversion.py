"""Promises of quantizer.models.source for GGUF files and for dry runs.

What is converted is the same model, and what is not read.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantizer.errors import ModelError
from quantizer.models.loading import load_model, load_tokenizer
from quantizer.models.source import find_model
from tests.support.edited_models import FILE, find, tensors, without
from tests.support.gguf_files import write_gguf
from tests.support.paths import ROOT
from tests.support.quantized import PACKED_TOKENS, Edited, TinyFolder, TinyModel, logits_of

TEXT = "The assert statement, in Python"


@pytest.fixture(scope="module")
def gguf_file(
    tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the tiny llama as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), tiny_folder("llama").path / "tokenizer.json")
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_of(
    gguf_file: Path, tiny_folder: TinyFolder, tiny_model: TinyModel, tmp_path: Path
) -> None:
    found = find_model(str(gguf_file), tmp_path)
    assert (found.name, found.dtype, found.path.parent) == (str(gguf_file), "float16", tmp_path)
    converted = load_model(found, torch.float32, "cpu")
    expected = logits_of(tiny_model("llama"), PACKED_TOKENS)
    assert torch.allclose(logits_of(converted, PACKED_TOKENS), expected, atol=1e-3)
    expected_ids = load_tokenizer(tiny_folder("llama"))(TEXT)["input_ids"]
    assert load_tokenizer(found)(TEXT, add_special_tokens=False)["input_ids"] == expected_ids


def test_a_gguf_file_is_converted_once(gguf_file: Path, tmp_path: Path) -> None:
    first = find_model(str(gguf_file), tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in first.path.iterdir()}
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(gguf_file.read_bytes())
    second = find_model(str(renamed), tmp_path)
    assert (second.path, second.sha256) == (first.path, first.sha256)
    assert {file.name: file.stat().st_mtime_ns for file in second.path.iterdir()} == times


CONVERT = """
import sys, time
from pathlib import Path
from quantizer.models.source import find_model
file, cache, mine = map(Path, sys.argv[1:])
mine.touch()
while len(list(mine.parent.glob("ready.*"))) < 3:
    time.sleep(0.01)
print(find_model(str(file), cache).sha256)
"""


def test_processes_that_ask_for_one_gguf_file_at_once_all_get_it(
    gguf_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", CONVERT, str(gguf_file), str(cache)]
    processes = [
        subprocess.Popen(
            [*command, str(tmp_path / f"ready.{number}")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, ended
    found = find_model(str(gguf_file), cache)
    assert {out.split()[-1] for out, _ in ended} == {found.sha256}
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [found.path]


def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(
    gguf_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"GGUF file '.*broken\.gguf' cannot be read"):
        find_model(str(broken), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_dry_run_on_a_gguf_file_finds_configuration_and_tokenizer_alone(
    gguf_file: Path, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    found = find_model(str(gguf_file), tmp_path, read_weights=False)
    assert found.sha256 == ""
    assert json.loads((found.path / "config.json").read_text())["num_hidden_layers"] == 3
    assert not list(found.path.glob("*.safetensors"))
    expected_ids = load_tokenizer(tiny_folder("llama"))(TEXT)["input_ids"]
    assert load_tokenizer(found)(TEXT, add_special_tokens=False)["input_ids"] == expected_ids


def test_a_dry_run_sees_the_file_of_today(
    gguf_file: Path, tiny_model: TinyModel, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_file.read_bytes())
    first = find_model(str(file), tmp_path / "cache", read_weights=False)
    assert find_model(str(file), tmp_path / "cache", read_weights=False).path == first.path
    model = tiny_model("llama")
    model.config.max_position_embeddings = 128
    write_gguf(file, model, tiny_folder("llama").path / "tokenizer.json")
    second = find_model(str(file), tmp_path / "cache", read_weights=False)
    assert json.loads((second.path / "config.json").read_text())["max_position_embeddings"] == 128
    assert first.path.is_dir()


def test_a_dry_run_does_not_stand_in_the_way_of_the_real_one(
    gguf_file: Path, tmp_path: Path
) -> None:
    find_model(str(gguf_file), tmp_path, read_weights=False)
    found = find_model(str(gguf_file), tmp_path)
    assert found.sha256
    assert (found.path / FILE).is_file()


def test_a_dry_run_on_a_folder_reads_no_values(edited: Edited) -> None:
    folder = edited(tensors(lambda all_: all_["model.norm.weight"].fill_(float("nan"))))
    found = find_model(str(folder), folder.parent / "cache", read_weights=False)
    assert (found.path, found.dtype, found.sha256) == (folder, "bfloat16", "")
    with pytest.raises(ModelError, match="NaN"):
        find(folder)


def test_a_dry_run_refuses_weights_that_are_truncated_or_missing(edited: Edited) -> None:
    folder = edited(lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100]))
    with pytest.raises(ModelError, match="damaged or truncated"):
        find_model(str(folder), folder.parent / "cache", read_weights=False)
    without(FILE)(folder)
    with pytest.raises(ModelError, match="no weights"):
        find_model(str(folder), folder.parent / "cache", read_weights=False)
