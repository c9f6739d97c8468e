"""Routes of a job's results: the files it produced, one by one or as one archive."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from service.api.access import JobReader
from service.api.backend import Backend, BackendOfApp
from service.api.downloads import archive, download
from service.api.job_wire import ArtifactOut, ArtifactsOut
from service.errors import ArtifactUnknown
from service.records.job import Status
from service.request.stage_names import result_place

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


@router.get("/artifacts", operation_id="list_artifacts")
def list_artifacts(backend: BackendOfApp, caller: JobReader, job_id: str) -> ArtifactsOut:
    """List the files that a job produced, with checksums; none before it has succeeded."""
    job = backend.jobs.get(job_id, caller.tenant)
    found = backend.artifacts.list(result_place(job.id)) if job.status is Status.SUCCEEDED else ()
    base = f"/v1/jobs/{job.id}/artifacts"
    rows = [
        ArtifactOut(
            name=row.name, size_bytes=row.size_bytes, sha256=row.sha256, url=f"{base}/{row.name}"
        )
        for row in found
    ]
    return ArtifactsOut(data=rows)


@router.get("/archive", operation_id="get_archive", response_class=StreamingResponse)
def get_archive(backend: BackendOfApp, caller: JobReader, job_id: str) -> Response:
    """Return all files that a job produced as one tar archive, in a folder named by the job."""
    place = _place(backend, caller.tenant, job_id)
    return archive(backend.artifacts, place, backend.artifacts.list(place), job_id)


@router.get("/artifacts/{name:path}", operation_id="get_artifact", response_class=StreamingResponse)
def get_artifact(
    backend: BackendOfApp, caller: JobReader, job_id: str, name: str, request: Request
) -> Response:
    """Return one file that a job produced.

    Ranges are served, so a download that broke off can be resumed.
    """
    place = _place(backend, caller.tenant, job_id)
    return download(backend.artifacts, place, backend.artifacts.find(place, name), request)


def _place(backend: Backend, tenant: str, job_id: str) -> str:
    """Return where a job's results are stored.

    Raises:
        JobUnknown: the job does not exist, or is another tenant's.
        ArtifactUnknown: it has not succeeded.
    """
    job = backend.jobs.get(job_id, tenant)
    if job.status is not Status.SUCCEEDED:
        raise ArtifactUnknown(
            f"job {job_id} is {job.status}; its files are there once it has succeeded"
        )
    return result_place(job.id)
