"""What all stages of a run share."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model
from quantizer.models.source import find_model
from quantizer.running.block_chain import check_block_chain
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from service.request.request import RunRequest
from service.stages.machine import Machine
from service.stages.progress import Reporter
from service.stages.windows import Windows
from service.storage.cache_entry import MODELS
from service.storage.disk import disk_errors
from service.storage.stage_store import StageStore


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every stage of a run takes: where results are stored, the model, and how it is run.

    Attributes:
        store: finished stages, each under the hash of its inputs.
        model: folder of the original model, checked.
        machine: device and dtype.
        reporter: shows progress.
        batch: windows that are run through the model at once.
    """

    store: StageStore
    model: ModelFolder
    machine: Machine
    reporter: Reporter
    batch: int

    @classmethod
    def for_request(
        cls,
        request: RunRequest,
        store: StageStore,
        reporter: Reporter,
        *,
        read_weights: bool = True,
    ) -> "RunContext":
        """Return the context of a run, after checking its model.

        Args:
            request: names the model, the device and the batch.
            store: where results are stored.
            reporter: shows progress.
            read_weights: whether to read and check every weight. Without it, only headers are read
                and the model's digest is empty, which is enough for a dry run.

        Raises:
            ModelError: the model cannot be used.
            RequestError: the device is missing.
            StorageError: the disk is full while the model is converted.
        """
        model = model_in(store, request.model, read_weights=read_weights)
        machine = Machine.choose(request.device)
        return cls(store_for(store, model), model, machine, reporter, request.amounts.batch)

    def load(self) -> BlockRunner:
        """Load the original model onto the machine and return a runner of its blocks.

        Raises:
            ModelError: it cannot be loaded, or not be run block by block.
            MemoryShort: it does not fit on the device.
        """
        model = load_model(self.model, self.machine.dtype, self.machine.device)
        runner = self.machine.runner(model)
        check_block_chain(runner)
        return runner

    def on_device(self, windows: Windows) -> Tensor:
        """Return token windows as an int64 tensor [windows, tokens] on the machine's device."""
        return windows.tokens.to(self.machine.device)

    def calibration(self, windows: Windows) -> Calibration:
        """Return windows that layers are quantized on, on the machine's device."""
        return Calibration(self.on_device(windows), self.batch)


def model_in(store: StageStore, reference: str, *, read_weights: bool = True) -> ModelFolder:
    """Return the folder of a model, converted into the store if it is a GGUF file.

    See `quantizer.models.source.find_model`.

    Raises:
        ModelError: the model cannot be used.
        StorageError: the disk is full while the model is converted.
    """
    models = store.root / MODELS
    with disk_errors(models):
        return find_model(reference, models, read_weights=read_weights)


def store_for(store: StageStore, model: ModelFolder) -> StageStore:
    """Return the store for stages of a model; manifests hold its hub id or its file's name."""
    reference = Path(model.name)
    return store.for_model(reference.name if reference.exists() else model.name, model.path)
