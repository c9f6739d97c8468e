"""Settings: values, files that hold them, and what is refused. Memory that a process keeps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import RequestError
from service.settings import PREFIX, ServiceSettings, default_cache, default_data
from service.validation import values_of
from tests.support.paths import ROOT

_FAULTS = """
import resource, sys
import torch
from service.process import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for megabytes in (100, 60, 20, 100):
        torch.ones(megabytes << 20, dtype=torch.uint8)
for _ in range(4):  # until the pieces have found their places
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(way: str) -> int:
    return int(
        subprocess.run(
            [sys.executable, "-c", _FAULTS, way], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    usual, keeping = _faults("usual"), _faults("keep")
    assert usual > 50_000  # 280 MiB in pages of 4 KiB
    assert keeping < 1000


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, folder: Path, **variables: str) -> ServiceSettings:
    """Return the settings of these variables, called without their prefix."""
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"{PREFIX}{name}", value)
        return ServiceSettings.read(data=folder, cache=folder / "cache")


def test_settings_are_read_from_variables_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text("postgresql://me:secret@host/name\n")
    found = read(
        monkeypatch,
        tmp_path,
        DATABASE_URL_FILE=str(tmp_path / "url"),
        DATABASE_URL="sqlite:///elsewhere",
        MODELS=f"/a{os.pathsep}/b{os.pathsep}",
        WEBHOOK_TARGETS="10.0.0.0/8,hooks.example",
        SLOTS="2",
        STORED_BYTES="1000000000",
        KEEP_DAYS="0.5",
    )
    assert found.database_url == "postgresql://me:secret@host/name"
    assert found.models == (Path("/a"), Path("/b"))
    assert found.webhook_targets == ("10.0.0.0/8", "hooks.example")
    assert (found.slots, found.stored_bytes, found.keep_days) == (2, 10**9, 0.5)
    assert found.hub


def test_settings_have_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(monkeypatch, tmp_path, HUB="0", SLOTS="")
    assert found.database_url == f"sqlite:///{tmp_path / 'bitwright.sqlite'}"
    assert found.artifacts == str(tmp_path / "artifacts")
    assert (found.worker, found.hub, found.slots, found.keep_days) == ("local", False, 1, None)
    assert found.models == (Path.cwd(),)
    shared = read(monkeypatch, tmp_path, DATABASE_URL="postgresql://host/name")
    assert shared.worker not in ("", "local")


def test_folders_are_read_from_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("BITWRIGHT_DATA", str(tmp_path / "d"))
    assert (default_cache(), default_data()) == (tmp_path / "c", tmp_path / "d")


WRONG = [
    ("SLOTS", "many", "a whole number of at least 1"),
    ("SLOTS", "0.5", "a whole number of at least 1"),
    ("SLOTS", "1.9", "a whole number of at least 1"),
    ("SLOTS", "0", "a whole number of at least 1"),
    ("ACTIVE_JOBS", "1.5", "a whole number of at least 1"),
    ("STORED_BYTES", "-1", "a whole number of at least 1"),
    ("KEEP_DAYS", "-1", "a number above 0"),
    ("KEEP_DAYS", "nan", "a number above 0"),
    ("STAGE_SECONDS", "inf", "a number above 0"),
    ("HUB", "perhaps", "true or false"),
    ("KERNELS", "cuda", "auto, reference or triton"),
]


@pytest.mark.parametrize(("name", "value", "values"), WRONG)
def test_a_wrong_setting_is_refused_with_its_variable_and_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, values: str
) -> None:
    message = f"{PREFIX}{name} is {value!r}; give {values}"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read(monkeypatch, tmp_path, **{name: value})


def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="BITWRIGHT_DATABASE_URL_FILE names '/none/such'"):
        read(monkeypatch, tmp_path, DATABASE_URL_FILE="/none/such")


def test_secrets_are_neither_shown_nor_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(monkeypatch, tmp_path, DATABASE_URL="postgresql://me:hunter2@host/name")
    assert "hunter2" not in repr(found) + str(found)
    with pytest.raises(ValidationError) as refused:
        ServiceSettings(data=tmp_path, database_url=b"\xffhunter2")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(RequestError) as told:
        ServiceSettings.read(data=tmp_path, database_url=b"\xffhunter2")
    assert "hunter2" not in str(told.value)
    assert "BITWRIGHT_DATABASE_URL" in str(told.value)


def test_every_setting_is_described_and_no_other_module_knows_its_variable() -> None:
    names = {
        f"{PREFIX}{name.upper()}": field for name, field in ServiceSettings.model_fields.items()
    }
    assert all(field.description and values_of(field) for field in names.values())
    sources = {path: path.read_text() for path in (ROOT / "service").rglob("*.py")}
    elsewhere = {
        name: str(path.relative_to(ROOT))
        for path, text in sources.items()
        for name in names
        if f'"{name}"' in text
    }
    assert elsewhere == {}
    assert [path.name for path, text in sources.items() if "BaseSettings)" in text] == [
        "settings.py"
    ]
