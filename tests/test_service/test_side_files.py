"""Tokenizer, templates and defaults are delivered as they are in the model's folder now."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from service.errors import OutputError
from service.report import schema
from service.report.deliver import deliver
from service.report.document import Report
from tests.support.commands import SMALL, SmallRun, bitwright, bitwright_json, run_options

MESSAGES = [{"role": "user", "content": "Hello"}]


def stages(cache: Path) -> set[Path]:
    return {path.parent.relative_to(cache) for path in cache.glob("*/*/manifest.json")}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama, to be edited."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(model: Path) -> dict[str, str]:
    """Edit or add side files, and return the content of each."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    defaults = {"do_sample": False, "temperature": 0.25, "eos_token_id": 0}
    edited = {
        "chat_template.jinja": "{% for m in messages %}<new>{{ m.content }}{% endfor %}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "generation_config.json": json.dumps(defaults),
        "processor_config.json": "{}",
        "tokenizer_config.json": json.dumps(config | {"model_max_length": 77}),
    }
    for name, content in edited.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    return edited


def test_edited_side_files_are_delivered_and_nothing_else_is_made_again(
    model: Path, warm_cache: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    edited, before = edit(model), stages(warm_cache)
    out = tmp_path / "out"
    report = bitwright_json(*run_options(model, warm_cache, out))
    for name, content in edited.items():
        assert (out / name).read_text() == content
        assert report["side_files"][name] == sha256(content.encode()).hexdigest()
    assert (out / "model.safetensors").read_bytes() == (
        small_run.out / "model.safetensors"
    ).read_bytes()
    # an edited tokenizer may give other tokens, so its windows are cut again: to the same tokens
    assert {path.parent.name for path in stages(warm_cache) - before} == {"calibration"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "<new>Hello"
    assert GenerationConfig.from_pretrained(out).temperature == 0.25


def test_a_template_alone_makes_no_stage_again(
    model: Path, warm_cache: Path, tmp_path: Path
) -> None:
    before = stages(warm_cache)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    bitwright_json(*run_options(model, warm_cache, tmp_path / "out"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert stages(warm_cache) == before


def test_side_files_that_were_removed_are_not_delivered_from_the_cache(
    model: Path, module_cache: Path, tmp_path: Path
) -> None:
    edited = edit(model)
    bitwright_json(*run_options(model, module_cache, tmp_path / "first"))
    for name in set(edited) - {"tokenizer_config.json"}:
        (model / name).unlink()
    report = bitwright_json(*run_options(model, module_cache, tmp_path / "second"))
    assert set(report["side_files"]) == {"tokenizer.json", "tokenizer_config.json"}
    delivered = {path.name for path in (tmp_path / "second").iterdir()}
    assert "generation_config.json" in edited
    assert delivered.isdisjoint(set(edited) - {"tokenizer_config.json"})
    # the defaults of the configuration stand in
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert loaded.generation_config.temperature != 0.25


def test_a_quantized_model_has_the_side_files_of_today_too(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    plan, cache = small_run.out / "plan.json", tmp_path / "cache"
    quantize = ["quantize", model, "--plan", plan, "--cache", cache, "--effort", "fast"]
    options = [each for pair in zip(SMALL[::2], SMALL[1::2], strict=True) for each in pair]
    options = options[:4] + options[-2:]
    bitwright_json(*quantize, *options, "--out", tmp_path / "first")
    edited = edit(model)
    bitwright_json(*quantize, *options, "--out", tmp_path / "second")
    for name, content in edited.items():
        assert (tmp_path / "second" / name).read_text() == content


def test_the_report_keeps_to_its_schema(small_run: SmallRun) -> None:
    Draft202012Validator(schema.report_schema()).validate(small_run.report)
    assert set(small_run.report["side_files"]) == {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_file_that_is_edited_after_the_report_was_made_is_not_delivered(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    report: Any = Report.from_json(small_run.report)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"tokenizer\.json' was edited while the run ended"):
        deliver(tmp_path / "again", small_run.out, model, report)
    assert not (tmp_path / "again").exists()
    assert bitwright("report", small_run.out).returncode == 0
