"""What the environment decides: the one module that looks at it. See the table in the README."""

import os
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

CACHE_VARIABLE = "BITWRIGHT_CACHE"
DATA_VARIABLE = "BITWRIGHT_DATA"


def default_cache() -> Path:
    """Return the folder of finished stages: `BITWRIGHT_CACHE`, or the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("bitwright")


def default_data() -> Path:
    """Return the folder that the service keeps its profiles in: `BITWRIGHT_DATA`, or the user's data folder."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named else user_data_path("bitwright")


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries below off stderr; must run before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
