"""What a worker does for a job.

Start its stages, listen to them, and put on record how they ended.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError

from quantizer.known_error import KnownError
from service.errors import StageKilled, Unavailable
from service.failpoint import failpoint
from service.ids import new_id
from service.problems import problem_of
from service.process import stage_environment
from service.records.jobs import Job, JobStore, Status
from service.request.stage_names import DELIVER, ESTIMATE, REQUEST, STAGES, request_place
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.storage.unfinished_runs import UnfinishedRun
from service.tracing import traced
from service.worker.runner import StageCall, StageRunner, Stopped

ESTIMATE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
"""How long a worker waits for a database that is away, before the stage counts as failed."""

T = TypeVar("T")
log = logging.getLogger("bitwright.work")


@dataclass(frozen=True, slots=True)
class Work:
    """A worker's part in jobs, see `service.records.engine.Working`.

    Attributes:
        store: where jobs are on record.
        artifacts: where options and results are.
        runner: runs the commands of stages.
        settings: the worker's.
    """

    store: JobStore
    artifacts: ArtifactStore
    runner: StageRunner
    settings: ServiceSettings
    stages: tuple[str, ...] = STAGES

    def stage(self, job_id: str, attempt: int, stage: str) -> Mapping[str, Any]:
        """Do one stage; return what goes on record.

        Whether the job goes on, and what was found or went wrong.

        Raises:
            Unavailable: something outside did not answer; the stage may be tried again.
        """
        store = self.store
        job = patiently(lambda: store.begin_stage(job_id, attempt, stage, self.settings.worker))
        if job is None:
            return {"goes_on": False}
        log.info("stage begins", extra={"job_id": job_id, "stage": stage, "tenant": job.tenant})
        try:
            self._store_request(job)
            with traced(
                f"stage {stage}", job_id=job_id, attempt=attempt, tenant=job.tenant
            ) as variables:
                last = self.runner.run(
                    self._call(stage, job, variables),
                    lambda progress: patiently(lambda: store.progress(job_id, attempt, progress)),
                    lambda lines: patiently(lambda: store.write_log(job_id, stage, lines)),
                    lambda: patiently(lambda: store.is_to_stop(job_id, attempt)),
                )
        except Stopped:
            return {"goes_on": False}
        except KnownError as error:
            if isinstance(error, Unavailable):
                raise
            last = {"problem": problem_of(error)}
        if "problem" in last:
            log.warning(
                "stage failed: %s",
                last["problem"].get("detail"),
                extra={"job_id": job_id, "stage": stage},
            )
            return {"goes_on": False, "error": last["problem"]}
        failpoint(f"{stage}-unrecorded")
        patiently(lambda: store.end_stage(job_id, attempt, stage, last["outcome"]))
        log.info("stage ended", extra={"job_id": job_id, "stage": stage})
        return {"goes_on": True, **({"outcome": last["outcome"]} if stage == DELIVER else {})}

    def end(self, job_id: str, attempt: int, found: Mapping[str, Any]) -> None:
        """Put a job's end on record."""
        outcome, error = found.get("outcome"), found.get("error")
        failpoint("end-unrecorded")
        if found.get("fault"):
            error = problem_of(StageKilled(f"the stage could not be run: {found['fault']}"))
        if outcome is not None:
            stored = int(outcome["stored_bytes"])
            result = outcome["result"] | {"delivered": outcome["delivered"]}
            done = patiently(
                lambda: self.store.end(
                    job_id, attempt, Status.SUCCEEDED, result=result, stored_bytes=stored
                )
            )
        elif error is not None:
            done = patiently(lambda: self.store.end(job_id, attempt, Status.FAILED, error=error))
        else:
            done = patiently(lambda: self.store.end(job_id, attempt, Status.CANCELLED))
        UnfinishedRun(self.settings.cache, job_id).end()
        if done is not None:
            log.info("job %s", done.status, extra={"job_id": job_id, "tenant": done.tenant})

    def call(self, what: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer a client that waits: `estimate` says what a job would take."""
        if what != ESTIMATE:
            return {"problem": problem_of(StageKilled(f"this worker cannot do {what!r}"))}
        name, said = new_id("dry"), list[str]()
        try:
            self.artifacts.put(
                request_place(name), {REQUEST: json.dumps(document["request"]).encode()}
            )
            command = self.command(ESTIMATE, name, document.get("profile"))
            call = StageCall(command, stage_environment(), ESTIMATE_SECONDS)
            return self.runner.run(call, lambda _: None, said.extend, lambda: False)
        except KnownError as error:
            log.warning("estimate failed: %s", " | ".join(said)[-2000:])
            return {"problem": problem_of(error)}
        finally:
            self.artifacts.delete(request_place(name))

    def command(self, stage: str, job_id: str, profile: str | None) -> list[str]:
        """Return the command line of a stage, as any machine with the same settings could run it."""
        settings = self.settings
        command = [
            sys.executable,
            "-m",
            "service.stage_process.command",
            stage,
            "--job",
            job_id,
            "--artifacts",
            settings.artifacts,
        ]
        command += ["--cache", str(settings.cache)]
        for root in settings.models:
            command += ["--models", str(root)]
        return [
            *command,
            *(["--hub"] if settings.hub else []),
            *(["--profile", profile] if profile else []),
        ]

    def _call(self, stage: str, job: Job, variables: dict[str, str]) -> StageCall:
        command = self.command(stage, job.id, job.profile)
        return StageCall(command, stage_environment() | variables, self.settings.stage_seconds)

    def _store_request(self, job: Job) -> None:
        if not self.artifacts.exists(request_place(job.id)):
            self.artifacts.put(request_place(job.id), {REQUEST: json.dumps(job.request).encode()})


def patiently(work: Callable[[], T]) -> T:
    """Return what `work` returns, waiting for a database that is away.

    Raises:
        Unavailable: it stayed away.
    """
    end, pause = time.monotonic() + PATIENCE_SECONDS, 0.1
    while True:
        try:
            return work()
        except (InterfaceError, OperationalError) as error:
            if time.monotonic() > end:
                raise Unavailable("the database did not answer") from error
            log.warning("the database does not answer, waiting: %s", type(error).__name__)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
