"""Promises of quantizer.texts.text and quantizer.texts.windows.

Where text comes from, what is refused, and how it is cut into windows.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizer.errors import TextError
from quantizer.texts.text import (
    BUILT_IN_CALIBRATION,
    BUILT_IN_EVALUATION,
    TextSpec,
    read_text,
    text_sha256,
)
from quantizer.texts.windows import make_windows
from tests.support.paths import ROOT
from tests.support.quantized import fixed
from tests.support.tiny_models import make_tokenizer

BUILT_IN = [BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION]


class Letters:
    """A tokenizer that makes a token of each letter."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [7] * add_special_tokens + [ord(letter) for letter in text]}


def _spec(windows: int, tokens: int, seed: int | None = None, skip: int = 0) -> TextSpec:
    return TextSpec("some.txt", windows, tokens, seed, skip)


def _cut(length: int, spec: TextSpec) -> list[list[int]]:
    """Return windows of a text whose tokens count 0, 1, 2 .."""
    rows: list[list[int]] = make_windows("".join(map(chr, range(length))), spec, Letters()).tolist()
    return rows


def test_built_in_texts_are_the_topics_by_turns() -> None:
    names, texts = sorted(topics), [read_text(source) for source in BUILT_IN]
    longest = [max(topics[name].split("\n\n"), key=len).strip("\n") for name in names[::2]]
    assert all(part in texts[0] for part in longest)
    assert sum(map(len, texts)) > 0.6 * sum(map(len, topics.values()))


def test_built_in_texts_have_no_paragraph_in_common() -> None:
    calibration, evaluation = (
        {part for part in read_text(source).split("\n\n") if len(part) > 80} for source in BUILT_IN
    )
    assert len(calibration) > 300
    assert not calibration & evaluation


