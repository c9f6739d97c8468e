"""What the commands have in common: options that are no part of a run's result, and names of flags."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from service.settings import CACHE_VARIABLE, DATA_VARIABLE

FLAGS = {
    "ties": "tie",
    "untied": "untie",
    "rules": "rule",
    "pools": "pool",
    "max_distinct": "distinct",
    "low": "from",
    "high": "to",
    "as_json": "json",
    "needs_key": "keys",
    "out_folder": "out",
    "out_file": "out",
    "plan_file": "plan",
    "profile_folder": "profile",
}
"""Flags that are not called as the field: several of a list are given one by one."""


def flag_name(field: str) -> str:
    """Return the name of a field's flag, without the hyphens in front."""
    return FLAGS.get(field, field).replace("_", "-")


OPTIONS = Parameter(name="*", allow_leading_hyphen=True)
"""The fields of a model become flags of the command."""

AsJson = Annotated[bool, Parameter(help="Print one JSON document on stdout.")]
OutFolder = Annotated[Path, Parameter(help="New or empty folder for the result.")]
LatencyFile = Annotated[
    Path | None, Parameter(help="CSV file of latencies: columns layer, fidelity, latency_us.")
]
ProfileFolder = Annotated[Path, Parameter(help="Folder that `bitwright profile` wrote.")]
Cache = Annotated[
    Path, Parameter(help="Folder of finished stages.", env_var=CACHE_VARIABLE, show_env_var=True)
]
Data = Annotated[
    Path,
    Parameter(
        help="Folder of the service: database, artifacts.",
        env_var=DATA_VARIABLE,
        show_env_var=True,
    ),
]
