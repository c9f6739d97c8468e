"""Bad input gets one clear sentence, exit code 2 or 3, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantizer.errors import MemoryShort
from service.errors import exit_code_of
from tests.support.commands import bitwright, run_options


def refuse(model: Path | str, tmp_path: Path, *extra: str, budget: str = "4bpw") -> tuple[int, str]:
    """Run a job that must fail, check that nothing was left, and return (exit code, message)."""
    out = tmp_path / "out"
    done = bitwright(*run_options(Path(model), tmp_path / "cache", out, budget), *extra, "--json")
    assert "Traceback" not in done.stderr, done.stderr
    assert not out.exists()
    assert not [
        path
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    ]
    document = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode
    assert document["message"].split()[0] in done.stderr
    return done.returncode, document["message"]


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "broken"))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_unknown_model(tmp_path: Path) -> None:
    code, message = refuse("no-such-org/no-such-model", tmp_path)
    assert code == 2
    assert "no such folder" in message


def test_folder_without_weights(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").unlink()
    code, message = refuse(broken, tmp_path)
    assert (code, "no weights" in message) == (2, True)


def test_pickled_weights_are_refused(broken: Path, tmp_path: Path) -> None:
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    code, message = refuse(broken, tmp_path)
    assert (code, "safetensors" in message) == (2, True)


def test_code_of_a_model_is_never_run(broken: Path, tmp_path: Path) -> None:
    (broken / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(
        broken,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    code, message = refuse(broken, tmp_path)
    assert (code, "never run" in message) == (2, True)
    assert not (tmp_path / "ran").exists()


def test_budget_below_the_smallest_plan_names_the_feasible_range(
    tiny_llama: Path, tmp_path: Path
) -> None:
    code, message = refuse(tiny_llama, tmp_path, budget="1.5bpw")
    assert code == 3
    assert "feasible are" in message
    assert "bpw" in message


def test_budget_above_the_full_size_stores_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    code, message = refuse(tiny_llama, tmp_path, budget="1MB")
    assert (code, "use the original model" in message) == (3, True)


def test_whole_file_budget_below_the_unquantized_parts(tiny_llama: Path, tmp_path: Path) -> None:
    code, message = refuse(tiny_llama, tmp_path, budget="10kB")
    assert code == 3
    assert "not quantized" in message


@pytest.mark.parametrize("budget", ["lots", "3", "-2bpw", "0bpw", "2parsecs"])
def test_budget_that_is_no_size(tiny_llama: Path, tmp_path: Path, budget: str) -> None:
    code, message = refuse(tiny_llama, tmp_path, budget=budget)
    assert (code, "bpw" in message) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        ("run", "MODEL", "--budget", "4bpw", "--out", "OUT", "--cache", "FILE"),
        ("serve", "--data", "FILE"),
        ("serve", "--data", "FILE/data"),
        ("worker", "--data", "FILE"),
    ],
    ids=" ".join,
)
def test_a_folder_that_is_a_file(
    tiny_llama: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    names = {"MODEL": str(tiny_llama), "OUT": str(tmp_path / "out")}
    file = str(tmp_path / "file")
    done = bitwright(*(names.get(part, part.replace("FILE", file)) for part in command))
    assert done.returncode == 3
    said = done.stderr.replace("\n", " ")
    assert f"error StorageError: folder '{file}" in said
    assert "cannot be made" in said
    assert "choose another place" in said


@pytest.mark.parametrize(("content", "word"), [("", "empty"), ("too short", "needed")])
def test_text_that_is_too_short(tiny_llama: Path, tmp_path: Path, content: str, word: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(content)
    for option in ("--calibration", "--evaluation"):
        code, message = refuse_text(tiny_llama, tmp_path / option, option, text)
        assert (code, word in message) == (2, True)


def refuse_text(model: Path, tmp_path: Path, option: str, text: Path) -> tuple[int, str]:
    out = tmp_path / "out"
    done = bitwright(*run_options(model, tmp_path / "cache", out), option, text, "--json")
    assert not out.exists()
    assert not (tmp_path / "cache" / "profile").exists()
    return done.returncode, json.loads(done.stdout)["message"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_tensor(
    broken: Path, tmp_path: Path, value: float
) -> None:
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, message = refuse(broken, tmp_path)
    assert (code, name in message) == (2, True)


def test_truncated_safetensors(broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, message = refuse(broken, tmp_path)
    assert (code, "truncated" in message) == (2, True)


def test_truncated_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    code, message = refuse(file, tmp_path)
    assert (code, "GGUF" in message) == (2, True)


def test_plan_of_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    layer = {"fidelity": "int4g64", "block": 0, "kind": "x", "shape": [8, 8]}
    (tmp_path / "plan.json").write_text(
        json.dumps({"schema": "bitwright.plan/1", "layers": {"other.0.x": layer}})
    )
    done = bitwright(
        "quantize",
        tiny_llama,
        "--plan",
        tmp_path / "plan.json",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "c",
    )
    assert done.returncode == 2
    assert "make a plan for it" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


OUT_OF_RANGE = {
    "--probe-tokens": "0",
    "--guard-windows": "0",
    "--group-size": "50",
    "--device": "tpu",
    "--tokens": "0",
    "--signal": "magic",
    "--coupling": "some",
    "--context": "empty",
}


@pytest.mark.parametrize(("option", "value"), OUT_OF_RANGE.items())
def test_options_out_of_range(tiny_llama: Path, tmp_path: Path, option: str, value: str) -> None:
    code, message = refuse(tiny_llama, tmp_path, option, value)
    assert (code, value in message) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("when", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_gpu_that_is_missing(tiny_llama: Path, tmp_path: Path, when: tuple[str, ...]) -> None:
    code, message = refuse(tiny_llama, tmp_path, "--device", "cuda", *when)
    assert (code, message) == (2, "device 'cuda': torch finds no GPU here; give cpu or auto")


def test_a_signal_that_cannot_be_measured_in_the_original_says_which_can(
    tiny_llama: Path, tmp_path: Path
) -> None:
    code, message = refuse(tiny_llama, tmp_path, "--context", "original")
    assert (code, "use one of output" in message) == (2, True)


def test_too_little_memory_is_what_cannot_be_done_and_no_bug() -> None:
    assert exit_code_of(MemoryShort("one window does not fit")) == 3


def test_a_profile_is_not_measured_for_a_folder_in_use(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    folders = ("--out", tmp_path / "out", "--cache", tmp_path / "cache")
    done = bitwright("profile", tiny_llama, "--budget", "4bpw", *folders)
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)
    assert not (tmp_path / "cache").exists()
