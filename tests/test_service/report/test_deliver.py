"""Delivered files belong to the user.

Their permissions follow the umask, and edits stay in them.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import OutputError
from service.report.deliver import check_output, deliver, deliver_files
from service.storage.artifact_store import ArtifactStore
from tests.support.commands import SmallRun

Deliver = Callable[[Path], None]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Give the process a mask for the permissions of new files."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished stage in the cache, whose weights only their owner may read."""
    folder = tmp_path / "cache" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "model.safetensors").chmod(0o600)
    (folder / "plan.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(
    stage: Path, tmp_path: Path, mask: int, file: int, folder: int
) -> None:
    with umask(mask):
        deliver(tmp_path / "out", stage, stage, None)
        deliver_files(tmp_path / "files", {"profile.json": b"{}"})
    for out in (tmp_path / "out", tmp_path / "files"):
        assert stat.S_IMODE(out.stat().st_mode) == folder
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {file}


def parent_is_a_file(root: Path) -> Path:
    (root / "file").write_text("")
    return root / "file" / "out"


def parent_takes_no_folders(_: Path) -> Path:
    return Path("/proc/out")


@pytest.mark.parametrize("place", [parent_is_a_file, parent_takes_no_folders])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    place: Callable[[Path], Path], tmp_path: Path
) -> None:
    out = place(tmp_path)
    with pytest.raises(OutputError, match=f"{str(out)!r} cannot be made: .*name another place"):
        check_output(out)


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "", str(tmp_path)):
        with pytest.raises(OutputError, match="is the current one"):
            check_output(Path(name))


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_is_filled(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    deliver(tmp_path / "out", stage, stage, None)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {
        path.name for path in stage.iterdir()
    }
    assert (tmp_path / "out").is_symlink()


def test_an_edit_of_a_delivered_file_changes_nothing_in_the_cache(
    stage: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in stage.iterdir()}
    deliver(tmp_path / "out", stage, stage, None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for path in (tmp_path / "out").iterdir():
        with path.open("r+b") as file:
            file.write(b"edited")
    assert {path.name: path.read_bytes() for path in stage.iterdir()} == before


def test_nothing_is_delivered_into_a_folder_in_use(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="not empty"):
        deliver(tmp_path / "out", stage, stage, None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_a_run_delivers_shares_no_file_with_its_cache(small_run: SmallRun) -> None:
    for path in small_run.out.iterdir():
        assert path.stat().st_nlink == 1, path.name
        assert stat.S_IMODE(path.stat().st_mode) & 0o700 == 0o600, path.name
    modes = {stat.S_IMODE(path.stat().st_mode) for path in small_run.out.iterdir()}
    assert len(modes) == 1


def test_the_artifacts_of_a_job_share_no_file_with_the_cache(stage: Path, tmp_path: Path) -> None:
    deliver(tmp_path / "out", stage, stage, None)
    weights = tmp_path / "out" / "model.safetensors"
    ArtifactStore(str(tmp_path / "artifacts")).put("jobs/job_1", {weights.name: weights})
    assert (stage / "model.safetensors").stat().st_nlink == 1
