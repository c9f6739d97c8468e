"""Runs that are killed, stopped, or find their cache damaged, and what they leave behind."""

import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.commands import (
    PROGRAM,
    EndedTooSoon,
    SmallRun,
    bitwright,
    bitwright_json,
    environment,
    run_options,
    stop_when,
)
from tests.support.gguf_files import write_gguf

WEIGHTS = "model.safetensors"


def stages(cache: Path) -> dict[str, dict[str, str]]:
    """Return the checksums that the finished stages of a cache recorded."""
    found = cache.glob("*/*/manifest.json")
    return {
        str(path.parent.relative_to(cache)): json.loads(path.read_text())["sha256"]
        for path in found
    }


def kill_in_stage(options: list[str], cache: Path, stage: str, part: str) -> None:
    """Remove a stage, and kill a run that makes it again once a part is there."""
    out = Path(options[options.index("--out") + 1])
    for _ in range(3):
        shutil.rmtree(cache / stage)
        if stage == "candidates":  # only a profile that is made anew needs them
            shutil.rmtree(cache / "profile")
        shutil.rmtree(out, ignore_errors=True)
        try:
            killed = stop_when(
                options, lambda: any(cache.glob(f"{stage}/*.work/{part}")), signal.SIGKILL
            )
        except EndedTooSoon:
            continue
        assert killed.returncode == -signal.SIGKILL
        return
    raise AssertionError(f"stage {stage} was too quick three times")


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("candidates", "block-0001.part"),
        ("profile", "shares-1-0001.part"),
        ("checkpoint", "block-0001.part"),
        ("evaluation", "batch-000000.part"),
    ],
)
def test_killed_run_goes_on_to_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun, warm_cache: Path, stage: str, part: str
) -> None:
    cache, out = warm_cache, tmp_path / "out"
    options = run_options(tiny_llama, cache, out)
    kill_in_stage(options, cache, stage, part)
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in cache.glob(f"{stage}/*.work/*.part")}

    bitwright_json(*options)

    assert kept
    assert (out / WEIGHTS).read_bytes() == (small_run.out / WEIGHTS).read_bytes()
    assert stages(cache) == stages(small_run.cache)
    assert not list(cache.rglob("*.work"))
    assert not list(cache.rglob("*.new"))


def test_interrupt_says_how_to_go_on_and_exits_with_130(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    options = run_options(tiny_llama, cache, out)
    stopped = stop_when(
        options, lambda: any(cache.glob("candidates/*.work/block-0000.part")), signal.SIGINT
    )

    assert stopped.returncode == 130
    assert "run the same command again" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not out.exists()
    bitwright_json(*options)
    assert (out / WEIGHTS).read_bytes() == (small_run.out / WEIGHTS).read_bytes()


def test_damaged_stage_is_made_again_with_a_warning(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun, warm_cache: Path
) -> None:
    cache = warm_cache
    (arrays,) = cache.glob("profile/*/profile.npz")
    arrays.write_bytes(arrays.read_bytes()[:-7] + b"garbage")

    done = bitwright(*run_options(tiny_llama, cache, tmp_path / "out"))

    assert done.returncode == 0, done.stderr
    assert "is damaged" in done.stderr
    assert stages(cache) == stages(small_run.cache)


def test_output_folder_in_use_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")

    refused = bitwright(*run_options(tiny_llama, tmp_path / "cache", out))

    assert refused.returncode == 2
    assert "not empty" in refused.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "cache" / "profile").exists()


def run_on_small_disk(program: list[str], file_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run a program under a limit on the size of files.

    It makes real writes fail in the way a full disk does.
    """

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        program, capture_output=True, text=True, check=False, preexec_fn=limit, env=environment()
    )


def test_full_disk_is_reported_and_leaves_nothing_half_written(
    tiny_llama: Path, tmp_path: Path, small_run: SmallRun
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    program = [*PROGRAM, *run_options(tiny_llama, cache, out)]

    full = run_on_small_disk(program, 30_000)

    assert full.returncode == 3, full.stderr
    assert "make room" in full.stderr
    assert not out.exists()
    assert not list(cache.rglob("*.tmp"))
    assert not list(cache.rglob("*.new"))
    bitwright_json(*run_options(tiny_llama, cache, out))
    assert (out / WEIGHTS).read_bytes() == (small_run.out / WEIGHTS).read_bytes()


@pytest.mark.parametrize("file_bytes", [100, 100_000], ids=["configuration", "weights"])
def test_full_disk_while_a_model_is_converted_is_reported_and_leaves_nothing(
    file_bytes: int, tiny_llama: Path, tmp_path: Path
) -> None:
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    write_gguf(file, model, tiny_llama / "tokenizer.json")

    program = [*PROGRAM, *run_options(file, cache, tmp_path / "out")]
    full = run_on_small_disk(program, file_bytes)

    assert full.returncode == 3, full.stderr
    assert "make room" in full.stderr
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]
