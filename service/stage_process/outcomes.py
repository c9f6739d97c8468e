"""The outcome of a stage: the few figures that go on record, and the results that are stored."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.report.deliver import deliver
from service.report.document import Report
from service.report.summary import headline
from service.request.stage_names import result_place
from service.stage_process.job_request import as_called
from service.storage.artifact_store import ArtifactStore
from service.storage.profile_store import ProfileStore

if TYPE_CHECKING:
    from service.stages.run_state import RunState


def outcome_of(artifacts: ArtifactStore, state: "RunState") -> dict[str, Any]:
    """Return the figures of a stage that ended. A profile is stored where what-ifs find it."""
    if state.stage == "profile":
        digest, _ = ProfileStore(artifacts).add(*state.profile.dumps())
        return {
            "profile": digest,
            "signal": state.profile.signal,
            "layers": len(state.profile.layers),
        }
    if state.stage == "plan" and state.plans is not None:
        solved = state.plans.allocations["plan"]
        return {
            "budget_bytes": solved.budget_bytes,
            "plan_bytes": solved.plan.weight_bytes,
            "bits_per_weight": solved.plan.bits_per_weight,
            "predicted_kl_nats_per_token": solved.predicted_loss,
            "gap": solved.gap,
        }
    if state.stage == "quantize":
        return {"candidates": sorted(state.checkpoints)}
    if state.stage == "tune" and state.delivery is not None:
        return {"trained": state.delivery.is_trained}
    if state.report is None:
        raise RuntimeError(f"stage {state.stage!r} made no report")
    return {"delivered": state.report.delivered}


def store_results(
    artifacts: ArtifactStore, job: str, cache: Path, state: "RunState", names: Mapping[str, str]
) -> dict[str, Any]:
    """Store the checkpoint and its report, and return the figures that people look at first.

    Args:
        artifacts: where they are stored.
        job: id of the job.
        cache: folder on the disk of finished stages, for files on their way.
        state: the results of the last stage.
        names: what the job calls each path of this machine.
    """
    if state.report is None or state.delivery is None:
        raise RuntimeError(f"stage {state.stage!r} made no report")
    report = Report.from_json(as_called(state.report.to_json(), names))
    with tempfile.TemporaryDirectory(dir=cache, prefix="deliver-") as folder:
        out = Path(folder) / "out"
        deliver(out, state.delivery.checkpoint, state.delivery.source, report)
        paths = (path for path in sorted(out.rglob("*")) if path.is_file())
        stored = artifacts.put(
            result_place(job), {str(path.relative_to(out)): path for path in paths}
        )
    return {
        "result": headline(report),
        "delivered": report.delivered,
        "stored_bytes": sum(artifact.size_bytes for artifact in stored),
    }
