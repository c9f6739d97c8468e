"""Edits that make a copy of a tiny model invalid or unsafe, each a function of its folder."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantizer.models.folder import ModelFolder
from quantizer.models.source import find_model

Edit = Callable[[Path], object]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001.safetensors"


def find(folder: Path) -> ModelFolder:
    """Check a folder that is not in anybody's cache."""
    return find_model(str(folder), folder.parent / "cache")


def config(**values: object) -> Edit:
    """Set fields of the configuration; an ellipsis drops the field."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in found.items() if value is not ...})
        )

    return edit


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    """Change the stored tensors."""

    def edit(folder: Path) -> None:
        found = load_file(folder / FILE)
        change(found)
        save_file(found, folder / FILE, metadata={"format": "pt"})

    return edit


def index(content: object) -> Edit:
    """Make a shard of the single file, and add an index."""

    def edit(folder: Path) -> None:
        (folder / FILE).rename(folder / SHARD)
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def without(name: str) -> Edit:
    """Drop a file."""
    return lambda folder: (folder / name).unlink()


def code_of_its_own(folder: Path) -> None:
    """Add code that leaves a trace when it is run."""
    lines = [
        f"open({str(folder / 'trace')!r}, 'w').close()",
        "from transformers import LlamaConfig, LlamaForCausalLM",
    ]
    (folder / "own.py").write_text("\n".join(lines))
    config(
        auto_map={"AutoConfig": "own.LlamaConfig", "AutoModelForCausalLM": "own.LlamaForCausalLM"}
    )(folder)


class _Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def pickled(folder: Path) -> None:
    """Replace the weights by pickled ones that leave a trace when they are read."""
    (folder / FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(folder / "trace")))
