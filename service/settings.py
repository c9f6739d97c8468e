"""The settings of the service: what its environment decides, in one model.

Each field is the variable `BITWRIGHT_` and its name in capitals. Instead of a value, a variable may
name a file that holds it, by its name with `_FILE` (for secrets); an empty one counts as unset. The
table in `service/README.md` is generated from the model.

Modules below the service, and those that run before it, read the environment themselves and say
why: `quantizer.kernels.path`, `service.failpoint`, `service.process` and `service.tracing`.
"""

import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from platformdirs import user_cache_path, user_data_path
from pydantic import BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.errors import RequestError
from service.validation import option, values_of

PREFIX = "BITWRIGHT_"
CACHE_VARIABLE = f"{PREFIX}CACHE"
DATA_VARIABLE = f"{PREFIX}DATA"


def _list_of(separator: str) -> BeforeValidator:
    """Return what makes a list of a variable whose parts are separated so."""

    def split(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(part for part in value.split(separator) if part)

    return BeforeValidator(split)


class FileSource(PydanticBaseSettingsSource):
    """Takes values from the files that variables with `_FILE` name."""

    def get_field_value(
        self,
        field: FieldInfo,  # noqa: ARG002
        field_name: str,
    ) -> tuple[Any, str, bool]:
        """Return the value of a field, None where no file is named or the file is empty.

        Raises:
            RequestError: the file cannot be read.
        """
        variable = f"{PREFIX}{field_name.upper()}_FILE"
        file = os.environ.get(variable)
        if not file:
            return None, field_name, False
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"{variable} names {file!r}, which cannot be read: {error}"
            ) from error
        return text or None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the values of all fields whose variable names a file."""
        found = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in found.items() if value is not None}


class Settings(BaseSettings):
    """Base of the settings: where values come from, and how wrong ones are refused."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the first before the others: arguments, files, variables."""
        return init_settings, FileSource(settings_cls), env_settings

    @classmethod
    def read(cls, **values: Any) -> Self:
        """Return the settings of this process's environment, with these values instead of its.

        Raises:
            RequestError: a value is wrong.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            wrong = [
                _sentence(row, cls.model_fields)
                for row in error.errors(include_url=False)
                if row["type"] != "default_factory_not_called"  # it follows from another
            ]
            raise RequestError("; ".join(wrong)) from None


def _sentence(row: ErrorDetails, fields: dict[str, FieldInfo]) -> str:
    name = str(row["loc"][0])
    field = fields[name]
    is_wrong = f"is {row['input']!r}" if field.repr else "is wrong"
    return f"{PREFIX}{name.upper()} {is_wrong}; give {values_of(field)}"


class Folders(Settings):
    """Where the command line and the service keep their files."""

    cache: Annotated[
        Path,
        option("Folder of finished stages; by default the user's cache folder.", values="a folder"),
    ] = Field(default_factory=lambda: user_cache_path("bitwright"))
    data: Annotated[
        Path,
        option(
            "Folder of the service, for the database and artifacts; by default the user's data "
            "folder.",
            values="a folder",
        ),
    ] = Field(default_factory=lambda: user_data_path("bitwright"))


class ServiceSettings(Folders):
    """All settings of the service."""

    database_url: Annotated[
        str,
        option(
            "Database: SQLite or PostgreSQL; by default SQLite in the data folder.",
            values="sqlite:///FILE or postgresql://...",
            repr=False,  # it may hold a password
        ),
    ] = Field(default_factory=lambda found: f"sqlite:///{found['data'] / 'bitwright.sqlite'}")
    artifacts: Annotated[
        str,
        option(
            "Where results and profiles are stored; by default in the data folder. Variables "
            "`AWS_*` give access to S3.",
            values="a folder or s3://BUCKET/PREFIX",
        ),
    ] = Field(default_factory=lambda found: str(found["data"] / "artifacts"))
    models: Annotated[
        tuple[Path, ...],
        NoDecode,
        _list_of(os.pathsep),
        option(
            "Folders whose models and texts jobs may use; by default the one that the service was "
            "started in.",
            values="folders, separated by colons",
        ),
    ] = Field(default_factory=lambda: (Path.cwd(),))
    hub: Annotated[
        bool, option("Whether jobs may name models and texts of the Hugging Face hub.")
    ] = True
    worker: Annotated[
        str,
        option(
            "Name of the worker; no two that run at once may share it. By default `local` with "
            "SQLite, else the host name.",
            min_length=1,
        ),
    ] = Field(default_factory=lambda found: _worker_name(found["database_url"]))
    slots: Annotated[
        int, option("Number of jobs that a worker runs at once.", unit="jobs", ge=1)
    ] = 1
    stage_seconds: Annotated[
        float, option("Longest time that one stage may take.", unit="seconds", gt=0)
    ] = 86400.0
    webhook_targets: Annotated[
        tuple[str, ...],
        NoDecode,
        _list_of(","),
        option(
            "Private networks and hosts that webhooks may reach; by default none.",
            values="networks and hosts, separated by commas",
        ),
    ] = ()
    active_jobs: Annotated[
        int | None,
        option(
            "Quota of a tenant without one of its own: jobs that have not ended; by default no "
            "limit.",
            unit="jobs",
            ge=1,
        ),
    ] = None
    stored_bytes: Annotated[
        int | None,
        option(
            "Quota of a tenant without one of its own: size of its artifacts; by default no limit.",
            unit="bytes",
            ge=1,
        ),
    ] = None
    keep_days: Annotated[
        float | None,
        option(
            "Quota of a tenant without one of its own: how long a job is kept after it ended; by "
            "default no limit.",
            unit="days",
            gt=0,
        ),
    ] = None
    oidc_issuer: Annotated[
        str | None,
        option(
            "Issuer of OIDC tokens that are accepted beside API keys; by default none.",
            values="a URL",
        ),
    ] = None
    oidc_audience: Annotated[str | None, option("Audience that such tokens must be for.")] = None
    kernels: Annotated[
        Literal["auto", "reference", "triton"],
        option(
            "How products with packed weights are computed: auto, reference (slow and exact) or "
            "triton (on a GPU). `quantizer.kernels.path` reads it, also without the service."
        ),
    ] = "auto"


def _worker_name(database_url: str) -> str:
    return "local" if database_url.startswith("sqlite") else socket.gethostname()


def default_cache() -> Path:
    """Return the folder of finished stages, see `Folders.cache`."""
    return Folders.read().cache


def default_data() -> Path:
    """Return the folder of the service, see `Folders.data`."""
    return Folders.read().data
