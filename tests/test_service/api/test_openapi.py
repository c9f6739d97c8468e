"""The API keeps to its own OpenAPI document, whatever is sent to it.

No fault of the service, every error a problem.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.testclient import TestClient

from service.api.app import create_app
from service.records.job import Status
from service.records.submission import Submission
from tests.support.paths import ROOT
from tests.support.served import SMALL_JOB, Served, backend_in
from tests.support.synthetic_profiles import make_profile

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
)
EXAMPLES = (
    ("sqlite", 4),
    pytest.param(("sqlite", 40), marks=pytest.mark.long),
    pytest.param(("postgresql", 15), marks=pytest.mark.long),
)
"""Kind of database, and how many requests of each operation are made."""


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda case: f"{case[0]}-{case[1]}")
def known(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """An application with one of each thing, and ids by the names of their parameters."""
    folder = tmp_path_factory.mktemp("fuzzed")
    kind, examples = request.param
    settings = (
        {}
        if kind == "sqlite"
        else {"database_url": request.getfixturevalue("postgres").fresh("fuzzed")}
    )
    backend = backend_in(folder, active_jobs=200, webhook_targets=("192.0.2.0/24",), **settings)
    digest, _ = backend.profiles.add(*make_profile(4).dumps())
    backend.profile_owners.add("local", digest)
    job, _ = backend.job_service.submit(
        Submission("local", {"model": "model", "budget": "4bpw"}, profile=digest)
    )
    backend.jobs.start_stage(job.id, 1, "deliver", "w")
    backend.artifacts.put(f"jobs/{job.id}", {"plan.json": b"{}"})
    backend.jobs.end(job.id, 1, Status.SUCCEEDED, result={})
    app = create_app(backend)
    webhook = backend.webhooks.add("local", "https://192.0.2.1/x", ["job.failed"])
    ids = {"job_id": job.id, "digest": digest, "name": "plan.json", "webhook_id": webhook.id}
    return {"app": app, "examples": examples, **ids}


STORED = json.loads((ROOT / "service" / "api" / "openapi.json").read_text())
OPERATIONS = [
    (method, path) for path, operations in STORED["paths"].items() for method in operations
]


@pytest.fixture(scope="module")
def schema(known: dict[str, Any]) -> Any:
    return schemathesis.openapi.from_asgi(
        "/openapi.json", known["app"], headers={"Host": "localhost"}
    )


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=str)
def test_whatever_is_sent_is_answered_as_documented(
    method: str, path: str, schema: Any, known: dict[str, Any]
) -> None:
    @given(schema[path][method].as_strategy(), st.sampled_from(["as it is", "known", "known"]))
    @settings(
        max_examples=known["examples"],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any, ids: str) -> None:
        if ids == "known" and method != "delete":  # what is there is to stay for the other cases
            case.path_parameters = {
                name: known.get(name, value) for name, value in (case.path_parameters or {}).items()
            }
        response = case.call(headers={"Host": "localhost"})
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            assert response.headers["content-type"][0] == "application/problem+json", response.text
            problem = response.json()
            assert problem["status"] == response.status_code
            assert problem["type"].startswith("urn:bitwright:problem:")

    check()


@pytest.mark.parametrize(("method", "path"), [row for row in OPERATIONS if "{" in row[1]], ids=str)
@pytest.mark.parametrize(
    "odd", ["%00", "job_%00", "%ff", "..", "%2e%2e%2f", "x" * 3000, "%F0%9F%98%80", "';--"]
)
def test_odd_ids_name_nothing(method: str, path: str, odd: str, known: dict[str, Any]) -> None:
    client = TestClient(known["app"], base_url="http://localhost", raise_server_exceptions=False)
    answer = client.request(
        method,
        re.sub(r"\{\w+\}", odd, path),
        json={"questions": [{"budget": "4bpw"}], "plan": {}, "budget": "3bpw"},
    )
    assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model": ' * 5000,
        b'{"model": "m", "budget": "3bpw", "seed": ' + b"9" * 20_000 + b"}",
        b"\xff\xfe",
        b"null",
        b'{"model": "\\ud800", "budget": "3bpw"}',
        b'{"model": "m\\u0000", "budget": "3bpw"}',
        b'{"model": "m", "budget": NaN}',
        b'{"model": "m", "budget": "3bpw", "labels": {"a": "\\u0000"}}',
        b'{"model": "m", "budget": "3bpw", "name": "\\u0000"}',
        b'{"model": "m", "budget": "3bpw", "constraints": {"rules": ["\\u0000=int4g128"]}}',
    ],
    ids=lambda body: str(body[:40]),
)
def test_odd_bodies_are_refused(body: bytes, known: dict[str, Any]) -> None:
    client = TestClient(known["app"], base_url="http://localhost", raise_server_exceptions=False)
    answer = client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_generated_client_does_a_real_clients_work(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(
        "post_hooks: []\npackage_name_override: bitwright_client\n"
    )
    document = ROOT / "service" / "api" / "openapi.json"
    command = [
        sys.executable,
        "-m",
        "openapi_python_client",
        "generate",
        "--path",
        document,
        "--meta",
        "none",
    ]
    where = [
        "--output-path",
        tmp_path / "bitwright_client",
        "--config",
        tmp_path / "config.yaml",
        "--fail-on-warning",
    ]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    from bitwright_client import Client  # type: ignore[import-not-found]
    from bitwright_client.api.jobs import (  # type: ignore[import-not-found]
        cancel_job,
        get_job,
        list_events,
        list_jobs,
        submit_job,
    )
    from bitwright_client.models import JobIn  # type: ignore[import-not-found]

    with Client(base_url=server.url) as client:
        wanted = JobIn.from_dict(
            {**SMALL_JOB, "model": "llama", "budget": "4bpw", "labels": {"made": "generated"}}
        )
        job = submit_job.sync(client=client, body=wanted, idempotency_key="generated")
        assert job.status == "queued"
        assert submit_job.sync(client=client, body=wanted, idempotency_key="generated").id == job.id
        assert cancel_job.sync(job.id, client=client).status in ("cancelled", "cancelling")
        server.wait(job.id)
        assert get_job.sync(job.id, client=client).status == "cancelled"
        assert [
            found.id for found in list_jobs.sync(client=client, label="made:generated").data
        ] == [job.id]
        assert list_events.sync(job.id, client=client).data[0].type_ == "job.queued"
        refused = submit_job.sync(
            client=client, body=JobIn.from_dict({"model": "llama", "budget": "nonsense"})
        )
        assert refused.to_dict()["type"] == "urn:bitwright:problem:budget-error"
