"""The command frontier: budgets and their losses, as rows, picture, page and table."""

import csv
import zlib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from allocator.demands.menu import bpw
from allocator.profile import Profile
from tests.support.commands import bitwright, bitwright_json
from tests.support.profile_commands import bytes_of, refused

COLUMNS = [
    *(
        "budget_bytes",
        "weight_bytes",
        "bits_per_weight",
        "predicted_kl_nats_per_token",
        "bound_nats_per_token",
        "gap",
    ),
    *("price_nats_per_token_per_byte", "on_hull", "knee", "checkpoint_bytes"),
]


def test_a_frontier_is_a_csv_file_with_a_row_for_each_budget(
    measured: Profile, folder: Path, tmp_path: Path
) -> None:
    document = bitwright_json("frontier", folder, "--points", "15", "--csv", tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [list(row.values()) for row in rows] == [
        ["" if value is None else str(value) for value in point.values()]
        for point in document["points"]
    ]
    assert len(rows) == 15
    low, high = measured.budget_range
    assert (int(rows[0]["budget_bytes"]), int(rows[-1]["budget_bytes"])) == (low, high)
    assert all(int(row["weight_bytes"]) <= int(row["budget_bytes"]) for row in rows)
    assert all(
        float(row["bound_nats_per_token"]) <= float(row["predicted_kl_nats_per_token"])
        for row in rows
    )
    assert all(
        float(row["bits_per_weight"])
        == pytest.approx(bpw(measured.layers, int(row["weight_bytes"])))
        for row in rows
    )
    losses = [float(row["predicted_kl_nats_per_token"]) for row in rows]
    assert all(one >= two for one, two in pairwise(losses))
    assert {row["on_hull"] for row in rows} == {"True", "False"}


def test_the_ends_of_a_frontier_can_be_chosen(measured: Profile, folder: Path) -> None:
    points = bitwright_json(
        "frontier", folder, "--points", "3", "--from", "2.5bpw", "--to", "4bpw"
    )["points"]
    low, high = (bytes_of(text, measured) for text in ("2.5bpw", "4bpw"))
    assert [point["budget_bytes"] for point in points] == [low, round((low + high) / 2), high]


def test_each_point_is_the_plan_of_its_budget(folder: Path, tmp_path: Path) -> None:
    limits = ("--target", "vllm", "--rule", "*.o_proj>=3", "--distinct", "3")
    for at, point in enumerate(
        bitwright_json("frontier", folder, "--points", "3", *limits)["points"]
    ):
        budget, out = f"{point['budget_bytes']}B", tmp_path / f"{at}.json"
        document = bitwright_json("plan", folder, "--budget", budget, "--out", out, *limits)
        assert point["weight_bytes"] == document["weight_bytes"]
        assert point["predicted_kl_nats_per_token"] == document["predicted_loss_nats_per_token"]


def test_a_frontier_heeds_pools_and_times(measured: Profile, folder: Path, latency: Path) -> None:
    def best(*options: str | Path) -> float:
        return float(
            bitwright_json("frontier", folder, "--points", "3", *options)["points"][-1][
                "predicted_kl_nats_per_token"
            ]
        )

    small = sum(
        measured.fidelities[1].weight_bytes(layer.out_features, layer.in_features)
        for layer in measured.layers[:6]
    )
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
        self.links += [
            value or ""
            for name, value in attrs
            if name in ("href", "xlink:href", "src", "action", "data")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_frontier_is_a_page_without_scripts_and_with_nothing_beside_it(
    folder: Path, tmp_path: Path
) -> None:
    document = bitwright_json("frontier", folder, "--points", "8", "--html", tmp_path / "f.html")
    source = (tmp_path / "f.html").read_text()
    page = Page()
    page.feed(source)
    page.close()
    assert page.tags.count("svg") == 1
    assert page.tags.count("tr") == 1 + 8
    assert not {"script", "iframe", "object", "embed", "link", "form", "base", "img"} & set(
        page.tags
    )
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in source
    assert all(part.startswith(("#", "'#", '"#')) for part in source.split("url(")[1:])
    assert all(f"{point['weight_bytes']:,}" in page.text for point in document["points"])
    assert page.text.count("knee") == 1 + sum(
        point["knee"] for point in document["points"]
    )  # once in the legend


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
def test_a_frontier_is_never_written_over_a_file_nor_in_part(
    folder: Path, tmp_path: Path, option: str
) -> None:
    files = {name: tmp_path / f"f{name}" for name in ("--csv", "--png", "--html")}
    files[option].write_text("mine")
    arguments = [word for name, path in files.items() for word in (name, path)]
    assert "exists; name a new file" in refused("frontier", folder, "--points", "3", *arguments)
    assert files[option].read_text() == "mine"
    assert [path for path in files.values() if path.exists()] == [files[option]]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--points", "1"), "from 2 to 1000"),
        (("--from", "4bpw", "--to", "3bpw"), "below the largest"),
        (("--from", "3bpw", "--to", "3bpw"), "below the largest"),
        (("--from", "lots"), "is not a size"),
        (("--rule", "*>3"), "write PATTERN=FIDELITY"),
    ],
)
def test_a_frontier_that_makes_no_sense_is_bad_input(
    folder: Path, options: tuple[str, ...], word: str
) -> None:
    assert word in refused("frontier", folder, *options)


def test_a_frontier_from_below_the_smallest_plan_is_impossible(folder: Path) -> None:
    assert "feasible are" in refused("frontier", folder, "--from", "1bpw", code=3)
