"""Promises of quantizer.durable: files are whole or absent, and damage is found."""

import errno
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantizer import durable
from quantizer.durable import (
    PartStore,
    atomic_file,
    atomic_folder,
    file_sha256,
    system_errors,
    write_atomically,
)
from quantizer.errors import ModelError
from tests.support.paths import ROOT


def test_write_atomically_writes_and_replaces(tmp_path: Path) -> None:
    for data in (b"first", b"", b"\0\xff" * 100_000):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
        assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_no_temporary_file_and_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "file", "text, not bytes")  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_failed_rename_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", b"data")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_write_atomically_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"data")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals")
def test_a_process_killed_while_it_writes_leaves_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from quantizer import durable\n"
        "durable.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "durable.write_atomically(Path(sys.argv[1]), b'new')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert result.returncode == -9
    assert (tmp_path / "file").read_bytes() == b"old"


def fail_after(write: Callable[[Path], object], path: Path) -> None:
    """Write, and then fail."""
    write(path)
    raise KeyboardInterrupt


def test_an_interrupted_file_keeps_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        fail_after(lambda path: path.write_bytes(b"new"), temporary)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_that_is_a_link_to_the_content_stays(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"data")
    for _ in range(2):
        with atomic_file(tmp_path / "file") as temporary:
            os.link(tmp_path / "source", temporary)
    assert (tmp_path / "file").samefile(tmp_path / "source")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "source"]


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "absent"])
def test_a_folder_appears_with_all_its_files(empty: bool, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    if empty:
        folder.mkdir(parents=True)
    with atomic_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"data")
        assert not any(folder.glob("*"))
    assert (folder / "inner" / "file").read_bytes() == b"data"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="folder"), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    assert (tmp_path / "folder" / "file").read_bytes() == b"old"


def test_an_interrupted_folder_is_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as temporary:
        fail_after(lambda path: (path / "file").write_bytes(b"half"), temporary)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_of_a_folder_does_not_stay(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from quantizer.durable import *\n"
        "with atomic_folder(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'stale').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert not (tmp_path / "folder").exists()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"data")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


def test_everything_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    sync, replace = durable.sync_path, Path.replace
    monkeypatch.setattr(
        durable, "sync_path", lambda path: (sync(path), flushed.append(path.name))[0]
    )
    monkeypatch.setattr(
        Path, "replace", lambda old, new: (flushed.append("renamed"), replace(old, new))[1]
    )
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"data")
    assert flushed == ["file", ".folder.new", "renamed", tmp_path.name]
    del flushed[1:]
    write_atomically(tmp_path / "file", b"data")
    assert flushed[2:] == ["renamed", tmp_path.name]


def test_file_sha256_is_the_digest_of_the_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 1000])
def test_a_part_is_read_back(data: bytes, tmp_path: Path) -> None:
    PartStore(tmp_path / "a" / "b").write("name", data)
    assert PartStore(tmp_path / "a" / "b").read("name") == data


def test_a_part_can_be_written_again(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    store.write("name", b"old")
    store.write("name", b"new")
    assert store.read("name") == b"new"


def test_a_missing_part_is_none_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert PartStore(tmp_path).read("name") is None
    assert not caplog.records


@pytest.mark.parametrize(
    "damage", ["flip first", "flip last", "cut", "grow", "empty", "digest only"]
)
def test_a_damaged_part_is_none_and_logged(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PartStore(tmp_path)
    store.write("name", b"some data")
    path = tmp_path / "name.part"
    content = path.read_bytes()
    damaged = {
        "flip first": bytes([content[0] ^ 1]) + content[1:],
        "flip last": content[:-1] + bytes([content[-1] ^ 1]),
        "cut": content[:-1],
        "grow": content + b"\0",
        "empty": b"",
        "digest only": content[:32],
    }[damage]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "bitwright"):
        assert store.read("name") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    store.write("name", b"made again")
    assert store.read("name") == b"made again"


def test_parts_do_not_mix(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    store.write("a", b"1")
    store.write("b", b"2")
    assert (store.read("a"), store.read("b")) == (b"1", b"2")
    assert PartStore(tmp_path / "other").read("a") is None


def test_an_error_of_the_system_that_a_library_quotes_is_one(tmp_path: Path) -> None:
    """The folder that safetensors is told to write to is missing."""
    file = tmp_path / "missing" / "file"
    with pytest.raises(OSError, match="os error 2") as caught, system_errors(file):
        save_file({"a": torch.zeros(1)}, file)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(file))


@pytest.mark.parametrize(
    "error", [ValueError("no such number"), ModelError("damaged (os error 5)"), OSError(28, "full")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, system_errors(tmp_path):
        raise error
    assert caught.value is error
