"""Reports: typed values and a stable JSON document, which old reports keep to as well."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from allocator.allocate import allocate
from quantizer.running.quality import Quality
from quantizer.training.spec import TrainingSpec
from service.errors import RequestError
from service.report import schema
from service.report.document import Report
from service.report.layers import PlanInfo
from service.report.methods import PhaseInfo
from service.report.page import render_page
from service.report.quality import Scores
from service.report.summary import headline, summary_rows
from tests.support.commands import bitwright
from tests.support.profile_commands import refused
from tests.support.synthetic_profiles import budget_at, make_profile

STORED = Path(__file__).parent / "stored"
"""Reports of version 0.1.0, written before there were types: of the demo, and of tiny models."""

NAMES = sorted(path.stem for path in STORED.iterdir())
LATER = ("constraints", "tables", "tuning", "guard", "profile", "checks")
"""Fields that the first reports of this schema did not have."""


def stored(name: str) -> Any:
    return json.loads((STORED / f"{name}.json").read_text())


def test_the_stored_schema_is_that_of_the_dataclasses() -> None:
    assert Path(schema.__file__).with_name(schema.FILE).read_text() == schema.dumps()
    Draft202012Validator.check_schema(schema.report_schema())


def test_every_field_of_the_schema_is_described() -> None:
    document = schema.report_schema()
    for part in (document, *document["$defs"].values()):
        assert part["description"]
        assert all(content["description"] for content in part["properties"].values())


@pytest.mark.parametrize("name", NAMES)
def test_old_reports_keep_to_the_schema_and_are_read_and_written_without_loss(name: str) -> None:
    document = stored(name)
    Draft202012Validator(schema.report_schema()).validate(document)
    report = Report.from_json(document)
    assert json.dumps(report.to_json()) == json.dumps(document), "not even the order of keys"
    assert render_page(report).count("<svg") == (5 if report.checks else 4)
    assert headline(report)["plan_bytes"] == document["plan_bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_reports_of_the_schema_are_shown_too(name: str, tmp_path: Path) -> None:
    document = {key: value for key, value in stored(name).items() if key not in LATER}
    (tmp_path / "report.json").write_text(json.dumps(document))
    done = bitwright("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert document["model"]["name"] in done.stdout
    assert f"{document['plan_bytes']:,}" in done.stdout
    assert render_page(Report.from_json(document))


def test_the_summary_has_the_plan_before_training_where_it_was_trained() -> None:
    names = ["original", "uniform", "plan, before training", "plan"]
    assert [row.model for row in summary_rows(Report.from_json(stored("trained")))] == names
    names.remove("plan, before training")
    assert [row.model for row in summary_rows(Report.from_json(stored("demo")))] == names


def test_numbers_that_are_not_finite_are_shown_as_such() -> None:
    document = stored("checked")
    document["evaluation"]["plan"] |= {"perplexity": "infinity", "kl_nats_per_token": None}
    document["evaluation"]["uniform"] |= {"kl_stderr": None}
    *_, uniform, plan = summary_rows(Report.from_json(document))
    assert plan.perplexity == "infinite"
    assert plan.kl == "not finite"
    assert Report.from_json(document).to_json()["evaluation"]["plan"]["perplexity"] == "infinity"
    assert "±" not in uniform.kl
    assert "not finite" in render_page(Report.from_json(document))


def test_fields_that_a_later_version_adds_are_ignored() -> None:
    document = stored("trained")
    report = Report.from_json(document | {"added": 1})
    assert report == Report.from_json(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "bitwright.report/9"}, "schema 'bitwright.report/9'; this version reads"),
        ({"schema": None}, "schema None; this version reads"),
        ({"evaluation": {}}, "evaluation.original"),
        ({"plan_bytes": "many"}, "plan_bytes"),
    ],
)
def test_what_is_no_report_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    document = stored("trained") | change
    with pytest.raises(RequestError, match=message):
        Report.from_json(document)
    (tmp_path / "report.json").write_text(json.dumps(document))
    done = bitwright("report", tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_a_folder_without_a_report_is_bad_input(tmp_path: Path) -> None:
    message = refused("report", tmp_path)
    assert message.endswith("has no report.json; give the output folder of `bitwright run`")


@pytest.mark.parametrize("document", [[], "report", None])
def test_documents_that_are_no_objects_are_refused(document: Any) -> None:
    with pytest.raises(RequestError, match="schema None"):
        Report.from_json(document)


def test_reports_have_every_field_of_scores_training_and_plans() -> None:
    assert {each.name for each in fields(Scores)} == {each.name for each in fields(Quality)}
    spec = {each.name for each in fields(TrainingSpec)}
    assert {each.name for each in fields(PhaseInfo)} == spec | {"kind"}
    profile = make_profile(0)
    allocation = allocate(profile, budget_at(profile, 0.5))
    assert [each.name for each in fields(PlanInfo)] == list(allocation.to_json())
