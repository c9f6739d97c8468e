"""What a stage's process writes: JSON lines, neither too many nor with paths of the machine."""

import io
import json

import pytest

from service.stage_process import progress_lines
from service.stage_process.job_request import as_called
from service.stage_process.progress_lines import ProgressLines, finite


def test_output_is_json_and_names_no_path_of_the_machine() -> None:
    loss = [float("inf"), float("nan"), 1.5]
    document = {
        "path": "no /srv/models/a/config.json",
        "loss": loss,
        "more": {"at": ("/srv/models/a",)},
    }
    written = finite(as_called(document, {"/srv/models/a": "a"}))
    assert written == {"path": "no a/config.json", "loss": [None, None, 1.5], "more": {"at": ["a"]}}


def test_progress_is_reported_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()
    now = 100.0
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now)
    update = ProgressLines("profile", sink).step("quantize")
    for done in range(1, 401):
        now += 0.125
        update(done, 400)
    rows = [json.loads(line)["progress"] for line in sink.getvalue().splitlines()]
    assert [row["done"] for row in rows[:3]] == [1, 17, 33]
    assert rows[-1] == {
        "stage": "profile",
        "step": "quantize",
        "done": 400,
        "total": 400,
        "seconds_left": 0.0,
    }
    assert rows[1]["seconds_left"] == pytest.approx(0.125 * (400 - 17), abs=0.05)


def test_a_step_that_hardly_advances_is_reported_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = io.StringIO()
    now = 100.0
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now)
    update = ProgressLines("profile", sink).step("quantize")
    for done in range(1, 61):
        now += 1.0
        update(done, 100_000)
    rows = [json.loads(line)["progress"] for line in sink.getvalue().splitlines()]
    assert [row["done"] for row in rows] == [1, 16, 31, 46]
