"""The durable engine: DBOS, and the only module that knows it.

A job is a workflow that runs its stages one after the other. DBOS journals which stages have
finished. A workflow whose worker died is queued again and goes on with the stage that had not
finished. So a stage may start more than once, but is never repeated once its end is journaled. What
a stage does, and what a job is, is defined elsewhere (`service.worker.stage_executor`,
`service.records.job`).

Names of workflows and steps, their arguments and results, and `_VERSION` are part of the journal:
workflows of an earlier release go on only if these stay as they are.
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

JOBS = "jobs"
QUICK = "quick"
"""Queues: jobs wait for a device; quick calls do not."""

_APPLICATION = "bitwright"
_VERSION = "1"
"""Recorded with each workflow; workflows of another version are not run.

It changes when workflows change in shape.
"""

_JOB = "job"
_CALL = "call"
_UNFINISHED = (
    WorkflowStatusString.PENDING.value,
    WorkflowStatusString.ENQUEUED.value,
    WorkflowStatusString.DELAYED.value,
)
_MAX_RECOVERIES = 1_000_000
"""A workflow is run again after each crash. A person who finds it hopeless can cancel the job."""

_POLL_SECONDS = 0.5
_CALL_POLL_SECONDS = 0.1

log = logging.getLogger("bitwright.engine")


class Steps(Protocol):
    """What the engine calls to do the work of a worker."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a job, in order."""
        ...

    def stage(self, job_id: str, attempt: int, stage: str) -> Mapping[str, Any]:
        """Run one stage and return what is journaled.

        `goes_on`, a bool in it, says whether the next stage follows.
        """
        ...

    def end(self, job_id: str, attempt: int, last: Mapping[str, Any]) -> None:
        """Record the end of a job; `last` is what its last stage returned."""
        ...

    def call(self, what: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do something quick for a client that waits, and return its outcome or problem."""
        ...


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow in the journal.

    Attributes:
        id: its id.
        worker: who runs it; None while it is queued.
        is_unfinished: whether it is queued or runs.
    """

    id: str
    worker: str | None
    is_unfinished: bool

    @classmethod
    def of(cls, status: WorkflowStatus) -> "Workflow":
        """Return the workflow that DBOS describes."""
        return cls(status.workflow_id, status.executor_id, status.status in _UNFINISHED)


def workflow_id(job_id: str, attempt: int) -> str:
    """Return the id of the workflow that runs a job's attempt."""
    return f"{job_id}.{attempt}"


class EngineClient:
    """What any process can ask of the engine."""

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
        """Queue a job; see `service.records.job_service.Enqueue`."""
        options: EnqueueOptions = {
            "queue_name": JOBS,
            "workflow_name": _JOB,
            "workflow_id": workflow_id(job_id, attempt),
            "app_version": _VERSION,
            "priority": priority,
        }
        self._client.enqueue_in_transaction(connection, options, job_id, attempt, first_stage)

    def call(
        self, what: str, document: Mapping[str, Any], timeout_seconds: float
    ) -> dict[str, Any]:
        """Have a worker do something quick, and wait for its answer.

        Raises:
            Unavailable: no worker answered in time.
        """
        options: EnqueueOptions = {
            "queue_name": QUICK,
            "workflow_name": _CALL,
            "app_version": _VERSION,
            "workflow_timeout": timeout_seconds,
        }
        name = self._client.enqueue(options, what, dict(document)).get_workflow_id()
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            (status,) = self._client.list_workflows(workflow_ids=[name], load_input=False)
            if status.status == WorkflowStatusString.SUCCESS.value:
                self._client.delete_workflow(name)
                return dict(status.output or {})
            time.sleep(_CALL_POLL_SECONDS)
        self._client.cancel_workflow(name)
        raise Unavailable(
            f"no worker answered within {timeout_seconds:.0f} s; check that one runs, and try again"
        )

    def workflows(self, ids: Sequence[str]) -> dict[str, Workflow]:
        """Return those of the named workflows that are in the journal, by id."""
        if not ids:
            return {}
        found = self._client.list_workflows(
            workflow_ids=list(ids), load_input=False, load_output=False
        )
        return {status.workflow_id: Workflow.of(status) for status in found}

    def running(self) -> list[Workflow]:
        """Return the workflows that a worker runs, or ran when it died."""
        found = self._client.list_workflows(
            status=WorkflowStatusString.PENDING.value, load_input=False, load_output=False
        )
        return [Workflow.of(status) for status in found]

    def requeue(self, workflow: Workflow) -> None:
        """Queue a workflow again whose worker is dead; the caller must be sure of that."""
        (status,) = self._client.list_workflows(
            workflow_ids=[workflow.id], load_input=False, load_output=False
        )
        is_running = status.status == WorkflowStatusString.PENDING.value
        if is_running and status.executor_id == workflow.worker:
            self._client.resume_workflow(workflow.id, queue_name=status.queue_name)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete those of the named workflows that have finished."""
        finished = [
            name for name, workflow in self.workflows(ids).items() if not workflow.is_unfinished
        ]
        self._client.delete_workflows(finished)


def launch(engine: sa.Engine, worker: str, steps: Steps, slots: int) -> None:
    """Run workflows in this process, under the name `worker`, until the process ends.

    Workflows that a worker of this name ran when it died are queued again. At most `slots` jobs run
    at once. To stop, end the process; the journal makes no difference between a stop and a crash.
    """
    DBOS(
        config={
            "name": _APPLICATION,
            "system_database_url": engine.url.render_as_string(hide_password=False),
            "system_database_engine": engine,
            "executor_id": worker,
            "application_version": _VERSION,
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "WARNING",
        }
    )
    _register(steps)
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


def _register(steps: Steps) -> None:
    """Register the workflows, and what they do at each step."""

    @DBOS.step(
        name="stage",
        retries_allowed=True,
        max_attempts=5,
        backoff_rate=4.0,
        should_retry=_is_temporary,
    )
    def stage(job_id: str, attempt: int, name: str) -> dict[str, Any]:
        return dict(steps.stage(job_id, attempt, name))

    @DBOS.step(name="end")
    def end(job_id: str, attempt: int, last: dict[str, Any]) -> None:
        steps.end(job_id, attempt, last)

    @DBOS.step(name="call")
    def do_call(what: str, document: dict[str, Any]) -> dict[str, Any]:
        return dict(steps.call(what, document))

    @DBOS.workflow(name=_JOB, max_recovery_attempts=_MAX_RECOVERIES)
    def job(job_id: str, attempt: int, first_stage: str | None) -> None:
        last: dict[str, Any] = {}
        first = steps.stages.index(first_stage or steps.stages[0])
        for name in steps.stages[first:]:
            try:
                last = stage(job_id, attempt, name)
            except Exception as error:  # whatever it is, the job must end
                log.exception("stage %s of job %s failed", name, job_id)
                last = {"goes_on": False, "fault": f"{type(error).__name__}: {error}"[:500]}
            if not last["goes_on"]:
                break
        end(job_id, attempt, last)

    @DBOS.workflow(name=_CALL, max_recovery_attempts=3)
    def call(what: str, document: dict[str, Any]) -> dict[str, Any]:
        return do_call(what, document)


def _is_temporary(error: BaseException) -> bool:
    return isinstance(error, Unavailable)


def bring_up_to_date(engine: sa.Engine) -> None:
    """Create or update all tables: the service's, and those of DBOS.

    Raises:
        Unavailable: the database does not answer.
    """
    try:
        migrate(engine)
        DBOS.migrate(engine.url.render_as_string(hide_password=False))
    except (InterfaceError, OperationalError) as error:
        reason = str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
        raise Unavailable(
            f"the database does not answer: {reason}; check BITWRIGHT_DATABASE_URL"
        ) from error
