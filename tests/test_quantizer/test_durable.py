"""Promises of quantizer.durable: files are whole or absent, and damage is found."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantizer.durable import PartStore, file_sha256, write_atomically
from tests.support.paths import ROOT


def test_write_whole_writes_and_replaces(tmp_path: Path) -> None:
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


def test_write_whole_needs_the_folder(tmp_path: Path) -> None:
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
