"""What quantizer/README.md states in numbers and lists."""

import re
from math import prod

import pytest

from quantizer.packed.layout import tensor_specs
from quantizer.plans.fidelity import Fidelity
from service.stages.recipe import RECIPES
from tests.support.paths import ROOT

README = (ROOT / "quantizer" / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text below a heading."""
    return re.split(r"^## ", README.split(f"## {title}\n")[1], flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """Return the names in the first column of a table."""
    return [name for line in text.splitlines() for name in re.findall(r"^\| `([^|`]+)`", line)]


def test_the_table_of_tensors_is_that_of_its_fidelity() -> None:
    text = section("A stored layer")
    name, (outputs, inputs) = "int2+3r0.4g32s6o0.05a3", (576, 1536)
    assert f"`{name}`" in text
    fidelity = Fidelity.parse(name)
    expected = [
        f"| `{tensor}` | {str(spec.dtype).removeprefix('torch.')} | {list(spec.shape)} "
        f"| {prod(spec.shape) * spec.dtype.itemsize:,} |"
        for tensor, spec in tensor_specs(fidelity, outputs, inputs).items()
    ]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row[: len(start)] for row, start in zip(rows, expected, strict=True)] == expected
    size = fidelity.weight_bytes(outputs, inputs)
    assert f"{size:,} bytes, {8 * size / (outputs * inputs):.2f} bits a weight" in text


@pytest.mark.parametrize("name", re.findall(r"`(int[0-9][^`<]*)`", README))
def test_fidelities_that_are_named_exist(name: str) -> None:
    assert re.fullmatch(r"int[0-9]", name) or Fidelity.parse(name).name == name


def test_rooms_are_those_on_disk() -> None:
    rooms = {path.parent.name for path in (ROOT / "quantizer").glob("*/__init__.py")}
    assert {name.rstrip("/") for name in first_cells(section("Rooms")) if "/" in name} == rooms


def test_recipes_are_those_of_the_service() -> None:
    assert first_cells(section("Recipes")) == list(RECIPES)


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|md))`", README)
    assert named
    assert [
        name
        for name in named
        if not (ROOT / "quantizer" / name).is_file() and not (ROOT / name).is_file()
    ] == []
