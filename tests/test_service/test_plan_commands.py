"""The commands that need a profile only: plan, frontier and diff, from files to files."""

import csv
import json
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from allocator.menu import bpw
from allocator.profile import Profile
from quantizer.plan import Plan
from tests.command import bitwright, bitwright_json
from tests.test_allocator.synthetic import byte_ends, make_decoder_profile, make_profile

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
BUDGET = "3.1bpw"


def store(profile: Profile, folder: Path) -> Path:
    """Write a profile as `bitwright profile` does."""
    folder.mkdir()
    head, arrays = profile.dumps()
    (folder / "profile.json").write_bytes(head)
    (folder / "profile.npz").write_bytes(arrays)
    return folder


@pytest.fixture(scope="module")
def measured() -> Profile:
    """The profile of a small decoder."""
    return make_decoder_profile(3, KINDS, 2, menu=5)


@pytest.fixture
def folder(measured: Profile, tmp_path: Path) -> Path:
    """A folder with that profile."""
    return store(measured, tmp_path / "profile")


@pytest.fixture
def latency(measured: Profile, tmp_path: Path) -> Path:
    """A table in which the fidelities take 10, 20, 30, 40 and 50 microseconds a layer."""
    path = tmp_path / "latency.csv"
    rows = [f"*,{fidelity.name},{10 * at}" for at, fidelity in enumerate(measured.fidelities, start=1)]
    path.write_text("\n".join(["layer,fidelity,latency_us", *rows]))
    return path


def planned(folder: Path, *options: str | Path) -> Any:
    """Return the document of a plan for `BUDGET` that must be made."""
    return bitwright_json("plan", folder, "--budget", BUDGET, "--out", new_file(folder), *options)


def new_file(folder: Path) -> Path:
    return folder.parent / f"plan{len([*folder.parent.glob('plan*.json')])}.json"


def refused(*arguments: str | Path, code: int = 2) -> str:
    """Return the message of a command that must fail, with --json and without."""
    plain, told = bitwright(*arguments), bitwright(*arguments, "--json")
    document = json.loads(told.stdout)
    assert (plain.returncode, told.returncode, document["exit_code"]) == (code, code, code), plain.stderr
    assert plain.stdout == ""
    assert f"error {document['error']}: " in plain.stderr
    assert document["message"] in plain.stderr.replace("\n", " ") or document["message"] in plain.stderr
    return str(document["message"])


def bytes_of(text: str, profile: Profile) -> int:
    return int(float(text.removesuffix("bpw")) * sum(layer.weights for layer in profile.layers) / 8)


# plan


