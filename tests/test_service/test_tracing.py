"""Promises of service.tracing: with an endpoint, requests and stages are traced there.

Without one, nothing is.
"""

import time
from pathlib import Path

import pytest

from service.tracing import is_traced, traced
from tests.support.served import served
from tests.support.webhook_receiver import receiving


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert not is_traced()
    with traced("stage", job_id="x") as variables:
        assert variables == {}


def test_requests_and_stages_reach_a_real_collector(tmp_path: Path, models: Path) -> None:
    with receiving(lambda _: 200) as collector:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url.removesuffix("/hook"),
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        with served(tmp_path, models, variables=variables) as server:
            job = server.submit(model="nothing/here", budget="4bpw", device="cpu")
            server.wait(job["id"])
            end = time.monotonic() + 20
            wanted = {b"POST /v1/jobs", b"stage profile", job["id"].encode()}
            while time.monotonic() < end:
                received = b"".join(body for body, _ in collector.received)
                if all(each in received for each in wanted):
                    break
                time.sleep(0.2)
            assert all(each in received for each in wanted), [
                each for each in wanted if each not in received
            ]
