"""Models of the Hugging Face hub: in its cache on this machine, downloaded, or seen from afar.

Only files that are needed count: the configuration, the side files, and the weights in one form.
"""

import errno
import glob
import io
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantizer.durable import system_errors
from quantizer.errors import ModelError
from quantizer.models.config import CONFIG
from quantizer.models.files import CONFIG_BYTES
from quantizer.models.safetensors_header import (
    MAX_HEADER_BYTES,
    StoredTensor,
    parse_tensors,
    read_tensors,
)
from quantizer.models.side_files import SIDE_FILE_BYTES, is_side_file
from quantizer.models.stored_weights import StoredWeights
from quantizer.models.weight_files import INDEX, INDEX_BYTES, SINGLE, no_weights, shard_names

_REFERENCE = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LENGTH_BYTES = 8
"""A weight file begins with the length of its header."""
_PART_BYTES = 1 << 16
_CONNECTIONS = 8
_REASON_CHARACTERS = 400

log = logging.getLogger("bitwright")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the hub.

    Attributes:
        repo: its id, such as `org/name`.
        revision: a branch, a tag or a commit; None for the default branch.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, reference: str) -> "HubModel | None":
        """Return the model that `org/name` or `org/name@revision` names, None for other texts."""
        match = _REFERENCE.fullmatch(reference)
        if match is None or ".." in reference:
            return None
        return cls(match["repo"], match["revision"])

    def __str__(self) -> str:
        """Return what a user calls it."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Outline:
    """A model of the hub, seen from afar.

    Attributes:
        folder: a folder with its configuration and side files.
        stored: what its weight files hold; None if they are in the folder, too.
        download_bytes: size of the weight files that are not on this machine.
    """

    folder: Path
    stored: StoredWeights | None
    download_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a model that are needed.

    Attributes:
        commit: of which they are.
        small: configuration, index and side files.
        weights: names and sizes of the weight files.
    """

    commit: str
    small: tuple[str, ...]
    weights: Mapping[str, int]


def download(model: HubModel) -> Path:
    """Return the folder of a model in the cache of the hub, after downloading what is missing.

    Where the hub is not reached, and with `HF_HUB_OFFLINE`, the folder is as it was; it may lack
    files if it was never downloaded completely.

    Raises:
        ModelError: there is no such model or revision, it has no weights that can be read, or it is
            not on this machine and the hub is not reached.
        OSError: the disk is full or fails.
    """
    with _hub_errors(model):
        files = _find_files(model)
        if files is None:
            return _cached(model)
        return _fetch(model, files.commit, (*files.small, *files.weights))


def outline(model: HubModel) -> Outline:
    """Return what a model is, without its weights: of them, only headers are read.

    Raises as `download` does, and:
        ModelError: a weight file is damaged.
    """
    with _hub_errors(model):
        files = _find_files(model)
        if files is None:
            return Outline(_cached(model), None, 0)
        folder = _fetch(model, files.commit, files.small)
        missing = {name for name in files.weights if not (folder / name).exists()}
        if not missing:
            return Outline(folder, None, 0)

        def tensors_of(name: str) -> list[StoredTensor]:
            if name in missing:
                return _remote_tensors(model, files.commit, name, files.weights[name])
            return read_tensors(folder / name)

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            tensors = [each for found in pool.map(tensors_of, files.weights) for each in found]
        stored = StoredWeights.of(str(model), sum(files.weights.values()), tensors)
        return Outline(folder, stored, sum(files.weights[name] for name in missing))


def find_snapshot(folder: Path) -> Path:
    """Return the model folder in a folder `models--...` of the hub's cache; others as they are.

    Raises:
        ModelError: it holds several revisions, or none.
    """
    if (folder / CONFIG).exists() or not (folder / "snapshots").is_dir():
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / constants.DEFAULT_REVISION
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        snapshots = [path for path in snapshots if path == named] or snapshots
    if len(snapshots) != 1:
        raise ModelError(
            f"folder {str(folder)!r} holds {len(snapshots)} revisions of a model; give one of the "
            "folders in its folder snapshots"
        )
    return snapshots[0]


