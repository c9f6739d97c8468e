"""The stage that cuts texts into windows of tokens."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantizer.durable import PartStore
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_tokenizer
from quantizer.texts.text import TextSpec, read_text, text_sha256
from quantizer.texts.windows import make_windows
from service.request.effort import Effort
from service.storage.stage_store import StageKey, StageStore


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows and where they come from.

    Attributes:
        tokens: int64 [windows, tokens].
        sha256: digest of the windows.
        source: what the user called the text.
    """

    tokens: Tensor
    sha256: str
    source: str

    @classmethod
    def of(cls, tokens: Tensor, source: str) -> "Windows":
        """Return these windows with their digest."""
        return cls(tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), source)


def windows_of(
    store: StageStore, model: ModelFolder, spec: TextSpec, used_tokens: int | None = None
) -> Windows:
    """Cut a text into token windows, of which the first `used_tokens` tokens are taken if it is given.

    Raises:
        TextError: the text cannot be used.
    """
    text = read_text(spec.source)
    inputs = {
        "model": model.sha256,
        "text": text_sha256(text),
        **{k: v for k, v in asdict(spec).items() if k != "source"},
    }

    def make(folder: Path, _: PartStore) -> None:
        save_file(
            {"windows": make_windows(text, spec, load_tokenizer(model))},
            folder / "windows.safetensors",
        )

    folder = store.get(StageKey("calibration", inputs), make)
    tokens = load_file(folder / "windows.safetensors")["windows"][:, :used_tokens].contiguous()
    return Windows.of(tokens, spec.source)


def windows_without(
    store: StageStore, model: ModelFolder, spec: TextSpec, held_out: Windows, count: int
) -> Windows:
    """Return at most `count` windows of a text, at random by the seed, in the text's order, but none of those that are held out."""
    every = windows_of(store, model, TextSpec(spec.source, 0, spec.tokens, None))
    avoided = {row.numpy().tobytes() for row in held_out.tokens}
    rows = torch.tensor(
        [at for at, row in enumerate(every.tokens) if row.numpy().tobytes() not in avoided]
    )
    generator = torch.Generator().manual_seed(spec.seed or 0)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
    return Windows.of(every.tokens[chosen], spec.source)


def quantizing_windows(
    store: StageStore, model: ModelFolder, spec: TextSpec, held_out: Windows, effort: Effort
) -> Windows:
    """Return the windows that the layers of a plan are quantized on."""
    if effort.calibration == 1:
        return windows_of(store, model, spec)
    return windows_without(store, model, spec, held_out, effort.calibration * spec.windows)
