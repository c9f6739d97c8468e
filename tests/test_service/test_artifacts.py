"""The artifact store keeps its promises in a folder and in a bucket alike: one suite for both, with real processes and servers."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.artifacts import LEFTOVER_SECONDS, MANIFEST, Artifact, ArtifactStore
from service.blobs import PIECE_BYTES
from service.errors import ArtifactDamaged, ArtifactUnknown, RequestError, StorageError
from service.ids import new_id
from service.settings import FAILPOINT_VARIABLE
from tests.s3 import S3, variables
from tests.served import free_port

PLACE = "jobs/job_1"
OLD = {"model.safetensors": b"weights", "report.json": b"{}"}
NEW = {"model.safetensors": b"weights", "report/index.html": b"<html>", "plan.json": b"[]"}
BIG_BYTES = 200 * 10**6

PUT = """
import sys, json
from service.artifacts import ArtifactStore
from service.errors import StorageError
store, place, rounds, many = ArtifactStore(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
for number in range(rounds):
    files = many[number % len(many)]
    try:
        store.put(place, {name: text.encode() for name, text in files.items()}) if files else store.delete(place)
    except StorageError as error:
        print(error, file=sys.stderr)
"""

MEASURE = """
import sys
from pathlib import Path
from service.artifacts import ArtifactStore

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


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def bucket(s3: S3) -> tuple[str, ArtifactStore]:
    """URL and store of a bucket; a client of its own for each test would take most of the time."""
    url = f"{s3.fresh()}/below/here"
    with pytest.MonkeyPatch.context() as patch:
        set_variables(patch, s3.url)
        store = ArtifactStore(url)
        store.check()
    return url, store


@pytest.fixture(params=["folder", "bucket"])
def place_of_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ArtifactStore]:
    """URL and store, which is empty; processes that a test starts can reach it too."""
    if request.param == "folder":
        return str(tmp_path / "store"), ArtifactStore(str(tmp_path / "store"))
    set_variables(monkeypatch, request.getfixturevalue("s3").url)
    url, store = request.getfixturevalue("bucket")
    for kind in ("jobs", "profiles"):
        store._blobs.remove(store._blobs.sizes(kind))
    return url, store


@pytest.fixture
def url(place_of_store: tuple[str, ArtifactStore]) -> str:
    return place_of_store[0]


@pytest.fixture
def store(place_of_store: tuple[str, ArtifactStore]) -> ArtifactStore:
    return place_of_store[1]


