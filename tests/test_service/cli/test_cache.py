"""The command cache: what is kept of finished stages is listed, and goes unless it is in use."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from quantizer.durable import PartStore
from service.storage.cache_entry import read_entries
from service.storage.cache_limit import LIMIT, read_limit, write_limit
from service.storage.stage_store import StageKey, StageStore
from service.storage.unfinished_runs import ABANDONED_DAYS, UnfinishedRun
from tests.support.commands import bitwright, bitwright_json, environment, run_options

DAY = 86400


def key(number: int, stage: str = "profile") -> StageKey:
    return StageKey(stage, {"number": number})


def filled(size: int) -> Callable[[Path, PartStore], None]:
    """Return what makes a stage of one file of so many bytes."""

    def make(folder: Path, _: PartStore) -> None:
        (folder / "data").write_bytes(bytes(size))

    return make


def put(store: StageStore, number: int, *, size: int = 1000, days: float = 0) -> Path:
    """Make a stage that was last used so many days ago."""
    folder = store.get(key(number), filled(size))
    used = time.time() - days * DAY
    os.utime(folder / "manifest.json", (used, used))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(root: Path) -> StageStore:
    """A store as another process has it, which is not asked for its stages again."""
    return StageStore(root).for_model("org/model", Path("/elsewhere"))


def cache(root: Path, *options: str) -> Any:
    return bitwright_json("cache", "--cache", root, *options)


def test_entries_are_listed_by_model_and_age_with_their_sizes(root: Path) -> None:
    other = StageStore(root).for_model("other", Path("/elsewhere"))
    put(StageStore(root).for_model("model", Path("/elsewhere")), 1, size=500, days=1)
    put(other, 2, size=200, days=1)
    put(other, 3, size=100, days=9)
    found = cache(root)
    rows = [(row["model"], row["stage"], row["size_bytes"]) for row in found["entries"]]
    assert rows == [("model", "profile", 500), ("other", "profile", 100), ("other", "profile", 200)]
    assert found["size_bytes"] == 800
    assert all(row["finished"] and not row["in_use"] for row in found["entries"])
    lines = bitwright("cache", "--cache", root).stdout
    assert "org" not in lines
    assert lines.count("other") == 2
    assert "800 B of at most" in lines


def test_an_empty_cache_has_nothing_and_is_not_created(root: Path) -> None:
    assert cache(root)["entries"] == []
    assert not root.exists()


def test_old_entries_are_removed_and_young_ones_stay(root: Path, store: StageStore) -> None:
    old, young = put(store, 1, days=40), put(store, 2, days=20)
    found = cache(root, "--older-than", "30d")
    assert found["removed"] == [old.relative_to(root).as_posix()]
    assert (old.exists(), young.exists()) == (False, True)
    assert found["size_bytes"] == found["removed_bytes"] == 1000


def test_the_least_recently_used_go_first_until_the_rest_is_small_enough(
    root: Path, store: StageStore
) -> None:
    folders = [put(store, number, days=number) for number in (3, 1, 4, 2)]
    found = cache(root, "--keep", "2kB")
    assert [folder.exists() for folder in folders] == [False, True, False, True]
    assert found["size_bytes"] == 2000


def test_using_a_stage_makes_it_the_last_to_go(root: Path, store: StageStore) -> None:
    first, second = put(store, 1, days=9), put(store, 2, days=8)
    StageStore(root).get(key(1), filled(1000))
    cache(root, "--keep", "1kB")
    assert (first.exists(), second.exists()) == (True, False)


def test_a_dry_run_removes_nothing_and_says_the_same(root: Path, store: StageStore) -> None:
    for number in (1, 2, 3):
        put(store, number, days=10 * number)
    options = ("--older-than", "25d", "--keep", "1kB", "--limit", "5kB")
    planned = cache(root, "--dry-run", *options)
    assert len(list((root / "profile").glob("*/manifest.json"))) == 3
    assert read_limit(root) != 5000
    done = cache(root, *options)
    assert planned["removed"] == done["removed"] != []
    assert (planned["size_bytes"], done["size_bytes"]) == (3000, 1000)
    assert read_limit(root) == 5000


def test_what_a_process_holds_the_lock_of_stays(root: Path, store: StageStore) -> None:
    folder = put(store, 1, days=99)
    with FileLock(f"{folder}.lock"):
        for options in (("--dry-run",), ()):
            found = cache(root, "--older-than", "1d", *options)
            assert found["removed"] == []
            assert found["in_use"] == [folder.relative_to(root).as_posix()]
        assert cache(root)["entries"][0]["in_use"]
    cache(root, "--older-than", "1d")
    assert not folder.exists()


def test_what_an_unfinished_run_uses_stays_until_it_ends(root: Path) -> None:
    run = StageStore(root, UnfinishedRun(root, "mine"))
    mine, other = put(run, 1, days=9), put(StageStore(root), 2, days=9)
    cache(root, "--older-than", "0m")
    assert (mine.exists(), other.exists()) == (True, False)
    run.end_run()
    cache(root, "--older-than", "0m")
    assert not mine.exists()


def test_an_abandoned_run_keeps_nothing(root: Path) -> None:
    mine = put(StageStore(root, UnfinishedRun(root, "mine")), 1, days=99)
    long_ago = time.time() - (ABANDONED_DAYS + 1) * DAY
    os.utime(root / "runs" / "mine.stages", (long_ago, long_ago))
    cache(root, "--older-than", "0m")
    assert not mine.exists()


def test_parts_of_a_stage_that_was_interrupted_are_listed_and_stay_with_their_run(
    root: Path,
) -> None:
    def interrupted(_: Path, parts: PartStore) -> None:
        parts.write("0", bytes(100))
        raise KeyboardInterrupt

    run = StageStore(root, UnfinishedRun(root, "mine")).for_model("m", Path("/elsewhere"))
    with pytest.raises(KeyboardInterrupt):
        run.get(key(1), interrupted)
    (row,) = cache(root)["entries"]
    assert (row["model"], row["finished"], row["in_use"]) == ("m", False, True)
    assert row["size_bytes"] > 100
    assert cache(root, "--older-than", "0m")["removed"] == []
    run.end_run()
    assert len(cache(root, "--older-than", "0m")["removed"]) == 1
    assert not list((root / "profile").glob("*.work"))


def test_a_converted_model_stays_while_any_run_is_unfinished(root: Path) -> None:
    model = root / "models" / "gguf-1"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(300))
    run = StageStore(root, UnfinishedRun(root, "mine")).for_model("m.gguf", model)
    (row,) = cache(root)["entries"]
    assert (row["model"], row["stage"], row["size_bytes"]) == ("m.gguf", "models", 300)
    cache(root, "--older-than", "0m")
    assert model.exists()
    run.end_run()
    UnfinishedRun(root, "another").note(root / "profile" / "x", "m")
    assert cache(root, "--older-than", "0m")["in_use"] == ["models/gguf-1"]
    UnfinishedRun(root, "another").end()
    cache(root, "--older-than", "0m")
    assert not model.exists()


def test_the_default_limit_is_half_of_the_free_space_and_recorded_at_first_use(
    root: Path, store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(root))
    assert not (root / LIMIT).exists()
    free = bitwright_json("doctor")["cache_free_bytes"]
    put(store, 1)
    limit = read_limit(root)
    assert limit == pytest.approx(free / 2, rel=0.1)
    put(store, 2)
    assert read_limit(root) == limit == cache(root)["limit_bytes"]


def test_doctor_tells_size_and_limit(
    root: Path, store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(root))
    before = bitwright_json("doctor")
    assert before["cache_bytes"] == 0
    assert before["cache_limit_bytes"] == pytest.approx(before["cache_free_bytes"] / 2, rel=0.1)
    put(store, 1)
    write_limit(root, 12_345)
    after = bitwright_json("doctor")
    assert (after["cache"], after["cache_bytes"], after["cache_limit_bytes"]) == (
        str(root),
        1000,
        12_345,
    )


def test_a_new_stage_above_the_limit_removes_the_least_recently_used(root: Path) -> None:
    cache(root, "--limit", "2500B")
    first, second = put(StageStore(root), 1, days=2), put(StageStore(root), 2, days=3)
    third = put(StageStore(root), 3)
    assert [folder.exists() for folder in (first, second, third)] == [True, False, True]


def test_a_run_keeps_its_own_stages_even_above_the_limit(root: Path) -> None:
    write_limit_in(root, 1500)
    run = StageStore(root, UnfinishedRun(root, "mine"))
    folders = [put(run, number, days=number) for number in (1, 2, 3)]
    assert all(folder.exists() for folder in folders)
    run.end_run()
    put(StageStore(root), 4)
    assert not any(folder.exists() for folder in folders)


def test_one_process_keeps_what_it_has_used(root: Path) -> None:
    write_limit_in(root, 1500)
    store = StageStore(root)
    folders = [put(store, number, days=number) for number in (1, 2, 3)]
    assert all(folder.exists() for folder in folders)


def write_limit_in(root: Path, size: int) -> None:
    root.mkdir()
    write_limit(root, size)


WORKS = """
import sys
from pathlib import Path
from service.storage.stage_store import StageKey, StageStore
from service.storage.unfinished_runs import UnfinishedRun

