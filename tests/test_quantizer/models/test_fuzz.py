"""Whatever bytes a model is made of, it is used or refused with one ModelError, in bounded memory.

Seeded: the same at each run.
"""

import json
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantizer.errors import ModelError
from quantizer.models.config import read_config
from quantizer.models.gguf_header import check_gguf
from quantizer.models.loading import load_config, load_model, load_tokenizer
from quantizer.models.safetensors_header import check_safetensors
from quantizer.models.source import find_model
from quantizer.models.weight_files import read_shards
from tests.support.edited_models import FILE, INDEX, SHARD
from tests.support.quantized import Edited, TinyFolder
from tests.test_quantizer.models.test_gguf_header import (
    gguf_bytes,
    gguf_list,
    gguf_tensor,
    gguf_text,
)
from tests.test_quantizer.models.test_hostile_folders import GOOD, weights

PEAK_BYTES = 4_000_000
"""Of Python memory for one small file, whatever it claims to hold."""

BORDERS = (
    0,
    1,
    7,
    8,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "0",
        "../x",
        "\0",
        "\ud800",
        "a" * 5000,
    ),
    *(
        [],
        {},
        [[]],
        [0] * 20,
        {"a": {}},
        "F32",
        [0, 0],
        ["0", 24],
        "llama",
        "eager",
        "someone/kernel",
        "https://a.b/c",
    ),
)
KEYS = (
    *(
        "auto_map",
        "_attn_implementation",
        "attn_implementation",
        "_x",
        "__class__",
        "_name_or_path",
        "quantization_config",
    ),
    *(
        "transformers_weights",
        "configuration_files",
        "text_config",
        "model_type",
        "to_dict",
        "per_layer_config",
        "dtype",
    ),
)


Cases = Callable[[int], int]


