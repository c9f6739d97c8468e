"""Promises about the images that can be kept without building them.

`docker/verify.sh` builds them and proves the rest.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from moto.server import ThreadedMotoServer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
TOOLS = Path(sys.executable).parent
TARGETS = ("api", "worker")
MODEL_LIBRARIES = {
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "gguf",
    "huggingface-hub",
    "cvxpy",
}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, and the stage that it belongs to; None before the first."""

    stage: str | None
    keyword: str
    value: str


def instructions() -> list[Instruction]:
    found, stage = [], None
    lines = [
        line
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        keyword, _, value = line.strip().partition(" ")
        if keyword == "FROM":
            stage = value.split()[2] if " AS " in value else value
        if keyword:
            found.append(Instruction(stage, keyword, value.strip()))
    return found


def base_of(stage: str) -> str:
    return next(
        each.value.split()[0]
        for each in instructions()
        if each.keyword == "FROM" and each.stage == stage
    )


def last(stage: str, keyword: str) -> str | None:
    """Return what an image has of an instruction, its base's if it has none of its own."""
    stages = {each.stage for each in instructions()}
    values = [
        each.value for each in instructions() if each.stage == stage and each.keyword == keyword
    ]
    if values:
        return values[-1]
    return last(base_of(stage), keyword) if base_of(stage) in stages else None


def requirements() -> list[str]:
    lines = (
        line.partition("#")[0].strip()
        for line in (DOCKER / "api-requirements.txt").read_text().splitlines()
    )
    return [line for line in lines if line]


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        [TOOLS / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_compose_file_passes_its_schema() -> None:
    command = [
        TOOLS / "check-jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        DOCKER / "compose.yaml",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_bases_are_stages_or_pinned_arguments() -> None:
    defaults = dict(
        each.value.split("=", 1)
        for each in instructions()
        if each.keyword == "ARG" and each.stage is None
    )
    stages = {each.stage for each in instructions()}
    assert {*TARGETS} <= stages
    for each in instructions():
        if each.keyword == "FROM":
            base = each.value.split()[0]
            image = defaults[base[2:-1]] if base.startswith("${") else base
            assert image in stages or re.fullmatch(
                r"\S+:(?!latest$)[\w.-]+(@sha256:[0-9a-f]{64})?", image
            ), image


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_one_who_is_not_root(target: str) -> None:
    assert last(target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keyword", ["ENTRYPOINT", "CMD", "HEALTHCHECK"])
def test_images_start_programs_without_a_shell(target: str, keyword: str) -> None:
    value = last(target, keyword)
    assert value is not None
    words = json.loads(value.rpartition("CMD ")[2] if keyword == "HEALTHCHECK" else value)
    assert words
    assert all(isinstance(word, str) for word in words)


@pytest.mark.parametrize("target", TARGETS)
def test_images_write_to_data_only(target: str) -> None:
    environment = dict(pair.split("=", 1) for pair in (last("base", "ENV") or "").split())
    for name in (
        "HOME",
        "HF_HOME",
        "TRITON_CACHE_DIR",
        "BITWRIGHT_DATA",
        "BITWRIGHT_CACHE",
        "BITWRIGHT_ARTIFACTS",
    ):
        assert environment[name].startswith("/data/"), name
    assert last(target, "WORKDIR") == "/data"
    assert last(target, "STOPSIGNAL") == "SIGTERM"


def test_what_is_copied_is_let_through_to_the_builder() -> None:
    let_through = {
        line[1:]
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copies = [each.value.split() for each in instructions() if each.keyword == "COPY"]
    sources = {
        source for words in copies if not words[0].startswith("--from") for source in words[:-1]
    }
    assert sources == let_through
    assert all((ROOT / source).exists() for source in sources)


def test_requirements_of_the_api_are_among_the_projects_and_need_no_model() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(requirements()) <= set(project["dependencies"])
    assert not MODEL_LIBRARIES & {canonicalize_name(name) for name in closure(requirements())}


def closure(lines: list[str]) -> set[str]:
    """Return the distributions that the requirements bring, as canonical names."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in lines]
    while waiting:
        requirement, wanted_for = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": wanted_for}):
            continue
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in found:
                found.add(key)
                needed = importlib.metadata.requires(requirement.name) or []
                waiting += [(Requirement(line), extra) for line in needed]
    return {name for name, _ in found}


IMPORT_WITHOUT = """
import importlib, json, sys
absent, modules = map(set, json.loads(sys.argv[1]))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)
sys.meta_path.insert(0, Absent())
for module in sorted(modules):
    importlib.import_module(module)
"""


def import_with_only(lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Import what runs in the API's image in a process that finds its requirements only."""
    installed = closure(lines) | {"bitwright", "coverage"}
    absent = [
        package
        for package, distributions in importlib.metadata.packages_distributions().items()
        if not installed & {canonicalize_name(name) for name in distributions}
    ]
    modules = [
        "service.cli.main",
        "service.api.server",
        *(f"service.api.{path.stem}" for path in (ROOT / "service/api").glob("[!_]*.py")),
    ]
    command = [sys.executable, "-c", IMPORT_WITHOUT, json.dumps([absent, modules])]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_requirements_of_the_api_cover_all_that_it_imports() -> None:
    done = import_with_only(requirements())
    assert done.returncode == 0, done.stderr


def test_a_requirement_that_is_missing_would_be_noticed() -> None:
    done = import_with_only([line for line in requirements() if not line.startswith("osqp")])
    assert "osqp is not in the image" in done.stderr


@pytest.mark.parametrize("name", compose()["services"])
def test_services_of_the_compose_file_are_guarded(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert any(place.startswith("/tmp") for place in service["tmpfs"])  # noqa: S108
    assert "healthcheck" in service or {"api", "worker"} & {service["build"]["target"]}
    assert "privileged" not in service
    assert re.search(r":(?!latest$)\S+$", service["image"]) or "build" in service


@pytest.mark.parametrize("name", compose()["services"])
def test_secrets_are_files(name: str) -> None:
    document = compose()
    service = document["services"][name]
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|SECRET|TOKEN|CREDENTIALS|DATABASE_URL", variable):
            assert value.removeprefix("/run/secrets/") in service["secrets"]
    assert set(service.get("secrets", [])) <= set(document["secrets"])
    assert all(secret["file"].startswith("secrets/") for secret in document["secrets"].values())
    assert "secrets/" in (DOCKER / ".gitignore").read_text().splitlines()


def test_secrets_are_random_agree_and_are_never_replaced(tmp_path: Path) -> None:
    def make(folder: Path) -> tuple[int, dict[str, str]]:
        done = subprocess.run(
            [DOCKER / "make-secrets.sh", folder], capture_output=True, check=False
        )
        return done.returncode, {path.name: path.read_text() for path in folder.iterdir()}

    code, first = make(tmp_path / "a")
    assert code == 0
    assert {f"secrets/{name}" for name in first} == {
        secret["file"] for secret in compose()["secrets"].values()
    }
    assert f":{first['postgres_password']}@postgres:5432/" in first["database_url"]
    credentials = json.loads(first["s3_identities.json"])["identities"][0]["credentials"][0]
    assert f"= {credentials['accessKey']}\n" in first["s3_credentials"]
    assert f"= {credentials['secretKey']}\n" in first["s3_credentials"]
    assert len(first["postgres_password"]) == len(credentials["secretKey"]) == 48
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert make(tmp_path / "a") == (2, first)
    assert make(tmp_path / "b")[1]["postgres_password"] != first["postgres_password"]


def test_pip_inside_a_build_is_told_what_the_host_tells_it(tmp_path: Path) -> None:
    (tmp_path / "simple").mkdir()
    (tmp_path / "ca.crt").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ca.crt").touch()
    (tmp_path / "host.conf").write_text(
        f"[global]\ncert = {tmp_path}/ca.crt\nextra-index-url =\n  file://{tmp_path}/simple\n  "
        "http://127.0.0.1/a\nretries = 3\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nowhere",
        "PIP_CONFIG_FILE": str(tmp_path / "host.conf"),
        "PIP_RETRIES": "7",
    }
    subprocess.run(
        [sys.executable, DOCKER / "verify_pip.py", tmp_path / "out"], env=environment, check=True
    )
    written = dict(
        line.split(" = ") for line in (tmp_path / "out" / "pip.conf").read_text().splitlines()[1:]
    )
    assert written["extra-index-url"] == f"file://{tmp_path}/simple http://127.0.0.1/a"
    assert written["cert"] == "/run/secrets/ca.crt"
    assert written["retries"] == "7"
    assert str(tmp_path) in (tmp_path / "out" / "volumes").read_text().splitlines()


def test_scripts_are_bash_and_name_no_host() -> None:
    for script in sorted(DOCKER.glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)  # noqa: S607
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text()
        hosts = re.findall(r"\w+://([^/\s\"':]+)", script.read_text())
        assert set(hosts) <= {"127.0.0.1", "bitwright"}, script


def test_the_bucket_is_made_with_the_secrets_and_the_environment_of_the_compose_file(
    tmp_path: Path,
) -> None:
    subprocess.run(
        [DOCKER / "make-secrets.sh", tmp_path / "secrets"], capture_output=True, check=True
    )
    service = compose()["services"]["bucket"]
    assert service["entrypoint"] == ["python", "-c"]
    told = {
        name: value for name, value in service["environment"].items() if name.startswith("AWS_")
    }
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        paths = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "secrets" / "s3_credentials")}
        environment = {
            "PATH": os.environ["PATH"],
            **told,
            **paths,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }
        for code in (
            *service["command"],
            *service["command"],
            "import s3fs; print(s3fs.S3FileSystem().ls(''))",
        ):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        assert done.stdout == "['bitwright']\n"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def health() -> ModuleType:
    """The module that the images' health checks run."""
    spec = importlib.util.spec_from_file_location("health", DOCKER / "health.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers everything with a status; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/healthz"
        server.shutdown()
        thread.join()


def test_the_api_is_well_while_it_answers(health: ModuleType) -> None:
    with answering(200) as url:
        assert health.api_trouble(url) is None
    assert "refused" in health.api_trouble(url)
    with answering(503) as url:
        assert "503" in health.api_trouble(url)


@pytest.fixture(params=["bitwright", "service.cli.main"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a worker's."""
    program = tmp_path / request.param
    program.write_text("import time\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, program, "worker"]) as process:
        yield process
        process.kill()


def test_a_worker_is_well_while_it_runs_and_can_write(
    health: ModuleType, tmp_path: Path, worker: subprocess.Popen[bytes]
) -> None:
    processes = tmp_path / "proc"
    processes.mkdir()
    (processes / str(worker.pid)).symlink_to(f"/proc/{worker.pid}")
    wait_for(lambda: health.worker_trouble(tmp_path / "new" / "data", processes), None)
    assert "nothing can be written" in health.worker_trouble(Path("/proc/data"), processes)

    absent = "no process `bitwright worker` is running"
    worker.send_signal(signal.SIGSTOP)
    wait_for(lambda: health.worker_trouble(tmp_path, processes), absent)
    worker.send_signal(signal.SIGCONT)
    wait_for(lambda: health.worker_trouble(tmp_path, processes), None)
    worker.kill()
    wait_for(lambda: health.worker_trouble(tmp_path, processes), absent)


def wait_for(ask: Callable[[], str | None], answer: str | None) -> None:
    """Ask until the answer comes, for a second at most.

    A process takes a moment to start, and a signal to arrive.
    """
    end = time.monotonic() + 1
    while (told := ask()) != answer and time.monotonic() < end:
        time.sleep(0.01)
    assert told == answer


def test_health_tells_by_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, DOCKER / "health.py", "worker"]
    environment = {**os.environ, "BITWRIGHT_DATA": "/proc/data"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_health_loads_the_standard_library_only() -> None:
    imported = re.findall(
        r"^(?:import|from) (\w+)", (DOCKER / "health.py").read_text(), re.MULTILINE
    )
    assert set(imported) <= sys.stdlib_module_names
