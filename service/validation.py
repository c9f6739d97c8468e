"""Pydantic models that say in one sentence which value is wrong and what to give instead.

The command line, the REST interface and the settings share them, so that a wrong value gets the
same sentence everywhere.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args, get_origin

import annotated_types
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from service.errors import RequestError

INVALID = "invalid_option"
"""Pydantic's error type of a value that has its sentence already."""

UNIT, VALUES = "x-unit", "x-values"
"""Keys of a field's JSON Schema: unit of a number; values that types and limits do not say."""

_LONGEST_SHOWN = 60
_MANY_DIGITS = 10**_LONGEST_SHOWN


def option(
    text: str | None = None,
    *,
    unit: str | None = None,
    values: str | None = None,
    example: Any = None,
    **limits: Any,
) -> Any:
    """Return the field of an option: all that is said about it, once.

    Args:
        text: its help; None for a type that several options share.
        unit: of a number.
        values: what it may be, in words, where type and limits do not say it.
        example: a value that users give.
        limits: as `pydantic.Field` takes them: `ge`, `gt`, `le`, `lt`, `multiple_of`, `min_length`,
            `max_length`, and `repr=False` for a value that messages must not repeat.
    """
    extra = {key: value for key, value in ((UNIT, unit), (VALUES, values)) if value is not None}
    said: dict[str, Any] = {
        "description": text,
        "examples": None if example is None else [example],
        "json_schema_extra": extra or None,
    }
    given = {key: value for key, value in said.items() if value is not None}
    return Field(**given, **limits)


class Checked(BaseModel):
    """A model whose fields are all known, and whose errors are sentences."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        rows = _booleans_for_numbers(data, cls.model_fields)
        if rows:
            raise ValidationError.from_exception_data(cls.__name__, rows)
        try:
            return handler(data)
        except ValidationError as error:
            rows = [_explained(row, cls.model_fields) for row in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, rows) from None

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Return the model of these values.

        Raises:
            RequestError: a value is wrong.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise RequestError(sentences(error)) from error


def invalid(sentence: str) -> PydanticCustomError:
    """Return the error that a validator raises for a demand on several fields together."""
    return PydanticCustomError(INVALID, "{text}", {"text": sentence})


def sentences(error: ValidationError) -> str:
    """Return what is wrong with the data of a `Checked` model."""
    return join(error.errors(include_url=False))


def join(rows: Sequence[Any]) -> str:
    """Return what several rows of pydantic's errors say, as one text."""
    return "; ".join(_said(row) for row in rows)


def missing(name: str) -> str:
    """Return the sentence for an option that must be given and is not."""
    return f"{words(name)} is missing; give it"


def words(name: str) -> str:
    """Return the name of a field as words."""
    return name.replace("_", " ")


def values_of(field: FieldInfo) -> str:
    """Return in words which values a field takes."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and VALUES in extra:
        return str(extra[VALUES])
    kind = field.annotation
    limits = {type(each): each for each in field.metadata}
    if type(None) in get_args(kind):  # the field may be left out
        inner = FieldInfo.from_annotation(get_args(kind)[0])
        if inner.metadata or inner.json_schema_extra:
            return values_of(inner)
        kind = inner.annotation
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if kind in (int, float):
        return _numbers(kind, limits)
    if kind is bool:
        return "true or false"
    return _texts(kind, limits)


def _numbers(kind: Any, limits: dict[Any, Any]) -> str:
    what = "a whole number" if kind is int else "a number"
    step = limits.get(annotated_types.MultipleOf)
    if step is not None:
        what = f"a multiple of {step.multiple_of}"
    low, high = limits.get(annotated_types.Ge), limits.get(annotated_types.Le)
    above, below = limits.get(annotated_types.Gt), limits.get(annotated_types.Lt)
    if low is not None and high is not None:
        return f"{what} from {low.ge} to {high.le}"
    if low is not None and below is not None and kind is int:
        return f"{what} from {low.ge} to {below.lt - 1}"
    bounds = [
        *([f"of at least {low.ge}"] if low is not None else []),
        *([f"above {above.gt}"] if above is not None else []),
        *([f"of at most {high.le}"] if high is not None else []),
        *([f"below {below.lt}"] if below is not None else []),
    ]
    return " ".join([what, " and ".join(bounds)]).strip()


def _texts(kind: Any, limits: dict[Any, Any]) -> str:
    many = get_origin(kind) in (list, tuple)
    short, long = limits.get(annotated_types.MinLen), limits.get(annotated_types.MaxLen)
    what = "a list" if many else "text"
    if kind is not str and not many:
        what = "an object"
    unit = "characters" if kind is str else "entries"
    if long is not None:
        start = short.min_length if short is not None else 0
        size = f"{start} to {long.max_length}" if start else f"at most {long.max_length}"
        return f"{what} of {size} {unit}"
    return what


def _booleans_for_numbers(data: Any, fields: dict[str, FieldInfo]) -> list[InitErrorDetails]:
    """Return an error for each number given as a boolean, which pydantic takes as 1 or 0."""
    given = data if isinstance(data, dict) else {}
    wrong = [
        name
        for name, field in fields.items()
        if isinstance(given.get(name), bool)
        and {int, float} & {field.annotation, *get_args(field.annotation)}
    ]
    texts = {
        name: f"{words(name)}: give {values_of(fields[name])}, not a boolean" for name in wrong
    }
    return [
        InitErrorDetails(type=invalid(text), loc=(name,), input=given[name])
        for name, text in texts.items()
    ]


def _explained(row: ErrorDetails, fields: dict[str, FieldInfo]) -> InitErrorDetails:
    """Return an error with a sentence in place of pydantic's message."""
    text = row["msg"] if row["type"] == INVALID else _sentence(row, fields)
    return InitErrorDetails(type=invalid(text), loc=row["loc"], input=row["input"])


def _sentence(row: ErrorDetails, fields: dict[str, FieldInfo]) -> str:
    place = row["loc"]
    if not place:
        return f"give an object, not {_shown(row['input'])}"
    name = str(place[0])
    if row["type"] == "extra_forbidden":
        return f"{words(name)[:_LONGEST_SHOWN]} is unknown; leave it out"
    if row["type"] == "missing":
        return missing(name)
    field = fields[name]
    shown = f" {_shown(row['input'])}" if field.repr else ""
    if len(place) == 1:
        return f"{words(name)}{shown}: give {values_of(field)}"
    if get_origin(field.annotation) is list:
        what, kind = "entry", 0
    elif get_origin(field.annotation) is dict:
        what, kind = ("name", 0) if place[-1] == "[key]" else ("value", 1)
    else:
        return f"{words(name)}: {row['msg']}"
    entry = FieldInfo.from_annotation(get_args(field.annotation)[kind])
    return f"{words(name)}: {what}{shown}: give {values_of(entry)}"


def _said(row: Any) -> str:
    """Return what a row says; one that is no sentence yet is preceded by where the value is."""
    if row["type"] == INVALID:
        return str(row["msg"])
    return f"{_place(row['loc'])}: {row['msg']}"


def _place(place: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in place)


def _shown(value: Any) -> str:
    """Return a value for a message: short, and alike from a command line and from JSON."""
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, list | tuple):
        return "[...]"
    if value is None:
        return "null"
    if isinstance(value, int) and abs(value) >= _MANY_DIGITS:
        return f"of more than {_LONGEST_SHOWN} digits"
    text = str(value)
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")