def test_a_plan_for_a_budget_is_written_and_loads_back(measured: Profile, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    document = bitwright_json("plan", folder, "--budget", BUDGET, "--out", out)
    plan = Plan.loads(out.read_text())
    assert json.loads(out.read_text()) == document
    assert plan.layers == measured.layers
    assert set(plan.fidelities) <= set(measured.fidelities)
    assert plan.weight_bytes == document["weight_bytes"] <= document["budget_bytes"] == bytes_of(BUDGET, measured)
    assert document["bound_nats_per_token"] <= document["predicted_loss_nats_per_token"]
    chosen = [measured.fidelities.index(fidelity) for fidelity in plan.fidelities]
    assert document["predicted_loss_nats_per_token"] == pytest.approx(measured.loss(chosen), abs=1e-9)


def test_a_plan_is_told_in_lines_where_no_document_is_asked_for(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = bitwright("plan", folder, "--budget", BUDGET, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert int(lines["weight_bytes"]) == Plan.loads(out.read_text()).weight_bytes
    assert {"predicted_loss_nats_per_token", "bound_nats_per_token", "gap", "budget_bytes"} <= lines.keys()
    assert lines["plan"] == str(out)


def test_the_smallest_plan_for_a_loss_is_written_with_the_bytes_that_are_surely_needed(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    most = (measured.loss([0] * 12) + measured.loss([4] * 12)) / 2
    document = bitwright_json("plan", folder, "--max-kl", str(most), "--out", out)
    assert document["predicted_loss_nats_per_token"] <= most
    assert byte_ends(measured)[0] < document["bound_bytes"] <= document["weight_bytes"] < byte_ends(measured)[1]
    assert document["budget_bytes"] == document["weight_bytes"] == Plan.loads(out.read_text()).weight_bytes


def test_a_budget_or_a_loss_is_needed_and_not_both(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    for options in ([], ["--budget", BUDGET, "--max-kl", "1"]):
        assert refused("plan", folder, *options, "--out", out) == "give either --budget or --max-kl"
        assert not out.exists()


def test_a_plan_is_never_written_over_a_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("mine")
    assert "exists; name a new one" in refused("plan", folder, "--budget", BUDGET, "--out", out)
    assert out.read_text() == "mine"


def test_a_budget_below_the_smallest_plan_names_the_feasible_range_and_what_binds(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    low, high = byte_ends(measured)
    message = refused("plan", folder, "--budget", f"{low - 1}B", "--out", out, code=3)
    assert f"feasible are {low} to {high} bytes" in message
    assert message.endswith("what binds: menu")
    message = refused("plan", folder, "--budget", f"{low}B", "--rule", "*.o_proj>=3", "--out", out, code=3)
    assert message.endswith("what binds: *.o_proj>=3")
    assert not out.exists()


def test_a_loss_that_no_plan_has_is_impossible(measured: Profile, folder: Path, tmp_path: Path) -> None:
    message = refused("plan", folder, "--max-kl", str(measured.loss([4] * 12) - 1), "--out", tmp_path / "plan.json", code=3)
    assert "no plan has a predicted KL" in message


def test_rules_are_obeyed_and_the_plan_says_which_one_decided(folder: Path) -> None:
    document = planned(folder, "--rule", "*.o_proj=int4g64", "--rule", "model.layers.1.*!=int2g64", "--rule", "*.1.mlp.*>=3")
    rows = document["layers"]
    assert all(rows[f"model.layers.{block}.self_attn.o_proj"]["fidelity"] == "int4g64" for block in range(2))
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
    return [len({rows[f"model.layers.{block}.{kind}"]["fidelity"] for kind in kinds}) == 1 for block in range(2)]


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
        *("plan", folder, "--budget", BUDGET, "--out", folder.parent / "none.json", "--pool", "gpu0:model.layers.0.*=1kB"), code=3
    )
    assert "limit 'gpu0' of 1000 bytes cannot be met" in message


def test_time_is_limited_by_a_table(measured: Profile, folder: Path, latency: Path) -> None:
    def time(document: Any) -> int:
        names = [fidelity.name for fidelity in measured.fidelities]
        return sum(10 * (names.index(row["fidelity"]) + 1) for row in document["layers"].values())

    free = time(planned(folder))
    document = planned(folder, "--latency", latency, "--max-latency-us", str(free - 20))
    assert time(document) <= free - 20
    assert [(use["name"], use["unit"], use["used"]) for use in document["limits"]] == [("latency", "us", time(document))]
    out = folder.parent / "none.json"
    options = ("plan", folder, "--budget", BUDGET, "--out", out, "--latency", latency)
    assert "limit 'latency' of 119 us cannot be met" in refused(*options, "--max-latency-us", "119", code=3)
    assert "both" in refused(*options)
    latency.write_text("layer,fidelity,latency_us\n*,int2g64,fast\n")
    assert "line 2" in refused(*options, "--max-latency-us", "500")


def test_a_plan_can_be_kept_to_few_fidelities(folder: Path, tmp_path: Path) -> None:
    def distinct(document: Any) -> int:
        return len({row["fidelity"] for row in document["layers"].values()})

    assert distinct(planned(folder)) > 2
    assert distinct(planned(folder, "--distinct", "2")) == 2
    assert distinct(planned(folder, "--distinct", "1")) == 1
    assert "1 or more" in refused("plan", folder, "--budget", BUDGET, "--distinct", "0", "--out", tmp_path / "none.json")


def test_coupling_changes_the_prediction(folder: Path) -> None:
    losses = {planned(folder, "--coupling", word)["predicted_loss_nats_per_token"] for word in ("full", "block", "none")}
    assert len(losses) == 3


BAD = {
    "--budget": ("lots", "is not a size"),
    "--coupling": ("some", "full"),
    "--target": ("exllama", "vllm"),
    "--tie": ("*.query", "names no layer"),
    "--untie": ("*.query", "names no layer"),
    "--rule": ("*>3", "write PATTERN=FIDELITY"),
    "--pool": ("gpu0", "write NAME:PATTERN=SIZE"),
    "--latency": ("no-such.csv", "cannot be read"),
}


@pytest.mark.parametrize("option", BAD)
def test_an_option_that_makes_no_sense_is_bad_input(folder: Path, tmp_path: Path, option: str) -> None:
    value, word = BAD[option]
    out = tmp_path / "plan.json"
    options = [] if option == "--budget" else ["--budget", BUDGET]
    assert word in refused("plan", folder, *options, option, value, "--out", out)
    assert not out.exists()


def test_a_profile_that_is_not_there_or_damaged_is_bad_input(folder: Path, tmp_path: Path) -> None:
    for command in ("plan", "frontier"):
        options = ["--budget", BUDGET, "--out", tmp_path / "plan.json"] if command == "plan" else []
        assert "cannot be read" in refused(command, tmp_path / "nowhere", *options)
    (folder / "profile.json").write_text("{}")
    assert "cannot be read" in refused("frontier", folder)


# plan --check


def edit(path: Path, **fidelities: str) -> Path:
    """Change layers of a plan file as a person would, `q_proj` of block 0 being called `q_proj`; return the new file."""
    document = json.loads(path.read_text())
    for kind, fidelity in fidelities.items():
        (name,) = (name for name in document["layers"] if name.startswith("model.layers.0.") and name.endswith(kind))
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
    assert found["predicted_loss_nats_per_token"] == pytest.approx(made["predicted_loss_nats_per_token"], abs=1e-9)


def test_an_edited_plan_is_priced_anew_and_told_what_it_breaks(measured: Profile, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    made = bitwright_json("plan", folder, "--target", "vllm", "--rule", "*!=int4g64", "--budget", BUDGET, "--out", out)
    edited = edit(out, q_proj="int4g64", k_proj="int2g64", up_proj="int8g64", gate_proj="int8g64")
    plan = Plan.loads(edited.read_text())
    assert plan.weight_bytes != made["weight_bytes"]
    options = ("--target", "vllm", "--rule", "*.self_attn.*!=int4g64", "--budget", f"{plan.weight_bytes - 1}B")
    done = bitwright("plan", folder, "--check", edited, *options, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 2
    assert not found["sound"]
    assert found["weight_bytes"] == plan.weight_bytes
    assert found["bits_per_weight"] == pytest.approx(bpw(measured.layers, plan.weight_bytes))
    assert found["off_menu"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert [message.split(",")[0] for message in found["broken_ties"]] == ["model.layers.0.self_attn.q_proj"]
    assert [message.split()[0] for message in found["broken_rules"]] == ["model.layers.0.self_attn.q_proj"]
    assert found["broken_limits"] == [f"budget of {plan.weight_bytes - 1} bytes: the plan has {plan.weight_bytes}"]
    assert bitwright("plan", folder, "--check", edited).returncode == 0  # nothing asked for, nothing broken
    assert "sound: False" in bitwright("plan", folder, "--check", edited, "--target", "vllm").stdout


def test_a_check_writes_no_plan(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "not JSON" in refused("plan", folder, "--check", plan)
    assert "cannot be read" in refused("plan", folder, "--check", tmp_path / "nowhere.json")


# frontier


COLUMNS = [
    *("budget_bytes", "weight_bytes", "bits_per_weight", "predicted_kl_nats_per_token", "bound_nats_per_token", "gap"),
    *("price_nats_per_token_per_byte", "on_hull", "knee"),
]


def test_a_frontier_is_a_csv_file_with_a_row_for_each_budget(measured: Profile, folder: Path, tmp_path: Path) -> None:
    document = bitwright_json("frontier", folder, "--points", "15", "--csv", tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [list(row.values()) for row in rows] == [[str(value) for value in point.values()] for point in document["points"]]
    assert len(rows) == 15
    low, high = measured.budget_range
    assert (int(rows[0]["budget_bytes"]), int(rows[-1]["budget_bytes"])) == (low, high)
    assert all(int(row["weight_bytes"]) <= int(row["budget_bytes"]) for row in rows)
    assert all(float(row["bound_nats_per_token"]) <= float(row["predicted_kl_nats_per_token"]) for row in rows)
    assert all(float(row["bits_per_weight"]) == pytest.approx(bpw(measured.layers, int(row["weight_bytes"]))) for row in rows)
    losses = [float(row["predicted_kl_nats_per_token"]) for row in rows]
    assert all(one >= two for one, two in pairwise(losses))
    assert {row["on_hull"] for row in rows} == {"True", "False"}


def test_the_ends_of_a_frontier_can_be_chosen(measured: Profile, folder: Path) -> None:
    points = bitwright_json("frontier", folder, "--points", "3", "--from", "2.5bpw", "--to", "4bpw")["points"]
    low, high = (bytes_of(text, measured) for text in ("2.5bpw", "4bpw"))
    assert [point["budget_bytes"] for point in points] == [low, round((low + high) / 2), high]


def test_each_point_is_the_plan_of_its_budget(folder: Path, tmp_path: Path) -> None:
    limits = ("--target", "vllm", "--rule", "*.o_proj>=3", "--distinct", "3")
    for at, point in enumerate(bitwright_json("frontier", folder, "--points", "3", *limits)["points"]):
        budget, out = f"{point['budget_bytes']}B", tmp_path / f"{at}.json"
        document = bitwright_json("plan", folder, "--budget", budget, "--out", out, *limits)
        assert point["weight_bytes"] == document["weight_bytes"]
        assert point["predicted_kl_nats_per_token"] == document["predicted_loss_nats_per_token"]


def test_a_frontier_heeds_pools_and_times(measured: Profile, folder: Path, latency: Path) -> None:
    def best(*options: str | Path) -> float:
        return float(bitwright_json("frontier", folder, "--points", "3", *options)["points"][-1]["predicted_kl_nats_per_token"])

    small = sum(measured.fidelities[1].weight_bytes(layer.out_features, layer.in_features) for layer in measured.layers[:6])
    free = best()
    assert best("--pool", f"gpu0:model.layers.0.*={small}B") > free
    assert best("--latency", latency, "--max-latency-us", "250") > free


def png_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG file whose chunks must be whole."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, pixels = 8, [], b""
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        body, check = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(check)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    assert len(set(zlib.decompress(pixels))) > 10  # something is drawn
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_a_frontier_is_a_png_picture(folder: Path, tmp_path: Path) -> None:
    done = bitwright("frontier", folder, "--points", "6", "--png", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    width, height = png_size((tmp_path / "f.png").read_bytes())
    assert width > height > 300
    assert f"written: {tmp_path / 'f.png'}" in done.stdout


class Page(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        """Start with nothing."""
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_frontier_is_a_page_without_scripts_and_with_nothing_beside_it(folder: Path, tmp_path: Path) -> None:
    document = bitwright_json("frontier", folder, "--points", "8", "--html", tmp_path / "f.html")
    source = (tmp_path / "f.html").read_text()
    page = Page()
    page.feed(source)
    page.close()
    assert page.tags.count("svg") == 1
    assert page.tags.count("tr") == 1 + 8
    assert not {"script", "iframe", "object", "embed", "link", "form", "base", "img"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in source
    assert all(part.startswith(("#", "'#", '"#')) for part in source.split("url(")[1:])
    assert all(f"{point['weight_bytes']:,}" in page.text for point in document["points"])
    assert page.text.count("knee") == 1 + sum(point["knee"] for point in document["points"])  # once in the legend


def test_a_frontier_is_a_table_on_a_terminal(folder: Path) -> None:
    points = bitwright_json("frontier", folder, "--points", "40")["points"]
    done = bitwright("frontier", folder, "--points", "40")
    assert done.returncode == 0, done.stderr
    shown = [point for point in points if f"{point['weight_bytes']:,}" in done.stdout]
    assert points[0] in shown
    assert points[-1] in shown
    assert all(point in shown for point in points if point["knee"])
    assert len(shown) < 40


@pytest.mark.parametrize("option", ["--csv", "--png", "--html"])
def test_a_frontier_is_never_written_over_a_file_nor_in_part(folder: Path, tmp_path: Path, option: str) -> None:
    files = {name: tmp_path / f"f{name}" for name in ("--csv", "--png", "--html")}
    files[option].write_text("mine")
    arguments = [word for name, path in files.items() for word in (name, path)]
    assert "exists; name a new one" in refused("frontier", folder, "--points", "3", *arguments)
    assert files[option].read_text() == "mine"
    assert [path for path in files.values() if path.exists()] == [files[option]]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--points", "1"), "2 or more"),
        (("--from", "4bpw", "--to", "3bpw"), "--from below --to"),
        (("--from", "3bpw", "--to", "3bpw"), "--from below --to"),
        (("--from", "lots"), "is not a size"),
        (("--rule", "*>3"), "write PATTERN=FIDELITY"),
    ],
)
def test_a_frontier_that_makes_no_sense_is_bad_input(folder: Path, options: tuple[str, ...], word: str) -> None:
    assert word in refused("frontier", folder, *options)


def test_a_frontier_from_below_the_smallest_plan_is_impossible(folder: Path) -> None:
    assert "feasible are" in refused("frontier", folder, "--from", "1bpw", code=3)


# diff


@pytest.fixture
def two_plans(folder: Path) -> tuple[Path, Path]:
    """Plans of a small and of a large budget."""
    paths = new_file(folder), folder.parent / "large.json"
    for path, budget in zip(paths, ("2.6bpw", "3.6bpw"), strict=True):
        bitwright_json("plan", folder, "--budget", budget, "--out", path)
    return paths


def test_two_plan_files_are_compared_layer_by_layer(two_plans: tuple[Path, Path]) -> None:
    before, after = (Plan.loads(path.read_text()) for path in two_plans)
    found = bitwright_json("diff", *two_plans)
    differ = [name for name, fidelity in before.by_name.items() if after.by_name[name] != fidelity]
    assert len(differ) == found["changed"] > 0
    assert [change["layer"] for change in found["changes"]] == differ
    assert found["bytes_more"] == after.weight_bytes - before.weight_bytes == sum(row["bytes_more"] for row in found["changes"])
    assert "predicted_loss_more" not in found


def test_with_a_profile_a_difference_is_priced(folder: Path, two_plans: tuple[Path, Path]) -> None:
    found = bitwright_json("diff", *two_plans, "--profile", folder)
    losses = [json.loads(path.read_text())["predicted_loss_nats_per_token"] for path in two_plans]
    assert [found["predicted_loss_before"], found["predicted_loss_after"]] == pytest.approx(losses, abs=1e-9)
    assert found["predicted_loss_more"] == pytest.approx(losses[1] - losses[0], abs=1e-9)
    assert found["predicted_loss_more"] < 0


def test_a_difference_is_a_table_on_a_terminal(two_plans: tuple[Path, Path]) -> None:
    done = bitwright("diff", *two_plans)
    assert done.returncode == 0, done.stderr
    changes = bitwright_json("diff", *two_plans)["changes"]
    rows = [line for line in done.stdout.splitlines() if "model.layers." in line]
    assert len(rows) == len(changes)
    for row, change in zip(rows, changes, strict=True):
        assert change["layer"].rpartition(".")[0] in row
        assert f" {change['before']} " in row
        assert f" {change['after']} " in row
        assert f" {change['bytes_more']:+,} " in row
    assert f"changed: {len(changes)}" in done.stdout


def other_model(folder: Path) -> str:
    store(make_profile(0), folder / "other")
    bitwright_json("plan", folder / "other", "--budget", BUDGET, "--out", folder / "bad.json")
    return "different models"


def no_plan(folder: Path) -> str:
    (folder / "bad.json").write_text('{"schema": "something/1", "layers": {}}')
    return "schema"


def nothing(folder: Path) -> str:
    assert not (folder / "bad.json").exists()
    return "cannot be read"


@pytest.mark.parametrize("spoil", [other_model, no_plan, nothing])
def test_what_cannot_be_compared_is_bad_input(two_plans: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    word = spoil(tmp_path)
    assert word in refused("diff", two_plans[0], tmp_path / "bad.json")
    assert word in refused("diff", tmp_path / "bad.json", two_plans[0])


def test_a_profile_of_another_model_does_not_price_a_difference(two_plans: tuple[Path, Path], tmp_path: Path) -> None:
    other = store(make_profile(0), tmp_path / "other")
    assert "different models" in refused("diff", *two_plans, "--profile", other)
    assert "cannot be read" in refused("diff", *two_plans, "--profile", tmp_path / "nowhere")