@pytest.fixture(params=["a tenth", pytest.param("all", marks=pytest.mark.long)])
def cases(request: pytest.FixtureRequest) -> Cases:
    """Return how many of so many cases are tried: the first tenth of them, or all."""
    return lambda count: count if request.param == "all" else -(-count // 10)


class Outcomes:
    """Counts what was used and what was refused, and lets every other error through."""

    used = 0
    refused = 0

    def of(self, check: Callable[[], object]) -> bool:
        message = refusal(check)
        if message is None:
            self.used += 1
            return True
        assert 0 < len(message) < 1500
        self.refused += 1
        return False


def refusal(check: Callable[[], object]) -> str | None:
    try:
        check()
    except ModelError as err:
        return str(err)
    return None


def dice(seed: object) -> random.Random:
    """Return chance that repeats itself."""
    return random.Random(str(seed))  # noqa: S311  nothing secret


@contextmanager
def outcomes(cases: int, *, least: int) -> Iterator[Outcomes]:
    """Give a counter; afterwards all cases were met, of either outcome at least so many."""
    counter = Outcomes()
    yield counter
    assert counter.used + counter.refused == cases
    assert min(counter.used, counter.refused) >= least, (counter.used, counter.refused)


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


def mangled(rng: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Return the bytes after one to four changes between two places.

    Bits, bytes, numbers, cuts, doublings, brackets.
    """
    changed, last = bytearray(data), len(data) if last is None else last
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(first, max(first, min(last, len(changed)) - 1))
        size = rng.randint(1, 12)
        match rng.randrange(7):
            case 0:
                changed[at : at + 1] = bytes(
                    [(changed[at] if at < len(changed) else 0) ^ 1 << rng.randrange(8)]
                )
            case 1:
                changed[at : at + 1] = rng.randbytes(1)
            case 2:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(BORDERS))
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size]
            case 5:
                changed[at:at] = rng.choice(
                    [
                        b"{",
                        b"[",
                        b'"',
                        b"\\",
                        b"}",
                        b",",
                        b"[" * 3000,
                        b"9" * 30,
                        b"-",
                        b"\xff",
                        b"\0",
                    ]
                )
            case _:
                del changed[at + rng.randint(0, len(changed)) :]
    return bytes(changed)


def spoiled(rng: random.Random, values: Any, depth: int = 0) -> Any:
    """Return JSON values with some of them replaced, dropped, renamed, or nested."""
    if isinstance(values, dict) and values and rng.random() < 0.9:
        changed = dict(values)
        key = rng.choice(list(changed))
        match rng.randrange(5):
            case 0:
                changed[rng.choice(KEYS)] = rng.choice(NASTY)
            case 1:
                del changed[key]
            case 2:
                changed[key + rng.choice(["", "_", "\u2603"])] = changed.pop(key)
            case _:
                changed[key] = spoiled(rng, changed[key], depth + 1)
        return changed
    if isinstance(values, list) and values and rng.random() < 0.7:
        changed_list = list(values)
        changed_list[rng.randrange(len(values))] = rng.choice([*NASTY, *BORDERS])
        return changed_list
    return rng.choice([*NASTY, *BORDERS])


def test_random_bytes_are_no_weights(tmp_path: Path, cases: Cases) -> None:
    rng, file = dice(1), tmp_path / FILE
    with bounded_memory(), outcomes(cases(1500), least=0) as seen:
        for _ in range(cases(1500)):
            body = rng.randbytes(rng.randint(0, 300))
            length = rng.choice([len(body), rng.choice(BORDERS), rng.randrange(2**64)])
            file.write_bytes(
                rng.choice(
                    [
                        body,
                        struct.pack("<Q", length) + body,
                        struct.pack("<Q", length) + b"{" + body,
                    ]
                )
            )
            seen.of(lambda: check_safetensors(file))


def test_weights_with_mangled_headers(
    tiny_folder: TinyFolder, tmp_path: Path, cases: Cases
) -> None:
    rng, file = dice(2), tmp_path / FILE
    real = (tiny_folder("llama").path / FILE).read_bytes()
    header = real[: 8 + int.from_bytes(real[:8], "little")]
    small = weights(GOOD | {"__metadata__": {"format": "pt"}})
    with bounded_memory(), outcomes(cases(3000), least=cases(20)) as seen:
        for case in range(cases(3000)):
            file.write_bytes(
                mangled(rng, small, 0, len(small) - 29)
                if case % 4
                else mangled(rng, header) + real[len(header) :]
            )
            check_with_twin(file, seen)


def test_weights_with_structured_wrong_headers(tmp_path: Path, cases: Cases) -> None:
    rng, file = dice(3), tmp_path / FILE
    with bounded_memory(), outcomes(cases(3000), least=cases(200)) as seen:
        for _ in range(cases(3000)):
            header, data_bytes = random_header(rng)
            for _ in range(rng.randint(0, 2)):
                header = spoiled(rng, header)
            file.write_bytes(weights(header, max(0, data_bytes + rng.choice([0, 0, 0, 1, -1]))))
            check_with_twin(file, seen)


def check_with_twin(file: Path, seen: Outcomes) -> None:
    """What our check lets through, safetensors opens."""
    if seen.of(lambda: check_safetensors(file)):
        with safe_open(file, framework="pt") as tensors:
            assert check_safetensors(file) == len(tensors.keys())


def random_header(rng: random.Random) -> tuple[dict[str, Any], int]:
    """Return a header that is right, its tensors in any order, and the bytes of its data."""
    sizes, rows, end = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}, [], 0
    for number in range(rng.randint(1, 5)):
        dtype, shape = (
            rng.choice(list(sizes)),
            [rng.randint(0, 4) for _ in range(rng.randint(0, 3))],
        )
        start, count = end, sizes[dtype]
        for length in shape:
            count *= length
        end += count
        rows.append(
            (f"layer.{number}", {"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
        )
    rng.shuffle(rows)
    return dict(rows), end


def test_indexes(edited: Edited, cases: Cases) -> None:
    folder = edited()
    (folder / FILE).rename(folder / SHARD)
    rng, good = (
        dice(4),
        {"metadata": {"total_size": 1}, "weight_map": {"a": SHARD, "b": SHARD, "c": SHARD}},
    )
    names = [
        SHARD,
        SHARD,
        "../" + FILE,
        "/etc/passwd",
        "config.json",
        "",
        ".",
        "..",
        "x.safetensors",
        "a\0b.safetensors",
        5,
        None,
    ]
    with bounded_memory(), outcomes(cases(2000), least=cases(100)) as seen:
        for case in range(cases(2000)):
            index: Any = good | {
                "weight_map": {
                    str(number): rng.choice(names[: rng.choice([2, 2, 12])]) for number in range(3)
                }
            }
            text = json.dumps(spoiled(rng, index) if case % 3 == 0 else index).encode()
            (folder / INDEX).write_bytes(mangled(rng, text) if case % 3 == 1 else text)
            seen.of(lambda: read_shards(folder, folder / INDEX))


def test_configurations(edited: Edited, cases: Cases) -> None:
    folder = edited()
    rng, good = dice(5), json.loads((folder / "config.json").read_text())
    with bounded_memory(), outcomes(cases(2000), least=cases(200)) as seen:
        for case in range(cases(2000)):
            (folder / "config.json").write_bytes(wrong_config(rng, good, case))
            seen.of(lambda: read_config(folder))


def wrong_config(rng: random.Random, good: dict[str, Any], case: int) -> bytes:
    values: Any = good
    for _ in range(rng.randint(1, 3)):
        values = spoiled(rng, values)
    return mangled(rng, json.dumps(good).encode()) if case % 3 == 0 else json.dumps(values).encode()


def random_gguf(rng: random.Random) -> bytes:
    """Return a small llama's header, each number in it wrong with a small chance."""

    def some(value: int) -> int:
        return rng.choice(BORDERS) if rng.random() < 0.02 else value

    def number(value: int) -> tuple[int, bytes]:
        return 4, struct.pack("<I", some(value) % 2**32)

    values = {"general.architecture": (8, gguf_text("llama")), "llama.block_count": number(1)}
    values |= {
        f"llama.{name}": number(32)
        for name in ("context_length", "embedding_length", "feed_forward_length")
    }
    values |= {f"llama.attention.{name}": number(2) for name in ("head_count", "head_count_kv")}
    values["llama.attention.layer_norm_rms_epsilon"] = (
        6,
        struct.pack("<f", rng.choice([1e-5, float("nan")])),
    )
    values["tokenizer.ggml.tokens"] = gguf_list(
        some(8) % 2**32, some(3), b"".join(gguf_text(text) for text in "abc")
    )
    values["tokenizer.ggml.scores"] = gguf_list(some(6) % 2**32, some(3), bytes(12))
    values[rng.choice(["general.alignment", "general.file_type"])] = number(32)
    tensors = (
        gguf_tensor("token_embd.weight", [some(8), some(4)], some(0) % 2**32, 0),
        gguf_tensor("output_norm.weight", [8], 0, some(128)),
    )
    counts = (some(2), some(len(values)))
    return gguf_bytes(
        values, version=some(3) % 2**32, counts=counts, tensors=tensors, data_bytes=some(160) % 1000
    )


def test_gguf_headers(tmp_path: Path, cases: Cases) -> None:
    rng, file = dice(6), tmp_path / "model.gguf"
    file.write_bytes(gguf_bytes())
    assert (
        check_gguf(file) == 2
    )  # imports the library that the check needs before memory is measured
    with bounded_memory(), outcomes(cases(4000), least=cases(400)) as seen:
        for case in range(cases(4000)):
            content = random_gguf(rng)
            file.write_bytes(mangled(rng, content) if case % 2 else content)
            seen.of(lambda: check_gguf(file))


@pytest.mark.parametrize(
    "part", [FILE, INDEX, "config.json", "tokenizer_config.json", "generation_config.json"]
)
def test_whole_folders(part: str, edited: Edited, cases: Cases) -> None:
    folder = edited()
    rng = dice(f"folder of {part}")
    if part == INDEX:
        (folder / FILE).rename(folder / SHARD)
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {"a": SHARD, "b": SHARD}})
        )
    good = (folder / part).read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little") if part == FILE else len(good)
    with outcomes(cases(80), least=1) as seen:
        for case in range(cases(80)):
            if part == FILE or case % 2:
                content = mangled(rng, good[:header_bytes]) + good[header_bytes:]
            else:
                content = json.dumps(spoiled(rng, json.loads(good))).encode()
            (folder / part).write_bytes(content if case else good)
            seen.of(
                lambda: load_config(
                    find_model(str(folder), folder.parent / "cache", read_weights=False)
                )
            )


