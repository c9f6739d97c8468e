"""The stage that cuts texts into windows of tokens.

A run uses five sets of windows, see `RunWindows`. Calibration, probe and selection windows are
different windows of the calibration text.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantizer.durable import PartStore
from quantizer.texts.text import TextSpec, read_text, text_sha256
from service.request.effort import Effort
from service.request.request import RunRequest
from service.stages.context import RunContext
from service.stages.machine import versions_of
from service.stages.text_fit import TextReader
from service.stages.windows import Windows
from service.storage.stage_store import StageKey

_FILE = "windows.safetensors"
_TOKENIZING = ("torch", "transformers", "tokenizers", "sentencepiece")
"""Packages whose versions decide which windows a text has."""


@dataclass(frozen=True, slots=True)
class RunWindows:
    """The windows of a run.

    Attributes:
        calibration: layers are quantized on them while their effects are measured.
        probes: the effects of layers on the loss are measured on them.
        quantizing: the layers of candidate plans are quantized on them; with more effort, there are
            more of them.
        selection: held-out windows of the calibration text on which candidate plans are compared.
            No plan is fitted to them and nothing is trained on them.
        evaluation: held-out windows of the evaluation text on which the result is scored.
    """

    calibration: Windows
    probes: Windows
    quantizing: Windows
    selection: Windows
    evaluation: Windows


def cut_windows(context: RunContext, request: RunRequest) -> RunWindows:
    """Return all windows of a run.

    The selection windows come first: they are the last ones of the calibration text, so an error
    about a text that is too short states how much text the whole run needs.

    Raises:
        TextError: a text cannot be used.
    """
    amounts = request.amounts
    selection = text_windows(context, amounts.guard)
    return RunWindows(
        calibration=text_windows(context, amounts.calibration),
        probes=text_windows(context, amounts.probes),
        quantizing=quantizing_windows(context, amounts.calibration, selection, request.effort),
        selection=selection,
        evaluation=text_windows(context, amounts.evaluation),
    )


def text_windows(context: RunContext, spec: TextSpec) -> Windows:
    """Cut a text into token windows that fit the model.

    Raises:
        TextError: the text cannot be used.
        ModelError: the tokenizer cannot be used, or is that of another model.
    """
    text = read_text(spec.source)
    inputs = {name: value for name, value in asdict(spec).items() if name != "source"}
    inputs |= {
        "tokenizer": context.model.tokenizer_sha256,
        "text": text_sha256(text),
        "versions": versions_of(_TOKENIZING),
    }

    def make(folder: Path, _: PartStore) -> None:
        windows = TextReader.of(context.model).windows(text, {"windows": spec})
        save_file(windows, folder / _FILE)

    folder = context.store.get(StageKey("calibration", inputs), make)
    return Windows.of(load_file(folder / _FILE)["windows"].contiguous(), spec.source)


def windows_besides(context: RunContext, spec: TextSpec, held_out: Windows, count: int) -> Windows:
    """Return windows of a text that are not among the held-out ones.

    Args:
        context: gives the tokenizer.
        spec: the text, the tokens of a window and the seed.
        held_out: windows to leave out.
        count: how many windows to draw at random; all of them where the text has fewer.

    Returns:
        The windows in the order of the text.
    """
    every = text_windows(context, TextSpec(spec.source, 0, spec.tokens, None))
    avoided = {row.numpy().tobytes() for row in held_out.tokens}
    rows = torch.tensor(
        [at for at, row in enumerate(every.tokens) if row.numpy().tobytes() not in avoided]
    )
    generator = torch.Generator().manual_seed(spec.seed or 0)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
    return Windows.of(every.tokens[chosen], spec.source)


def quantizing_windows(
    context: RunContext, spec: TextSpec, held_out: Windows, effort: Effort
) -> Windows:
    """Return the windows that the layers of a plan are quantized on.

    They are the calibration windows, or `effort.calibration` times as many of the same text without
    the held-out ones.
    """
    if effort.calibration == 1:
        return text_windows(context, spec)
    return windows_besides(context, spec, held_out, effort.calibration * spec.windows)
