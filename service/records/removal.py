"""A job with all that belongs to it is removed."""

import sqlalchemy as sa

from service.records.database import jobs
from service.records.engine import Client, workflow_id
from service.records.jobs import ACTIVE, Job
from service.request.stage_names import request_place, result_place
from service.storage.artifact_store import ArtifactStore


def remove_job(engine: sa.Engine, client: Client, artifacts: ArtifactStore, job: Job) -> bool:
    """Remove a job that has ended with all that it made; profiles stay.

    Return False where it has not ended, or is gone.

    The row goes last: what is interrupted is done again.
    """
    over = jobs.c.id == job.id, jobs.c.status.not_in(ACTIVE)
    with engine.connect() as connection:
        if connection.execute(sa.select(jobs.c.id).where(*over)).one_or_none() is None:
            return False
    artifacts.delete(result_place(job.id))
    artifacts.delete(request_place(job.id))
    client.forget([workflow_id(job.id, attempt) for attempt in range(1, job.attempt + 1)])
    with engine.begin() as connection:
        return bool(connection.execute(sa.delete(jobs).where(*over)).rowcount)