def set_variables(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in variables(endpoint).items():
        patch.setenv(name, value)


def put_in_process(url: str, many: list[dict[str, bytes]], rounds: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start a process that puts each of `many` in turn; an empty one stands for deleting the place."""
    text = json.dumps([{name: data.decode() for name, data in files.items()} for files in many])
    command = [sys.executable, "-c", PUT, url, PLACE, str(rounds), text]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def put_killed(url: str, files: dict[str, bytes], point: str, marker: Path) -> None:
    process = put_in_process(url, [files], **{FAILPOINT_VARIABLE: f"{point}:{marker}"})
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, told


def content(store: ArtifactStore, place: str = PLACE) -> dict[str, bytes]:
    return {artifact.name: store.read(place, artifact.name) for artifact in store.list(place)}


def keys(store: ArtifactStore) -> set[str]:
    return set(store._blobs.sizes("jobs"))


def overwrite(store: ArtifactStore, name: str, data: bytes | None) -> None:
    """Change or remove what is stored of a file, behind the store's back."""
    (key,) = (key for key in keys(store) if key.endswith(store.find(PLACE, name).sha256))
    store._blobs.remove([key])
    if data is not None:
        store._blobs.write(key, data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_was_put_is_listed_and_read(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"out of a file")
    files = {"b.json": b"{}", "a.bin": source, "below/c.txt": b"", "below/d.json": b"{}"}

    put = store.put(PLACE, files)

    assert put == store.list(PLACE) == (
        Artifact("a.bin", sha256(b"out of a file"), 13),
        Artifact("b.json", sha256(b"{}"), 2),
        Artifact("below/c.txt", sha256(b""), 0),
        Artifact("below/d.json", sha256(b"{}"), 2),
    )  # fmt: skip
    assert store.find(PLACE, "b.json") == put[1]
    assert store.read(PLACE, "a.bin") == b"out of a file"
    assert list(store.chunks(PLACE, put[2])) == []
    assert store.exists(PLACE)
    store.check()


def test_what_is_not_there_is_told(store: ArtifactStore) -> None:
    store.check()
    assert not store.exists(PLACE)
    for ask in (store.list, lambda place: store.find(place, "a"), lambda place: store.read(place, "a")):
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
        (0, None), (0, 0), (5, 6), (PIECE_BYTES - 1, PIECE_BYTES + 1), (8 * PIECE_BYTES - 1, 8 * PIECE_BYTES + 1),
        (1, 9 * PIECE_BYTES), (9 * PIECE_BYTES + 6, None), (9 * PIECE_BYTES + 7, None),
    ):  # fmt: skip
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
def test_killed_put_is_invisible_and_can_be_repeated(store: ArtifactStore, url: str, tmp_path: Path, point: str) -> None:
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


def test_put_killed_after_its_manifest_is_there(store: ArtifactStore, url: str, tmp_path: Path) -> None:
    store.put(PLACE, OLD)
    put_killed(url, NEW, "artifact-listed", tmp_path / "marker")
    assert content(store) == NEW
    store.put(PLACE, NEW)
    assert content(store) == NEW


def test_leftovers_of_dead_puts_go_with_a_later_put(store: ArtifactStore) -> None:
    now = int(new_id("put")[4:18], 16)
    for age_seconds, digit in ((60, "a"), (LEFTOVER_SECONDS + 60, "b")):
        store._blobs.write(f"{PLACE}/put_{now - age_seconds * 1_000_000:014x}{digit * 12}/{'0' * 64}", b"left")
    store.put(PLACE, OLD)
    left = [key for key in keys(store) if key.endswith("0" * 64)]
    assert [key[-66] for key in left] == ["a"]  # it may still be at work


@pytest.mark.parametrize("many", [[OLD, NEW], [OLD, {}, NEW, {}]], ids=["puts", "puts and deletes"])
def test_puts_at_the_same_time_end_in_one_whole_result(store: ArtifactStore, url: str, many: list[dict[str, bytes]]) -> None:
    processes = [put_in_process(url, many[turn:] + many[:turn], rounds=60 if url.startswith("/") else 10) for turn in range(2)]
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    if {} not in many:
        assert told == ["", ""]
        assert content(store) in (OLD, NEW)
    else:
        assert not store.exists(PLACE) or content(store) in (OLD, NEW)


def test_put_that_was_deleted_before_its_manifest_came_takes_it_back(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete_at(point: str) -> None:
        if point == "artifact-written":
            store.delete(PLACE)

    monkeypatch.setattr("service.artifacts.failpoint", delete_at)
    with pytest.raises(StorageError, match="was deleted while it was put"):
        store.put(PLACE, OLD)
    assert not store.exists(PLACE)
    assert not keys(store)


@pytest.mark.parametrize("data", [b"Weights", b"weight", b"weights and more", None], ids=["changed", "short", "long", "missing"])
def test_damage_is_found_and_putting_again_mends_what_can_be_seen(store: ArtifactStore, data: bytes | None) -> None:
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
def test_damaged_manifest_is_told_and_can_be_put_again(tmp_path: Path, change: Callable[[str], str]) -> None:
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


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\\b", "a\0b", "a\nb", 'a"b', "é", "a b", "a" * 256,
        "a/" * 600 + "a",
    ],
)  # fmt: skip
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    store = ArtifactStore(str(tmp_path))
    with pytest.raises(RequestError, match="is no name of a file"):
        store.put(PLACE, {"good": b"", name: b""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "place", ["", "jobs", "jobs/", "/jobs/a", "jobs/a/b", "../a", "jobs/..", "jobs/.a", "jobs/a b", "jobs\\a", "jobs/a\n"]
)
def test_hostile_places_are_refused(tmp_path: Path, place: str) -> None:
    store = ArtifactStore(str(tmp_path))
    artifact = Artifact("a", "0" * 64, 0)
    for use in (
        lambda: store.put(place, OLD), lambda: store.list(place), lambda: store.read(place, "a"), lambda: store.exists(place),
        lambda: store.delete(place), lambda: store.chunks(place, artifact),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="is no place"):
            use()
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_put_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    with pytest.raises(RequestError, match="no files"):
        store.put(PLACE, {})
    with pytest.raises(RequestError, match="lies below another file"):
        store.put(PLACE, {"a": b"", "a/b": b""})
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RequestError, match="cannot be read as the file 'a'"):
            store.put(PLACE, {"a": source})
    assert not store.exists(PLACE)


@pytest.mark.parametrize(
    "url",
    [
        "", "a\0b", "file:///a%00b", "file://host/a", "memory://a", "http://host/a", "https://u:hidden@host/a", "gs://bucket",
        "simplecache::s3://a/b", "s3://", "s3:/a/b", "s3://key:hidden@bucket/a", "s3://bucket/../a", "s3://bucket//a",
        "s3://bucket/a?x=hidden", "S3://bucket",
    ],
)  # fmt: skip
def test_other_urls_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(RequestError, match="use a folder") as refused:
        ArtifactStore(url)
    assert "hidden" not in str(refused.value)


def test_a_folder_can_be_a_url(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}/with%20space")
    store.put(PLACE, OLD)
    assert content(ArtifactStore(str(tmp_path / "with space"))) == OLD


def test_large_files_are_linked_and_links_are_followed(tmp_path: Path) -> None:
    source, link = tmp_path / "source", tmp_path / "link"
    source.write_bytes(b"weights")
    link.symlink_to(source.name)
    store = ArtifactStore(str(tmp_path / "store"))
    store.put(PLACE, {"a": link})
    (stored,) = (tmp_path / "store").rglob(sha256(b"weights"))
    assert stored.samefile(source)
    assert not stored.is_symlink()


def test_a_store_that_may_not_be_written_says_so() -> None:
    with tempfile.TemporaryDirectory() as name, as_nobody(name):
        store = ArtifactStore(name)
        with pytest.raises(StorageError, match=r"cannot be written: Permission denied"):
            store.put(PLACE, OLD)
        with pytest.raises(StorageError, match=r"cannot be written: Permission denied"):
            ArtifactStore(f"{name}/below")
        store.check()
    with pytest.raises(StorageError, match="cannot be listed"):
        store.check()


@contextmanager
def as_nobody(folder: str) -> Iterator[None]:
    """Take away the right to write to a folder; root has it whatever the folder says, so become somebody else."""
    Path(folder).chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        Path(folder).chmod(0o755)


def test_full_disk_is_told_and_keeps_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files makes real writes fail in the way a full disk does."""
    store = ArtifactStore(str(tmp_path))
    store.put(PLACE, OLD)
    before = keys(store)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    text = json.dumps([{"a": "fits", "large": "x" * 20_000}])
    command = [sys.executable, "-c", PUT, str(tmp_path), PLACE, "1", text]
    full = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limit)
    assert "no space left" in full.stderr
    assert content(store) == OLD
    assert keys(store) == before


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no bucket", "does not exist"),
        ("no server", "does not answer"),
        ("no access", "refuses access"),
        ("no S3", "cannot be used"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_in_one_sentence(
    s3: S3, monkeypatch: pytest.MonkeyPatch, case: str, reason: str
) -> None:
    with answering(403 if case == "no access" else 404) as port:
        endpoint = {"no bucket": s3.url, "no server": f"http://127.0.0.1:{free_port()}"}.get(case, f"http://127.0.0.1:{port}")
        set_variables(monkeypatch, endpoint)
        store = ArtifactStore("s3://absent/x")
        for use in (
            store.check, lambda: store.exists(PLACE), lambda: store.put(PLACE, OLD), lambda: store.delete(PLACE),
        ):  # fmt: skip
            start = time.monotonic()
            with pytest.raises(StorageError) as told:
                use()
            assert time.monotonic() - start < 20
            assert str(told.value).startswith(f"the bucket 'absent' of the artifact store {reason}")
            assert "hidden" not in str(told.value)
            assert "testing" not in str(told.value)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Run a server that answers everything in one way, and give its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b"<Error><Code>AccessDenied</Code><Message>hidden</Message></Error>" if status == 403 else b"hidden"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_DELETE = do_POST = do_GET  # noqa: N815  names that the library looks for

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_memory_stays_flat(url: str, tmp_path: Path) -> None:
    big = tmp_path / "big"
    block = os.urandom(1 << 20)
    with big.open("wb") as file:
        for _ in range(BIG_BYTES // len(block)):
            file.write(block)
    done = subprocess.run([sys.executable, "-c", MEASURE, url, str(big)], capture_output=True, text=True, check=True)
    total, more_for_put_bytes, more_for_all_bytes = map(int, done.stdout.split())
    print(f"{url[:5]}: +{more_for_put_bytes / 1e6:.0f} MB to put, +{more_for_all_bytes / 1e6:.0f} MB to put and stream")
    assert total == big.stat().st_size
    assert more_for_all_bytes < (100e6 if url.startswith("s3") else 20e6)


def test_a_folder_needs_neither_torch_nor_s3(tmp_path: Path) -> None:
    code = f"import sys; from service.artifacts import ArtifactStore; ArtifactStore({str(tmp_path)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "botocore", "s3fs", "fsspec"} & set(loaded)
