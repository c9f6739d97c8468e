"""numba's compiler, or a stand-in where numba is not installed. The only module that imports numba.

Without numba, `quantizer.kernels.path` chooses PyTorch for all products, so functions that the
stand-in leaves uncompiled never run.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from numba import float32, int32, njit, uint32
except ImportError:
    njit = None
    float32, int32 = np.float32, np.int32
    uint32 = np.uint32

__all__ = ["CACHED_ON_DISK", "compiled", "float32", "int32", "uint32"]

Function = Callable[..., Any]


def _find_cache_folder() -> bool:
    """Return whether numba finds a folder in which to keep compiled code."""
    if njit is None:
        return False
    try:
        njit(cache=True)(_find_cache_folder)
    except RuntimeError:
        return False
    return True


CACHED_ON_DISK = _find_cache_folder()
"""Whether compiled code is kept beside the package or in the user's cache.

If neither can be written, each process compiles anew.
"""


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Return the decorator that compiles a function on its first call, without Python objects.

    Args:
        **options: of `numba.njit`, such as `fastmath`.
    """
    if njit is None:
        return lambda function: function
    decorator: Callable[[Function], Function] = njit(cache=CACHED_ON_DISK, **options)
    return decorator
