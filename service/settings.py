"""What the environment decides: the one module that looks at it. See the table in the README."""

import ctypes
import os
import signal
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
PARENT_VARIABLE = "BITWRIGHT_PARENT"

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of options in malloc.h."""


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


PASSED_ON = (
    *(
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "COVERAGE_PROCESS_START",
    ),
    *(
        "COVERAGE_PROCESS_CONFIG",
        "COVERAGE_FILE",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
    ),
    *(
        "CUDA_VISIBLE_DEVICES",
        "TRITON_CACHE_DIR",
        "XDG_CACHE_HOME",
        FAILPOINT_VARIABLE,
        "TRACEPARENT",
    ),
)
"""Variables that a stage's process gets of the worker's, beside those that begin with `PASSED_ON_PREFIXES`; nothing else."""

PASSED_ON_PREFIXES = ("AWS_", "HF_", "OMP_", "MKL_", "NVIDIA_", "CUDA_", "TORCH_", "OTEL_")


def stage_environment() -> dict[str, str]:
    """Return the variables that a stage's process gets.

    An allow-list, so that the database's password is not among them.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }


def live_and_die_with_parent() -> None:
    """Have the kernel kill this process when the one that `BITWRIGHT_PARENT` names dies, if that variable is set."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent.isdigit():
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os._exit(1)


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries below off stderr.

    Must run before they are imported.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor, where it is glibc.

    For processes that end with their work.

    Else every large tensor is given back and comes anew, page by page, which takes longer than what
    is computed in it.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, -1)  # never
        set_option(_M_MMAP_MAX, 0)
