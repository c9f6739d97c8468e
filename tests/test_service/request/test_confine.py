"""Promises of service.request.confine.

A job reaches what the operator opened, and the hub by id, and nothing else.
"""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import PathRefused
from service.request.confine import confine_model, confine_text


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    opened, other, secret = tmp_path / "opened", tmp_path / "other", tmp_path / "secret"
    for folder in (opened / "model", other, secret / "model"):
        folder.mkdir(parents=True)
    (other / "text.txt").write_text("words")
    (opened / "out").symlink_to(secret)
    (opened / "within").symlink_to(opened / "model")
    return [opened, other]


@pytest.mark.parametrize("named", ["model", "./model", "model/", "model/../model", "within"])
def test_what_lies_in_an_opened_folder_is_given_by_its_real_path(
    named: str, roots: list[Path]
) -> None:
    assert confine_model(named, roots, hub=False) == str(roots[0] / "model")


def test_absolute_paths_and_all_opened_folders_count(roots: list[Path]) -> None:
    assert confine_model(str(roots[0] / "model"), roots, hub=False) == str(roots[0] / "model")
    assert confine_text("text.txt", roots, hub=False) == str(roots[1] / "text.txt")


ELSEWHERE = [
    "../secret/model",
    "out/model",
    "out",
    "/etc/passwd",
    "/",
    "..",
    "missing",
    "file:///etc/passwd",
    "model\0",
    "",
    "~/model",
    "https://example.com/model",
    "s3://bucket/model",
    "x" * 5000,
    "-rf",
    "org/../..",
    "./../secret",
]


@pytest.mark.parametrize("named", ELSEWHERE)
def test_everything_else_is_refused_in_the_same_words_whether_it_is_there_or_not(
    named: str, roots: list[Path]
) -> None:
    for confine in (confine_model, confine_text):
        with pytest.raises(PathRefused) as refused:
            confine(named, roots, hub=False)
        assert "is not in a folder that jobs may use" in str(refused.value)
        assert str(roots[0]) not in str(refused.value).replace(repr(named[:200]), "")


def test_hub_ids_are_taken_where_the_hub_is_open(roots: list[Path]) -> None:
    assert (
        confine_model("HuggingFaceTB/SmolLM2-135M", roots, hub=True) == "HuggingFaceTB/SmolLM2-135M"
    )
    for revision in ("main", "v1.0", "refs/pr/3", "0" * 40):
        named = f"org/name@{revision}"
        assert confine_model(named, roots, hub=True) == named
    assert confine_text("org/data:config:train", roots, hub=True) == "org/data:config:train"
    assert confine_text("builtin:calibration", roots, hub=False) == "builtin:calibration"
    for named in (
        "org/.hidden",
        ".org/name",
        "org/na..me",
        "org/name/more",
        "org",
        "org/name?x=1",
        "org/name@",
        "org/name@a@b",
        "org/name@../main",
        "org/name@/main",
        "org/name@main/",
        "a b/c",
    ):
        with pytest.raises(PathRefused):
            confine_model(named, roots, hub=True)
    with pytest.raises(PathRefused, match="switched off"):
        confine_model("HuggingFaceTB/SmolLM2-135M", roots, hub=False)


@given(st.text(st.sampled_from("abc./\\~:%\0-é \n"), max_size=30))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_name_leads_out(tmp_path_factory: pytest.TempPathFactory, named: str) -> None:
    root = tmp_path_factory.getbasetemp() / "confined"
    (root / "a").mkdir(parents=True, exist_ok=True)
    try:
        found = confine_model(named, [root], hub=False)
    except PathRefused:
        return
    assert os.path.commonpath([os.path.realpath(root), found]) == os.path.realpath(root)