root, hold, go = map(Path, sys.argv[1:])
store = StageStore(root, UnfinishedRun(root, "other"))

def fill(folder, parts):
    (folder / "data").write_bytes(bytes(1000))

def wait(folder, parts):
    fill(folder, parts)
    hold.touch()
    while not go.exists():
        pass

first = store.get(StageKey("profile", {"number": 1}), fill)
second = store.get(StageKey("profile", {"number": 2}), wait)
assert (first / "data").is_file() and (second / "data").is_file()
store.end_run()
"""


def test_removal_beside_a_run_of_another_process_takes_nothing_of_it(
    root: Path, tmp_path: Path
) -> None:
    hold, go = tmp_path / "hold", tmp_path / "go"
    other = put(StageStore(root), 3)
    command = [sys.executable, "-c", WORKS, root, hold, go]
    process = subprocess.Popen(command, env=environment())
    while not hold.exists():
        assert process.poll() is None
        time.sleep(0.01)
    found = cache(root, "--older-than", "0m")
    assert found["removed"] == [other.relative_to(root).as_posix()]
    go.touch()
    assert process.wait(60) == 0
    assert len(read_entries(root)) == 2
    assert len(cache(root, "--older-than", "0m")["removed"]) == 2


def test_a_run_of_the_command_line_notes_its_stages_until_it_has_ended(
    tiny_llama: Path, tmp_path: Path
) -> None:
    root, command = tmp_path / "cache", ["profile", str(tiny_llama), "--budget", "4bpw"]
    small = run_options(tiny_llama, root, tmp_path / "out")
    options = [*small[4:8], *small[small.index("--calibration-windows") :]]
    del options[options.index("--guard-windows") : options.index("--guard-windows") + 2]
    bitwright_json(*command, *options)
    assert not list((root / "runs").iterdir())
    entries = cache(root)["entries"]
    assert {row["model"] for row in entries} == {tiny_llama.name}
    manifests = [json.loads(path.read_text()) for path in root.glob("*/*/manifest.json")]
    assert {each["model"] for each in manifests} == {tiny_llama.name}
    assert sum(each["bytes"] for each in manifests) == cache(root)["size_bytes"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--older-than", "30"), "such as 30d"),
        (("--older-than", "-3d"), "such as 30d"),
        *(
            ((option, size), f"size {size!r}: give bytes above 0 with their unit, such as 20GB")
            for option in ("--keep", "--limit")
            for size in ("3bpw", "much", "1,5GB", "1000", "-3GB", "0", "0B", "")
        ),
    ],
)
def test_ages_and_sizes_that_make_no_sense_are_bad_input(
    root: Path, store: StageStore, options: tuple[str, ...], word: str
) -> None:
    folder = put(store, 1, days=99)
    done = bitwright("cache", "--cache", root, *options)
    assert done.returncode == 2
    assert word in done.stderr
    assert folder.exists()
