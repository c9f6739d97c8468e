"""Promises of quantizer.conversion.embeddings and quantizer.modules.embedding.

Both ends of a model are stored packed, tied ones once.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantizer.conversion.checkpoint import quantized_bytes, save_checkpoint
from quantizer.conversion.embedding_losses import embedding_losses
from quantizer.conversion.embeddings import (
    EMBEDDING,
    EMBEDDING_FIDELITIES,
    HEAD,
    TIED,
    find_embeddings,
    quantize_embedding,
)
from quantizer.conversion.pack import pack_model
from quantizer.errors import CheckpointError
from quantizer.modules.embedding import QuantizedEmbedding, TiedHead
from quantizer.modules.linear import QuantizedLinear
from quantizer.packed.dequantize import dequantize_rows
from quantizer.packed.packing import pack, unpack, unpack_positions
from quantizer.plans.fidelity import Fidelity
from quantizer.plans.plan import OUTSIDE_BLOCKS, Plan
from quantizer.rounding.methods import quantize_layer
from quantizer.running.moments import head_moments
from quantizer.running.runner import BlockRunner
from quantizer.structure.blocks import find_layers
from tests.support.quantized import TinyFolder, TinyModel, correlated_inputs, logits_of, normal
from tests.support.tiny_models import CONFIGS, VOCABULARY
from tests.support.trained import WINDOWS

FIDELITY = Fidelity.parse("int4g64s6")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_single_codes_are_read_where_they_are(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 77), generator=torch.Generator().manual_seed(bits))
    places = torch.tensor([0, 76, 31, 32, 5, 5, 63])
    packed = pack(codes, bits)
    assert torch.equal(unpack_positions(packed, bits, places), unpack(packed, bits, 77)[:, places])


@pytest.mark.parametrize(
    "name", ["int2g32", "int3g64s6", "int4g64s8", "int8g256s8", "int2+4r0.4g32s6"]
)
def test_some_rows_are_those_of_the_whole_weight(name: str) -> None:
    weight, rows = normal(70, 100), torch.tensor([69, 0, 33, 33, 1])
    quantized = quantize_layer(weight, torch.eye(100), Fidelity.parse(name))
    assert torch.equal(
        dequantize_rows(quantized.tensors, quantized.fidelity, 100, rows),
        quantized.dequantize()[rows],
    )


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_tables_are_the_two_ends_of_a_model_and_one_if_they_are_tied(
    family: str, tiny_model: TinyModel
) -> None:
    model = tiny_model(family)
    found = find_embeddings(model)
    assert all((table.block, table.out_features) == (OUTSIDE_BLOCKS, VOCABULARY) for table in found)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        ends.pop()
    assert [model.get_submodule(table.name) for table in found] == ends
    assert [table.kind for table in found] == ([EMBEDDING, HEAD] if len(ends) == 2 else [TIED])
    assert not {table.name for table in found} & {layer.name for layer in find_layers(model)}


@pytest.mark.parametrize("fidelity", EMBEDDING_FIDELITIES, ids=lambda fidelity: fidelity.name)
@pytest.mark.parametrize("moments", [None, "some"])
def test_tables_are_quantized_some_rows_at_a_time(
    fidelity: Fidelity, moments: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = normal(150, 96), correlated_inputs(400, 96, 0)
    hessian = inputs.t() @ inputs / 400 if moments else None
    whole = quantize_embedding(weight, hessian, fidelity)
    monkeypatch.setattr("quantizer.conversion.embeddings._ROWS", 64)
    pieces = quantize_embedding(weight, hessian, fidelity)
    assert torch.allclose(pieces.dequantize(), whole.dequantize(), atol=1e-6)
    assert pieces.weight_bytes == fidelity.weight_bytes(150, 96)
    if hessian is not None:
        error, rounded = (
            quantized.dequantize() - weight
            for quantized in (whole, quantize_embedding(weight, None, fidelity))
        )
        assert float((error @ hessian * error).sum()) < 0.9 * float(
            (rounded @ hessian * rounded).sum()
        )


def test_moments_of_the_head_are_those_of_what_enters_it(tiny_model: TinyModel) -> None:
    model = tiny_model("qwen2")
    runner, seen = BlockRunner(model), []
    handle = runner.head.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, 1))
    )
    model(input_ids=WINDOWS)
    handle.remove()
    (states,) = seen
    expected = states.double().t() @ states.double() / len(states)
    assert torch.allclose(
        head_moments(runner, torch.split(WINDOWS, 2)).double(), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_losses_of_tables_are_divergences_of_models_with_them(
    family: str, tiny_model: TinyModel
) -> None:
    model = tiny_model(family)
    table = find_embeddings(model)[-1]
    weight = model.get_submodule(table.name).weight.data
    changed = [
        {table.name: quantize_embedding(weight, None, option).dequantize()}
        for option in EMBEDDING_FIDELITIES
    ]
    found = embedding_losses(model, changed, WINDOWS, torch.float32)

    reference = logits_of(model, WINDOWS)[:, :-1].log_softmax(-1)
    for loss, weights in zip(found, changed, strict=True):
        other = tiny_model(family)
        other.get_submodule(table.name).weight.data = weights[table.name]
        log_p = logits_of(other, WINDOWS)[:, :-1].log_softmax(-1)
        assert loss == pytest.approx(
            float((reference.exp() * (reference - log_p)).sum(-1).mean()), rel=1e-3, abs=1e-7
        )
    assert found[0] < found[1] < found[2]
    assert torch.equal(model.get_submodule(table.name).weight.data, weight), (
        "the model is left as it was"
    )


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_checkpoints_with_packed_tables_load_and_run_like_the_dequantized_model(
    family: str, tiny_model: TinyModel, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model, expanded = tiny_model(family), tiny_model(family)
    source = tiny_folder(family)
    layers, tables = find_layers(model), find_embeddings(model)
    plan = Plan.uniform(layers, Fidelity.parse("int8g32")).with_embeddings(
        dict.fromkeys(tables, FIDELITY)
    )
    weights = {
        layer.name: quantize_layer(
            model.get_submodule(layer.name).weight.data,
            torch.zeros(layer.in_features, layer.in_features),
            plan.by_name[layer.name],
        )
        for layer in layers
    }
    weights |= {
        table.name: quantize_embedding(model.get_submodule(table.name).weight.data, None, FIDELITY)
        for table in tables
    }
    for name, quantized in weights.items():
        expanded.get_submodule(name).weight.data = quantized.dequantize()

    pack_model(model, plan, weights)
    assert torch.allclose(logits_of(model, WINDOWS), logits_of(expanded, WINDOWS), atol=1e-4)
    save_checkpoint(model, source, plan, tmp_path / "out")
    assert quantized_bytes(tmp_path / "out", plan) == plan.weight_bytes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits_of(loaded, WINDOWS), logits_of(expanded, WINDOWS), atol=2e-2)
    assert isinstance(loaded.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(
        loaded.get_output_embeddings(), TiedHead if tables[0].kind == TIED else QuantizedLinear
    )
    generated = loaded.generate(WINDOWS[:1, :5], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 8)
    if tables[0].kind == TIED:
        _refuse_edits(tmp_path / "out", tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again, WINDOWS), logits_of(loaded, WINDOWS))


def _refuse_edits(folder: Path, elsewhere: Path) -> None:
    """Check that wrong ties, and tables with an unsupported fidelity, are refused by name."""
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]
    (head, table) = next(iter(said["tied"].items()))
    layers = {**said["layers"], table: "int4g64s6a4"}
    edits = [{"tied": {"nowhere": table}}, {"tied": {head: "model.norm"}}, {"layers": layers}]
    for at, edit in enumerate(edits):
        shutil.copytree(folder, elsewhere / f"edited{at}")
        (elsewhere / f"edited{at}" / "config.json").write_text(
            json.dumps({**config, "quantization_config": {**said, **edit}})
        )
        with pytest.raises(
            CheckpointError,
            match=r"not the model.s head|no quantized embedding|neither outliers nor adapters",
        ):
            AutoModelForCausalLM.from_pretrained(elsewhere / f"edited{at}")
