"""Put files into an artifact store, here and in processes that are killed meanwhile."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.failpoint import FAILPOINT_VARIABLE
from service.storage.artifact_store import ArtifactStore
from tests.support.s3 import variables

PLACE = "jobs/job_1"
OLD = {"model.safetensors": b"weights", "report.json": b"{}"}
NEW = {"model.safetensors": b"weights", "report/index.html": b"<html>", "plan.json": b"[]"}

PUT = """
import sys, json
from service.storage.artifact_store import ArtifactStore
from service.errors import StorageError
store, place = ArtifactStore(sys.argv[1]), sys.argv[2]
rounds, many = int(sys.argv[3]), json.loads(sys.argv[4])
for number in range(rounds):
    files = many[number % len(many)]
    try:
        if files:
            store.put(place, {name: text.encode() for name, text in files.items()})
        else:
            store.delete(place)
    except StorageError as error:
        print(error, file=sys.stderr)
"""


def set_variables(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in variables(endpoint).items():
        patch.setenv(name, value)


def put_in_process(
    url: str, many: list[dict[str, bytes]], rounds: int = 1, **environment: str
) -> subprocess.Popen[str]:
    """Start a process that puts each of `many` in turn.

    An empty one stands for deleting the place.
    """
    text = json.dumps([{name: data.decode() for name, data in files.items()} for files in many])
    command = [sys.executable, "-c", PUT, url, PLACE, str(rounds), text]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )


def put_killed(url: str, files: dict[str, bytes], point: str, marker: Path) -> None:
    process = put_in_process(url, [files], **{FAILPOINT_VARIABLE: f"{point}:{marker}"})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors


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
