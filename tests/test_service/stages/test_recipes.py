"""Each recipe makes a loadable checkpoint of the plan's bytes by its own method."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantizer.conversion.checkpoint import quantized_bytes, read_weights
from quantizer.importance.selection import select_weights
from quantizer.models.loading import meta_model
from quantizer.models.source import find_model
from quantizer.modules.linear import get_linear
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import LayerSpec, Plan
from quantizer.structure.blocks import find_layers
from quantizer.texts.text import TextSpec
from quantizer.training.spec import TrainingSpec
from service.request.effort import find_effort
from service.stages.calibration_windows import text_windows
from service.stages.machine import Machine
from service.stages.recipe import BLOCKS, MODEL, RECIPES
from service.stages.requantize import RANKING_WINDOWS
from service.stages.training_phases import Phase, phases_for
from tests.support.commands import SMALL, bitwright, bitwright_json
from tests.support.run_contexts import run_context
from tests.support.sampling import sampled

PLAIN = "int2+4r0.5g32"
ADAPTED = "int2+4r0.5g32a8"
SPARSE = "int2+4r0.5g32s6o0.01"


def save_plan(model: Path, folder: Path, kind: str) -> Path:
    layers = find_layers(meta_model(find_model(str(model), folder / "models")))
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(Plan.uniform(layers, Fidelity.parse(kind)).to_json()))
    return file


def quantize_options(
    folder: Path, plan: Path, recipe: str, effort: str, cache: Path | None = None
) -> tuple[str | Path, ...]:
    return (
        "--plan",
        plan,
        "--out",
        folder / recipe,
        "--recipe",
        recipe,
        "--effort",
        effort,
        "--cache",
        cache or folder / "cache",
        *SMALL[:4],
    )


def _divergences(model: Path, folder: Path, cache: Path, *names: str) -> list[float]:
    folders = [folder / name for name in names]
    scores = bitwright_json("evaluate", model, *folders, "--tokens", "64", "--cache", cache)
    return [scores[str(each)]["kl_nats_per_token"] for each in folders]


@pytest.fixture(scope="module")
def correlated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose inputs lie near three directions.

    There, one weight can compensate the error of another.
    """
    folder = tmp_path_factory.mktemp("correlated") / "model"
    shutil.copytree(tiny_llama, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    embedding, chance = model.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    with torch.no_grad():
        near = torch.randn(len(embedding), 3, generator=chance) @ torch.randn(
            3, embedding.shape[1], generator=chance
        )
        embedding.copy_(0.15 * near + 0.015 * torch.randn(embedding.shape, generator=chance))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("recipe", "kind", "steps", "changed"),
    [
        ("usual", MODEL, 100, {}),
        ("blockwise", BLOCKS, 60, {}),
        ("sgr-q", MODEL, 100, {"trained": "scales", "scale_rate": 3e-2, "salient": "knee"}),
        ("apiq", BLOCKS, 60, {"trained": "clipping", "scale_rate": 1e-3}),
        ("signiq", BLOCKS, 60, {"trained": "clipping", "scale_rate": 1e-3, "penalty": 0.1}),
    ],
)
def test_each_recipe_trains_its_own_parameters(
    recipe: str, kind: str, steps: int, changed: dict[str, Any]
) -> None:
    layers = (LayerSpec("layer", 0, "layer", 64, 64),)
    machine = Machine("cpu", torch.float32)
    (phase,) = phases_for(find_effort("balanced"), layers, machine, 4, 7, RECIPES[recipe])
    common = {"trained": "codes", "code_rate": 2e-3, "scale_rate": 1e-2, "adapter_rate": 1e-2}
    expected = TrainingSpec(steps, batch=4, precision=machine.precision, seed=7, **common)
    assert phase == Phase(kind, replace(expected, **changed))


