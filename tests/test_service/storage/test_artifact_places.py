"""Names, places and stores that cannot be used are refused, and nothing stored is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.errors import RequestError, StorageError
from service.storage.artifact import Artifact
from service.storage.artifact_store import ArtifactStore
from tests.support.object_store import OLD, PLACE, PUT, content, keys, set_variables, sha256
from tests.support.s3 import S3
from tests.support.served import free_port


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a/./b",
        "a\\b",
        "a\0b",
        "a\nb",
        'a"b',
        "é",
        "a b",
        "a" * 256,
        "a/" * 600 + "a",
    ],
)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    store = ArtifactStore(str(tmp_path))
    with pytest.raises(RequestError, match="is no name of a file"):
        store.put(PLACE, {"good": b"", name: b""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "place",
    [
        "",
        "jobs",
        "jobs/",
        "/jobs/a",
        "jobs/a/b",
        "../a",
        "jobs/..",
        "jobs/.a",
        "jobs/a b",
        "jobs\\a",
        "jobs/a\n",
    ],
)
def test_hostile_places_are_refused(tmp_path: Path, place: str) -> None:
    store = ArtifactStore(str(tmp_path))
    artifact = Artifact("a", "0" * 64, 0)
    for use in (
        lambda: store.put(place, OLD),
        lambda: store.list(place),
        lambda: store.read(place, "a"),
        lambda: store.exists(place),
        lambda: store.delete(place),
        lambda: store.chunks(place, artifact),
    ):
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
        "",
        "a\0b",
        "file:///a%00b",
        "file://host/a",
        "memory://a",
        "http://host/a",
        "https://u:hidden@host/a",
        "gs://bucket",
        "simplecache::s3://a/b",
        "s3://",
        "s3:/a/b",
        "s3://key:hidden@bucket/a",
        "s3://bucket/../a",
        "s3://bucket//a",
        "s3://bucket/a?x=hidden",
        "S3://bucket",
    ],
)
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
    """Take away the right to write to a folder.

    Root has it whatever the folder says, so become somebody else.
    """
    Path(folder).chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        Path(folder).chmod(0o755)


def test_full_disk_is_reported_and_keeps_what_was_there(tmp_path: Path) -> None:
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
def test_a_bucket_that_cannot_be_used_is_reported_in_one_sentence(
    s3: S3, monkeypatch: pytest.MonkeyPatch, case: str, reason: str
) -> None:
    with answering(403 if case == "no access" else 404) as port:
        endpoint = {"no bucket": s3.url, "no server": f"http://127.0.0.1:{free_port()}"}.get(
            case, f"http://127.0.0.1:{port}"
        )
        set_variables(monkeypatch, endpoint)
        store = ArtifactStore("s3://absent/x")
        for use in (
            store.check,
            lambda: store.exists(PLACE),
            lambda: store.put(PLACE, OLD),
            lambda: store.delete(PLACE),
        ):
            start = time.monotonic()
            with pytest.raises(StorageError) as caught:
                use()
            assert time.monotonic() - start < 20
            assert str(caught.value).startswith(
                f"the bucket 'absent' of the artifact store {reason}"
            )
            assert "hidden" not in str(caught.value)
            assert "testing" not in str(caught.value)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Run a server that answers everything in one way, and give its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = (
                b"<Error><Code>AccessDenied</Code><Message>hidden</Message></Error>"
                if status == 403
                else b"hidden"
            )
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


def test_a_folder_needs_neither_torch_nor_s3(tmp_path: Path) -> None:
    code = (
        "import sys; from service.storage.artifact_store import ArtifactStore; "
        f"ArtifactStore({str(tmp_path)!r}); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "botocore", "s3fs", "fsspec"} & set(loaded)
