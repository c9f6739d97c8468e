"""The durable engine: DBOS, and the only module that knows it.

A job is a workflow that runs its stages one after the other. DBOS journals which stages are
finished; a workflow whose worker died is queued again, and goes on with the stage that was not
finished. So a stage may start more than once, but is never repeated once its end is on record. What
a stage does, and what a job is, is told elsewhere (`service.worker.work`, `service.records.jobs`).
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from dbos import (
    DBOS,
    DBOSClient,
    DBOSPortableJSONSerializer,
    EnqueueOptions,
    WorkflowStatus,
    WorkflowStatusString,
)
from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import Unavailable
from service.records.database import migrate

JOBS, QUICK = "jobs", "quick"
"""Queues: jobs wait for a device; what is quick does not."""

_APPLICATION, _SCHEMA = "bitwright", "1"
"""The version that is on record with each workflow.

Workflows of another are not taken up, so it stays until they change shape.
"""

_JOB, _CALL = "job", "call"
_GOES_ON = (
    WorkflowStatusString.PENDING.value,
    WorkflowStatusString.ENQUEUED.value,
    WorkflowStatusString.DELAYED.value,
)
_NEVER_GIVE_UP = 1_000_000
"""A workflow is taken up again after each crash.

Whether that goes on too long is for a person to decide, who can cancel.
"""

_POLL_SECONDS = 0.5

log = logging.getLogger("bitwright.engine")


class Working(Protocol):
    """What the engine calls."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a job, in order."""
        ...

    def stage(self, job_id: str, attempt: int, stage: str) -> Mapping[str, Any]:
        """Do one stage and return what is to be on record.

        `{"goes_on": bool}` says whether the next stage follows.
        """
        ...

    def end(self, job_id: str, attempt: int, found: Mapping[str, Any]) -> None:
        """Put the job's end on record; `found` is what its last stage returned."""
        ...

    def call(self, what: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do something quick for a client that waits, and return its answer or problem."""
        ...


def prepare(engine: sa.Engine) -> None:
    """Bring DBOS's own tables up to date."""
    DBOS.migrate(engine.url.render_as_string(hide_password=False))


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow on record.

    Attributes:
        id: its id.
        worker: who has it; None while it waits.
        goes_on: whether it waits or runs.
    """

    id: str
    worker: str | None
    goes_on: bool


class Client:
    """What can be asked of the engine from any process."""

    def __init__(self, engine: sa.Engine) -> None:
        """Use DBOS's tables behind `engine`; nothing is asked yet."""
        self._client = DBOSClient(
            system_database_engine=engine,
            serializer=DBOSPortableJSONSerializer(),
            application_name=_APPLICATION,
            retry_connection_errors=False,
            lazy=True,
        )

    def enqueue(
        self,
        connection: sa.Connection,
        job_id: str,
        attempt: int,
        first_stage: str | None,
        priority: int,
    ) -> None:
        """Queue a job; see `service.records.submission.Enqueue`."""
        options: EnqueueOptions = {
            "queue_name": JOBS, "workflow_name": _JOB, "workflow_id": workflow_id(job_id, attempt), "app_version": _SCHEMA,
            "priority": priority,
        }  # fmt: skip
        self._client.enqueue_in_transaction(connection, options, job_id, attempt, first_stage)

    def call(
        self, what: str, document: Mapping[str, Any], timeout_seconds: float
    ) -> dict[str, Any]:
        """Have a worker do something quick, and wait for its answer.

        Raises:
            Unavailable: no worker answered in time.
        """
        options: EnqueueOptions = {
            "queue_name": QUICK, "workflow_name": _CALL, "app_version": _SCHEMA, "workflow_timeout": timeout_seconds
        }  # fmt: skip
        name = self._client.enqueue(options, what, dict(document)).get_workflow_id()
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            (found,) = self._client.list_workflows(workflow_ids=[name], load_input=False)
            if found.status == WorkflowStatusString.SUCCESS.value:
                self._client.delete_workflow(name)
                return dict(found.output or {})
            time.sleep(_POLL_SECONDS / 5)
        self._client.cancel_workflow(name)
        raise Unavailable(
            f"no worker answered within {timeout_seconds:.0f} s; see that one runs, and try again"
        )

    def workflows(self, ids: Sequence[str]) -> dict[str, Workflow]:
        """Return those of the named workflows that are on record."""
        found = (
            self._client.list_workflows(workflow_ids=list(ids), load_input=False, load_output=False)
            if ids
            else []
        )
        return {status.workflow_id: _workflow(status) for status in found}

    def held(self) -> list[Workflow]:
        """Return the workflows that a worker has."""
        pending = WorkflowStatusString.PENDING.value
        return [
            _workflow(status)
            for status in self._client.list_workflows(
                status=pending, load_input=False, load_output=False
            )
        ]

    def release(self, workflow: Workflow) -> None:
        """Queue a workflow again whose worker is gone; the caller must know that it is."""
        (found,) = self._client.list_workflows(
            workflow_ids=[workflow.id], load_input=False, load_output=False
        )
        if (
            found.executor_id == workflow.worker
            and found.status == WorkflowStatusString.PENDING.value
        ):
            self._client.resume_workflow(workflow.id, queue_name=found.queue_name)

    def forget(self, ids: Sequence[str]) -> None:
        """Take workflows off the record."""
        self._client.delete_workflows(
            [name for name, found in self.workflows(ids).items() if not found.goes_on]
        )


def workflow_id(job_id: str, attempt: int) -> str:
    """Return the id of the workflow that runs a job's attempt."""
    return f"{job_id}.{attempt}"


def _workflow(status: WorkflowStatus) -> Workflow:
    goes_on = status.status in _GOES_ON
    return Workflow(status.workflow_id, status.executor_id, goes_on)


def launch(engine: sa.Engine, worker: str, working: Working, slots: int) -> None:
    """Take up workflows in this process, under the name `worker`, until the process ends.

    Workflows that this worker had when it died are queued again. At most `slots` jobs run at once.
    To stop, end the process: to the journal it makes no difference how.
    """
    DBOS(
        config={
            "name": _APPLICATION,
            "system_database_url": engine.url.render_as_string(hide_password=False),
            "system_database_engine": engine,
            "executor_id": worker,
            "application_version": _SCHEMA,
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "WARNING",
        }
    )
    _register(working)
    DBOS.launch()
    DBOS.register_queue(
        JOBS,
        worker_concurrency=slots,
        polling_interval_sec=_POLL_SECONDS,
        on_conflict="always_update",
    )
    DBOS.register_queue(
        QUICK,
        worker_concurrency=2,
        polling_interval_sec=_POLL_SECONDS / 2,
        on_conflict="always_update",
    )


def _register(working: Working) -> None:
    """Register the workflows, and what they do at each step."""

    @DBOS.step(
        name="stage",
        retries_allowed=True,
        max_attempts=5,
        backoff_rate=4.0,
        should_retry=_is_temporary,
    )
    def stage(job_id: str, attempt: int, name: str) -> dict[str, Any]:
        return dict(working.stage(job_id, attempt, name))

    @DBOS.step(name="end")
    def end(job_id: str, attempt: int, found: dict[str, Any]) -> None:
        working.end(job_id, attempt, found)

    @DBOS.step(name="call")
    def do_call(what: str, document: dict[str, Any]) -> dict[str, Any]:
        return dict(working.call(what, document))

    @DBOS.workflow(name=_JOB, max_recovery_attempts=_NEVER_GIVE_UP)
    def job(job_id: str, attempt: int, first_stage: str | None) -> None:
        found: dict[str, Any] = {}
        for name in working.stages[working.stages.index(first_stage or working.stages[0]) :]:
            try:
                found = stage(job_id, attempt, name)
            except Exception as error:  # whatever it is, the job must end
                log.exception("stage %s of job %s failed", name, job_id)
                found = {"goes_on": False, "fault": f"{type(error).__name__}: {error}"[:500]}
            if not found["goes_on"]:
                break
        end(job_id, attempt, found)

    @DBOS.workflow(name=_CALL, max_recovery_attempts=3)
    def call(what: str, document: dict[str, Any]) -> dict[str, Any]:
        return do_call(what, document)


def _is_temporary(error: BaseException) -> bool:
    return isinstance(error, Unavailable)


def bring_up_to_date(database: sa.Engine) -> None:
    """Make or update all tables.

    Raises:
        Unavailable: the database does not answer.
    """
    try:
        migrate(database)
        prepare(database)
    except (InterfaceError, OperationalError) as error:
        reason = str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
        raise Unavailable(
            f"the database does not answer: {reason}; see BITWRIGHT_DATABASE_URL"
        ) from error
