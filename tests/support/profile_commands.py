"""Run the commands that need a profile only: plan, frontier and diff."""

import json
from pathlib import Path
from typing import Any

from allocator.profile import Profile
from tests.support.commands import bitwright, bitwright_json

BUDGET = "3.1bpw"
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)


def store(profile: Profile, folder: Path) -> Path:
    """Write a profile as `bitwright profile` does."""
    folder.mkdir()
    head, arrays = profile.dumps()
    (folder / "profile.json").write_bytes(head)
    (folder / "profile.npz").write_bytes(arrays)
    return folder


def planned(folder: Path, *options: str | Path) -> Any:
    """Return the document of a plan for `BUDGET` that must be made."""
    return bitwright_json("plan", folder, "--budget", BUDGET, "--out", new_file(folder), *options)


def new_file(folder: Path) -> Path:
    return folder.parent / f"plan{len([*folder.parent.glob('plan*.json')])}.json"


def refused(*arguments: str | Path, code: int = 2) -> str:
    """Return the message of a command that must fail, with --json and without."""
    plain, told = bitwright(*arguments), bitwright(*arguments, "--json")
    document = json.loads(told.stdout)
    assert (plain.returncode, told.returncode, document["exit_code"]) == (code, code, code), (
        plain.stderr
    )
    assert plain.stdout == ""
    assert f"error {document['error']}: " in plain.stderr
    assert (
        document["message"] in plain.stderr.replace("\n", " ")
        or document["message"] in plain.stderr
    )
    return str(document["message"])


def bytes_of(text: str, profile: Profile) -> int:
    return int(float(text.removesuffix("bpw")) * sum(layer.weights for layer in profile.layers) / 8)
