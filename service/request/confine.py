"""Which models and texts a job may name.

Hub ids, and what lies in the folders that the operator opened.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from quantizer.texts.text import BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION
from service.errors import PathRefused

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_HUB_MODEL = re.compile(rf"{_PART}/{_PART}")
_HUB_TEXT = re.compile(rf"{_PART}/{_PART}(:[\w.-]{{0,96}}){{0,2}}")
_LONGEST = 1000


def confine_model(named: str, roots: Sequence[Path], *, hub: bool) -> str:
    """Return what to load for a model's name.

    The real path of a folder or GGUF file within one of `roots`, or a hub id.

    Raises:
        PathRefused: it is neither. The message is the same whether or not there is such a path
            outside.
    """
    return _inside(named, roots) or _hub(named, _HUB_MODEL, "model", hub=hub)


def confine_text(named: str, roots: Sequence[Path], *, hub: bool) -> str:
    """Return what to read for a text's name.

    A built-in text, the real path of a file within one of `roots`, or a hub id.

    Raises:
        PathRefused: it is none of these.
    """
    if named in (BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION):
        return named
    return _inside(named, roots) or _hub(named, _HUB_TEXT, "text", hub=hub)


def _inside(named: str, roots: Sequence[Path]) -> str | None:
    if not named or len(named) > _LONGEST or "\0" in named:
        return None
    for root in roots:
        real_root = os.path.realpath(root)
        real = os.path.realpath(os.path.join(real_root, named))  # noqa: PTH118  realpath follows links without raising
        if os.path.commonpath([real_root, real]) == real_root and Path(real).exists():
            return real
    return None


def _hub(named: str, pattern: re.Pattern[str], kind: str, *, hub: bool) -> str:
    if hub and pattern.fullmatch(named) and ".." not in named:
        return named
    also = ", and is no id of the Hugging Face hub" if hub else "; the hub is switched off"
    raise PathRefused(
        f"{kind} {named[:200]!r} is not in a folder that jobs may use{also}; put it there, or "
        "have the operator add its folder "
        "to BITWRIGHT_MODELS"
    )
