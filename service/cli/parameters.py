"""Parameters that several commands have."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from service.settings import CACHE_VARIABLE, DATA_VARIABLE

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
