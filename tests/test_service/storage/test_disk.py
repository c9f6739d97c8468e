"""Promises of service.storage.disk: errors of a disk say where, and what to do."""

import errno
from pathlib import Path

import pytest

from quantizer.errors import ModelError
from service.errors import StorageError
from service.storage.disk import disk_errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(
    ("written", "named"),
    [(None, "stage"), ("stage/part", "stage"), (".stage.new/part", "stage"), ("/hub/x", "/hub/x")],
)
def test_a_full_disk_is_reported_with_its_place(
    number: int, written: str | None, named: str, tmp_path: Path
) -> None:
    error = OSError(number, "full", None if written is None else str(tmp_path / written))
    with pytest.raises(StorageError) as caught, disk_errors(tmp_path / "stage"):
        raise error
    assert f"no space left for {str(tmp_path / named)!r}; finished work is kept" in str(
        caught.value
    )


def test_what_a_library_says_about_a_full_disk_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="make room"), disk_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="damaged"), disk_errors(tmp_path):
        raise ModelError("damaged (os error 28)")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "missing").read_bytes()