def _find_files(model: HubModel) -> _Files | None:
    """Return the files that are needed; None if the hub is not reached, but a copy is there."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        found = huggingface_hub.HfApi().model_info(
            model.repo, revision=model.revision, files_metadata=True
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as err:
        if _cached_config(model) is None:
            raise
        log.warning("the hub is not reached (%s); the copy of %s here is used", err, model)
        return None
    sizes = {each.rfilename: each.size or 0 for each in found.siblings or ()}
    commit = str(found.sha)
    small = [name for name in sizes if name == CONFIG or is_side_file(name)]
    if CONFIG not in sizes:
        raise ModelError(f"model {str(model)!r} has no {CONFIG}; give a transformers model")
    weights = [SINGLE]
    if SINGLE not in sizes:
        if INDEX not in sizes:
            raise no_weights(f"model {str(model)!r}", sizes)
        small.append(INDEX)
        weights = _shards(model, commit, sizes)
    for name in small:
        _check_size(model, name, sizes[name])
    return _Files(commit, tuple(small), {name: sizes[name] for name in weights})


def _shards(model: HubModel, commit: str, sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the weight files that the index names."""
    _check_size(model, INDEX, sizes[INDEX])
    folder = _fetch(model, commit, (INDEX,))
    names = shard_names(folder / INDEX)
    for name in names:
        if name not in sizes:
            raise ModelError(
                f"model {str(model)!r} is incomplete at Hugging Face: {INDEX} names {name!r}, "
                "which is not there; give another revision"
            )
    return names


def _check_size(model: HubModel, name: str, size_bytes: int) -> None:
    limit = {CONFIG: CONFIG_BYTES, INDEX: INDEX_BYTES}.get(name, SIDE_FILE_BYTES)
    if size_bytes > limit:
        raise ModelError(
            f"{name!r} of model {str(model)!r} is larger than {limit} bytes, more than such a file "
            "needs"
        )


def _fetch(model: HubModel, commit: str, names: tuple[str, ...]) -> Path:
    """Download files into the hub's cache unless they are there; return the model's folder."""
    with system_errors(Path(constants.HF_HUB_CACHE)):
        folder = huggingface_hub.snapshot_download(
            model.repo,
            revision=model.revision,
            allow_patterns=[glob.escape(name) for name in names],
        )
    if Path(folder).name != commit:
        raise ModelError(
            f"model {str(model)!r} was changed while it was downloaded; run the same command again"
        )
    return Path(folder)


def _cached_config(model: HubModel) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(model.repo, CONFIG, revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def _cached(model: HubModel) -> Path:
    """Return the folder of a model in the hub's cache."""
    found = _cached_config(model)
    if found is None:
        raise ModelError(
            f"model {str(model)!r}: no such folder or file, it is not in the cache of Hugging "
            "Face, and HF_HUB_OFFLINE is set; unset it, or download the model first"
        )
    return found.parent


def _remote_tensors(model: HubModel, commit: str, name: str, size_bytes: int) -> list[StoredTensor]:
    """Return the tensors of a weight file of the hub; only its header is downloaded."""
    head = _first_bytes(model, commit, name, _LENGTH_BYTES)
    header_bytes = _LENGTH_BYTES + int.from_bytes(head, "little")
    if header_bytes <= min(size_bytes, _LENGTH_BYTES + MAX_HEADER_BYTES):
        head = _first_bytes(model, commit, name, header_bytes)
    return parse_tensors(f"{model}/{name}", io.BytesIO(head), size_bytes)


def _first_bytes(model: HubModel, commit: str, name: str, count: int) -> bytes:
    """Return the first bytes of a file, and no more, also of a server that ignores ranges."""
    url = huggingface_hub.hf_hub_url(model.repo, name, revision=commit)
    headers = {"range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    token = huggingface_hub.get_token()
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    client = huggingface_hub.get_session()
    with client.stream("GET", url, headers=headers, follow_redirects=True) as response:
        response.raise_for_status()
        found = bytearray()
        for part in response.iter_bytes(_PART_BYTES):
            found += part
            if len(found) >= count:
                break
        return bytes(found[:count])


@contextmanager
def _hub_errors(model: HubModel) -> Iterator[None]:
    """Turn whatever goes wrong between this machine and the hub into one `ModelError`.

    A full disk stays an `OSError`.
    """
    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as err:
        raise ModelError(
            f"model {str(model)!r} is gated at Hugging Face; ask for access there, and set HF_TOKEN"
        ) from err
    except RepositoryNotFoundError as err:
        raise ModelError(
            f"model {str(model)!r}: no such folder or file, and no such model at Hugging Face; if "
            "it is private, set HF_TOKEN"
        ) from err
    except RevisionNotFoundError as err:
        raise ModelError(
            f"model {model.repo!r} has no revision {model.revision!r} at Hugging Face; give a "
            "branch, a tag or a commit"
        ) from err
    except Exception as err:
        if isinstance(err, OSError) and err.errno in _FULL:
            raise
        lines = str(err).strip().splitlines() or [type(err).__name__]
        reason = lines[0][:_REASON_CHARACTERS]
        raise ModelError(
            f"model {str(model)!r}: no such folder or file, and not to be had from Hugging Face: "
            f"{reason}"
        ) from err
