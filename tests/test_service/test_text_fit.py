"""Texts and tokenizers that do not fit the model are refused at a dry run, and by each command."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import bitwright, run_options
from tests.support.tiny_models import VOCABULARY, make_tokenizer, save_tiny


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama, to be edited."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refused(model: Path, tmp_path: Path, *more: str) -> str:
    """Return the sentence with which a run of a model and its dry run are refused."""
    cache = tmp_path / "cache"
    options = [*run_options(model, cache, tmp_path / "out"), *more]
    dry, real = bitwright(*options, "--dry-run"), bitwright(*options)
    assert (dry.returncode, real.returncode) == (2, 2), real.stderr
    sentence = dry.stderr.strip()
    assert real.stderr.strip().endswith(sentence)
    assert not list(cache.glob("profile/*"))
    return " ".join(sentence.split())


def test_windows_beyond_the_table_of_positions(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "opt", "opt")
    sentence = refused(model, tmp_path, "--tokens", "257")
    assert "windows of 257 tokens are longer than the 256 positions of model" in sentence
    options = run_options(model, tmp_path / "cache", tmp_path / "out")
    assert bitwright(*options, "--tokens", "256", "--dry-run").returncode == 0


def test_tokens_beyond_the_rows_of_the_embedding(model: Path, tmp_path: Path) -> None:
    make_tokenizer(VOCABULARY + 200).save_pretrained(model)
    sentence = refused(model, tmp_path)
    assert "has token 5" in sentence
    assert f"the model's embedding has {VOCABULARY} rows" in sentence


def test_a_tokenizer_without_the_models_tokens(model: Path, tmp_path: Path) -> None:
    make_tokenizer(260).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 300]}))
    assert "has 260 tokens, and lacks token 300, its eos_token_id" in refused(model, tmp_path)


def test_a_tokenizer_of_a_fraction_of_the_vocabulary(model: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token: number for token, number in vocabulary.items() if number < 100
    }
    tokenizer["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"has 100 tokens, its embedding {VOCABULARY} rows" in refused(model, tmp_path)


def test_a_text_that_is_too_short(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    sentence = refused(model, tmp_path, "--calibration", str(tmp_path / "short.txt"))
    assert "give more text, or ask for fewer or shorter windows" in sentence


def test_the_models_own_tokenizer_may_have_more_tokens_than_the_text_uses(
    model: Path, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|never used|>"])
    tokenizer.save_pretrained(model)
    options = run_options(model, tmp_path / "cache", tmp_path / "out")
    assert bitwright(*options, "--dry-run").returncode == 0


def test_profile_and_evaluate_refuse_it_too(model: Path, tmp_path: Path) -> None:
    make_tokenizer(VOCABULARY + 200).save_pretrained(model)
    cache = ["--cache", str(tmp_path / "cache")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("{}")
    done = bitwright("evaluate", model, tmp_path / "out", *cache, "--tokens", "64")
    assert done.returncode == 2
    assert "rows" in done.stderr
    profiled = bitwright(
        "profile",
        model,
        "--budget",
        "4bpw",
        "--out",
        tmp_path / "profile",
        "--tokens",
        "64",
        *cache,
    )
    assert profiled.returncode == 2
    assert "rows" in profiled.stderr
