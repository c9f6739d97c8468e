"""Removes a job with all that belongs to it."""

import sqlalchemy as sa

from service.records.engine import EngineClient, workflow_id
from service.records.job import ACTIVE, Job
from service.records.tables import jobs
from service.request.stage_names import request_place, result_place
from service.storage.artifact_store import ArtifactStore


def remove_job(
    database: sa.Engine, client: EngineClient, artifacts: ArtifactStore, job: Job
) -> bool:
    """Remove a job that has ended, with its events, log, artifacts and workflows; profiles stay.

    Return False if it has not ended, or does not exist any more. Its row is removed last, so an
    interrupted removal can be repeated.
    """
    over = jobs.c.id == job.id, jobs.c.status.not_in(ACTIVE)
    with database.connect() as connection:
        if connection.execute(sa.select(jobs.c.id).where(*over)).one_or_none() is None:
            return False
    artifacts.delete(result_place(job.id))
    artifacts.delete(request_place(job.id))
    client.delete([workflow_id(job.id, attempt) for attempt in range(1, job.attempt + 1)])
    with database.begin() as connection:
        return bool(connection.execute(sa.delete(jobs).where(*over)).rowcount)
