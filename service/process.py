"""What a process of the service sets for itself: environment, memory, and when it ends.

It runs before settings can be read, so it looks at the environment itself.
"""

import ctypes
import os
import signal

from quantizer.kernels.path import KERNELS_VARIABLE
from service.failpoint import FAILPOINT_VARIABLE

PARENT_VARIABLE = "BITWRIGHT_PARENT"
"""Variable that names the process with which a child is to end."""

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2)."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of mallopt(3)."""

PASSED_ON = frozenset(
    {
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
        "COVERAGE_PROCESS_CONFIG",
        "COVERAGE_FILE",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
        "CUDA_VISIBLE_DEVICES",
        "TRITON_CACHE_DIR",
        "XDG_CACHE_HOME",
        FAILPOINT_VARIABLE,
        KERNELS_VARIABLE,
        "TRACEPARENT",
    }
)
"""Variables of a worker that the processes of its stages get, beside `PASSED_ON_PREFIXES`."""

PASSED_ON_PREFIXES = ("AWS_", "HF_", "OMP_", "MKL_", "NVIDIA_", "CUDA_", "TORCH_", "OTEL_")


def stage_environment() -> dict[str, str]:
    """Return the variables that the process of a stage gets.

    Only listed ones, so that the password of the database is not among them.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }


def live_and_die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, if `BITWRIGHT_PARENT` names it."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent.isdigit():
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os._exit(1)


def quiet_libraries() -> None:
    """Keep progress bars and advice of libraries off stderr; call it before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor, in a process that ends with its work.

    Otherwise each large tensor is returned to the system and mapped again, page by page, which
    takes longer than the computation. Without glibc, nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, -1)  # never
        set_option(_M_MMAP_MAX, 0)
