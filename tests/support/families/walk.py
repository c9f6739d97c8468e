"""Take a tiny model of a type through everything: find, measure, plan, quantize, save, reload."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig

from quantizer.conversion.blocks import QuantizationSpec, quantize_blocks
from quantizer.conversion.checkpoint import save_checkpoint
from quantizer.conversion.pack import pack_model
from quantizer.conversion.quantized_block import read_blocks
from quantizer.durable import PartStore
from quantizer.known_error import KnownError
from quantizer.models.folder import ModelFolder
from quantizer.models.loading import load_model, meta_model, model_class
from quantizer.models.source import find_model
from quantizer.packed.weight import QuantizedWeight
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import Plan
from quantizer.running.block_chain import check_block_chain
from quantizer.running.moments import Calibration
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from quantizer.structure.coverage import measure_coverage
from tests.support.families.building import save_family

_TOLERANCE = 1e-3
WINDOWS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(3))
_FIDELITY = Fidelity.parse("int3g32s6")


@dataclass(frozen=True)
class Walk:
    """How far a type came.

    Attributes:
        model_type: the type.
        works: whether it came to the end.
        sentence: why it was refused; empty if it was not.
        share: share of the block weights that are reached.
        stays: the largest part that stays, if little is reached.
        error: what is wrong otherwise: a traceback, or a checkpoint that computes something else.
    """

    model_type: str
    works: bool
    sentence: str = ""
    share: float = 0.0
    stays: str = ""
    error: str = ""


def walk(model_type: str, folder: Path) -> Walk:
    """Take a type through everything, or to the sentence that refuses it."""
    save_family(model_type, folder / "original")
    try:
        source = find_model(str(folder / "original"), folder / "cache")
        bare = meta_model(source)
        coverage = measure_coverage(bare)
        runner = BlockRunner(load_model(source, torch.float32, "cpu"))
        check_block_chain(runner)
    except KnownError as err:
        return Walk(model_type, works=False, sentence=str(err).replace(str(folder), ""))
    layers = find_layers(runner.model)
    error = "" if layers == find_layers(bare) else "other layers without weights"
    plan = Plan(layers, tuple(_FIDELITY for _ in layers))
    difference = _quantize(runner, source, plan, folder)
    if difference > _TOLERANCE:
        error = f"the reloaded checkpoint differs by {difference:.2g}"
    stays = coverage.warning or ""
    return Walk(model_type, not error, "", coverage.share, stays, error)


def _quantize(runner: BlockRunner, source: ModelFolder, plan: Plan, folder: Path) -> float:
    """Quantize and save; return how much the reloaded logits differ from the dequantized ones."""
    parts = PartStore(folder / "parts")
    spec = QuantizationSpec.for_plan(plan)
    quantize_blocks(runner, plan.layers, spec, Calibration(WINDOWS, 2), parts, lambda *_: None)
    generates = _generates(runner.model)
    with torch.no_grad():
        expected = runner.model(input_ids=WINDOWS, use_cache=False).logits
    choices = {name: (fidelity,) for name, fidelity in plan.by_name.items()}
    weights: dict[str, QuantizedWeight] = {}
    for block in read_blocks(parts, plan.layers, choices):
        weights |= {name: next(iter(own.values())) for name, own in block.weights.items()}
    pack_model(runner.model, plan, weights)
    save_checkpoint(runner.model, source, plan, folder / "out")
    loaded = _reload(folder / "out")
    with torch.no_grad():
        found = loaded(input_ids=WINDOWS, use_cache=False).logits
    if generates and not _generates(loaded):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _generates(model: Any) -> bool:
    """Return whether a model generates; some tiny originals do not."""
    try:
        model.generate(input_ids=WINDOWS[:1, :4], max_new_tokens=3, do_sample=False)
    except Exception:  # noqa: BLE001  whatever keeps a tiny original from it
        return False
    return True


def _reload(folder: Path) -> Any:

    config = AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    """Walk through the types that are named as arguments and print a JSON line for each."""
    for model_type in sys.argv[1:]:
        with TemporaryDirectory() as folder:
            try:
                result = walk(model_type, Path(folder))
            except Exception as err:  # noqa: BLE001  what must not happen is told
                import traceback

                last = traceback.extract_tb(err.__traceback__)
                places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in last[-1:-6:-1])
                text = " ".join(str(err).split())[:200]
                error = f"{type(err).__name__}: {text} @ {places}"
                result = Walk(model_type, works=False, error=error)
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