def test_tokenizers(edited: Edited, cases: Cases) -> None:
    folder = edited()
    rng, good = dice(7), (folder / "tokenizer.json").read_bytes()
    with outcomes(cases(300), least=cases(10)) as seen:
        for case in range(cases(300)):
            values = spoiled(rng, spoiled(rng, json.loads(good)))
            (folder / "tokenizer.json").write_bytes(
                mangled(rng, good) if case % 3 == 0 else json.dumps(values).encode()
            )
            seen.of(
                lambda: load_tokenizer(
                    find_model(str(folder), folder.parent / "cache", read_weights=False)
                )
            )


def test_models(edited: Edited, cases: Cases) -> None:
    folder = edited()
    rng, good = dice(9), json.loads((folder / "config.json").read_text())
    with outcomes(cases(150), least=cases(10)) as seen:
        for _ in range(cases(150)):
            (folder / "config.json").write_text(json.dumps(spoiled(rng, good)))
            seen.of(
                lambda: load_model(
                    find_model(str(folder), folder.parent / "cache", read_weights=False),
                    torch.float32,
                    "cpu",
                )
            )


def test_whole_gguf_files(tmp_path: Path, cases: Cases) -> None:
    rng, file = dice(8), tmp_path / "model.gguf"
    with outcomes(cases(200), least=cases(20)) as seen:
        for case in range(cases(200)):
            content = random_gguf(rng)
            file.write_bytes(mangled(rng, content) if case % 4 == 0 else content)
            seen.of(
                lambda: load_config(find_model(str(file), tmp_path / "cache", read_weights=False))
            )
            assert refusal(lambda: find_model(str(file), tmp_path / "cache"))  # blocks are missing
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
