"""What a worker does for a job: run its stages, pass on their progress, and record how they end."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantizer.known_error import KnownError
from service.errors import StageKilled, Unavailable
from service.failpoint import failpoint
from service.ids import new_id
from service.problems import problem_of
from service.process import stage_environment
from service.records.job import Job, Status
from service.records.job_store import JobStore
from service.request.stage_names import DELIVER, ESTIMATE, REQUEST, STAGES, request_place
from service.settings import ServiceSettings
from service.storage.artifact_store import ArtifactStore
from service.storage.unfinished_runs import UnfinishedRun
from service.tracing import traced
from service.worker.database_retry import retried
from service.worker.fork_client import COMMAND
from service.worker.stage_runner import StageCall, StageRunner, Stopped

ESTIMATE_SECONDS = 60.0

log = logging.getLogger("bitwright.stages")


@dataclass(frozen=True, slots=True)
class StageExecutor:
    """A worker's part in jobs, see `service.records.engine.Steps`.

    Attributes:
        store: where jobs are recorded.
        artifacts: where options and results are stored.
        runner: runs the commands of stages.
        settings: the worker's.
        stages: the stages of a job, in order.
    """

    store: JobStore
    artifacts: ArtifactStore
    runner: StageRunner
    settings: ServiceSettings
    stages: tuple[str, ...] = STAGES

    def stage(self, job_id: str, attempt: int, stage: str) -> Mapping[str, Any]:
        """Run one stage.

        Return what is journaled: whether the job goes on, and an error or the final outcome.

        Raises:
            Unavailable: something outside did not answer; the stage may be tried again.
        """
        worker = self.settings.worker
        job = retried(lambda: self.store.start_stage(job_id, attempt, stage, worker))
        if job is None:
            return {"goes_on": False}
        extra = {"job_id": job_id, "stage": stage, "tenant": job.tenant}
        log.info("stage started", extra=extra)
        try:
            last = self._run(job, attempt, stage)
        except Stopped:
            return {"goes_on": False}
        except Unavailable:
            raise
        except KnownError as error:
            last = {"problem": problem_of(error)}
        if "problem" in last:
            problem = last["problem"]
            log.warning("stage failed: %s", problem.get("detail"), extra=extra)
            return {"goes_on": False, "error": problem}
        failpoint(f"{stage}-unrecorded")
        outcome = last["outcome"]
        retried(lambda: self.store.end_stage(job_id, attempt, stage, outcome))
        log.info("stage finished", extra=extra)
        return {"goes_on": True, "outcome": outcome} if stage == DELIVER else {"goes_on": True}

    def _run(self, job: Job, attempt: int, stage: str) -> dict[str, Any]:
        """Run the command of a stage and return its last document."""
        self._store_request(job)
        store = self.store
        with traced(
            f"stage {stage}", job_id=job.id, attempt=attempt, tenant=job.tenant
        ) as variables:
            command = self.command(stage, job.id, job.profile)
            call = StageCall(command, stage_environment() | variables, self.settings.stage_seconds)
            return self.runner.run(
                call,
                lambda progress: retried(lambda: store.progress(job.id, attempt, progress)),
                lambda lines: retried(lambda: store.write_log(job.id, stage, lines)),
                lambda: retried(lambda: store.must_stop(job.id, attempt)),
            )

    def end(self, job_id: str, attempt: int, last: Mapping[str, Any]) -> None:
        """Record the end of a job from what its last stage returned."""
        store = self.store
        outcome = last.get("outcome")
        error = last.get("error")
        failpoint("end-unrecorded")
        if last.get("fault"):
            error = problem_of(StageKilled(f"the stage could not be run: {last['fault']}"))
        if outcome is not None:
            stored = int(outcome["stored_bytes"])
            result = outcome["result"] | {"delivered": outcome["delivered"]}
            succeeded = Status.SUCCEEDED
            job = retried(
                lambda: store.end(job_id, attempt, succeeded, result=result, stored_bytes=stored)
            )
        elif error is not None:
            job = retried(lambda: store.end(job_id, attempt, Status.FAILED, error=error))
        else:
            job = retried(lambda: store.end(job_id, attempt, Status.CANCELLED))
        UnfinishedRun(self.settings.cache, job_id).end()
        if job is not None:
            log.info("job %s", job.status, extra={"job_id": job_id, "tenant": job.tenant})

    def call(self, what: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer a client that waits: `estimate` returns what a job would take."""
        if what != ESTIMATE:
            return {"problem": problem_of(StageKilled(f"this worker cannot do {what!r}"))}
        name = new_id("dry")
        messages: list[str] = []
        try:
            request = json.dumps(document["request"]).encode()
            self.artifacts.put(request_place(name), {REQUEST: request})
            command = self.command(ESTIMATE, name, document.get("profile"))
            call = StageCall(command, stage_environment(), ESTIMATE_SECONDS)
            return self.runner.run(call, lambda _: None, messages.extend, lambda: False)
        except KnownError as error:
            log.warning("estimate failed: %s", " | ".join(messages)[-2000:])
            return {"problem": problem_of(error)}
        finally:
            self.artifacts.delete(request_place(name))

    def command(self, stage: str, job_id: str, profile: str | None) -> list[str]:
        """Return the command of a stage, which any machine with the same settings could run."""
        settings = self.settings
        command = [*COMMAND, stage, "--job", job_id]
        command += ["--artifacts", settings.artifacts, "--cache", str(settings.cache)]
        for root in settings.models:
            command += ["--models", str(root)]
        if settings.hub:
            command += ["--hub"]
        if profile:
            command += ["--profile", profile]
        return command

    def _store_request(self, job: Job) -> None:
        place = request_place(job.id)
        if not self.artifacts.exists(place):
            self.artifacts.put(place, {REQUEST: json.dumps(job.request).encode()})
