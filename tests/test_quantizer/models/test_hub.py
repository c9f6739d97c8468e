"""Promises of quantizer.models.hub: what is downloaded, and what is found on this machine."""

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from quantizer.errors import ModelError
from quantizer.models.hub import HubModel
from quantizer.models.source import find_model
from tests.support.fake_hub import MAIN, SHARDS, TINY, FakeHub, commit_of, point_to
from tests.support.quantized import TinyFolder

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weights_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("reference", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("gpt2@main", "gpt2", "main"),
    ],
)
def test_a_reference_is_a_repository_and_perhaps_a_revision(
    reference: str, repo: str, revision: str | None
) -> None:
    model = HubModel.parse(reference)
    assert model == HubModel(repo, revision)
    assert str(model) == reference


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "a/b/c",
        "org/name@",
        "@main",
        "org/name@a@b",
        "org/name@../x",
        "../name",
        "org/n m",
        "ä/b",
    ],
)
def test_other_texts_are_no_reference(reference: str) -> None:
    assert HubModel.parse(reference) is None


def test_weights_are_downloaded_in_one_form_only(
    hub: FakeHub, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    found = find_model(TINY, tmp_path / "cache")
    assert found.sha256 == tiny_folder("llama").sha256
    names = {str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()}
    assert FILE in names
    assert "additional_chat_templates/rag.jinja" in names
    assert names.isdisjoint(
        {"consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"}
    )
    assert hub.sent[FILE] == (found.path / FILE).stat().st_size
    assert not {name for name in hub.sent if "consolidated" in name or name.endswith(".bin")}


def test_what_is_there_is_not_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    first = find_model(TINY, tmp_path / "cache")
    sent = hub.sent[FILE]
    second = find_model(TINY, tmp_path / "cache")
    assert (second.path, second.sha256, hub.sent[FILE]) == (first.path, first.sha256, sent)


@pytest.mark.usefixtures("hub")
def test_a_revision_is_another_model(tmp_path: Path) -> None:
    main, other = (find_model(f"{SHARDS}{at}", tmp_path / "cache") for at in ("", "@v2"))
    commit = find_model(f"{SHARDS}@{commit_of('v2')}", tmp_path / "cache")
    assert (other.name, other.path.name) == (f"{SHARDS}@v2", commit_of("v2"))
    assert main.sha256 != other.sha256 == commit.sha256


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("org/none", "no such model at Hugging Face; if it is private, set HF_TOKEN"),
        (f"{SHARDS}@v3", "'org/shards' has no revision 'v3'.*give a branch, a tag or a commit"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_is_refused_with_the_reason(
    reference: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        find_model(reference, tmp_path / "cache")


def test_without_network_the_copy_on_this_machine_is_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = {each: find_model(each, tmp_path / "cache") for each in (TINY, f"{SHARDS}@v2")}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sent = hub.sent.copy()
    for reference, found in online.items():
        assert find_model(reference, tmp_path / "cache").sha256 == found.sha256
        offline = find_model(reference, tmp_path / "cache", read_weights=False)
        assert (offline.path, offline.download_bytes) == (found.path, 0)
    assert hub.sent == sent
    for missing in (SHARDS, f"{TINY}@v2"):
        with pytest.raises(ModelError, match=r"not in the cache.*HF_HUB_OFFLINE is set; unset it"):
            find_model(missing, tmp_path / "cache")


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_not_reached_is_replaced_by_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_model(TINY, tmp_path / "cache")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert find_model(TINY, tmp_path / "cache").sha256 == found.sha256
    with pytest.raises(ModelError, match="not to be had from Hugging Face"):
        find_model(SHARDS, tmp_path / "cache")


@pytest.mark.usefixtures("hub")
def test_folders_of_the_cache_are_models_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_model(TINY, tmp_path / "cache")
    find_model(f"{SHARDS}@v2", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (found.path / FILE).is_symlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(found.path, target_is_directory=True)
    for folder in (found.path, found.path.parent.parent, elsewhere):
        assert find_model(str(folder), tmp_path / "cache").sha256 == found.sha256
    only = tmp_path / "hub" / "models--org--shards"
    assert find_model(str(only), tmp_path / "cache").path.name == commit_of("v2")


@pytest.mark.usefixtures("hub")
def test_a_cache_folder_of_several_revisions_needs_a_choice(tmp_path: Path) -> None:
    for revision in (MAIN, "v2"):
        find_model(f"{SHARDS}@{revision}", tmp_path / "cache")
    folder = tmp_path / "hub" / "models--org--shards"
    assert find_model(str(folder), tmp_path / "cache").path.name == commit_of(MAIN)
    (folder / "refs" / MAIN).unlink()
    with pytest.raises(ModelError, match="holds 2 revisions of a model; give one of the folders"):
        find_model(str(folder), tmp_path / "cache")


def _without_blob(folder: Path, name: str) -> None:
    """Take a download back to where it was interrupted."""
    blob = (folder / name).resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))


def _without_link(folder: Path, name: str) -> None:
    _without_blob(folder, name)
    (folder / name).unlink()


@pytest.mark.parametrize("interrupt", [_without_blob, _without_link])
@pytest.mark.parametrize("read_weights", [True, False])
@pytest.mark.usefixtures("hub")
def test_an_interrupted_download_is_incomplete(
    interrupt: Callable[[Path, str], None],
    read_weights: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    single, shards = (find_model(each, tmp_path / "cache").path for each in (TINY, SHARDS))
    shard = weights_in(shards)[1].name
    interrupt(single, FILE)
    interrupt(shards, shard)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for reference in (TINY, str(single)):
        with pytest.raises(ModelError, match=rf"is incomplete: it lacks '{FILE}'.*\.incomplete'"):
            find_model(reference, tmp_path / "cache", read_weights=read_weights)
    for reference in (SHARDS, str(shards)):
        with pytest.raises(ModelError, match=f"it lacks '{shard}', which {INDEX} names"):
            find_model(reference, tmp_path / "cache", read_weights=read_weights)


def test_a_download_goes_on_where_it_was_interrupted(hub: FakeHub, tmp_path: Path) -> None:
    found = find_model(SHARDS, tmp_path / "cache")
    before, shards = hub.sent.copy(), weights_in(found.path)
    _without_link(found.path, shards[1].name)
    assert find_model(SHARDS, tmp_path / "cache").sha256 == found.sha256
    for shard in shards:
        again = hub.sent[shard.name] - before[shard.name]
        assert again == (shard.stat().st_size if shard == shards[1] else 0)


def test_what_a_download_into_a_folder_left_is_incomplete(hub_folder: Path, tmp_path: Path) -> None:
    """So are files of other programs that mark what they have not finished."""
    folder = Path(shutil.copytree(hub_folder / TINY / MAIN, tmp_path / "model"))
    (folder / FILE).rename(folder / f"{FILE}.incomplete")
    with pytest.raises(ModelError, match=rf"it lacks '{FILE}'; .* left '{FILE}\.incomplete'"):
        find_model(str(folder), tmp_path / "cache")
    parts = folder / ".cache" / "huggingface" / "download"
    parts.mkdir(parents=True)
    (folder / f"{FILE}.incomplete").rename(parts / "a1b2.incomplete")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it lacks 'config\.json'; .* left 'a1b2\.incomplete'"):
        find_model(str(folder), tmp_path / "cache")


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("reference", [TINY, SHARDS, f"{SHARDS}@v2"])
def test_of_a_model_seen_from_afar_only_headers_are_downloaded(
    reference: str, hub: FakeHub, tmp_path: Path
) -> None:
    seen = find_model(reference, tmp_path / "cache", read_weights=False)
    assert not weights_in(seen.path)
    for name in [name for name in hub.sent if name.endswith(".safetensors")]:
        repo, _, revision = reference.partition("@")
        file = hub.root / repo / (revision or MAIN) / name
        assert hub.sent[name] == header_bytes(file) + 8  # the length is read first
    found = find_model(reference, tmp_path / "cache")
    assert (seen.stored, seen.dtype, seen.path) == (found.stored, found.dtype, found.path)
    assert seen.download_bytes == sum(file.stat().st_size for file in weights_in(found.path))
    again = find_model(reference, tmp_path / "cache", read_weights=False)
    assert (again.stored, again.download_bytes) == (found.stored, 0)


def test_what_is_here_of_a_model_seen_from_afar_is_not_counted(
    hub: FakeHub, tmp_path: Path
) -> None:
    found = find_model(SHARDS, tmp_path / "cache")
    missing = weights_in(found.path)[2]
    size = missing.stat().st_size
    _without_link(found.path, missing.name)
    hub.sent.clear()
    seen = find_model(SHARDS, tmp_path / "cache", read_weights=False)
    assert (seen.download_bytes, seen.stored) == (size, found.stored)
    assert [name for name in hub.sent if name.endswith(".safetensors")] == [missing.name]


def test_a_hub_that_ignores_ranges_is_not_read_to_the_end(hub: FakeHub, tmp_path: Path) -> None:
    hub.ignores_ranges = True
    seen = find_model(SHARDS, tmp_path / "cache", read_weights=False)
    assert seen.stored == find_model(SHARDS, tmp_path / "cache").stored


@pytest.mark.usefixtures("hub")
def test_without_network_a_model_seen_from_afar_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reference, lacks in ((TINY, FILE), (SHARDS, "model-00001-of-00005.safetensors")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        find_model(reference, tmp_path / "cache", read_weights=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match=f"is incomplete: it lacks '{lacks}'"):
            find_model(reference, tmp_path / "cache", read_weights=False)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (FILE, b"", r"org/broken/model\.safetensors' are damaged or truncated"),
        (FILE, (1 << 40).to_bytes(8, "little"), r"the header should take 1099511627776 bytes"),
        ("config.json", b" " * 10_000_001, r"'config\.json' of .* is larger than 10000000 bytes"),
        ("tokenizer.json", b" " * 64_000_001, "is larger than 64000000 bytes"),
    ],
    ids=["empty", "long header", "large config", "large tokenizer"],
)
def test_a_broken_model_is_refused_before_it_is_downloaded(
    name: str, content: bytes, reason: str, hub: FakeHub, tmp_path: Path
) -> None:
    folder = tmp_path / "root" / "org" / "broken" / MAIN
    shutil.copytree(hub.root / TINY / MAIN, folder)
    (folder / name).write_bytes(content)
    hub.root = tmp_path / "root"
    with pytest.raises(ModelError, match=reason):
        find_model("org/broken", tmp_path / "cache", read_weights=False)
    assert hub.sent[name] <= 16


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("model-00002-of-00005.safetensors", "incomplete at Hugging Face: .* names 'model-00002"),
        (INDEX, "'org/broken' has no weights: neither"),
        ("config.json", r"has no config\.json"),
    ],
)
def test_a_model_that_is_incomplete_at_the_hub_is_refused(
    lacks: str, reason: str, hub: FakeHub, tmp_path: Path
) -> None:
    folder = tmp_path / "root" / "org" / "broken" / MAIN
    shutil.copytree(hub.root / SHARDS / MAIN, folder)
    (folder / lacks).unlink()
    hub.root = tmp_path / "root"
    for read_weights in (False, True):
        with pytest.raises(ModelError, match=reason):
            find_model("org/broken", tmp_path / "cache", read_weights=read_weights)