@pytest.mark.parametrize("source", BUILT_IN)
def test_built_in_texts_are_the_same_in_every_process(source: str) -> None:
    code = (
        "import sys; from quantizer.texts.text import read_text, text_sha256; "
        "print(text_sha256(read_text(sys.argv[1])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == text_sha256(read_text(source))


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    text = "One\n\n  zwei \u2028 drei\n"
    (tmp_path / "text.md").write_text(text, encoding="utf-8")
    assert read_text(str(tmp_path / "text.md")) == text


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_records_of_a_jsonl_file_are_joined_by_blank_lines(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    rows = [{"text": "first\nline"}, {"id": 3, "text": "zw\u00f6lf"}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    assert read_text(str(path)) == "first\nline\n\nzw\u00f6lf"


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85"])
def test_a_record_may_hold_any_letter_that_json_allows(letter: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": f"a{letter}b"}, ensure_ascii=False), encoding="utf-8")
    assert read_text(str(path)) == f"a{letter}b"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ('{"content": "x"}', "line 2: no field 'text'"),
        ('{"text": 3}', "line 2: no field 'text'"),
        ('{"text": null}', "line 2: no field 'text'"),
        ('["text"]', "line 2: no field 'text'"),
        ('"text"', "line 2: no field 'text'"),
    ],
)
def test_a_wrong_record_is_named_by_its_line(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(TextError, match=complaint):
        read_text(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\t "), ("a.jsonl", ""), ("a.jsonl", '{"text": " "}')],
)
def test_an_empty_text_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match="is empty"):
        read_text(str(tmp_path / name))


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("z\u00f6lf".encode("latin-1"))
    with pytest.raises(TextError, match="not UTF-8"):
        read_text(str(tmp_path / "a.txt"))


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a folder"):
        read_text(str(tmp_path))


def test_a_source_that_is_nothing_is_refused() -> None:
    with pytest.raises(TextError, match="'org/nothing' is no file, and no Hugging Face dataset"):
        read_text("org/nothing")


@pytest.mark.parametrize(
    "name", ["my.txt", "texts/my.jsonl", "./my", "../my", "/my/text", "~/my", "a/b/c", "my text"]
)
def test_a_file_that_is_missing_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(TextError) as caught:
        read_text(name)
    message = f"text {name!r} is no file, and no id of a Hugging Face dataset"
    assert str(caught.value) == message


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(TextError):
        read_text("a" * 300)


@pytest.mark.filterwarnings("default")
def test_a_dataset_is_read_from_its_text_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, column in (("good", "text"), ("bad", "content")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            f'{{"{column}": "one"}}\n{{"{column}": "two"}}\n', encoding="utf-8"
        )
    assert read_text(f"{tmp_path / 'good'}::train") == "one\n\ntwo"
    with pytest.raises(TextError, match=r"'content'.*'text' is needed"):
        read_text(f"{tmp_path / 'bad'}::train")


def test_the_digest_is_that_of_the_utf8_text() -> None:
    assert text_sha256("z\u00f6lf") == hashlib.sha256(b"z\xc3\xb6lf").hexdigest()


def test_text_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}', encoding="utf-8")
    with pytest.raises(TextError):
        text_sha256(read_text(str(tmp_path / "a.jsonl")))


def test_without_a_seed_the_first_windows_are_taken_and_a_rest_is_dropped() -> None:
    assert _cut(11, _spec(0, 3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert _cut(11, _spec(2, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert _cut(11, _spec(0, 3, skip=1)) == [[3, 4, 5], [6, 7, 8]]
    assert _cut(11, _spec(1, 3, skip=1)) == [[3, 4, 5]]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_all_windows_are_the_whole_text_in_order(seed: int | None) -> None:
    assert _cut(100, _spec(0, 7, seed)) == [
        list(range(start, start + 7)) for start in range(0, 98, 7)
    ]


@fixed
@given(
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 8),
    st.none() | st.integers(0, 2**63),
    st.integers(0, 60),
)
def test_windows_are_distinct_pieces_of_the_text_in_order(
    tokens: int, windows: int, skip: int, seed: int | None, rest: int
) -> None:
    rows = _cut((windows + skip) * tokens + rest, _spec(windows, tokens, seed, skip))
    assert len(rows) == windows
    assert rows == sorted(rows)
    assert len({row[0] for row in rows}) == windows
    assert all(row == list(range(row[0], row[0] + tokens)) and row[0] % tokens == 0 for row in rows)


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_skipped_windows_are_those_drawn_first(seed: int | None) -> None:
    first, second, rest = (
        _cut(300, _spec(windows, 3, seed, skip)) for windows, skip in ((20, 0), (30, 20), (0, 50))
    )
    starts = [row[0] for rows in (first, second, rest) for row in rows]
    assert len(starts) == len(set(starts)) == 100


def test_a_seed_always_draws_the_same_windows_and_another_one_others() -> None:
    assert _cut(300, _spec(20, 3, 5)) == _cut(300, _spec(20, 3, 5))
    assert _cut(300, _spec(20, 3, 5)) != _cut(300, _spec(20, 3, 6)) != _cut(300, _spec(20, 3))


def test_drawing_windows_leaves_the_global_chance_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    _cut(300, _spec(20, 3, 5))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("length", "spec"),
    [
        (2, _spec(0, 3)),
        (8, _spec(3, 3)),
        (9, _spec(3, 3, skip=1)),
        (9, _spec(0, 3, skip=3)),
        (9, _spec(0, 3, skip=9)),
        (8, _spec(3, 3, 1)),
    ],
)
def test_a_text_that_is_too_short_is_refused_with_its_size(length: int, spec: TextSpec) -> None:
    needed = max(spec.windows, 1) + spec.skip
    available = rf"'some\.txt' has {length} tokens, enough for {length // 3} windows of 3"
    with pytest.raises(TextError, match=f"{available}; {needed} are"):
        _cut(length, spec)


def test_windows_of_a_real_tokenizer_spell_the_text() -> None:
    tokenizer = make_tokenizer()
    text = read_text(BUILT_IN_EVALUATION)[:3000]
    windows = make_windows(text, _spec(0, 16), tokenizer)
    assert windows.dtype == torch.int64
    assert windows.shape[1] == 16
    spelled = tokenizer.decode(windows.flatten(), clean_up_tokenization_spaces=False)
    assert text.startswith(spelled)
    assert len(spelled) > len(text) - 200
