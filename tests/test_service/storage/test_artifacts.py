"""The artifact store keeps its promises in a folder and in a bucket alike.

One suite for both, with real processes and servers.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import ArtifactDamaged, ArtifactUnknown, RequestError, StorageError
from service.ids import new_id
from service.storage.artifact import MANIFEST, Artifact
from service.storage.artifact_store import LEFTOVER_SECONDS, ArtifactStore
from service.storage.blobs import PIECE_BYTES
from tests.support.object_store import (
    NEW,
    OLD,
    PLACE,
    content,
    keys,
    overwrite,
    put_in_process,
    put_killed,
    sha256,
)

BIG_BYTES = 200 * 10**6

MEASURE = """
import sys
from pathlib import Path
from service.storage.artifact_store import ArtifactStore

def peak_kib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

store, source = ArtifactStore(sys.argv[1]), Path(sys.argv[2])
store.put("jobs/warm", {"a": b"warm"})
before = peak_kib()
store.put("jobs/big", {"big": source})
after_put = peak_kib()
total = sum(map(len, store.chunks("jobs/big", store.find("jobs/big", "big"))))
after_all = peak_kib()
print(total, (after_put - before) * 1024, (after_all - before) * 1024)
"""


def test_what_was_put_is_listed_and_read(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"out of a file")
    files = {"b.json": b"{}", "a.bin": source, "below/c.txt": b"", "below/d.json": b"{}"}

    put = store.put(PLACE, files)

    assert (
        put
        == store.list(PLACE)
        == (
            Artifact("a.bin", sha256(b"out of a file"), 13),
            Artifact("b.json", sha256(b"{}"), 2),
            Artifact("below/c.txt", sha256(b""), 0),
            Artifact("below/d.json", sha256(b"{}"), 2),
        )
    )
    assert store.find(PLACE, "b.json") == put[1]
    assert store.read(PLACE, "a.bin") == b"out of a file"
    assert list(store.chunks(PLACE, put[2])) == []
    assert store.exists(PLACE)
    store.check()


def test_what_is_not_there_is_an_error(store: ArtifactStore) -> None:
    store.check()
    assert not store.exists(PLACE)
    for ask in (
        store.list,
        lambda place: store.find(place, "a"),
        lambda place: store.read(place, "a"),
    ):
        with pytest.raises(ArtifactUnknown, match="nothing at 'jobs/job_1'"):
            ask(PLACE)
    gone = store.put(PLACE, {"a": b"a"})[0]
    with pytest.raises(ArtifactUnknown, match="has no file 'b'; it has a"):
        store.find(PLACE, "b")
    store.put(PLACE, {"a": b"b"})
    with pytest.raises(ArtifactUnknown, match="list it again"):
        store.chunks(PLACE, gone)  # before the first piece is asked for


def test_ranges_are_exact_and_come_in_small_pieces(store: ArtifactStore) -> None:
    data = (bytes(range(251)) * 37600)[: 9 * PIECE_BYTES + 7]
    (artifact,) = store.put(PLACE, {"a": data})
    for start, end in (
        (0, None),
        (0, 0),
        (5, 6),
        (PIECE_BYTES - 1, PIECE_BYTES + 1),
        (8 * PIECE_BYTES - 1, 8 * PIECE_BYTES + 1),
        (1, 9 * PIECE_BYTES),
        (9 * PIECE_BYTES + 6, None),
        (9 * PIECE_BYTES + 7, None),
    ):
        pieces = list(store.chunks(PLACE, artifact, start, end))
        assert b"".join(pieces) == data[start:end]
        assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 1), (0, 4), (4, None)])
def test_ranges_outside_the_file_are_refused(tmp_path: Path, start: int, end: int | None) -> None:
    store = ArtifactStore(str(tmp_path))
    (artifact,) = store.put(PLACE, {"a": b"abc"})
    with pytest.raises(RequestError, match="not within the 3 bytes"):
        store.chunks(PLACE, artifact, start, end)


def test_putting_the_same_again_changes_nothing(store: ArtifactStore) -> None:
    first = store.put(PLACE, OLD)
    before = keys(store)
    assert store.put(PLACE, OLD) == first
    assert keys(store) == before


def test_putting_other_files_replaces_all(store: ArtifactStore) -> None:
    store.put(PLACE, OLD)
    (kept,) = (artifact for artifact in store.list(PLACE) if artifact.name == "model.safetensors")
    store.put(PLACE, NEW)
    assert content(store) == NEW
    assert b"".join(store.chunks(PLACE, kept)) == b"weights"
    assert len(keys(store)) == len(NEW) + 1


def test_delete_takes_one_place_and_no_other(store: ArtifactStore) -> None:
    for place in (PLACE, "jobs/job_10", "jobs/job_2", "profiles/abc"):
        store.put(place, OLD)
    store.delete(PLACE)
    store.delete(PLACE)
    assert not store.exists(PLACE)
    assert not [key for key in keys(store) if key.startswith(f"{PLACE}/")]
    assert content(store, "jobs/job_10") == OLD


@pytest.mark.parametrize("point", ["artifact-begun", "artifact-written"])
def test_killed_put_is_invisible_and_can_be_repeated(
    store: ArtifactStore, url: str, tmp_path: Path, point: str
) -> None:
    put_killed(url, OLD, point, tmp_path / "first")
    assert keys(store)
    assert not store.exists(PLACE)
    store.put(PLACE, OLD)
    put_killed(url, NEW, point, tmp_path / "second")
    assert content(store) == OLD
    store.put(PLACE, NEW)
    assert content(store) == NEW
    store.delete(PLACE)
    assert not keys(store)


def test_put_killed_after_its_manifest_is_there(
    store: ArtifactStore, url: str, tmp_path: Path
) -> None:
    store.put(PLACE, OLD)
    put_killed(url, NEW, "artifact-listed", tmp_path / "marker")
    assert content(store) == NEW
    store.put(PLACE, NEW)
    assert content(store) == NEW


def test_leftovers_of_dead_puts_go_with_a_later_put(store: ArtifactStore) -> None:
    now = int(new_id("put")[4:18], 16)
    for age_seconds, digit in ((60, "a"), (LEFTOVER_SECONDS + 60, "b")):
        store._blobs.write(
            f"{PLACE}/put_{now - age_seconds * 1_000_000:014x}{digit * 12}/{'0' * 64}", b"left"
        )
    store.put(PLACE, OLD)
    left = [key for key in keys(store) if key.endswith("0" * 64)]
    assert [key[-66] for key in left] == ["a"]  # it may still be at work


@pytest.mark.parametrize("many", [[OLD, NEW], [OLD, {}, NEW, {}]], ids=["puts", "puts and deletes"])
def test_puts_at_the_same_time_end_in_one_whole_result(
    store: ArtifactStore, url: str, many: list[dict[str, bytes]]
) -> None:
    processes = [
        put_in_process(url, many[turn:] + many[:turn], rounds=60 if url.startswith("/") else 10)
        for turn in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    if {} not in many:
        assert errors == ["", ""]
        assert content(store) in (OLD, NEW)
    else:
        assert not store.exists(PLACE) or content(store) in (OLD, NEW)


def test_put_that_was_deleted_before_its_manifest_came_takes_it_back(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete_at(point: str) -> None:
        if point == "artifact-written":
            store.delete(PLACE)

    monkeypatch.setattr("service.storage.artifact_store.failpoint", delete_at)
    with pytest.raises(StorageError, match="was deleted while it was put"):
        store.put(PLACE, OLD)
    assert not store.exists(PLACE)
    assert not keys(store)


@pytest.mark.parametrize(
    "data",
    [b"Weights", b"weight", b"weights and more", None],
    ids=["changed", "short", "long", "missing"],
)
def test_damage_is_found_and_putting_again_mends_what_can_be_seen(
    store: ArtifactStore, data: bytes | None
) -> None:
    store.put(PLACE, OLD)
    overwrite(store, "model.safetensors", data)
    if data != b"weights and more":  # the bytes beyond are never read
        with pytest.raises(ArtifactDamaged, match=r"model\.safetensors"):
            store.read(PLACE, "model.safetensors")
    if data is None or len(data) < len(OLD["model.safetensors"]):
        with pytest.raises(ArtifactDamaged, match=r"model\.safetensors"):
            list(store.chunks(PLACE, store.find(PLACE, "model.safetensors")))
    if data != b"Weights":  # the same size: only reading it shows
        store.put(PLACE, OLD)
    else:
        store.delete(PLACE)
        store.put(PLACE, OLD)
    assert content(store) == OLD
    assert len(keys(store)) == len(OLD) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda _: "[]",
        lambda _: '{"put": 3, "files": []}',
        lambda text: text.replace("report.json", "../report.json"),
        lambda text: text.replace("put_", "../put_"),
        lambda text: text.replace('": 2', '": "2"'),
        lambda text: text.replace(sha256(b"{}"), "../../secret"),
    ],
)
def test_damaged_manifest_is_an_error_and_can_be_put_again(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    store = ArtifactStore(str(tmp_path))
    store.put(PLACE, OLD)
    path = tmp_path / PLACE / MANIFEST
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(ArtifactDamaged, match="manifest of jobs/job_1 cannot be read"):
        store.list(PLACE)
    assert not store.exists(PLACE)
    store.put(PLACE, OLD)
    assert content(store) == OLD


def test_memory_stays_flat(url: str, tmp_path: Path) -> None:
    big = tmp_path / "big"
    block = os.urandom(1 << 20)
    with big.open("wb") as file:
        for _ in range(BIG_BYTES // len(block)):
            file.write(block)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, url, str(big)], capture_output=True, text=True, check=True
    )
    total, more_for_put_bytes, more_for_all_bytes = map(int, done.stdout.split())
    print(
        f"{url[:5]}: +{more_for_put_bytes / 1e6:.0f} MB to put, +{more_for_all_bytes / 1e6:.0f} "
        "MB to put and stream"
    )
    assert total == big.stat().st_size
    assert more_for_all_bytes < (100e6 if url.startswith("s3") else 20e6)
