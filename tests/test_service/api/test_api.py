"""The API answers what the command line answers, over HTTP.

Profiles as resources, what-ifs at once, errors as problems.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from allocator.answers.whatif import WhatIf
from allocator.demands.constraints import Constraints
from quantizer.plans.plan import Plan
from service.api import app as application
from service.api.app import create_app
from service.storage.artifact_store import ArtifactStore
from service.storage.profile_store import ProfileStore
from tests.support.commands import bitwright
from tests.support.served import Served, backend_in
from tests.support.stored_profiles import FOLDER, stored_profile
from tests.support.synthetic_profiles import budget_at, make_profile
from tests.support.write_openapi import STORED

NAME = "smollm2-135m-integral"
FILES = {"head": FOLDER / f"{NAME}.json", "arrays": FOLDER / f"{NAME}.npz"}


def upload(client: TestClient | httpx2.Client, head: bytes, arrays: bytes) -> Any:
    return client.post(
        "/v1/profiles", files={"head": ("profile.json", head), "arrays": ("profile.npz", arrays)}
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return TestClient(
        create_app(backend_in(tmp_path_factory.mktemp("data"))),
        base_url="http://localhost",
        raise_server_exceptions=False,
    )


@pytest.fixture(scope="module")
def digest(client: TestClient) -> str:
    answer = upload(client, *(path.read_bytes() for path in FILES.values()))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["digest"])


def ask(client: TestClient, digest: str, *questions: dict[str, Any], **body: Any) -> Any:
    return client.post(
        f"/v1/profiles/{digest}/allocations", json={"questions": list(questions), **body}
    )


def test_a_profile_is_imported_once_and_described(client: TestClient, digest: str) -> None:
    again = upload(client, *(path.read_bytes() for path in FILES.values()))
    assert again.status_code == 200
    assert again.headers["location"] == f"/v1/profiles/{digest}"
    profile, found = stored_profile(NAME), client.get(f"/v1/profiles/{digest}").json()
    assert found == again.json()
    assert (found["layers"], found["signal"], found["coupling_rank"]) == (210, "integral", 0)
    assert found["fidelities"] == [fidelity.name for fidelity in profile.fidelities]
    assert tuple(found["trusted_bytes"]) == profile.budget_range
    assert client.get("/v1/profiles").json()["data"] == [digest]


def test_a_profile_never_changes_and_says_so(client: TestClient, digest: str) -> None:
    first = client.get(f"/v1/profiles/{digest}")
    assert "immutable" in first.headers["cache-control"]
    again = client.get(f"/v1/profiles/{digest}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_profile_is_exported_as_it_was_imported_in_parts_too(
    client: TestClient, digest: str
) -> None:
    for name, path in zip(("profile.json", "profile.npz"), FILES.values(), strict=True):
        assert client.get(f"/v1/profiles/{digest}/{name}").content == path.read_bytes()
    part = client.get(f"/v1/profiles/{digest}/profile.npz", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, FILES["arrays"].read_bytes()[10:20])


def test_a_what_if_is_what_the_allocator_says(client: TestClient, digest: str) -> None:
    answer = ask(
        client,
        digest,
        {"budget": "2.5bpw"},
        {"budget": "34MB"},
        {"max_kl": 0.6},
        include_plans=True,
    )
    assert answer.status_code == 200
    whatif = WhatIf(stored_profile(NAME))
    first, second, third = (row["allocation"] for row in answer.json()["data"])
    expected = whatif.plan(34_000_000)
    assert second["predicted_loss_nats_per_token"] == expected.predicted_loss
    assert (second["weight_bytes"], second["budget_bytes"]) == (expected.weight_bytes, 34_000_000)
    assert second["bound_nats_per_token"] == expected.bound
    assert first["weight_bytes"] <= first["budget_bytes"] == 33_177_600
    assert Plan.from_json(second["plan"]) == expected.plan
    assert third["predicted_loss_nats_per_token"] <= 0.6
    assert third["bound_bytes"] <= third["weight_bytes"]
    assert "solve;dur=" in answer.headers["server-timing"]


def test_plans_are_sent_only_where_they_are_asked_for(client: TestClient, digest: str) -> None:
    assert "plan" not in ask(client, digest, {"budget": "34MB"}).json()["data"][0]["allocation"]


def test_constraints_mean_what_they_mean_on_the_command_line(
    client: TestClient, digest: str
) -> None:
    constraints = {
        "target": "vllm",
        "rules": ["*.down_proj>=3"],
        "pools": ["a:model.layers.[0-9].*=12MB"],
        "max_distinct": 4,
    }
    answer = ask(client, digest, {"budget": "36MB"}, constraints=constraints, include_plans=True)
    plan = Plan.from_json(answer.json()["data"][0]["allocation"]["plan"])
    assert len(set(plan.fidelities)) <= 4
    assert all(
        fidelity.bits_lo >= 3
        for name, fidelity in plan.by_name.items()
        if name.endswith("down_proj")
    )
    assert len({plan.by_name[f"model.layers.3.self_attn.{name}_proj"] for name in "qkv"}) == 1
    (limit,) = answer.json()["data"][0]["allocation"]["limits"]
    assert limit["name"] == "a"
    assert limit["used"] <= 12e6


def test_a_budget_that_cannot_be_met_says_what_binds_and_what_can(
    client: TestClient, digest: str
) -> None:
    answer = ask(client, digest, {"budget": "1bpw"}, constraints={"rules": ["*.down_proj>=3"]})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == "urn:bitwright:problem:budget-infeasible"
    assert "*.down_proj>=3" in problem["binding"]
    nearest = ask(
        client,
        digest,
        {"budget": f"{problem['nearest_bytes']}B"},
        constraints={"rules": ["*.down_proj>=3"]},
    )
    assert nearest.status_code == 200


def test_one_question_without_a_plan_does_not_spoil_the_others(
    client: TestClient, digest: str
) -> None:
    answer = ask(client, digest, {"budget": "1bpw"}, {"budget": "34MB"}, {"max_kl": 1e-9})
    assert answer.status_code == 200
    kinds = [next(iter(row)) for row in answer.json()["data"]]
    assert kinds == ["problem", "allocation", "problem"]
    assert answer.json()["data"][2]["problem"]["type"].endswith("loss-unreachable")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"questions": []}, 422),
        ({"questions": [{}]}, 422),
        ({"questions": [{"budget": "2.5bpw", "max_kl": 0.5}]}, 422),
        ({"questions": [{"budget": "much"}]}, 400),
        ({"questions": [{"budget": "2.5bpw"}], "constraints": {"rules": ["nonsense"]}}, 400),
        ({"questions": [{"budget": "2.5bpw"}], "constraints": {"target": "toaster"}}, 422),
        (
            {
                "questions": [{"budget": "2.5bpw"}],
                "constraints": {"rules": ["*.nothing=int4g64s6"]},
            },
            400,
        ),
        ({"questions": [{"budget": "2.5bpw"}], "unknown": 1}, 422),
        ({"questions": [{"max_kl": "Infinity"}]}, 422),
        ({"questions": [{"budget": "2.5bpw"}], "coupling": "sideways"}, 422),
    ],
)
def test_bad_input_is_a_problem_that_does_not_repeat_it(
    client: TestClient, digest: str, body: dict[str, Any], status: int
) -> None:
    answer = client.post(f"/v1/profiles/{digest}/allocations", json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json()) >= {"type", "title", "status", "detail"}
    assert answer.json()["status"] == status
    assert '"input"' not in answer.text


def test_what_is_not_there_is_a_problem_of_404(client: TestClient) -> None:
    for path in (
        "/v1/profiles/" + "0" * 64,
        "/v1/profiles/..%2F..%2Fetc",
        "/v1/nothing",
        "/v1/profiles/" + "0" * 64 + "/profile.npz",
    ):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{", "application/json", "the body is not JSON: Expecting property name"),
        (b'{"model": }', "application/json", "the body is not JSON: Expecting value, at character"),
        (b"", "application/json", "the body is missing; send a JSON object"),
        (b"[]", "application/json", "give an object, not [...]"),
        (b"null", "application/json", "give an object, not null"),
        (
            b'{"model": "m", "budget": "3bpw"}',
            "application/x-www-form-urlencoded",
            "the body is not declared to be JSON; send the header content-type: application/json",
        ),
    ],
)
def test_a_body_that_is_no_json_object_is_told_what_to_send(
    client: TestClient, body: bytes, kind: str, message: str
) -> None:
    answer = client.post("/v1/jobs", content=body, headers={"content-type": kind})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)
    assert [each["message"] for each in answer.json()["errors"]] == [answer.json()["detail"]]


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/v1/jobs?limit=many", "limit: give a whole number"),
        ("GET", "/v1/jobs?limit=0", "limit: give at least 1"),
        ("GET", "/v1/jobs?limit=101", "limit: give at most 100"),
        ("GET", "/v1/jobs/job_1?wait=long", "wait: give a number"),
        ("POST", "/v1/jobs?dry_run=maybe", "dry_run: give true or false"),
        ("GET", "/v1/nothing", "GET /v1/nothing: not found; /docs lists what there is"),
        ("DELETE", "/v1/jobs", "DELETE /v1/jobs: method not allowed; /docs lists what there is"),
    ],
)
def test_a_wrong_address_is_told_what_to_ask(
    client: TestClient, method: str, path: str, message: str
) -> None:
    body = {"model": "demo/model", "budget": "3bpw"} if method == "POST" else None
    assert client.request(method, path, json=body).json()["detail"] == message


@pytest.mark.parametrize("name", ["other.txt", "..%2Fprofile.json", "%2E%2E"])
def test_only_the_two_files_of_a_profile_are_served(
    client: TestClient, digest: str, name: str
) -> None:
    assert client.get(f"/v1/profiles/{digest}/{name}").status_code == 404


def test_a_damaged_profile_is_refused_and_nothing_is_kept(client: TestClient, digest: str) -> None:
    head, arrays = (path.read_bytes() for path in FILES.values())
    for bad in ((b"{}", arrays), (head, arrays[:-100]), (head[:-10], arrays), (arrays, head)):
        answer = upload(client, *bad)
        assert (answer.status_code, answer.json()["type"]) == (
            400,
            "urn:bitwright:problem:profile-error",
        )
    assert client.get("/v1/profiles").json()["data"] == [digest]


def test_frontier_check_and_diff_are_those_of_the_command_line(
    client: TestClient, digest: str
) -> None:
    found = client.post(f"/v1/profiles/{digest}/frontier", json={"points": 12}).json()
    losses = [row["predicted_kl_nats_per_token"] for row in found["points"]]
    assert len(losses) == 12
    assert losses == sorted(losses, reverse=True)
    rows = ask(client, digest, {"budget": "33MB"}, {"budget": "36MB"}, include_plans=True).json()[
        "data"
    ]
    one, two = (row["allocation"]["plan"] for row in rows)
    diff = client.post(
        "/v1/plan-diffs", json={"before": one, "after": two, "profile": digest}
    ).json()
    assert diff["bytes_more"] == two["weight_bytes"] - one["weight_bytes"]
    assert diff["predicted_loss_more"] < 0
    check = {"plan": one, "budget": "32MB", "constraints": {"target": "vllm"}}
    priced = client.post(f"/v1/profiles/{digest}/plan-checks", json=check).json()
    assert priced["weight_bytes"] == one["weight_bytes"]
    assert not priced["sound"]
    assert priced["broken_ties"]
    assert priced["broken_limits"]


def test_a_deleted_profile_is_gone(client: TestClient, digest: str) -> None:
    head, arrays = make_profile(0).dumps()
    other = upload(client, head, arrays).json()["digest"]
    assert ask(client, other, {"budget": f"{budget_at(make_profile(0), 0.5)}B"}).status_code == 200
    assert client.delete(f"/v1/profiles/{other}").status_code == 204
    assert ask(client, other, {"budget": "2.5bpw"}).status_code == 404
    assert client.get("/v1/profiles").json()["data"] == [digest]


def test_pages_of_other_sites_and_other_names_are_not_served(client: TestClient) -> None:
    foreign = client.get("/v1/profiles", headers={"Origin": "https://example.com"})
    assert (foreign.status_code, foreign.json()["type"]) == (
        403,
        "urn:bitwright:problem:foreign-origin",
    )
    assert client.get("/v1/profiles", headers={"Origin": "http://localhost"}).status_code == 200
    assert client.get("/v1/profiles", headers={"Host": "example.com"}).status_code == 400


def test_bodies_are_limited_whether_or_not_they_say_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "MAX_JSON_BYTES", 1000)
    client = TestClient(create_app(backend_in(tmp_path)), base_url="http://localhost")
    said = client.post("/v1/plan-diffs", content=b"x" * 2000)
    unsaid = client.post("/v1/plan-diffs", content=(b"x" * 100 for _ in range(20)))
    for answer in (said, unsaid):
        assert (answer.status_code, answer.json()["type"]) == (
            413,
            "urn:bitwright:problem:body-too-large",
        )


def test_a_profile_store_keeps_only_so_many_what_ifs_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.storage.profile_store.MAX_WHATIFS", 2)
    store = ProfileStore(ArtifactStore(str(tmp_path)))
    digests = [store.add(*make_profile(seed).dumps())[0] for seed in range(4)]
    for each in digests:
        with store.whatif(each, "full", Constraints()) as whatif:
            assert whatif.plan(whatif.byte_range[1]).slack_bytes == 0
    assert len(store._whatifs) == 2


def test_the_server_of_the_command_line_answers_and_documents_itself(server: Served) -> None:
    digest = upload(server.client, *(path.read_bytes() for path in FILES.values())).json()["digest"]
    answer = server.client.post(
        f"/v1/profiles/{digest}/allocations", json={"questions": [{"budget": "2.5bpw"}]}
    )
    assert answer.json()["data"][0]["allocation"]["gap"] < 0.001
    page = server.client.get("/docs").text
    assert "Bitwright" in page
    assert "//" not in page.replace(server.url, "")  # nothing is fetched from elsewhere
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert server.client.get(asset).status_code == 200
    assert server.client.get("/v1/capabilities").json()["targets"][0] == "transformers"


def test_nobody_else_is_let_in_without_keys(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "example.com"):  # noqa: S104
        done = bitwright("serve", "--host", host, "--data", tmp_path)
        assert done.returncode == 2
        assert "--keys" in done.stderr


def test_the_openapi_document_in_the_repository_is_that_of_the_code(client: TestClient) -> None:
    assert client.get("/openapi.json").json() == json.loads(STORED.read_text()), (
        "run python -m tests.support.write_openapi"
    )
