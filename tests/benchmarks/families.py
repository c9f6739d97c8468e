"""Take a tiny model of every decoder type through everything, and store how far each came.

python -m tests.benchmarks.families

The stored rows are those that the table in quantizer/README.md is made of, and that the long tests
expect.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from tests.benchmarks.record import circumstances
from tests.benchmarks.stored import RESULTS
from tests.support.families.decoders import decoder_types

_TYPES_AT_ONCE = 6
"""Types that one process walks through; more would let memory grow."""


def walk_all(types: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the walk of each type, walked through in processes of their own, two at once."""
    batches = [types[at : at + _TYPES_AT_ONCE] for at in range(0, len(types), _TYPES_AT_ONCE)]
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(_walk, batches):
            yield from rows


def _walk(types: Sequence[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.families.walk", *types],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    walked = {row["model_type"] for row in rows}
    rows += [
        {"model_type": each, "works": False, "error": "the process ended"}
        for each in types
        if each not in walked
    ]
    made = {"transformers": version("transformers"), "commit": circumstances()["commit"]}
    return [row | made for row in rows]


def main() -> None:
    """Walk through all types and store their rows."""
    with (RESULTS / "families.jsonl").open("w", encoding="utf-8") as file:
        for row in walk_all(decoder_types()):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
