"""Checks of reports."""

from typing import Any

from jsonschema import Draft202012Validator

from service.report.document import Report
from service.report.schema import report_schema


def check_report(document: Any) -> None:
    """Check that a report keeps to the schema, and that its typed value loses nothing."""
    Draft202012Validator(report_schema()).validate(document)
    assert Report.from_json(document).to_json() == document
