"""Every decoder type of transformers works from folder to checkpoint, or is refused by a sentence.

The long test compares with the stored rows; `python -m tests.benchmarks.families` makes them anew.
"""

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.benchmarks.families import walk_all
from tests.benchmarks.stored import rows
from tests.support.families.decoders import decoder_types
from tests.support.families.walk import walk

DIFFERENT = (
    "gpt2",
    "bloom",
    "gemma3",
    "gpt_oss",
    "llama4_text",
    "nemotron_h",
    "mamba",
    "qwen3_5",
    "zamba2",
    "jetmoe",
    "xlstm",
    "longcat_flash",
    "lara_mini",
)
"""Types that differ in kind: transposed, fused, hybrid, multi-modal, recurrent, split in files."""
REFUSED = {"gemma3n_text": "several streams", "dory": "more from the blocks before it"}


@pytest.mark.parametrize("model_type", DIFFERENT)
def test_types_that_differ_in_kind_work(model_type: str, tmp_path: Path) -> None:
    found = walk(model_type, tmp_path)
    assert found.works, found.sentence or found.error


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_cannot_work_are_refused_in_one_sentence(
    model_type: str, tmp_path: Path
) -> None:
    found = walk(model_type, tmp_path)
    assert REFUSED[model_type] in found.sentence
    assert not found.error


def test_the_stored_rows_are_of_all_types_and_none_ends_in_an_error() -> None:
    stored = rows("families")
    assert not [row["model_type"] for row in stored if row["error"]]
    assert all(row["works"] or row["sentence"] for row in stored)
    if stored[0]["transformers"] == version("transformers"):
        assert [row["model_type"] for row in stored] == list(decoder_types())


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_every_type_goes_as_far_as_the_table_says() -> None:
    stored = {row["model_type"]: row for row in rows("families")}
    for row in walk_all(decoder_types()):
        assert not row["error"], row
        before = stored.get(row["model_type"])
        if before is not None and row["transformers"] == before["transformers"]:
            assert row["works"] == before["works"], row
            assert row["share"] == pytest.approx(before["share"])
