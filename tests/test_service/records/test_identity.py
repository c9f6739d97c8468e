"""Who may do what.

Every route without a key, with a key that lacks the scope, and with another tenant's key; tokens
of a provider.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.testclient import TestClient

from service.api.app import create_app
from service.api.backend import Backend
from service.errors import RequestError
from service.records.identity import SCOPES
from service.records.job import Status
from service.records.oidc_tokens import OidcTokens
from service.records.submission import Submission
from tests.support.commands import bitwright, bitwright_json
from tests.support.served import SMALL_JOB, backend_in, served
from tests.support.synthetic_profiles import make_profile

OPEN = {"/healthz", "/readyz", "/v1/capabilities"}
"""Routes that tell nothing of anybody."""


@dataclass
class World:
    """A service with keys, and something of everything that belongs to the tenant `me`."""

    backend: Backend
    client: TestClient
    mine: dict[str, str]
    theirs: dict[str, str]
    ids: dict[str, str]

    def call(self, method: str, path: str, headers: dict[str, str]) -> Any:
        """Call a route with my ids in its path, and a body that it would take."""
        url = re.sub(r"\{(\w+)(:path)?\}", lambda match: self.ids[match[1]], path)
        return self.client.request(method, url, headers=headers, **self.body(method, path))

    def body(self, method: str, path: str) -> dict[str, Any]:
        if method in ("GET", "DELETE"):
            return {}
        if path == "/v1/profiles":
            head, arrays = make_profile(5).dumps()
            return {"files": {"head": ("profile.json", head), "arrays": ("profile.npz", arrays)}}
        bodies: dict[str, Any] = {
            "/v1/jobs": {**SMALL_JOB, "model": "model", "budget": "4bpw"},
            "/v1/jobs/{job_id}/fork": {"budget": "3bpw"},
            "/v1/profiles/{digest}/allocations": {"questions": [{"budget": "4bpw"}]},
            "/v1/profiles/{digest}/plan-checks": {"plan": {}},
            "/v1/plan-diffs": {"before": {}, "after": {}, "profile": self.ids["digest"]},
            "/v1/webhooks": {"url": "https://192.0.2.1/x"},
        }
        return {"json": bodies.get(path, {})}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "model").mkdir()
    backend = backend_in(folder, needs_key=True, webhook_targets=("192.0.2.0/24",))
    client = TestClient(
        create_app(backend), base_url="http://localhost", raise_server_exceptions=False
    )
    _, mine = backend.api_keys.create("me", "all", list(SCOPES))
    _, theirs = backend.api_keys.create("they", "all", list(SCOPES))
    digest, _ = backend.profiles.add(*make_profile(4).dumps())
    backend.profile_owners.add("me", digest)
    job, _ = backend.job_service.submit(
        Submission("me", {"model": "model", "budget": "4bpw"}, profile=digest)
    )
    backend.jobs.start_stage(job.id, 1, "deliver", "w")
    backend.artifacts.put(f"jobs/{job.id}", {"plan.json": b"{}"})
    backend.jobs.end(job.id, 1, Status.SUCCEEDED, result={})
    webhook = backend.webhooks.add("me", "https://192.0.2.1/x", ["job.succeeded"])
    ids = {"job_id": job.id, "digest": digest, "name": "profile.json", "webhook_id": webhook.id}
    return World(backend, client, bearer(mine), bearer(theirs), ids)


def routes() -> list[tuple[str, str, str]]:
    """Return every route of the service: method, path, scope."""
    paths = create_app(_Nobody()).openapi()["paths"]  # type: ignore[arg-type]
    return [
        (
            method.upper(),
            path,
            operation["security"][0]["HTTPBearer"][0] if "security" in operation else "",
        )
        for path, operations in paths.items()
        for method, operation in operations.items()
    ]


class _Nobody:
    """Enough of a backend to ask an application for its routes."""

    needs_key = True
    metrics = None


ROUTES = routes()


def test_every_route_but_those_that_tell_nothing_needs_a_scope() -> None:
    assert len(ROUTES) > 25
    assert {path for _, path, scope in ROUTES if not scope} == OPEN
    assert {scope for _, _, scope in ROUTES if scope} == set(SCOPES)


@pytest.mark.parametrize(("method", "path", "scope"), [row for row in ROUTES if row[2]], ids=str)
def test_a_route_is_closed_to_those_without_key_scope_or_tenancy(
    world: World, method: str, path: str, scope: str
) -> None:
    for headers in (
        {},
        bearer("bw_" + "x" * 43),
        bearer("nonsense"),
        {"Authorization": "Basic eDp5"},
    ):
        nobody = world.call(method, path, headers)
        assert (nobody.status_code, nobody.json()["type"]) == (
            401,
            "urn:bitwright:problem:no-credentials",
        )
        assert nobody.headers["www-authenticate"] == "Bearer"
    _, others = world.backend.api_keys.create(
        "me", "others", [other for other in SCOPES if other != scope]
    )
    without = world.call(method, path, bearer(others))
    assert (without.status_code, without.json()["type"]) == (
        403,
        "urn:bitwright:problem:not-allowed",
    )
    assert scope in without.json()["detail"]
    foreign = world.call(method, path, world.theirs)
    if "{" in path or path == "/v1/plan-diffs":
        assert foreign.status_code == 404, foreign.text
        assert "there is no" in foreign.json()["detail"]
    elif method == "GET" and path != "/metrics":
        assert not any(known in foreign.text for known in world.ids.values())


def test_what_is_mine_is_open_to_me(world: World) -> None:
    for method, path, _ in ROUTES:
        if method == "GET" and path != "/readyz":
            name = "plan.json" if "artifacts" in path else "profile.json"
            world.ids["name"] = name
            answer = world.call(method, path, world.mine)
            assert answer.status_code == 200, (path, answer.text)


def test_keys_are_stored_as_hashes_expire_and_are_revoked(world: World) -> None:
    info, key = world.backend.api_keys.create("me", "short", ["jobs:read"], days=1e-9)
    time.sleep(0.01)
    assert world.client.get("/v1/jobs", headers=bearer(key)).status_code == 401
    info, key = world.backend.api_keys.create("me", "soon revoked", ["jobs:read"])
    assert world.client.get("/v1/jobs", headers=bearer(key)).status_code == 200
    world.backend.api_keys.revoke(info.id)
    assert world.client.get("/v1/jobs", headers=bearer(key)).status_code == 401
    files = list(world.backend.settings.data.glob("bitwright.sqlite*"))
    assert not any(key.removeprefix("bw_").encode() in path.read_bytes() for path in files)
    with pytest.raises(RequestError, match="scope"):
        world.backend.api_keys.create("me", "x", ["everything"])


def test_keys_are_made_listed_and_revoked_on_the_command_line(tmp_path: Path) -> None:
    made = bitwright_json("keys", "create", "me", "--scope", "jobs:read", "--data", tmp_path)
    assert made["key"].startswith("bw_")
    (listed,) = bitwright_json("keys", "list", "--data", tmp_path)
    assert (listed["id"], listed["tenant"], listed["in_use"]) == (made["id"], "me", True)
    assert made["key"] not in json.dumps(listed)
    assert bitwright("keys", "revoke", made["id"], "--data", tmp_path).returncode == 0
    assert bitwright("keys", "revoke", made["id"], "--data", tmp_path).returncode == 2
    assert not bitwright_json("keys", "list", "--data", tmp_path)[0]["in_use"]


def test_a_server_with_keys_asks_for_them_and_says_none_of_them(
    tmp_path: Path, models: Path
) -> None:
    key = bitwright_json("keys", "create", "me", "--data", tmp_path / "data")["key"]
    with served(tmp_path, models, "--keys", "--no-worker") as server:
        assert server.client.get("/v1/jobs").status_code == 401
        assert server.client.get("/v1/jobs", headers=bearer(key)).json()["data"] == []
        assert (
            server.client.get(
                "/v1/jobs", headers=bearer(key) | {"Host": "bitwright.example"}
            ).status_code
            == 200
        )
        assert server.client.get("/v1/jobs", headers=bearer(key + "x")).status_code == 401
        assert (
            server.client.post(
                "/v1/jobs", headers=bearer(key), json={"model": key, "budget": key}
            ).status_code
            == 422
        )
        assert key not in server.log


class Provider(HTTPServer):
    """A small OpenID Connect provider.

    Discovery and keys over HTTP, tokens signed with a real key.
    """

    def __init__(self) -> None:
        """Listen, with a new key."""
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        super().__init__(("127.0.0.1", 0), _ProviderAnswers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def issuer(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def token(self, **claims: Any) -> str:
        values = {
            "iss": self.issuer,
            "aud": "bitwright",
            "exp": time.time() + 60,
            "sub": "someone",
            "scope": "jobs:read",
            **claims,
        }
        return jwt.encode(
            {k: v for k, v in values.items() if v is not None},
            self.key,
            "RS256",
            headers={"kid": "1"},
        )


class _ProviderAnswers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        provider = self.server
        assert isinstance(provider, Provider)
        if self.path == "/keys":
            public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(provider.key.public_key()))
            document: dict[str, Any] = {
                "keys": [public | {"kid": "1", "use": "sig", "alg": "RS256"}]
            }
        else:
            document = {"issuer": provider.issuer, "jwks_uri": f"{provider.issuer}/keys"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    server = Provider()
    yield server
    server.shutdown()
    server.server_close()


def test_tokens_of_the_provider_are_taken_and_no_others(provider: Provider, tmp_path: Path) -> None:
    backend = backend_in(
        tmp_path, needs_key=True, oidc_issuer=provider.issuer, oidc_audience="bitwright"
    )
    client = TestClient(
        create_app(backend), base_url="http://localhost", raise_server_exceptions=False
    )

    def status(token: str, path: str = "/v1/jobs") -> int:
        return client.get(path, headers=bearer(token)).status_code

    assert status(provider.token()) == 200
    assert status(provider.token(), "/v1/profiles") == 403
    assert status(provider.token(scope="profiles:read nonsense"), "/v1/profiles") == 200
    for claims in (
        {"aud": "another"},
        {"iss": "https://example.com"},
        {"exp": time.time() - 120},
        {"exp": None},
        {"aud": None},
        {"sub": None},
    ):
        assert status(provider.token(**claims)) == 401, claims
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    claims = {
        "iss": provider.issuer,
        "aud": "bitwright",
        "exp": time.time() + 60,
        "sub": "x",
        "scope": "jobs:read",
    }
    assert status(jwt.encode(claims, stranger, "RS256", headers={"kid": "1"})) == 401
    assert status(jwt.encode(claims, None, "none")) == 401
    assert status(jwt.encode(claims, "x" * 32, "HS256", headers={"kid": "1"})) == 401
    job, _ = backend.job_service.submit(Submission("a team", {"model": "m", "budget": "3bpw"}))
    assert status(provider.token(tenant="a team"), f"/v1/jobs/{job.id}") == 200
    assert status(provider.token(tenant="another"), f"/v1/jobs/{job.id}") == 404


def test_a_provider_needs_an_audience_and_https() -> None:
    with pytest.raises(RequestError, match="AUDIENCE"):
        OidcTokens("https://example.com", None)
    with pytest.raises(RequestError, match="https"):
        OidcTokens("http://example.com", "bitwright")
