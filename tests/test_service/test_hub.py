"""Models of the hub on the command line: what a dry run says of them, and what it downloads."""

from pathlib import Path

from tests.support.commands import bitwright, bitwright_json, run_options
from tests.support.fake_hub import SHARDS, TINY, FakeHub


def test_a_dry_run_says_what_a_run_downloads_and_downloads_no_weights(
    hub: FakeHub, tiny_llama: Path, tmp_path: Path
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    here = bitwright_json(*run_options(tiny_llama, cache, out), "--dry-run")
    options = run_options(Path(TINY), cache, out)
    afar = bitwright_json(*options, "--dry-run")
    weights = (tiny_llama / "model.safetensors").stat().st_size
    assert (here["download_bytes"], afar["download_bytes"]) == (0, weights)
    assert {**afar, "model": here["model"], "download_bytes": 0} == here
    assert hub.sent["model.safetensors"] < 5_000
    report = bitwright_json(*options)
    assert hub.sent["model.safetensors"] >= weights
    assert report["model"]["name"] == TINY
    assert bitwright_json(*options, "--dry-run")["download_bytes"] == 0


def test_a_revision_is_part_of_the_name(hub: FakeHub, tmp_path: Path) -> None:
    named = f"{SHARDS}@v2"
    options = run_options(Path(named), tmp_path / "cache", tmp_path / "out")
    estimate = bitwright_json(*options, "--dry-run")
    assert estimate["model"] == named
    assert estimate["download_bytes"] > 100_000
    assert hub.sent["config.json"]


def test_without_network_the_sentence_says_so(tmp_path: Path) -> None:
    options = run_options(Path(TINY), tmp_path / "cache", tmp_path / "out")
    refused = bitwright(*options, "--dry-run")
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE is set; unset it, or download the model first" in refused.stderr
