"""What a process of the service does to itself: its environment, its memory, its end."""

import ctypes
import os
import signal

from service.failpoint import FAILPOINT_VARIABLE

PARENT_VARIABLE = "BITWRIGHT_PARENT"

_PR_SET_PDEATHSIG = 1

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of options in malloc.h."""

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
