"""The options of a job, with its names of models and texts confined to what this machine opens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import RequestError
from service.request.confine import confine_model, confine_text
from service.request.options import RunOptions
from service.request.request import RunRequest
from service.request.stage_names import REQUEST, request_place
from service.storage.artifact_store import ArtifactStore
from service.validation import sentences


@dataclass(frozen=True, slots=True)
class Confinement:
    """Which models and texts a job may use.

    Attributes:
        folders: folders whose models and texts may be used.
        hub: whether models and texts of the Hugging Face hub may be used.
        names: what the job calls each path of this machine; it grows as names are confined.
    """

    folders: tuple[Path, ...]
    hub: bool
    names: dict[str, str]

    def model(self, named: str) -> str:
        """Return the path or hub id of a model.

        Raises:
            PathRefused: the job may not use it.
        """
        return self._confined(confine_model, named)

    def text(self, named: str) -> str:
        """Return the path or hub id of a text, or the name of a built-in one.

        Raises:
            PathRefused: the job may not use it.
        """
        return self._confined(confine_text, named)

    def _confined(self, confine: Callable[..., str], named: str) -> str:
        path = confine(named, self.folders, hub=self.hub)
        self.names[path] = named
        return path


def read_request(artifacts: ArtifactStore, job: str, confinement: Confinement) -> RunRequest:
    """Return the options that were stored when a job was submitted, as a request.

    Raises:
        RequestError: they are not what was stored at submission.
        PathRefused: the job may not use a model or text that it names.
    """
    try:
        options = RunOptions.model_validate_json(artifacts.read(request_place(job), REQUEST))
    except ValidationError as error:
        raise RequestError(
            f"the options of job {job} are not understood by this version: {sentences(error)}"
        ) from error
    return options.to_request(confinement.model, confinement.text)


def as_called(document: Any, names: Mapping[str, str]) -> Any:
    """Return a document with paths of this machine replaced by what the job calls them.

    So clients do not learn where the operator keeps files.
    """
    if isinstance(document, str):
        for path, named in names.items():
            document = document.replace(path, named)
        return document
    if isinstance(document, Mapping):
        return {key: as_called(value, names) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [as_called(value, names) for value in document]
    return document
