"""Write the tables of options and settings into service/README.md.

python -m tests.support.write_tables
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from service.cli.flags import flag_name
from service.cli.plans import AskOptions
from service.request.constraints import ConstraintsIn, FrontierQuestion, PlanQuestion
from service.request.options import (
    EvaluateSettings,
    ModelOption,
    ProfileSettings,
    QuantizeSettings,
    RecipeOption,
    RunOptions,
    RunSettings,
)
from service.settings import PREFIX, ServiceSettings
from service.validation import UNIT, values_of
from tests.support.paths import ROOT

README = ROOT / "service" / "README.md"

COMMANDS: dict[str, tuple[type[BaseModel], ...]] = {
    "run": (RunSettings, ModelOption, ConstraintsIn),
    "profile": (ProfileSettings, ModelOption),
    "quantize": (QuantizeSettings, ModelOption),
    "evaluate": (EvaluateSettings, ModelOption),
    "plan": (PlanQuestion, AskOptions, ConstraintsIn),
    "frontier": (FrontierQuestion, AskOptions, ConstraintsIn),
}
"""Models whose fields are options of a command."""

LISTED: tuple[tuple[type[BaseModel], str], ...] = (
    (RunOptions, ""),
    (RecipeOption, ""),
    (ConstraintsIn, "constraints."),
    (PlanQuestion, "questions[]."),
    (FrontierQuestion, ""),
)
"""Models in the table, and where their fields are in a body of the REST interface."""


def options_table() -> str:
    """Return the table of all options."""
    head = ("command line", "REST", "default", "values", "meaning", "commands")
    return "\n".join(_table(head, _option_rows()))


def _option_rows() -> Iterator[Sequence[str]]:
    done: set[str] = set()
    for model, place in LISTED:
        for name, field in model.model_fields.items():
            if name in ("constraints", *done):
                continue
            done.add(name)
            flag = "`MODEL`" if name == "model" else f"`--{flag_name(name)}`"
            rest = "" if model is RecipeOption else f"`{place}{name}`"
            where = [key for key, models in COMMANDS.items() if _has(models, name)]
            yield (
                flag,
                rest,
                _default(field),
                _values(name, field),
                str(field.description),
                ", ".join(where),
            )


def _has(models: Sequence[type[BaseModel]], name: str) -> bool:
    return any(name in model.model_fields for model in models)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, [], ()) else f"`{_plain(field.default)}`"


def _values(name: str, field: FieldInfo) -> str:
    text = "a CSV file of latencies; over REST its rows" if name == "latency" else values_of(field)
    extra = field.json_schema_extra
    unit = extra.get(UNIT) if isinstance(extra, dict) else None
    return f"{text} ({unit})" if unit else text


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def settings_table() -> str:
    """Return the table of all settings."""
    rows = (
        (
            f"`{PREFIX}{name.upper()}`",
            _default(field) if field.default_factory is None else "",
            _values(name, field),
            str(field.description),
        )
        for name, field in ServiceSettings.model_fields.items()
    )
    return "\n".join(_table(("variable", "default", "values", "meaning"), rows))


BLOCKS = {"settings": settings_table, "options": options_table}
"""Parts of the README that are made here, by name."""


def with_tables(text: str) -> str:
    """Return the README with its tables made anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        table = make()
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
