"""Frozen dataclasses as JSON values, and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import inf
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from service.errors import RequestError

T = TypeVar("T")

INFINITY = "infinity"
"""What stands for an infinite number."""

OMIT_IF_NONE = {"omit_if_none": True}
"""Metadata of a field that is missing from the JSON object, instead of null, if it is None."""


def to_json(value: Any) -> Any:
    """Return a dataclass as JSON values: an object whose keys are the names of its fields.

    JSON has no infinite numbers; they become the string `infinity`, which `from_json` reads.
    """
    if is_dataclass(value):
        found = {each: getattr(value, each.name) for each in fields(value)}
        return {
            each.name: to_json(content)
            for each, content in found.items()
            if content is not None or not each.metadata.get("omit_if_none")
        }
    if isinstance(value, Mapping):
        return {key: to_json(content) for key, content in value.items()}
    if isinstance(value, float) and value == inf:
        return INFINITY
    return [to_json(content) for content in value] if isinstance(value, tuple | list) else value


def from_json(kind: type[T], document: Any, what: str) -> T:
    """Return the dataclass that `to_json` wrote. Unknown keys are ignored.

    Args:
        kind: the dataclass.
        document: JSON values.
        what: names the document in an error.

    Raises:
        RequestError: a field is missing or of the wrong type.
    """
    try:
        return TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise RequestError(
            f"{what} cannot be read: {field}: {first['msg']}; give one that this version wrote"
        ) from error
