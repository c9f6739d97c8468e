"""Which models and texts a job may use: hub ids, and what is in the folders for jobs."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from quantizer.texts.text import BUILT_IN_CALIBRATION, BUILT_IN_EVALUATION
from service.errors import PathRefused

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_REVISION = rf"{_PART}(?:/{_PART}){{0,7}}"
_HUB_MODEL = re.compile(rf"{_PART}/{_PART}(?:@{_REVISION})?")
_HUB_TEXT = re.compile(rf"{_PART}/{_PART}(:[\w.-]{{0,96}}){{0,2}}")
_LONGEST = 1000


def confine_model(named: str, roots: Sequence[Path], *, hub: bool) -> str:
    """Return what a model's name stands for: a real path within `roots`, or a hub id.

    Args:
        named: as a job gives it; a relative path is one below a root.
        roots: folders that jobs may use.
        hub: whether jobs may use the Hugging Face hub.

    Raises:
        PathRefused: it is neither. The message does not tell whether there is such a path
            elsewhere.
    """
    return _inside(named, roots) or _hub(named, _HUB_MODEL, "model", hub=hub)


def confine_text(named: str, roots: Sequence[Path], *, hub: bool) -> str:
    """Return what a text's name stands for: a built-in text, a path within `roots`, or a hub id.

    The arguments are those of `confine_model`.

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
        # realpath follows links without raising
        real = os.path.realpath(os.path.join(real_root, named))  # noqa: PTH118
        if os.path.commonpath([real_root, real]) == real_root and Path(real).exists():
            return real
    return None


def _hub(named: str, pattern: re.Pattern[str], kind: str, *, hub: bool) -> str:
    if hub and pattern.fullmatch(named) and ".." not in named:
        return named
    also = ", and is no id of the Hugging Face hub" if hub else "; the hub is switched off"
    raise PathRefused(
        f"{kind} {named[:200]!r} is not in a folder that jobs may use{also}; put it there, or "
        "have the operator add its folder to BITWRIGHT_MODELS"
    )
