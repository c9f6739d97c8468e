"""Promises of quantizer.models.side_files: what is copied as it is, and what tokens depend on."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from quantizer.errors import ModelError
from quantizer.models.side_files import (
    copy_side_files,
    find_side_files,
    remove_side_files,
    side_file_digests,
    tokenizer_sha256,
)
from tests.support.edited_models import Edit, config, find
from tests.support.quantized import Edited

SIDE_FILES = [
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "spiece.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
]
OTHERS = [
    "LICENSE",
    "README.md",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "plan.json",
    "report.json",
    "tokenizer.py",
    "tokenizer.pkl",
    "tokenizer (copy).json",
    "additional_chat_templates/notes.md",
    "original/tokenizer.model",
]


def fill(folder: Path) -> Path:
    for name in (*SIDE_FILES, *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"name": name}))
    return folder


def test_side_files_are_found_copied_and_removed(tmp_path: Path) -> None:
    model, copy = fill(tmp_path / "model"), tmp_path / "copy"
    assert list(find_side_files(model)) == sorted(SIDE_FILES)
    copy.mkdir()
    (copy / "tokenizer.json").write_text("another")
    assert list(copy_side_files(model, copy)) == sorted(SIDE_FILES)
    copied = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert copied == set(SIDE_FILES)
    assert all((copy / name).read_bytes() == (model / name).read_bytes() for name in copied)
    remove_side_files(copy)
    assert not list(copy.iterdir())


def test_their_digests_are_those_of_their_content(tmp_path: Path) -> None:
    model = fill(tmp_path)
    assert side_file_digests(model) == {
        name: sha256((model / name).read_bytes()).hexdigest() for name in SIDE_FILES
    }


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_side_file_that_leads_elsewhere_is_refused(name: str, edited: Edited) -> None:
    def link(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to("/etc/passwd")

    folder = edited(link)
    with pytest.raises(ModelError, match="leads out of its folder"):
        find_side_files(folder)
    with pytest.raises(ModelError, match="leads out of its folder"):
        find(folder)


def set_template(folder: Path) -> None:
    found = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(found | {"chat_template": "new"}))


def write(name: str, content: str = "{}") -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return edit


@pytest.mark.parametrize(
    ("edit", "changes"),
    [
        (set_template, False),
        (write("chat_template.jinja"), False),
        (write("additional_chat_templates/rag.jinja"), False),
        (write("generation_config.json"), False),
        (write("preprocessor_config.json"), False),
        (write("tokenizer_config.json"), True),
        (write("added_tokens.json"), True),
        (write("vocab.json"), True),
        (write("merges.txt"), True),
        (write("spiece.model"), True),
        (config(tokenizer_class="Other"), True),
    ],
)
def test_only_what_decides_tokens_changes_the_digest_of_the_tokenizer(
    edit: Edit, changes: bool, edited: Edited
) -> None:
    folder = edited()
    before = tokenizer_sha256(folder)
    edit(folder)
    assert (tokenizer_sha256(folder) != before) is changes


def test_no_side_file_is_in_the_digest_of_the_model(edited: Edited) -> None:
    folder = edited()
    before = find(folder)
    for name in find_side_files(folder):
        (folder / name).unlink()
    assert find(folder).sha256 == before.sha256
