"""The command plan: the plan of a budget or a loss is written, checked, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from allocator.demands.menu import bpw
from allocator.profile import Profile
from quantizer.plans.plan import Plan
from tests.support.commands import bitwright, bitwright_json
from tests.support.profile_commands import (
    BUDGET,
    KINDS,
    bytes_of,
    new_file,
    planned,
    refused,
    store,
)
from tests.support.synthetic_profiles import byte_ends, make_profile


def test_a_plan_for_a_budget_is_written_and_loads_back(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    document = bitwright_json("plan", folder, "--budget", BUDGET, "--out", out)
    plan = Plan.loads(out.read_text())
    assert json.loads(out.read_text()) == document
    assert plan.layers == measured.layers
    assert set(plan.fidelities) <= set(measured.fidelities)
    assert (
        plan.weight_bytes
        == document["weight_bytes"]
        <= document["budget_bytes"]
        == bytes_of(BUDGET, measured)
    )
    assert document["bound_nats_per_token"] <= document["predicted_loss_nats_per_token"]
    chosen = [measured.fidelities.index(fidelity) for fidelity in plan.fidelities]
    assert document["predicted_loss_nats_per_token"] == pytest.approx(
        measured.loss(chosen), abs=1e-9
    )


def test_a_plan_is_told_in_lines_where_no_document_is_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    done = bitwright("plan", folder, "--budget", BUDGET, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert int(lines["weight_bytes"]) == Plan.loads(out.read_text()).weight_bytes
    assert {
        "predicted_loss_nats_per_token",
        "bound_nats_per_token",
        "gap",
        "budget_bytes",
    } <= lines.keys()
    assert lines["plan"] == str(out)


def test_the_smallest_plan_for_a_loss_is_written_with_the_bytes_that_are_surely_needed(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    most = (measured.loss([0] * 12) + measured.loss([4] * 12)) / 2
    document = bitwright_json("plan", folder, "--max-kl", str(most), "--out", out)
    assert document["predicted_loss_nats_per_token"] <= most
    assert (
        byte_ends(measured)[0]
        < document["bound_bytes"]
        <= document["weight_bytes"]
        < byte_ends(measured)[1]
    )
    assert (
        document["budget_bytes"]
        == document["weight_bytes"]
        == Plan.loads(out.read_text()).weight_bytes
    )


def test_a_budget_or_a_loss_is_needed_and_not_both(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    for options in ([], ["--budget", BUDGET, "--max-kl", "1"]):
        assert refused("plan", folder, *options, "--out", out) == "give either budget or max kl"
        assert not out.exists()


def test_a_plan_is_never_written_over_a_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("mine")
    assert "exists; name a new file" in refused("plan", folder, "--budget", BUDGET, "--out", out)
    assert out.read_text() == "mine"


def test_a_budget_below_the_smallest_plan_names_the_feasible_range_and_what_binds(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    low, high = byte_ends(measured)
    message = refused("plan", folder, "--budget", f"{low - 1}B", "--out", out, code=3)
    assert f"feasible are {low} to {high} bytes" in message
    assert message.endswith("what binds: menu")
    message = refused(
        "plan", folder, "--budget", f"{low}B", "--rule", "*.o_proj>=3", "--out", out, code=3
    )
    assert message.endswith("what binds: *.o_proj>=3")
    assert not out.exists()


def test_a_loss_that_no_plan_has_is_impossible(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    message = refused(
        "plan",
        folder,
        "--max-kl",
        str(measured.loss([4] * 12) - 1),
        "--out",
        tmp_path / "plan.json",
        code=3,
    )
    assert "no plan has a predicted KL" in message


def test_rules_are_obeyed_and_the_plan_says_which_one_decided(folder: Path) -> None:
    document = planned(
        folder,
        "--rule",
        "*.o_proj=int4g64",
        "--rule",
        "model.layers.1.*!=int2g64",
        "--rule",
        "*.1.mlp.*>=3",
    )
    rows = document["layers"]
    assert all(
        rows[f"model.layers.{block}.self_attn.o_proj"]["fidelity"] == "int4g64"
        for block in range(2)
    )
    assert all(rows[name]["fidelity"] != "int2g64" for name in rows if ".1." in name)
    assert document["decided_by"] == {
        "model.layers.0.self_attn.o_proj": "*.o_proj=int4g64",
        **{f"model.layers.1.{kind}": "model.layers.1.*!=int2g64" for kind in KINDS[:3]},
        "model.layers.1.self_attn.o_proj": "*.o_proj=int4g64",
        **{f"model.layers.1.{kind}": "*.1.mlp.*>=3" for kind in KINDS[4:]},
    }


def agreeing(document: Any, *kinds: str) -> list[bool]:
    """Return for each block whether all layers of these kinds have one fidelity."""
    rows = document["layers"]
    return [
        len({rows[f"model.layers.{block}.{kind}"]["fidelity"] for kind in kinds}) == 1
        for block in range(2)
    ]


def test_a_target_ties_what_it_fuses_and_the_user_ties_and_unties_more(folder: Path) -> None:
    free, fused = planned(folder), planned(folder, "--target", "vllm")
    own = planned(folder, "--tie", "*.o_proj,*.up_proj")
    loose = planned(folder, "--target", "vllm", "--untie", "*")
    qkv = KINDS[:3]
    assert not all(agreeing(free, *qkv))
    assert not all(agreeing(free, "self_attn.o_proj", "mlp.up_proj"))
    assert all(agreeing(fused, *qkv) + agreeing(fused, *KINDS[4:]))
    assert all(agreeing(own, "self_attn.o_proj", "mlp.up_proj"))
    assert loose["layers"] == free["layers"]


def test_a_pool_holds_no_more_than_its_size(folder: Path) -> None:
    def inside(document: Any) -> int:
        return sum(row["weight_bytes"] for name, row in document["layers"].items() if ".0." in name)

    free = inside(planned(folder))
    most = free - 10_000
    document = planned(folder, "--pool", f"gpu0:model.layers.0.*={most}B")
    (use,) = document["limits"]
    assert (use["name"], use["unit"], use["most"]) == ("gpu0", "bytes", most)
    assert use["used"] == inside(document) <= most < free
    message = refused(
        *(
            "plan",
            folder,
            "--budget",
            BUDGET,
            "--out",
            folder.parent / "none.json",
            "--pool",
            "gpu0:model.layers.0.*=1kB",
        ),
        code=3,
    )
    assert "limit 'gpu0' of 1000 bytes cannot be met" in message


def test_time_is_limited_by_a_table(measured: Profile, folder: Path, latency: Path) -> None:
    def time(document: Any) -> int:
        names = [fidelity.name for fidelity in measured.fidelities]
        return sum(10 * (names.index(row["fidelity"]) + 1) for row in document["layers"].values())

    free = time(planned(folder))
    document = planned(folder, "--latency", latency, "--max-latency-us", str(free - 20))
    assert time(document) <= free - 20
    assert [(use["name"], use["unit"], use["used"]) for use in document["limits"]] == [
        ("latency", "us", time(document))
    ]
    out = folder.parent / "none.json"
    options = ("plan", folder, "--budget", BUDGET, "--out", out, "--latency", latency)
    assert "limit 'latency' of 119 us cannot be met" in refused(
        *options, "--max-latency-us", "119", code=3
    )
    assert "both" in refused(*options)
    latency.write_text("layer,fidelity,latency_us\n*,int2g64,fast\n")
    assert "line 2" in refused(*options, "--max-latency-us", "500")


def test_a_plan_can_be_kept_to_few_fidelities(folder: Path, tmp_path: Path) -> None:
    def distinct(document: Any) -> int:
        return len({row["fidelity"] for row in document["layers"].values()})

    assert distinct(planned(folder)) > 2
    assert distinct(planned(folder, "--distinct", "2")) == 2
    assert distinct(planned(folder, "--distinct", "1")) == 1
    assert "from 1 to 64" in refused(
        "plan", folder, "--budget", BUDGET, "--distinct", "0", "--out", tmp_path / "none.json"
    )


def test_coupling_changes_the_prediction(folder: Path) -> None:
    losses = {
        planned(folder, "--coupling", word)["predicted_loss_nats_per_token"]
        for word in ("full", "block", "none")
    }
    assert len(losses) == 3


BAD = {
    "--budget": ("lots", "is not a size"),
    "--coupling": ("some", "full"),
    "--target": ("exllama", "vllm"),
    "--tie": ("*.query", "matches no layer"),
    "--untie": ("*.query", "matches no layer"),
    "--rule": ("*>3", "write PATTERN=FIDELITY"),
    "--pool": ("gpu0", "write NAME:PATTERN=SIZE"),
    "--latency": ("no-such.csv", "cannot be read"),
}


@pytest.mark.parametrize("option", BAD)
def test_an_option_that_makes_no_sense_is_bad_input(
    folder: Path, tmp_path: Path, option: str
) -> None:
    value, word = BAD[option]
    out = tmp_path / "plan.json"
    options = [] if option == "--budget" else ["--budget", BUDGET]
    assert word in refused("plan", folder, *options, option, value, "--out", out)
    assert not out.exists()


def test_a_profile_that_is_not_there_or_damaged_is_bad_input(folder: Path, tmp_path: Path) -> None:
    for command in ("plan", "frontier"):
        options = ["--budget", BUDGET, "--out", tmp_path / "plan.json"] if command == "plan" else []
        message = refused(command, tmp_path / "nowhere", *options)
        assert "cannot be read" in message
        assert message.endswith("give a folder that `bitwright profile` wrote")
    (folder / "profile.json").write_text("{}")
    assert "cannot be read" in refused("frontier", folder)


# plan --check


def edit(path: Path, **fidelities: str) -> Path:
    """Change layers of a plan file as a person would, `q_proj` of block 0 being called `q_proj`.

    Return the new file.
    """
    document = json.loads(path.read_text())
    for kind, fidelity in fidelities.items():
        (name,) = (
            name
            for name in document["layers"]
            if name.startswith("model.layers.0.") and name.endswith(kind)
        )
        document["layers"][name]["fidelity"] = fidelity
    edited = path.with_name("edited.json")
    edited.write_text(json.dumps(document))
    return edited


def test_a_sound_plan_passes_its_check(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ("--target", "vllm", "--rule", "*.o_proj>=3", "--distinct", "3", "--budget", BUDGET)
    made = bitwright_json("plan", folder, *options, "--out", out)
    found = bitwright_json("plan", folder, *options, "--check", out)
    assert found["sound"]
    assert found["weight_bytes"] == made["weight_bytes"]
    assert found["predicted_loss_nats_per_token"] == pytest.approx(
        made["predicted_loss_nats_per_token"], abs=1e-9
    )


def test_an_edited_plan_is_priced_anew_and_told_what_it_breaks(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    made = bitwright_json(
        "plan", folder, "--target", "vllm", "--rule", "*!=int4g64", "--budget", BUDGET, "--out", out
    )
    edited = edit(out, q_proj="int4g64", k_proj="int2g64", up_proj="int8g64", gate_proj="int8g64")
    plan = Plan.loads(edited.read_text())
    assert plan.weight_bytes != made["weight_bytes"]
    options = (
        "--target",
        "vllm",
        "--rule",
        "*.self_attn.*!=int4g64",
        "--budget",
        f"{plan.weight_bytes - 1}B",
    )
    done = bitwright("plan", folder, "--check", edited, *options, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 2
    assert not found["sound"]
    assert found["weight_bytes"] == plan.weight_bytes
    assert found["bits_per_weight"] == pytest.approx(bpw(measured.layers, plan.weight_bytes))
    assert found["off_menu"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert [message.split(",")[0] for message in found["broken_ties"]] == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert [message.split()[0] for message in found["broken_rules"]] == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert found["broken_limits"] == [
        f"budget of {plan.weight_bytes - 1} bytes: the plan has {plan.weight_bytes}"
    ]
    assert (
        bitwright("plan", folder, "--check", edited).returncode == 0
    )  # nothing asked for, nothing broken
    assert "sound: False" in bitwright("plan", folder, "--check", edited, "--target", "vllm").stdout


def test_a_check_writes_no_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = new_file(folder)
    planned(folder)
    before = sorted(tmp_path.rglob("*"))
    assert bitwright("plan", folder, "--check", made, "--budget", BUDGET).returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_of_another_model_or_no_plan_is_bad_input(folder: Path, tmp_path: Path) -> None:
    other = store(make_profile(0), tmp_path / "other")
    plan = tmp_path / "other.json"
    bitwright_json("plan", other, "--budget", BUDGET, "--out", plan)
    assert "different models" in refused("plan", folder, "--check", plan)
    plan.write_text("nothing")
    assert f"{str(plan)!r}: the plan is not JSON" in refused("plan", folder, "--check", plan)
    plan.write_bytes(b"\xff")
    assert "it is no UTF-8 text" in refused("plan", folder, "--check", plan)
    assert "cannot be read" in refused("plan", folder, "--check", tmp_path / "nowhere.json")
