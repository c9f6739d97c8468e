"""Modules that are imported when they are first used.

PyTorch takes seconds to import. Commands that need it are declared in modules without it, so that
`--help` and wrong options answer at once, and do their work in modules that are imported late.
"""

from importlib import import_module
from types import ModuleType
from typing import Any


class LateModule(ModuleType):
    """Stands for a module until one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        """Import the module, and return what it calls `name`."""
        return getattr(import_module(self.__name__), name)
