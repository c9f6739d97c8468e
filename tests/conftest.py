"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.process import quiet_libraries
from tests.support.fake_hub import FakeHub, fill_hub, point_to, serving_hub
from tests.support.tiny_models import save_tiny

os.environ["TRITON_INTERPRET"] = (
    "0" if torch.cuda.is_available() else "1"
)  # Triton reads this once, when it is imported
quiet_libraries()
torch.set_num_threads(
    1
    # tiny models gain nothing from more, and a killed run must compute in the same order as one
    # that was not
)


def pytest_collection_finish() -> None:
    """Exclude what exists by now from garbage collection, which pipelines ask for explicitly."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama model."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def hub_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of a hub, see `tests.support.fake_hub.fill_hub`."""
    return fill_hub(tmp_path_factory.mktemp("hub"), tiny_llama)


@pytest.fixture
def hub(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine that is reached, and an empty cache of it."""
    with serving_hub(hub_folder) as hub:
        point_to(hub.url, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep every test off the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return
