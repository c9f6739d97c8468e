"""What the environment decides: the one module that looks at it. See the table in the README."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from service.errors import RequestError

CACHE_VARIABLE = "BITWRIGHT_CACHE"
DATA_VARIABLE = "BITWRIGHT_DATA"
FAILPOINT_VARIABLE = "BITWRIGHT_FAILPOINT"


def default_cache() -> Path:
    """Return the folder of finished stages: `BITWRIGHT_CACHE`, or the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("bitwright")


def default_data() -> Path:
    """Return the folder that the service keeps everything in: `BITWRIGHT_DATA`, or the user's data folder."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named else user_data_path("bitwright")


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What the job service is told by its environment; the README has the table.

    Attributes:
        data: folder of the service: database, artifacts and locks where none are named elsewhere.
        cache: folder of finished stages.
        database_url: of SQLite or PostgreSQL.
        artifacts: folder or `s3://bucket/prefix` of results and profiles.
        models: folders whose models and texts jobs may use.
        hub: whether jobs may name models and texts of the Hugging Face hub.
        worker: name of a worker; no two that run at once share it.
        slots: jobs that a worker runs at once.
        stage_seconds: longest time of one stage.
        webhook_targets: private networks and hosts that webhooks may reach.
        active_jobs, stored_bytes, keep_days: quota of a tenant without one of its own; None is no
            limit.
        oidc_issuer, oidc_audience: whose tokens are taken beside API keys, and for whom they must
            be; None takes none.
    """

    data: Path
    cache: Path
    database_url: str = field(repr=False)  # it may hold a password
    artifacts: str
    models: tuple[Path, ...]
    hub: bool = True
    worker: str = "local"
    slots: int = 1
    stage_seconds: float = 86400.0
    webhook_targets: tuple[str, ...] = ()
    active_jobs: int | None = None
    stored_bytes: int | None = None
    keep_days: float | None = None
    oidc_issuer: str | None = None
    oidc_audience: str | None = None

    @classmethod
    def read(
        cls, data: Path, cache: Path, environment: Mapping[str, str] | None = None
    ) -> "ServiceSettings":
        """Return the settings of an environment, by default this process's.

        Every variable may instead be given as a file that holds its value, under the variable's
        name with `_FILE`.

        Raises:
            RequestError: a value cannot be understood.
        """
        found = _Environment(os.environ if environment is None else environment)
        url = found.text("DATABASE_URL") or f"sqlite:///{data / 'bitwright.sqlite'}"
        local = url.startswith("sqlite")
        return cls(
            data=data,
            cache=cache,
            database_url=url,
            artifacts=found.text("ARTIFACTS") or str(data / "artifacts"),
            models=tuple(
                Path(part)
                for part in (found.text("MODELS") or str(Path.cwd())).split(os.pathsep)
                if part
            ),
            hub=found.text("HUB") not in ("0", "no", "false", "off"),
            worker=found.text("WORKER") or ("local" if local else socket.gethostname()),
            slots=int(found.number("SLOTS", 1) or 1),
            stage_seconds=found.number("STAGE_SECONDS", 86400.0) or 86400.0,
            webhook_targets=tuple(
                part for part in (found.text("WEBHOOK_TARGETS") or "").split(",") if part
            ),
            active_jobs=_whole(found.number("ACTIVE_JOBS", None)),
            stored_bytes=_whole(found.number("STORED_BYTES", None)),
            keep_days=found.number("KEEP_DAYS", None),
            oidc_issuer=found.text("OIDC_ISSUER"),
            oidc_audience=found.text("OIDC_AUDIENCE"),
        )


class _Environment:
    """Values by name without their prefix."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def text(self, name: str) -> str | None:
        """Return a value, or the content of the file that is named instead.

        None where neither is.
        """
        variable = f"BITWRIGHT_{name}"
        file = self._variables.get(f"{variable}_FILE")
        if not file:
            return self._variables.get(variable) or None
        try:
            return Path(file).read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"{variable}_FILE names {file!r}, which cannot be read: {error}"
            ) from error

    def number(self, name: str, default: float | None) -> float | None:
        """Return a positive number."""
        text = self.text(name)
        if text is None:
            return default
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number < inf:
            raise RequestError(f"BITWRIGHT_{name} is {text!r}; give a number above 0")
        return number


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
