"""Give the special tokens of a configuration numbers that a tiny vocabulary has."""

import re
from typing import Any

from tests.support.families.sizes import TEXT_TOKENS, VOCABULARY

END_OF_TEXT = 0
_TOKEN = re.compile(r"_?(id|ids|index)$")
_OF_TEXT = re.compile(r"^_?(bos|eos|pad|sep|cls|unk|mask|decoder_start|forced_eos|eod)_")


def renumbered(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return the configuration with tokens of text as `END_OF_TEXT` and others apart.

    Tokens of one name are one token, in whichever tower they are named.
    """
    names = sorted(set(_names(values)))
    return _with_numbers(values, {name: TEXT_TOKENS + place for place, name in enumerate(names)})


def is_token(name: object, value: Any) -> bool:
    """Return whether a field holds the number of a token, or several."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_token(name, each) for each in value)
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and _TOKEN.search(str(name)) is not None
        and value >= 0
        and ("token" in str(name) or value >= VOCABULARY)
    )


def _names(values: dict[Any, Any]) -> list[str]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _names(value)
        elif is_token(name, value) and not _OF_TEXT.search(str(name)):
            places = range(len(value)) if isinstance(value, list | tuple) else [0]
            found += [f"{name}.{place}" for place in places]
    return found


def _with_numbers(values: dict[Any, Any], numbers: dict[str, int]) -> dict[Any, Any]:
    new = dict(values)
    for name, value in values.items():
        if isinstance(value, dict):
            new[name] = _with_numbers(value, numbers)
        elif is_token(name, value):
            several = isinstance(value, list | tuple)
            count = len(value) if several else 1
            tokens = [numbers.get(f"{name}.{place}", END_OF_TEXT) for place in range(count)]
            new[name] = tokens if several else tokens[0]
    return new