@pytest.mark.parametrize(
    "recipe",
    sampled(
        [name for name in RECIPES if name not in ("usual", "requant")],
        lambda recipe: recipe != "apiq",  # signiq without its penalty
    ),
)
def test_each_recipe_makes_a_checkpoint_of_its_own_at_the_same_bytes(
    recipe: str, tiny_llama: Path, correlated: Path, tmp_path: Path, module_cache: Path
) -> None:
    model = correlated if RECIPES[recipe].kind is None else tiny_llama
    plan = save_plan(
        model, tmp_path, ADAPTED if RECIPES[recipe].parameters.trained == "clipping" else PLAIN
    )
    bitwright_json(
        "quantize", model, *quantize_options(tmp_path, plan, "usual", "fast", module_cache)
    )
    effort = "fast" if RECIPES[recipe].kind is None else "balanced"
    made = bitwright_json(
        "quantize", model, *quantize_options(tmp_path, plan, recipe, effort, module_cache)
    )

    chosen = Plan.loads(plan.read_text())
    assert made["plan_bytes"] == chosen.weight_bytes == quantized_bytes(tmp_path / recipe, chosen)
    AutoModelForCausalLM.from_pretrained(tmp_path / recipe)
    usual, own = _divergences(model, tmp_path, module_cache, "usual", recipe)
    if effort == "fast":
        assert own > 2 * usual, "nothing compensates the errors of rounding"
    else:
        assert made["trained"]
        assert own < usual


def test_requantizing_spreads_outliers_by_what_weights_matter(
    tiny_llama: Path, tmp_path: Path
) -> None:
    plan = save_plan(tiny_llama, tmp_path, SPARSE)
    made = bitwright_json(
        "quantize", tiny_llama, *quantize_options(tmp_path, plan, "requant", "fast")
    )
    wanted, found = (
        Plan.loads(plan.read_text()),
        Plan.loads((tmp_path / "requant" / "plan.json").read_text()),
    )
    assert made["plan_bytes"] == found.weight_bytes == quantized_bytes(tmp_path / "requant", found)
    assert found.weight_bytes == pytest.approx(wanted.weight_bytes, rel=0.002)

    expected = _kept(tiny_llama, tmp_path, wanted)
    forms = read_weights(tmp_path / "requant", found)
    for layer in found.layers:
        fidelity, outliers = forms[layer.name].fidelity, forms[layer.name].outliers
        assert fidelity.outlier_share == expected.shares[layer.name]
        assert outliers is not None
        places = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
        rows = torch.repeat_interleave(torch.arange(layer.out_features), outliers.starts.diff())
        places[rows, outliers.columns] = True
        scores = expected.scores[layer.name]
        assert float(scores[places].min()) >= float(scores[~places].max()), (
            "the weights that are kept score highest"
        )
    assert len({fidelity.outlier_share for fidelity in found.fidelities}) > 1


def _kept(model: Path, folder: Path, plan: Plan) -> Any:
    """Rank weights anew, on a checkpoint without outliers that the command line makes."""
    bare = save_plan(model, folder, SPARSE.split("o", maxsplit=1)[0])
    bitwright_json("quantize", model, *quantize_options(folder, bare, "usual", "fast"))
    context = run_context(model, folder / "cache")
    runner = context.load()
    originals = {
        layer.name: get_linear(runner.model, layer.name).weight.data.clone()
        for layer in plan.layers
    }
    forms = read_weights(folder / "usual", Plan.loads(bare.read_text()))
    calibration = text_windows(context, TextSpec("builtin:calibration", 4, 64, 0))
    windows = calibration.tokens[:RANKING_WINDOWS]
    share = sum(
        f.outlier_count(s.out_features, s.in_features)
        for s, f in zip(plan.layers, plan.fidelities, strict=True)
    )
    weights = sum(layer.weights for layer in plan.layers)
    quantized = {name: form.dequantize() for name, form in forms.items()}
    return select_weights(runner, originals, quantized, windows, share / weights)


@pytest.mark.parametrize(
    ("recipe", "effort", "kind", "message"),
    [
        ("heroic", "fast", PLAIN, "recipe 'heroic': give usual, rtn"),
        (
            "signiq",
            "fast",
            PLAIN,
            "recipe 'signiq' is a way of training, effort 'fast' trains nothing: use balanced or",
        ),
        (
            "requant",
            "fast",
            PLAIN,
            "recipe 'requant' chooses outliers, the plan has none: give fidelities such as",
        ),
        (
            "rtn",
            "fast",
            SPARSE,
            "rtn cannot store int2+4r0.5g32s6o0.01: use gptq, or int2+4r0.5g32",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused(
    recipe: str, effort: str, kind: str, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    done = bitwright(
        "quantize",
        tiny_llama,
        *quantize_options(tmp_path, save_plan(tiny_llama, tmp_path, kind), recipe, effort),
    )
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / recipe).exists()
