"""The JSON Schema of reports, made from their dataclasses.

It is stored beside this module. To write it anew:
`python -m service.report.schema > service/report/report.schema.json`.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from service.report.document import SCHEMA, Report
from service.report.json_values import INFINITY

FILE = "report.schema.json"

_NUMBER_OR_NULL = [{"type": "number"}, {"type": "null"}]
_ATTRIBUTE = re.compile(r"^ {4}(\w+): ((?:.|\n(?= {8}))*)", re.MULTILINE)


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema, draft 2020-12, of a report; its descriptions are the docstrings."""
    schema = TypeAdapter(Report).json_schema()
    for part in _objects(schema):
        summary, _, attributes = part.pop("description", "").partition("\nAttributes:\n")
        described = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(attributes)}
        part["description"] = " ".join(summary.split())
        for name, content in part["properties"].items():
            content.pop("title", None)
            if content.get("anyOf") == _NUMBER_OR_NULL:
                content["anyOf"] = [*_NUMBER_OR_NULL, {"const": INFINITY}]
            content["description"] = described[name]
    schema["properties"]["schema"]["const"] = SCHEMA
    return schema | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Report of a Bitwright run",
    }


def dumps() -> str:
    """Return the schema as the text of the file that is stored beside this module."""
    return json.dumps(report_schema(), indent=1) + "\n"


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    yield from schema["$defs"].values()


if __name__ == "__main__":
    sys.stdout.write(dumps())
